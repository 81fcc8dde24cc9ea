"""Timing, memory and tables of the benchmarks."""

import itertools
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity

Record = dict[str, str | int | float | None]

# Heading, key of the record and factor.
COLUMNS = {
    "variant": ("variant", 1.0),
    "forward ms": ("forward_p50_ms", 1.0),
    "backward ms": ("backward_p50_ms", 1.0),
    "both p20": ("both_p20_ms", 1.0),
    "p50": ("both_p50_ms", 1.0),
    "p80": ("both_p80_ms", 1.0),
    "ratio": ("ratio", 1.0),
    "GFLOP/s": ("gflops_per_s", 1.0),
    "saved MB": ("saved_mb", 1.0),
    "peak MB": ("peak_mb", 1.0),
}


@dataclass(frozen=True)
class Case:
    """Variants of one computation at one size.

    Attributes:
        op: name of the operator.
        size: name of the size and its numbers.
        variants: by name, what to run; the first is the baseline of the ratios.
        inputs: tensors of which gradients are taken; empty if there is no backward.
        flops: floating-point operations of the mathematics, forward and backward.
        parity: by name, the same computations without randomness, if ``variants`` are random.
        tolerance: largest difference of any variant's output to the baseline's, relative to its largest entry.
    """

    op: str
    size: str
    variants: Mapping[str, Callable[[], Tensor]]
    inputs: Sequence[Tensor] = ()
    flops: tuple[float, float] = (0.0, 0.0)
    parity: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)
    tolerance: float = 1e-4


def run(case: Case, repeats: int = 7) -> list[Record]:
    """Check the variants against the baseline, then time them in turn, so that drift of the machine hits all alike.

    Args:
        case: what to measure.
        repeats: rounds; the medians are over these.

    Returns:
        one record for each variant.

    Raises:
        AssertionError: a variant computes something else.
    """
    _check_parity(case)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in case.variants}
    for variant in case.variants.values():
        _time(case, variant)
    for _ in range(repeats):
        for name, variant in case.variants.items():
            seconds[name].append(_time(case, variant))
    baseline = statistics.median(map(sum, seconds[next(iter(case.variants))]))
    return [_record(case, name, seconds[name], baseline) for name in case.variants]


def _check_parity(case: Case) -> None:
    computations = case.parity or case.variants
    with torch.no_grad():
        outputs = {name: computation() for name, computation in computations.items()}
    baseline, expected = next(iter(outputs.items()))
    for name, output in outputs.items():
        error = ((output - expected).abs().max() / expected.abs().max()).item()
        assert error <= case.tolerance, f"{case.op} {case.size}: {name} differs from {baseline} by {error:.1e}"


def _time(case: Case, variant: Callable[[], Tensor]) -> tuple[float, float]:
    """Seconds of forward and of backward."""
    start = now()
    output = variant()
    middle = now()
    if case.inputs:
        torch.autograd.grad(output, case.inputs, torch.ones_like(output))
    return middle - start, now() - middle


def now() -> float:
    """Seconds on a clock that waits for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _record(case: Case, name: str, seconds: list[tuple[float, float]], baseline: float) -> Record:
    forward, backward = ([pair[i] for pair in seconds] for i in range(2))
    both = [sum(pair) for pair in seconds]
    record: Record = {"op": case.op, "size": case.size, "variant": name}
    for part, values in (("forward", forward), ("backward", backward), ("both", both)):
        for percent in (20, 50, 80):
            record[f"{part}_p{percent}_ms"] = 1e3 * percentile(values, percent)
    record["ratio"] = statistics.median(both) / baseline
    record["gflops_per_s"] = sum(case.flops) / statistics.median(both) / 1e9
    variant = case.variants[name]
    record["saved_mb"] = saved_bytes(variant) / 1e6 if case.inputs else 0.0
    record["peak_mb"] = peak_bytes(lambda: _time(case, variant)) / 1e6
    return record


def percentile(values: Sequence[float], percent: int) -> float:
    """The value that ``percent`` of the values do not exceed."""
    return sorted(values)[round(percent / 100 * (len(values) - 1))]


def saved_bytes(forward: Callable[[], Tensor], beyond: Iterable[Tensor] = ()) -> int:
    """Bytes of all distinct storages that ``forward`` keeps for backward, without those of the tensors ``beyond``."""
    storages: dict[int, int] = {}
    kept = []  # a freed storage could give its identity to another
    known = {_storage_id(x) for x in beyond}

    def pack(x: Tensor) -> Tensor:
        kept.append(x)
        if _storage_id(x) not in known:
            storages[_storage_id(x)] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        forward()
    return sum(storages.values())


def _storage_id(x: Tensor) -> int:
    return x.untyped_storage()._cdata  # unlike its address, also told of fake tensors


def peak_bytes(run_once: Callable[[], object]) -> float:
    """Bytes of tensors that a computation needs at once, beyond what was held before."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run_once()
        return float(torch.cuda.max_memory_allocated() - before)
    # The resident memory of the process would depend on what malloc happens to keep.
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profile:
        run_once()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return float(max(itertools.accumulate(changes), default=0))


def conditions() -> str:
    """Device, threads, versions and date of a run, for the head of its tables."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"CPU {_cpu_name()}, {torch.get_num_threads()} threads"
    return f"{device}; torch {torch.__version__}, Python {platform.python_version()}; {datetime.now(UTC):%Y-%m-%d}"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def table(records: Sequence[Record], columns: Mapping[str, tuple[str, float]]) -> str:
    """A Markdown table of records; ``columns`` give a heading, the key of its cells and a factor for numbers."""
    lines = ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    for record in records:
        cells = [(record[key], factor) for key, factor in columns.values()]
        lines.append("| " + " | ".join(_cell(value, factor) for value, factor in cells) + " |")
    return "\n".join(lines)


def _cell(value: str | float | None, factor: float) -> str:
    if isinstance(value, int | float) and not (isinstance(value, int) and factor == 1):
        return f"{value * factor:.2f}"
    return str(value)
