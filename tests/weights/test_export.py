import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from allspark_fast.errors import InputError, RunError
from allspark_fast.weights import export
from allspark_fast.weights.export import MIN_SIDE, PixelsToLogits
from allspark_fast.weights.spec import ModelSpec, load_model
from tests.helpers.runs import differences

SIZES = [(1, MIN_SIDE, MIN_SIDE), (1, 97, 130), (3, 130, 97), (2, 200, 64)]


def expected_logits(weights: Path, pixels: torch.Tensor) -> torch.Tensor:
    """By the fast operators, from pixels in 0..1."""
    model, spec = load_model(weights)
    images = (pixels - torch.tensor(spec.mean)[:, None, None]) / torch.tensor(spec.std)[:, None, None]
    with torch.no_grad():
        return F.interpolate(model(images), pixels.shape[2:], mode="bilinear", align_corners=False)


def assert_close(logits: torch.Tensor, expected: torch.Tensor) -> None:
    assert (logits.shape, logits.dtype) == (expected.shape, expected.dtype)
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()


def load_pt2(path: Path) -> tuple[Callable[[torch.Tensor], torch.Tensor], str]:
    extra = {"model.json": ""}
    program = torch.export.load(path, extra_files=extra)
    assert not [node for node in program.graph.nodes if "allspark_fast" in str(node.target)]
    return program.module(), extra["model.json"]


def load_onnx(path: Path) -> tuple[Callable[[torch.Tensor], torch.Tensor], str]:
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra export")
    session = onnxruntime.InferenceSession(path)
    assert [(x.name, x.shape) for x in session.get_inputs()] == [("images", ["batch", 3, "height", "width"])]
    text = session.get_modelmeta().custom_metadata_map["allspark_fast"]
    return lambda pixels: torch.from_numpy(session.run(["logits"], {"images": pixels.numpy()})[0]), text


@pytest.mark.slow
@pytest.mark.parametrize(("name", "load"), [("model.pt2", load_pt2), ("model.onnx", load_onnx)])
def test_graphs(weights, name, load, tmp_path, command):
    assert f"{name}: largest error of the logits" in command("export", weights, tmp_path / name)
    program, text = load(tmp_path / name)
    assert ModelSpec.from_json(text, tmp_path) == load_model(weights)[1]
    for batch, height, width in SIZES:
        pixels = torch.rand(batch, 3, height, width)
        assert_close(program(pixels), expected_logits(weights, pixels))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.pt2", "model.onnx"])
def test_an_encoder_of_timm(tiny_spec, tmp_path, name):
    """With TensorFlow's padding, which in timm depends on the size of each map."""
    pytest.importorskip("timm", reason="needs the extra timm")
    spec = replace(tiny_spec, backbone="timm/tf_mobilenetv3_small_minimal_100")
    assert export.export_model(spec.build().eval(), spec, tmp_path / name) <= 1e-4
    assert (tmp_path / name).is_file()


def test_plain_operators_compute_the_same_and_leave_the_model_alone(weights):
    model, spec = load_model(weights)
    before = copy.deepcopy(model.state_dict())
    pixels = torch.rand(2, 3, 70, 97)
    with torch.no_grad():
        assert_close(PixelsToLogits(model, spec)(pixels), expected_logits(weights, pixels))
    assert model.decoder.allspark.attn.backend == "auto"
    assert differences(model.state_dict(), before) == []


def test_a_graph_that_differs_is_refused(weights):
    module = PixelsToLogits(*load_model(weights)).eval()
    assert export.largest_error(module, module, Path("model.pt2")) == 0
    for wrong in (lambda x: module(x) * 1.001, lambda x: module(x) * torch.nan):
        with pytest.raises(RunError, match=r"model\.pt2: not written"):
            export.largest_error(wrong, module, Path("model.pt2"))


def test_what_cannot_be_exported_is_told(weights, tiny_spec, command, monkeypatch):
    with pytest.raises(InputError, match="Swin cannot be exported"):
        export.export_model(nn.Identity(), replace(tiny_spec, backbone="timm/swinv2_tiny_window8_256"), Path("x.pt2"))
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    printed = command("export", weights, weights.with_suffix(".onnx"), status=1)
    assert "onnxruntime: pip install 'allspark-fast[export]'" in printed
