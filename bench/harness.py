"""Timing, memory, parity and tables of the benchmarks."""

import functools
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity

Record = dict[str, str | int | float | None]
Moment = float | torch.cuda.Event

# Heading, key of the record and factor.
COLUMNS = {
    "variant": ("variant", 1.0),
    **{
        f"{part} {unit}": (f"{part}_{percent}_ms", 1.0)
        for part in ("forward", "backward", "both")
        for percent, unit in (("p20", "ms p20"), ("p50", "p50"), ("p80", "p80"))
    },
    "ratio": ("ratio", 1.0),
    "TFLOP/s": ("flops_per_s", 1e-12),
    "GB/s": ("bytes_per_s", 1e-9),
    "% of GEMM": ("gemm_fraction", 100.0),
    "saved MB": ("saved_mb", 1.0),
    "peak MB": ("peak_mb", 1.0),
}

# Why variants of these names cannot run on the device at hand.
UNAVAILABLE = (
    dict.fromkeys(("chunked", "vectorized"), "is for CPUs")
    if torch.cuda.is_available()
    else {"naive, compiled": "compiling takes a minute on a CPU, and gains little there", "triton": "needs a GPU"}
)
# About 10 ms at the clock rates of today's GPUs.
_HEAD_START_CYCLES = 20_000_000
_RATE_ROUNDS = 7


@dataclass(frozen=True)
class Case:
    """Variants of one computation at one size.

    Attributes:
        op: name of the operator.
        size: name of the size and its numbers.
        variants: by name, what to run; the first is the baseline of the ratios.
        inputs: tensors whose gradients are taken; empty if there is no backward pass.
        comparators: names of variants that may refuse the size or device: their cells are then n/a.
        unavailable: by name, why other variants than those in ``UNAVAILABLE`` cannot run here.
        flops: floating-point operations of the mathematics, forward and backward.
        moved: bytes of inputs, outputs and their gradients, each read or written once.
        dtype: of the matrix product whose rate they are compared with.
        parity: by name, the same computations without randomness, if ``variants`` are random.
        tolerance: largest difference of any variant's output and gradients from the baseline's, relative to the largest
            entry of each.
    """

    op: str
    size: str
    variants: Mapping[str, Callable[[], Tensor]]
    inputs: Sequence[Tensor] = ()
    comparators: Collection[str] = ("naive, compiled",)
    unavailable: Mapping[str, str] = field(default_factory=dict)
    flops: tuple[float, float] = (0.0, 0.0)
    moved: float = 0.0
    dtype: torch.dtype = torch.float32
    parity: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)
    tolerance: float = 1e-4


def run(case: Case, repeats: int = 7) -> list[Record]:
    """Check the variants against the baseline, then time them in turn, so that drift of the machine hits all alike.

    Args:
        case: what to measure.
        repeats: rounds; the medians are over these.

    Returns:
        one record for each variant; those that cannot run come last, with the reason and no figures.

    Raises:
        AssertionError: a variant computes something else.
    """
    unavailable = _unavailable(case)
    variants = {name: variant for name, variant in case.variants.items() if name not in unavailable}
    _check_parity(case, variants)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for variant in variants.values():
        _time(variant, case.inputs)
    for _ in range(repeats):
        for name, variant in variants.items():
            seconds[name].append(_time(variant, case.inputs))
    baseline = statistics.median(map(sum, seconds[next(iter(variants))]))
    records = [_record(case, name, seconds[name], baseline) for name in variants]
    empty: Record = dict.fromkeys(records[0])
    same: Record = {"op": case.op, "size": case.size}
    return records + [empty | same | {"variant": name, "reason": reason} for name, reason in unavailable.items()]


def _unavailable(case: Case) -> dict[str, str]:
    """Reasons why variants have no figures: those known, and what comparators raise when they are tried."""
    reasons = {name: reason for name, reason in UNAVAILABLE.items() if name in case.variants} | dict(case.unavailable)
    for name in (name for name in case.comparators if name in case.variants and name not in reasons):
        try:
            _time(case.variants[name], case.inputs)
        except Exception as error:  # each has exceptions of its own
            reasons[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return reasons


def _check_parity(case: Case, names: Iterable[str]) -> None:
    computations = case.parity or case.variants
    baseline, *others = names
    expected = _results(case, computations[baseline])
    for name in others:
        for (what, x), (_, y) in zip(_results(case, computations[name]), expected, strict=True):
            error = ((x - y).abs().max() / y.abs().max()).item()
            assert error <= case.tolerance, (
                f"{case.op} {case.size}: {what} of {name} differs from {baseline} by {error:.1e}"
            )


def _results(case: Case, computation: Callable[[], Tensor]) -> list[tuple[str, Tensor]]:
    """Return the output and, for one output gradient that all share, the gradients of the inputs."""
    output = computation()
    if not case.inputs:
        return [("output", output)]
    noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
    gradients = torch.autograd.grad(output, case.inputs, noise)
    return [("output", output.detach()), *((f"gradient {i}", x) for i, x in enumerate(gradients))]


def stamp() -> Moment:
    """Return the present moment of the device's work, which is not waited for."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(before: Moment, after: Moment) -> float:
    """Return the seconds from one moment to the other, both from ``stamp``."""
    if isinstance(before, float) and isinstance(after, float):
        return after - before
    assert isinstance(before, torch.cuda.Event)
    assert isinstance(after, torch.cuda.Event)
    after.synchronize()
    return before.elapsed_time(after) / 1e3


def _time(variant: Callable[[], Tensor], inputs: Sequence[Tensor] = ()) -> tuple[float, float]:
    """Return seconds of forward and backward; on a GPU without launching, which a CUDA graph saves."""
    if torch.cuda.is_available():  # busy for a while, it finds what follows queued when it gets there
        torch.cuda._sleep(_HEAD_START_CYCLES)
    start = stamp()
    output = variant()
    middle = stamp()
    if inputs:
        torch.autograd.grad(output, inputs, torch.ones_like(output))
    end = stamp()
    return seconds_between(start, middle), seconds_between(middle, end)


class Rates(NamedTuple):
    """Floating-point operations and bytes (read and written) in a second."""

    flops: float
    bytes: float


@functools.cache
def device_rates(dtype: torch.dtype) -> Rates:
    """Measure a large matrix product and a copy on the device at hand, once in a process."""
    cuda = torch.cuda.is_available()
    device, side, copied = ("cuda", 8192, 1 << 30) if cuda else ("cpu", 1024, 1 << 27)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Rates(
        2 * side**3 / _median_seconds(lambda: a @ b), 2 * copied / _median_seconds(lambda: target.copy_(source))
    )


def _median_seconds(run_once: Callable[[], Tensor]) -> float:
    run_once()
    return statistics.median(_time(run_once)[0] for _ in range(_RATE_ROUNDS))


def _record(case: Case, name: str, seconds: list[tuple[float, float]], baseline: float) -> Record:
    forward, backward = ([pair[i] for pair in seconds] for i in range(2))
    both = [sum(pair) for pair in seconds]
    record: Record = {"op": case.op, "size": case.size, "variant": name, "reason": None}
    for part, values in (("forward", forward), ("backward", backward), ("both", both)):
        for percent in (20, 50, 80):
            record[f"{part}_p{percent}_ms"] = 1e3 * percentile(values, percent)
    median, flops = statistics.median(both), sum(case.flops)
    variant = case.variants[name]
    return record | {
        "ratio": median / baseline,
        "flops_per_s": flops / median if flops else None,
        "bytes_per_s": case.moved / median if case.moved else None,
        "gemm_fraction": flops / median / device_rates(case.dtype).flops if flops else None,
        "saved_mb": saved_bytes(variant) / 1e6 if case.inputs else 0.0,
        "peak_mb": peak_bytes(lambda: _time(variant, case.inputs)) / 1e6,
    }


def percentile(values: Sequence[float], percent: int) -> float:
    """Return the value that ``percent`` of the values do not exceed."""
    return sorted(values)[round(percent / 100 * (len(values) - 1))]


def saved_bytes(forward: Callable[[], Tensor], beyond: Iterable[Tensor] = ()) -> int:
    """Return the bytes of all distinct storages that ``forward`` saves for backward.

    Args:
        forward: runs the forward pass; on fake tensors nothing is computed.
        beyond: tensors, such as parameters, whose storages do not count.
    """
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
    return x.untyped_storage()._cdata  # unlike its address, also distinct for fake tensors


def peak_bytes(run_once: Callable[[], object]) -> float:
    """Return the bytes of tensors that a computation allocates at most at once, beyond what was allocated before."""
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
    """Return device, threads, versions and date of a run."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        threads = torch.get_num_threads()
        device = f"CPU {_cpu_name()}, {threads} thread{'s' * (threads > 1)}"
    versions = [f"torch {torch.__version__}"]
    versions += [f"{name} {version(name)}" for name in ("triton", "xformers") if find_spec(name)]
    return f"{device}; {', '.join(versions)}, Python {platform.python_version()}; {datetime.now(UTC):%Y-%m-%d}"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def table(records: Sequence[Record], columns: Mapping[str, tuple[str, float]]) -> str:
    """Return a Markdown table of records; ``columns`` give a heading, the key of its cells and a factor for numbers."""
    lines = ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    for record in records:
        cells = [(record[key], factor) for key, factor in columns.values()]
        lines.append("| " + " | ".join(cell(value, factor) for value, factor in cells) + " |")
    notes = [f"{record['variant']}: n/a, {record['reason']}" for record in records if record.get("reason")]
    return "\n".join([*lines, *(f"\n{note}" for note in notes)])


def cell(value: str | float | None, factor: float) -> str:
    """Return one cell of a table; None is n/a."""
    if value is None:
        return "n/a"
    if isinstance(value, int | float) and not (isinstance(value, int) and factor == 1):
        value *= factor
        return f"{value:.2f}" if abs(value) >= 1 or value == 0 else f"{value:.3g}"
    return str(value)


def write_records(file: Path, records: Sequence[Record]) -> None:
    """Write a JSON list of flat records, each with the conditions of the run."""
    file.write_text(json.dumps([record | {"conditions": conditions()} for record in records], indent=1), "utf-8")
