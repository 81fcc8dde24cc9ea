"""What the device at hand reaches: the rate of a large matrix product, and of a copy."""

import functools
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch

from bench.clock import give_head_start, seconds_between, stamp

_ROUNDS = 7


class Rates(NamedTuple):
    """Floating-point operations and bytes (read and written) in a second."""

    flops: float
    bytes: float

    def seconds(self, flops: float, moved: float) -> float:
        """The least time for so much work, if products and memory traffic overlap: the roofline."""
        return max(flops / self.flops, moved / self.bytes)


@functools.cache
def device_rates(dtype: torch.dtype) -> Rates:
    """Medians of seven rounds on the device that the benchmarks use, once in a process."""
    cuda = torch.cuda.is_available()
    device, side, copied = ("cuda", 8192, 1 << 30) if cuda else ("cpu", 1024, 1 << 27)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Rates(2 * side**3 / _seconds(lambda: a @ b), 2 * copied / _seconds(lambda: target.copy_(source)))


def _seconds(run: Callable[[], object]) -> float:
    run()
    seconds = []
    for _ in range(_ROUNDS):
        give_head_start()
        start = stamp()
        run()
        seconds.append(seconds_between(start, stamp()))
    return statistics.median(seconds)
