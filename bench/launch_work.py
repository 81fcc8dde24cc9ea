"""The least time of a kernel's launch, from its arithmetic and published rates, for GPUs that need not be there."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

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
        moved: bytes of its tensors, each read or written once.
    """

    arithmetic: Arithmetic
    moved: float

    def bound(self, device: str) -> tuple[str, float]:
        """What takes longest at the peaks of ``device``, and how many seconds."""
        peaks = GPUS[device].peaks
        seconds = {
            "products": self.arithmetic.flops / peaks.single,
            "exponentials": self.arithmetic.exponentials / (_EXPONENTIALS * peaks.processor_clocks),
            "integers": self.arithmetic.integers / (_INTEGERS * peaks.processor_clocks),
            "memory": self.moved / peaks.bytes,
        }
        slowest = max(seconds, key=lambda part: seconds[part])
        return slowest, seconds[slowest]


def work_of(kernel: str, call: Call) -> Work:
    """The work of a launch, by the kernel's name; its tensors may be fake."""
    arithmetic = _ARITHMETIC.get(kernel, lambda _: Arithmetic())(call)
    return Work(arithmetic, sum(x.nbytes for x in call.arguments.values() if isinstance(x, Tensor)))


def _rows(call: Call) -> Arithmetic:
    """An exponential, with dropout or without, for every entry of the attention map."""
    entries = float(call.arguments["logits"].numel())
    return Arithmetic(0.0, entries, 0.0 if call.arguments["row_key"] is None else _DROPOUT_INTEGERS * entries)


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


_ARITHMETIC: dict[str, Callable[[Call], Arithmetic]] = {
    "softmax": _rows,
    "row_sums": _rows,
    "gradient": _rows,
    "grouping": _grouping,
    "cross_entropy": _upsampled,
    "cross_entropy_backward": _upsampled_backward,
    "argmax": _upsampled,
    "depthwise_gelu": functools.partial(_depthwise, passes=1, exponentials=1),
    "depthwise_gelu_backward": functools.partial(_depthwise, passes=2, exponentials=2),
    "depthwise_transposed": functools.partial(_depthwise, passes=1, exponentials=0),
}
