"""``python -m bench``: tables of the operators, of the training step, and of what the step costs by count."""

import argparse
import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from bench import (
    bench_channel_attention,
    bench_data,
    bench_mix_ffn,
    bench_semantic_memory,
    bench_train_step,
    bench_upsample,
    footprint,
    rank_cost,
    step_cost,
)
from bench.device_rates import device_rates
from bench.harness import COLUMNS, Case, Record, conditions, run, table
from bench.step_variants import SIZES as STEP_SIZES


class Benchmark(NamedTuple):
    """What a name on the command line runs.

    Attributes:
        measure: takes a size and a number of rounds and yields records and their table.
        sizes: names of the sizes it has.
        default: those that it runs unless told.
    """

    measure: Callable[[str, int], Iterator[tuple[list[Record], str]]]
    sizes: Collection[str]
    default: Collection[str]


def _operator(
    cases: Callable[[str], list[Case]],
    sizes: Collection[str] = tuple(bench_channel_attention.SIZES),
    default: Collection[str] | None = None,
) -> Benchmark:
    def measure(size: str, repeats: int) -> Iterator[tuple[list[Record], str]]:
        for case in cases(size):
            records = run(case, repeats)
            rates = device_rates(case.dtype)
            measured = f"{case.dtype} product {rates.flops / 1e12:.3g} TFLOP/s, copy {rates.bytes / 1e9:.3g} GB/s"
            yield records, f"{table(records, COLUMNS)}\n\nMeasured in this run: {measured}."

    if default is None:
        default = ["pascal", "cityscapes", "coco", "vit14"] if torch.cuda.is_available() else ["pascal"]
    return Benchmark(measure, sizes, default)


def _static(target: str, _: int) -> Iterator[tuple[list[Record], str]]:
    """What the compiled Triton kernels need on a GPU that need not be there."""
    from bench.static_report import STATIC_COLUMNS, report  # noqa: PLC0415 triton is optional

    records: list[Record] = []
    for compiled in report([target], full=True):
        record = {"op": "static", "size": target, **compiled}
        if record not in records:  # sizes that differ in what the compiler does not see
            records.append(record)
    yield records, table(records, STATIC_COLUMNS)


_FULL_STEPS = ["pascal", "cityscapes", "coco"]
_TIMED_STEPS = _FULL_STEPS if torch.cuda.is_available() else ["pascal_b0"]
_TARGETS = ["sm_80", "sm_86", "sm_90", "sm_100", "gfx942"]
BENCHMARKS = {
    "attention": _operator(
        bench_channel_attention.cases,
        default=list(bench_channel_attention.GRID) if torch.cuda.is_available() else ["pascal"],
    ),
    "memory": _operator(bench_semantic_memory.cases),
    "loss": _operator(lambda size: bench_upsample.cases(size)[:1], bench_upsample.SIZES),
    "argmax": _operator(lambda size: bench_upsample.cases(size)[1:], bench_upsample.SIZES),
    "ffn": _operator(bench_mix_ffn.cases, STEP_SIZES, _TIMED_STEPS),
    "step": Benchmark(bench_train_step.measure, STEP_SIZES, _TIMED_STEPS),
    "flops": Benchmark(step_cost.measure, STEP_SIZES, _FULL_STEPS),
    "ranks": Benchmark(rank_cost.measure, STEP_SIZES, _FULL_STEPS),
    "footprint": Benchmark(footprint.measure, footprint.SIZES, list(footprint.SIZES)),
    "data": Benchmark(bench_data.measure, bench_data.SIZES, bench_data.DEFAULT),
    "static": Benchmark(_static, _TARGETS, _TARGETS),
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    sizes = sorted({size for benchmark in BENCHMARKS.values() for size in benchmark.sizes})
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("benchmark", nargs="?", default="all", choices=[*BENCHMARKS, "all"])
    parser.add_argument("--size", choices=sizes, help="default: the benchmark's own; `all` skips those without it")
    parser.add_argument("--repeats", type=int, default=7, help="rounds, at least 5 for figures to quote")
    parser.add_argument("--json", type=Path, help="write the records of the tables to this file")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmarks named on the command line."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    chosen = list(BENCHMARKS.values()) if options.benchmark == "all" else [BENCHMARKS[options.benchmark]]
    runs = [
        (benchmark, size)
        for benchmark in chosen
        for size in ([options.size] if options.size else benchmark.default)
        if size in benchmark.sizes
    ]
    if not runs:
        parser.error(f"{options.benchmark} has no size {options.size}, choose from {', '.join(chosen[0].sizes)}")
    print(conditions())
    records: list[Record] = []
    for benchmark, size in runs:
        for new, tables in benchmark.measure(size, options.repeats):
            records += new
            print(f"\n{new[0]['op']}, {new[0]['size']}\n\n{tables}", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"conditions": conditions(), "records": records}, indent=1))


if __name__ == "__main__":
    main()
