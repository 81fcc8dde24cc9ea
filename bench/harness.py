"""Timing, memory, FLOPs, parity and tables of the benchmarks."""

import functools
import itertools
import json
import math
import platform
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import allspark_fast.model  # noqa: F401 registers the operators
from allspark_fast.files import write_atomically

T = TypeVar("T")
Record = dict[str, Any]

# Heading and factor of columns, by what the keys of records contain; the first that fits counts.
_UNITS = {
    "spill_bytes": ("spill bytes", 1.0),
    "shared_bytes": ("shared bytes", 1.0),
    "gemm_fraction": ("% of GEMM", 100.0),
    "flops_per_s": ("TFLOP/s", 1e-12),
    "flops": ("GFLOP", 1e-9),
    "seconds": ("ms", 1e3),
    "bytes": ("MB", 1e-6),
}

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# What the benchmarks compute in.
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
# What torch's counter lacks: our operators, and its own attention on a CPU. Its formula of the gradients of
# a convolution overlooks groups.
FLOP_FORMULAS: dict[object, Callable[..., int]] = {
    # Similarity and the product with the values: query (B, H, N, Cq), key (B or 1, H, N, L); backward the similarity
    # again, and gradients of the map, query, key and value.
    torch.ops.allspark_fast.channel_attention: lambda query, key, *_, **__: 2 * 2 * math.prod(query) * key[3],
    torch.ops.allspark_fast.channel_attention_backward: lambda grad, _, key, *__, **___: (
        5 * 2 * math.prod(grad) * key[3]
    ),
    # Gradients (B, C, h, w) of input and weight cost as much as the forward pass each.
    torch.ops.aten.convolution_backward: lambda grad, _, weight, *rest, **__: (
        sum(rest[-1][:2]) * 2 * grad[0] * math.prod(grad[2:]) * math.prod(weight)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}
# A context that counts the FLOPs in it; on fake tensors nothing is computed.
flop_counter = functools.partial(FlopCounterMode, display=False, custom_mapping=FLOP_FORMULAS)
# About 10 ms at the clock rates of today's GPUs.
_HEAD_START_CYCLES = 20_000_000


class Case(NamedTuple):
    """Variants of one computation at one size, by name; the first is the baseline, and its FLOPs are those of all.

    ``inputs`` are the tensors whose gradients are taken; without any there is no backward pass. ``comparators`` are
    variants that may refuse the size or the device, or lack a package: they are n/a then. ``parity`` are the same
    computations without randomness, if ``variants`` are random, of those that compute the same. ``flops`` are those of
    variants that have their own.
    """

    op: str
    size: str
    variants: Mapping[str, Callable[[], Tensor]]
    inputs: Sequence[Tensor] = ()
    comparators: Collection[str] = ("naive, compiled",)
    parity: Mapping[str, Callable[[], Tensor]] = {}
    flops: Mapping[str, int] = {}


def with_compiled(variants: dict[str, Callable[..., Tensor]]) -> dict[str, Callable[..., Tensor]]:
    """Add the first variant as the compiler's best, on a GPU: on a CPU it takes a minute and gains little."""
    if DEVICE == "cpu":
        return variants
    name, function = next(iter(variants.items()))
    torch.compiler.reset()  # or it would take a second size for a reason to compile for any
    compiled = torch.compile(function, dynamic=False, mode="max-autotune-no-cudagraphs")
    return {**variants, f"{name}, compiled": compiled}


def run(case: Case, repeats: int = 7) -> list[Record]:
    """Check the variants against the baseline, then time them in turn, so that drift of the machine hits all alike.

    Returns one record for each variant; those that cannot run come last, with a note why and no figures. Raises an
    AssertionError if a result is off by more than 1e-4, in half precision 3e-2, of its largest entry.
    """
    baseline, notes, expected = next(iter(case.variants)), {}, list[Tensor]()
    for name, computation in (case.parity or case.variants).items():
        try:
            results = outputs_and_grads(computation, case.inputs)
        except Exception as error:  # each has exceptions of its own
            if name not in case.comparators:
                raise
            notes[name] = error_line(error)
            continue
        expected = expected or results
        for i, (x, y) in enumerate(zip(results, expected, strict=True)):
            off, part = relative_error(x, y), f"gradient {i - 1}" if i else "output"
            message = f"{case.op}, {case.size}: {part} of {name} differs from {baseline} by {off:.1e}"
            assert off <= (3e-2 if x.dtype.itemsize < 4 else 1e-4), message
    variants = {name: variant for name, variant in case.variants.items() if name not in notes}
    with flop_counter() as counter:
        output = variants[baseline]()
        if case.inputs:
            output.sum().backward()
    times = {name: [forward_backward_seconds(variant, case.inputs)] for name, variant in variants.items()}  # warms up
    for _ in range(repeats):
        for name, variant in variants.items():
            times[name].append(forward_backward_seconds(variant, case.inputs))
    rounds = {name: np.array(pairs[1:]) for name, pairs in times.items()}
    same: Record = {"op": case.op, "size": case.size}
    records = []
    for name, variant in variants.items():
        record, seconds = same | {"variant": name}, rounds[name].sum(1)
        if case.inputs:
            forward, backward = np.median(rounds[name], axis=0).tolist()
            record |= {"forward_seconds_p50": forward, "backward_seconds_p50": backward}
        record |= {f"seconds_p{percent}": float(np.percentile(seconds, percent)) for percent in (20, 50, 80)}
        record["ratio"] = float(np.median(seconds / rounds[baseline].sum(1)))  # round by round: other jobs hit both
        if flops := case.flops.get(name, counter.get_total_flops()):
            rate = flops / record["seconds_p50"]
            record |= {"flops": flops, "flops_per_s": rate, "gemm_fraction": rate / gemm_rate(output.dtype)}
        record["saved_bytes"] = saved_bytes(variant) if case.inputs else 0
        record["peak_bytes"] = peak_bytes(functools.partial(forward_backward_seconds, variant, case.inputs))
        records.append(record | {"note": ""})
    empty: Record = dict.fromkeys(records[0])
    return records + [empty | same | {"variant": name, "note": note} for name, note in notes.items()]


def error_line(error: Exception) -> str:
    """Return the type and the first line of an exception."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def outputs_and_grads(computation: Callable[[], Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the output and, for one output gradient that all share, the gradients of the inputs."""
    output = computation()
    if not inputs:
        return [output.detach()]
    noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).bfloat16()  # which all dtypes hold
    return [output.detach(), *torch.autograd.grad(output, inputs, noise.to(output))]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest expected entry."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


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


def forward_backward_seconds(variant: Callable[[], Tensor], inputs: Sequence[Tensor]) -> tuple[float, float]:
    """Return seconds of forward and backward, 0 without inputs, as if launches cost nothing."""
    output, forward = timed(variant, head_start=True)
    if not inputs:
        return forward, 0.0
    ones = torch.ones_like(output)
    _, backward = timed(lambda: torch.autograd.grad(output, inputs, ones), head_start=True)
    return forward, backward


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
        info = Path("/proc/cpuinfo")
        names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
        device = f"CPU {[*names, platform.machine()][0]}, threads: {torch.get_num_threads()}"
    versions = [f"torch {torch.__version__}"]
    for name in ("triton", "xformers"):
        with suppress(PackageNotFoundError):
            versions.append(f"{name} {version(name)}")
    return f"{device}; {', '.join(versions)}, Python {platform.python_version()}; {datetime.now(UTC):%Y-%m-%d}"


def report(records: Iterable[Record], file: Path | None = None) -> None:
    """Print records as Markdown tables, a row as soon as it is there, and write the file anew each time.

    The file holds a JSON list of flat records with the conditions of the run.
    """
    written: list[str] = []
    shown = ""
    for record in records:
        columns = {key: _column(key) for key in record if key not in ("op", "size")}
        headings = " | ".join(heading for heading, _ in columns.values())
        start = f"\n{record['op']}, {record['size']}\n\n| {headings} |\n{'| --- ' * len(columns)}|"
        if start != shown:
            print(shown := start)
        print("| " + " | ".join(cell(record[key], factor) for key, (_, factor) in columns.items()) + " |", flush=True)
        written.append(json.dumps(record | {"conditions": conditions()}))
        if file is not None:
            text = "[\n" + ",\n".join(written) + "\n]\n"
            write_atomically(file, functools.partial(Path.write_text, data=text, encoding="utf-8"))


def _column(key: str) -> tuple[str, float]:
    part, (unit, factor) = next((item for item in _UNITS.items() if item[0] in key), ("_", (" ", 1.0)))
    return key.replace(part, unit).replace("_", " "), factor


def cell(value: object, factor: float) -> str:
    """Return one cell of a table; None is n/a."""
    if isinstance(value, float) or (isinstance(value, int) and factor != 1):
        return f"{value * factor:.0f}" if abs(value * factor) >= 1000 else f"{value * factor:.4g}"
    return "n/a" if value is None else str(value)
