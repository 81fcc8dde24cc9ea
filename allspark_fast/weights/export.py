"""A trained model as one graph of plain operators, by torch.export or as ONNX."""

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

from allspark_fast.errors import InputError, MissingPackageError, RunError
from allspark_fast.files import write_atomically
from allspark_fast.model import Segmentor
from allspark_fast.model.mit import STRIDES
from allspark_fast.weights.spec import ModelSpec

# torch.export takes a dimension of size 1 for a constant, so all maps must be at least two wide.
MIN_SIDE = 2 * STRIDES[-1]
# Traced with sides that differ, so that the graph does not assume equal ones.
_TRACED = (2, 3, 96, 128)
_CHECKED = ((1, 3, MIN_SIDE, 97), (3, 3, 128, MIN_SIDE))
_TOLERANCE = 1e-4


class PixelsToLogits(nn.Module):
    """What is exported: images in 0..1 to logits at their size; the memory, which serves training only, is left out."""

    def __init__(self, model: Segmentor, spec: ModelSpec) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        if self.model.decoder.allspark is not None:
            attention = self.model.decoder.allspark.attn
            attention.backend = "reference"
            attention.kv_queue = attention.kv_queue.new_empty(0)
        self.mean, self.std = (nn.Buffer(torch.tensor(x)[:, None, None]) for x in (spec.mean, spec.std))

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, 3, H, W) float32 RGB in 0..1 to logits (B, K, H, W)."""
        logits = self.model((images - self.mean) / self.std)
        return F.interpolate(logits, images.shape[2:], mode="bilinear", align_corners=False)


def export_model(model: Segmentor, spec: ModelSpec, path: Path) -> float:
    """Write a model as one graph, for any batch and any image of at least MIN_SIDE pixels a side.

    Its input ``images`` is (B, 3, H, W) float32, RGB in 0..1, not normalized; its output ``logits`` (B, K, H, W), of
    which the argmax over K is the label. What ``ModelSpec.to_json`` says travels with it: as the extra file
    ``model.json`` in ``.pt2``, as the metadata ``allspark_fast`` in ``.onnx``.
    ``model`` and ``spec`` are those of ``load_model``. Returns the largest error of the logits, relative to
    the largest logit, at some batches and sizes.

    Raises:
        InputError: the suffix is another, or the encoder is a Swin.
        MissingPackageError: a package for ONNX is not installed.
        RunError: the graph computes something else than the model; nothing is written.
    """
    if path.suffix not in (".pt2", ".onnx"):
        raise InputError(f"{path}: a graph is written to .pt2 or .onnx; `convert` writes weights")
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if path.suffix == ".onnx" and missing:
        raise MissingPackageError(f"ONNX needs {', '.join(missing)}: pip install 'allspark-fast[export]'")
    if "swin" in spec.backbone:
        # Its windows' sizes depend on the image's: tracing did not end within five minutes (torch 2.14).
        raise InputError(f"{spec.backbone}: Swin cannot be exported, torch.export does not end")
    module = PixelsToLogits(model, spec).eval()
    sizes: dict[int, object] = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    with torch.no_grad():
        program = torch.export.export(module, (torch.rand(_TRACED),), dynamic_shapes={"images": sizes})
    if path.suffix == ".pt2":
        error = largest_error(program.module(), module, path)
        extra = {"model.json": spec.to_json()}
        write_atomically(path, lambda temporary: torch.export.save(program, temporary, extra_files=extra))
        return error
    runtime = importlib.import_module("onnxruntime")
    onnx: Any = torch.onnx.export(program, input_names=["images"], output_names=["logits"], dynamo=True, verbose=False)
    shape = onnx.model.graph.inputs[0].shape
    onnx.rename_axes({str(shape[axis]): name for axis, name in ((0, "batch"), (2, "height"), (3, "width"))})
    onnx.model.metadata_props["allspark_fast"] = spec.to_json()
    session = runtime.InferenceSession(onnx.model_proto.SerializeToString())
    error = largest_error(lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0]), module, path)
    write_atomically(path, onnx.save)
    return error


@torch.no_grad()
def largest_error(program: Callable[[Tensor], Tensor], module: nn.Module, path: Path) -> float:
    """Return the largest difference of logits, relative to the largest one; RunError if it is more than rounding."""
    errors = []
    for size in _CHECKED:
        images = torch.rand(size)
        expected = module(images)
        errors.append(((program(images) - expected).abs().max() / expected.abs().max()).item())
    if not all(error <= _TOLERANCE for error in errors):  # a NaN, too
        raise RunError(f"{path}: not written, its logits would differ from the model's by {max(errors):.1e}")
    return max(errors)
