"""The least time of a kernel's launch, from its arithmetic and published rates, for GPUs that need not be there."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from bench.gpus import GPUS
from bench.launches import Call

# On every device here an SM or CU takes so many exponentials and integer operations in a clock.
_EXPONENTIALS = 16
_INTEGERS = 64
# For each entry of a map: two exclusive ors, two multiplications, a shift, a comparison and a selection.
_DROPOUT_INTEGERS = 7


class Arithmetic(NamedTuple):
    """FLOPs of products (or of the interpolation that takes their place), exponentials, integer operations."""

    flops: float = 0.0
    exponentials: float = 0.0
    integers: float = 0.0


class Work(NamedTuple):
    """What one launch has to do.

    Attributes:
        arithmetic: its operations.
        half: whether products are of half precision.
        moved: bytes of its tensors, each read or written once.
    """

    arithmetic: Arithmetic
    half: bool
    moved: float

    def bound(self, device: str) -> tuple[str, float]:
        """What takes longest at the peaks of ``device``, and how many seconds."""
        peaks = GPUS[device].peaks
        seconds = {
            "products": self.arithmetic.flops / (peaks.half if self.half else peaks.single),
            "exponentials": self.arithmetic.exponentials / (_EXPONENTIALS * peaks.processor_clocks),
            "integers": self.arithmetic.integers / (_INTEGERS * peaks.processor_clocks),
            "memory": self.moved / peaks.bytes,
        }
        slowest = max(seconds, key=lambda part: seconds[part])
        return slowest, seconds[slowest]


def work_of(kernel: str, call: Call) -> Work:
    """The work of a launch, by the kernel's name; its tensors may be fake."""
    arithmetic = _ARITHMETIC.get(kernel, lambda _: Arithmetic())(call)
    tensors = [x for x in call.arguments.values() if isinstance(x, Tensor | TensorDescriptor)]
    half = kernel in _PRODUCTS and next(x.dtype for x in tensors if isinstance(x, Tensor)) != torch.float32
    return Work(arithmetic, half, sum(_bytes(x, call.arguments) for x in tensors))


def _bytes(x: Tensor | TensorDescriptor, arguments: Mapping[str, Any]) -> float:
    if isinstance(x, TensorDescriptor):  # several cover the tokens of one tensor
        return x.base.nbytes * x.block_shape[1] / sum(arguments["CHUNKS"])
    chunked = "start" in arguments and x.ndim == 3 and x.shape[2] == arguments["L"]
    return x.nbytes * min(arguments["W"] / arguments["L"], 1.0) if chunked else x.nbytes


def _map(call: Call, columns: int, products: int) -> Arithmetic:
    """A softmax, with dropout or without, of so many columns of the attention map, and products of its size."""
    entries = float(call.arguments["scale"].shape[0] * call.arguments["R"] * columns)
    integers = 0.0 if call.arguments["seed"] is None else _DROPOUT_INTEGERS * entries
    return Arithmetic(2 * products * entries * call.arguments["N"], entries, integers)


def _probability(call: Call) -> Arithmetic:
    return _map(call, call.grid[1] * call.arguments["BLOCK_L"], products=1)


def _merge(call: Call) -> Arithmetic:
    maps, rows, width = call.arguments["probability"].shape
    return Arithmetic(2.0 * maps * rows * width * call.arguments["N"], float(maps * rows * call.arguments["tiles"]))


def _gradient(call: Call) -> Arithmetic:
    return _map(call, call.grid[1] * call.arguments["BLOCK_L"], products=2)


def _one_pass(call: Call) -> Arithmetic:
    return _map(call, call.arguments["L"], products=2)


def _grouping(call: Call) -> Arithmetic:
    return Arithmetic(2.0 * call.arguments["features"].numel() * call.arguments["K"])


def _upsampled(call: Call) -> Arithmetic:
    """Three interpolations, and an exponential, for every class of a pixel."""
    entries = float(call.arguments["logits"].shape[0] * math.prod(call.arguments[x] for x in "KHW"))
    return Arithmetic(6 * entries, entries)


def _upsampled_backward(call: Call) -> Arithmetic:
    """Each cell gathers from all pixels that it is part of, so a pixel is computed four times."""
    once = _upsampled(call)
    return Arithmetic(4 * once.flops, 4 * once.exponentials)


def _depthwise(call: Call, *, passes: int, exponentials: int) -> Arithmetic:
    """Products with the nine weights of a channel, for every token."""
    entries = float(call.arguments["h"] * call.arguments["w"] * call.arguments["C"] * call.grid[2])
    return Arithmetic(18 * passes * entries, exponentials * entries)


_PRODUCTS = {"probability", "merge", "gradient", "one_pass"}
_ARITHMETIC: dict[str, Callable[[Call], Arithmetic]] = {
    "probability": _probability,
    "merge": _merge,
    "gradient": _gradient,
    "one_pass": _one_pass,
    "grouping": _grouping,
    "cross_entropy": _upsampled,
    "cross_entropy_backward": _upsampled_backward,
    "argmax": _upsampled,
    "depthwise_gelu": functools.partial(_depthwise, passes=1, exponentials=1),
    "depthwise_gelu_backward": functools.partial(_depthwise, passes=2, exponentials=2),
    "depthwise_transposed": functools.partial(_depthwise, passes=1, exponentials=0),
}
