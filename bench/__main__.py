"""``python -m bench``: tables of the operators, of the training step, and of what the compiled kernels need."""

import argparse
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from bench import bench_channel_attention, bench_train_step, operators
from bench.harness import COLUMNS, DEVICE, Case, Columns, Record, conditions, run, table, write_records

_FULL_STEPS = ["pascal", "cityscapes", "coco"]
_OPERATORS, _TIMED_STEPS = (_FULL_STEPS, _FULL_STEPS) if DEVICE == "cuda" else (["pascal"], ["pascal_b0"])
_TARGETS = ["sm_80", "sm_86", "sm_90", "sm_100", "gfx942"]


class Benchmark(NamedTuple):
    """What a name on the command line runs: from a size and a number of rounds to the records of each table."""

    measure: Callable[[str, int], Iterable[list[Record]]]
    sizes: Collection[str]
    default: Collection[str]
    columns: Columns = COLUMNS


def _operator(
    cases: Callable[[str], list[Case]],
    sizes: Collection[str] = tuple(bench_train_step.SIZES),
    default: Collection[str] = _OPERATORS,
) -> Benchmark:
    return Benchmark(lambda size, repeats: (run(case, repeats) for case in cases(size)), sizes, default)


def _static(target: str, _: int) -> Iterator[list[Record]]:
    """What the compiled Triton kernels need on a GPU that need not be there."""
    from bench import static  # noqa: PLC0415 triton is optional

    yield [{"op": "static", "size": target, **record} for record in static.report(target, full=True)]


def _launches(size: str, _: int) -> Iterator[list[Record]]:
    """What a training step launches on a GPU that need not be there, by operator."""
    from bench import launches  # noqa: PLC0415 triton is optional

    counts = launches.count_launches(size)
    rows = [("all", counts.total()), *counts.most_common(30)]
    yield [{"op": "launches", "size": size, "operator": name, "launches": count} for name, count in rows]


_STATIC_KEYS = ("kernel", "dtype", "config", "registers", "spill_bytes", "shared_bytes", "ctas_per_sm", "mma")

BENCHMARKS = {
    "attention": _operator(
        bench_channel_attention.cases,
        bench_channel_attention.SIZES,
        list(bench_channel_attention.GRID) if DEVICE == "cuda" else ["pascal"],
    ),
    "memory": _operator(operators.memory_cases),
    "loss": _operator(lambda size: operators.upsample_cases(size)[:1]),
    "argmax": _operator(lambda size: operators.upsample_cases(size)[1:]),
    "ffn": _operator(operators.mix_ffn_cases, default=_TIMED_STEPS),
    "step": Benchmark(bench_train_step.measure, bench_train_step.SIZES, _TIMED_STEPS),
    "flops": Benchmark(bench_train_step.count, bench_train_step.SIZES, _FULL_STEPS),
    "launches": Benchmark(
        _launches, bench_train_step.SIZES, ["pascal"], {"operator": ("operator", 1.0), "launches": ("launches", 1.0)}
    ),
    "static": Benchmark(_static, _TARGETS, _TARGETS, {key: (key, 1.0) for key in _STATIC_KEYS}),
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
        for new in benchmark.measure(size, options.repeats):
            records += new
            print(f"\n{new[0]['op']}, {new[0]['size']}\n\n{table(new, benchmark.columns)}", flush=True)
            if options.json:
                write_records(options.json, records)


if __name__ == "__main__":
    main()
