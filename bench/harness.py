"""Timing, memory, FLOPs, parity and tables of the benchmarks."""

import functools
import itertools
import json
import platform
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity

from bench.flops import flop_counter

T = TypeVar("T")
Record = dict[str, Any]
Columns = Mapping[str, tuple[str, float]]

# Heading, key of the record and factor.
COLUMNS: Columns = {
    "variant": ("variant", 1.0),
    "forward ms": ("forward_seconds_p50", 1e3),
    "backward ms": ("backward_seconds_p50", 1e3),
    "ms p20": ("seconds_p20", 1e3),
    "p50": ("seconds_p50", 1e3),
    "p80": ("seconds_p80", 1e3),
    "ratio": ("ratio", 1.0),
    "images/s": ("images_per_s", 1.0),
    "GFLOP": ("flops", 1e-9),
    "FLOP ratio": ("flops_ratio", 1.0),
    "TFLOP/s": ("flops_per_s", 1e-12),
    "% of GEMM": ("gemm_fraction", 100.0),
    "saved MB": ("saved_bytes", 1e-6),
    "saved ratio": ("saved_bytes_ratio", 1.0),
    "peak MB": ("peak_bytes", 1e-6),
}

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Why variants of these names cannot run on it.
UNAVAILABLE = (
    {"naive, compiled": "compiling takes a minute on a CPU, and gains little there", "triton": "needs a GPU"}
    if DEVICE == "cpu"
    else {}
)
# About 10 ms at the clock rates of today's GPUs.
_HEAD_START_CYCLES = 20_000_000


@dataclass(frozen=True)
class Case:
    """Variants of one computation at one size, by name; the first is the baseline, and its FLOPs are those of all.

    Attributes:
        op: name of the operator.
        size: name of the size and its numbers.
        variants: what to run.
        inputs: tensors whose gradients are taken; empty if there is no backward pass.
        comparators: variants that may refuse the size or device: their cells are then n/a.
        unavailable: why other variants than those in ``UNAVAILABLE`` cannot run here.
        parity: the same computations without randomness, if ``variants`` are random.
    """

    op: str
    size: str
    variants: Mapping[str, Callable[[], Tensor]]
    inputs: Sequence[Tensor] = ()
    comparators: Collection[str] = ("naive, compiled",)
    unavailable: Mapping[str, str] = field(default_factory=dict)
    parity: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)


def run(case: Case, repeats: int = 7) -> list[Record]:
    """Check the variants against the baseline, then time them in turn, so that drift of the machine hits all alike.

    Returns one record for each variant; those that cannot run come last, with the reason and no figures. Raises an
    AssertionError if a variant computes something else.
    """
    unavailable = _check_variants(case)
    variants = {name: variant for name, variant in case.variants.items() if name not in unavailable}
    baseline = next(iter(variants))
    with flop_counter() as counter:
        output = variants[baseline]()
        if case.inputs:
            output.sum().backward()
    for variant in variants.values():
        _time(variant, case.inputs)
    rounds = [{name: _time(variant, case.inputs) for name, variant in variants.items()} for _ in range(repeats)]
    totals = [{name: sum(pair) for name, pair in times.items()} for times in rounds]
    same: Record = {"op": case.op, "size": case.size}
    records = []
    for name, variant in variants.items():
        forward, backward = np.median([times[name] for times in rounds], axis=0).tolist()
        record = same | {"variant": name, "reason": None}
        record |= {"forward_seconds_p50": forward, "backward_seconds_p50": backward}
        record |= time_figures(totals, name, baseline, counter.get_total_flops(), output.dtype)
        record["saved_bytes"] = saved_bytes(variant) if case.inputs else 0
        record["peak_bytes"] = peak_bytes(functools.partial(_time, variant, case.inputs))
        records.append(record)
    empty: Record = dict.fromkeys(records[0])
    return records + [empty | same | {"variant": name, "reason": reason} for name, reason in unavailable.items()]


def _check_variants(case: Case) -> dict[str, str]:
    """Compare the variants; return reasons why some cannot run: those known, and what comparators raise."""
    known = {**UNAVAILABLE, **case.unavailable}
    reasons = {name: known[name] for name in case.variants if name in known}
    results = {}
    for name in (name for name in case.variants if name not in reasons):
        try:
            results[name] = _results(case, (case.parity or case.variants)[name])
        except Exception as error:  # each has exceptions of its own
            if name not in case.comparators:
                raise
            reasons[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    check_parity(results)
    return reasons


def check_parity(results: Mapping[str, Mapping[str, Tensor]], tolerance: float | None = None) -> None:
    """Compare the tensors of each variant with those of the first, relative to the largest entry of these.

    Raises:
        AssertionError: a tensor differs by more than the tolerance, 1e-4 or in half precision 3e-2.
    """
    (baseline, expected), *others = results.items()
    for name, tensors in others:
        for what, x in tensors.items():
            error = ((x - expected[what]).abs().max() / expected[what].abs().max()).item()
            bound = tolerance or (3e-2 if x.dtype.itemsize < 4 else 1e-4)
            assert error <= bound, f"{what} of {name} differs from {baseline} by {error:.1e}"


def _results(case: Case, computation: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Return the output and, for one output gradient that all share, the gradients of the inputs."""
    output = computation()
    name = f"{case.op}, {case.size}"
    results = {f"{name}: output": output.detach()}
    if case.inputs:
        noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
        gradients = torch.autograd.grad(output, case.inputs, noise)
        results |= {f"{name}: gradient {i}": x for i, x in enumerate(gradients)}
    return results


def timed(function: Callable[[], T], *, head_start: bool = False) -> tuple[T, float]:
    """Return what a function returns, and the seconds that the device takes.

    With ``head_start`` a GPU is kept busy until the launches are queued, so that they cost nothing, as in a CUDA graph.
    """
    if DEVICE == "cpu":
        start = time.perf_counter()
        result = function()
        return result, time.perf_counter() - start
    if head_start:
        torch.cuda._sleep(_HEAD_START_CYCLES)
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    result = function()
    after.record()
    after.synchronize()
    return result, before.elapsed_time(after) / 1e3


def _time(variant: Callable[[], Tensor], inputs: Sequence[Tensor]) -> tuple[float, float]:
    """Return seconds of forward and backward."""
    output, forward = timed(variant, head_start=True)
    if not inputs:
        return forward, 0.0
    ones = torch.ones_like(output)
    _, backward = timed(lambda: torch.autograd.grad(output, inputs, ones), head_start=True)
    return forward, backward


def time_figures(
    rounds: Sequence[Mapping[str, float]], name: str, baseline: str, flops: int, dtype: torch.dtype
) -> Record:
    """Return percentiles of a variant's seconds, their ratio to the baseline's, and rates where there are FLOPs."""
    seconds = [times[name] for times in rounds]
    figures: Record = {f"seconds_p{percent}": float(np.percentile(seconds, percent)) for percent in (20, 50, 80)}
    figures["ratio"] = figures["seconds_p50"] / float(np.median([times[baseline] for times in rounds]))
    if flops:
        rate = flops / figures["seconds_p50"]
        figures |= {"flops": flops, "flops_per_s": rate, "gemm_fraction": rate / gemm_rate(dtype)}
    return figures


@functools.cache
def gemm_rate(dtype: torch.dtype) -> float:
    """Measure the FLOP/s of a large matrix product on the device at hand, once in a process."""
    side = 8192 if DEVICE == "cuda" else 1024
    a, b = (torch.randn(side, side, device=DEVICE, dtype=dtype) for _ in range(2))
    seconds = [timed(lambda: a @ b, head_start=True)[1] for _ in range(8)]
    return 2 * side**3 / float(np.median(seconds[1:]))


def saved_bytes(forward: Callable[[], Tensor], beyond: Iterable[Tensor] = ()) -> int:
    """Return the bytes of all distinct storages that ``forward`` saves for backward, but for those of ``beyond``."""
    # The keys differ for fake tensors too, unlike addresses. Values keep storages alive, so no key is used twice.
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        forward()
    for x in beyond:
        storages.pop(x.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in storages.values())


def peak_bytes(run_once: Callable[[], object]) -> float:
    """Return the bytes of tensors that a computation allocates at most at once, beyond what was allocated before."""
    if DEVICE == "cuda":
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
    if DEVICE == "cuda":
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


def table(records: Sequence[Record], columns: Columns = COLUMNS) -> str:
    """Return a Markdown table of records: of the columns, by heading a key and a factor, those whose keys they have."""
    shown = {heading: column for heading, column in columns.items() if column[0] in records[0]}
    lines = ["| " + " | ".join(shown) + " |", "| --- " * len(shown) + "|"]
    for record in records:
        lines.append("| " + " | ".join(cell(record[key], factor) for key, factor in shown.values()) + " |")
    notes = [f"{record['variant']}: n/a, {record['reason']}" for record in records if record.get("reason")]
    return "\n".join([*lines, *(f"\n{note}" for note in notes)])


def cell(value: object, factor: float) -> str:
    """Return one cell of a table; None is n/a."""
    if isinstance(value, float) or (isinstance(value, int) and factor != 1):
        return f"{value * factor:.0f}" if abs(value * factor) >= 1000 else f"{value * factor:.4g}"
    return "n/a" if value is None else str(value)


def write_records(file: Path, records: Sequence[Record]) -> None:
    """Write a JSON list of flat records, each with the conditions of the run."""
    file.write_text(json.dumps([record | {"conditions": conditions()} for record in records], indent=1), "utf-8")
