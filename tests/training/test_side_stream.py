"""The order in which two streams wait for each other; tests/training/test_cuda_graph.py: what they share."""

from contextlib import contextmanager
from unittest.mock import Mock

import pytest
import torch

from allspark_fast.model import build_segmentor
from allspark_fast.training.side_stream import beside_encoder, may_be_beside
from tests.helpers.steps import build_state, random_batch


@pytest.mark.parametrize("recorded", [True, False])
def test_the_decoder_waits_for_what_runs_beside_the_encoder(recorded, monkeypatch):
    """Once, in a recorded step; other steps have one stream."""
    did, model, images = [], build_state().model.eval(), random_batch().image

    @contextmanager
    def on(_):
        did.append("leave")
        yield
        did.append("return")

    main, side = Mock(), Mock()
    side.wait_stream.side_effect = lambda x: did.append("fork" if x is main else x)
    main.wait_stream.side_effect = lambda x: did.append("join" if x is side else x)
    replaced = {"is_initialized": lambda: True, "is_current_stream_capturing": lambda: recorded}
    for name, value in {**replaced, "current_stream": lambda: main, "Stream": lambda _: side, "stream": on}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    model.backbone.register_forward_hook(lambda *_: did.append("encoded"))
    model.decoder.register_forward_hook(lambda *_: did.append("decoded"))
    with beside_encoder(model):
        did.append("label")
    for _ in range(2):
        model(images)
    once = ["fork", "leave", "label", "return", "encoded", "join", "decoded"]
    assert did == [*(once if recorded else ["label", "encoded", "decoded"]), "encoded", "decoded"]


def test_encoders_with_statistics_stand_alone():
    pytest.importorskip("timm", reason="needs the extra timm")
    assert not may_be_beside(build_segmentor("timm/test_efficientnet", 3, (64, 64), embedding_dim=16))
