"""Weights to start from know the names of their classes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from allspark_fast.errors import InputError
from allspark_fast.weights.files import load_weights, save_weights
from allspark_fast.weights.spec import ModelSpec, load_model

BIAS, POINTERS = "decoder.decoder.linear_pred.bias", "decoder.allspark.attn.queue_ptr"


def test_another_order_is_matched_by_name(
    weights: Path, tiny_spec: ModelSpec, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    known, target, images = load_model(weights)[0], tiny_spec.build().eval(), torch.rand(1, 3, 64, 64)
    load_weights(target, weights, info=tiny_spec.info)
    assert not caplog.text
    load_weights(target, weights, info=replace(tiny_spec.info, classes=("plum", "apple", "pear")))
    assert "another order, and are matched by name" in caplog.text
    save_weights(known, weights.with_name("a.pth"))
    load_weights(tiny_spec.build(), weights.with_name("a.pth"), info=tiny_spec.info)
    assert "a.pth does not name its classes: they count as those of the data, in the same order" in caplog.text
    torch.testing.assert_close(target(images), known(images)[:, [2, 0, 1]])
    queue, expected = (model.decoder.allspark.attn.kv_queue for model in (target, known))
    assert torch.equal(queue, expected[[2, 0, 1]])


@pytest.mark.parametrize("classes", [("apple", "pear", "fig"), ("apple", "pear")])
def test_other_names_are_refused_or_start_afresh(
    weights: Path, tiny_spec: ModelSpec, classes: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    info = replace(tiny_spec.info, classes=classes)
    target = replace(tiny_spec, info=info).build()
    before = target.decoder.decoder.linear_pred.bias.clone()
    with pytest.raises(InputError, match=rf"are apple, pear, plum, but .* {classes[-1]}: .* --model.reset True"):
        load_weights(target, weights, info=info)
    caplog.set_level("INFO")
    assert {BIAS, POINTERS} <= {*load_weights(target, weights, info=info, reset=True).fresh}
    assert torch.equal(target.decoder.decoder.linear_pred.bias, before)
    assert "start afresh, because its classes are others" in caplog.text
