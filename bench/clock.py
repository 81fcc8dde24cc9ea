"""The clocks of the benchmarks."""

import time

import torch


def now() -> float:
    """Seconds on a clock that waits for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


# About 10 ms at the clock rates of today's GPUs.
_HEAD_START_CYCLES = 20_000_000


def stamp() -> float | torch.cuda.Event:
    """A moment in the device's work, which is not waited for."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(before: float | torch.cuda.Event, after: float | torch.cuda.Event) -> float:
    """Seconds from one moment to the other, both from ``stamp``."""
    if isinstance(before, float) and isinstance(after, float):
        return after - before
    assert isinstance(before, torch.cuda.Event)
    assert isinstance(after, torch.cuda.Event)
    after.synchronize()
    return before.elapsed_time(after) / 1e3


def give_head_start() -> None:
    """Keep a GPU busy for a while, so that what follows is queued when its turn comes: launching is not timed then."""
    if torch.cuda.is_available():
        torch.cuda._sleep(_HEAD_START_CYCLES)
