"""``python -m bench``: tables of the operators, of the training step, and of what the compiled kernels need."""

import argparse
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from bench import bench_channel_attention, bench_mix_ffn, bench_semantic_memory, bench_train_step, bench_upsample
from bench.harness import COLUMNS, Case, Record, conditions, device_rates, run, table, write_records


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


_CUDA = torch.cuda.is_available()
_OPERATORS = ["pascal", "cityscapes", "coco", "vit14"] if _CUDA else ["pascal"]
_FULL_STEPS = ["pascal", "cityscapes", "coco"]
_TIMED_STEPS = _FULL_STEPS if _CUDA else ["pascal_b0"]
_TARGETS = ["sm_80", "sm_86", "sm_90", "sm_100", "gfx942"]


def _operator(
    cases: Callable[[str], list[Case]],
    sizes: Collection[str] = tuple(bench_channel_attention.SIZES),
    default: Collection[str] = _OPERATORS,
) -> Benchmark:
    def measure(size: str, repeats: int) -> Iterator[tuple[list[Record], str]]:
        for case in cases(size):
            records = run(case, repeats)
            rates = device_rates(case.dtype)
            measured = f"{case.dtype} product {rates.flops / 1e12:.3g} TFLOP/s, copy {rates.bytes / 1e9:.3g} GB/s"
            yield records, f"{table(records, COLUMNS)}\n\nMeasured in this run: {measured}."

    return Benchmark(measure, sizes, default)


def _static(target: str, _: int) -> Iterator[tuple[list[Record], str]]:
    """What the compiled Triton kernels need on a GPU that need not be there."""
    from bench import static  # noqa: PLC0415 triton is optional

    records: list[Record] = []
    for compiled in static.report([target], full=True):
        record = {"op": "static", "size": target, **compiled}
        if record not in records:  # sizes that differ in what the compiler does not see
            records.append(record)
    yield records, table(records, static.COLUMNS)


BENCHMARKS = {
    "attention": _operator(
        bench_channel_attention.cases,
        default=list(bench_channel_attention.GRID) if torch.cuda.is_available() else ["pascal"],
    ),
    "memory": _operator(bench_semantic_memory.cases),
    "loss": _operator(lambda size: bench_upsample.cases(size)[:1], bench_upsample.SIZES),
    "argmax": _operator(lambda size: bench_upsample.cases(size)[1:], bench_upsample.SIZES),
    "ffn": _operator(bench_mix_ffn.cases, bench_train_step.SIZES, _TIMED_STEPS),
    "step": Benchmark(bench_train_step.measure, bench_train_step.SIZES, _TIMED_STEPS),
    "flops": Benchmark(bench_train_step.measure_counts, bench_train_step.SIZES, _FULL_STEPS),
    "static": Benchmark(_static, _TARGETS, _TARGETS),
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    sizes = sorted({size for benchmark in BENCHMARKS.values() for size in benchmark.sizes})
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("benchmark", nargs="?", default="all", choices=[*BENCHMARKS, "all"])
    parser.add_argument("--size", choices=sizes, help="default: the benchmark's own; `all` skips those without it")
    parser.add_argument("--repeats", type=int, default=7, help="rounds, at least 5 for figures to quote")
    parser.add_argument("--json", type=Path, help="write a JSON list of the tables' records to this file")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmarks named on the command line; the file holds what is finished after each of them."""
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
                write_records(options.json, records)


if __name__ == "__main__":
    main()
