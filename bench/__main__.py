"""``python -m bench``: tables of the operators, of the training step, and of what the compiled kernels need."""

import argparse
import itertools
from collections.abc import Callable, Collection, Iterable
from importlib import import_module
from pathlib import Path

from bench import bench_train_step, gpu, operators
from bench.harness import DEVICE, Case, Record, conditions, report, run

_STEPS, _GRID = bench_train_step.SIZES, operators.ATTENTION_GRID
_TARGETS = ["sm_80", "sm_86", "sm_90", "sm_100", "gfx942"]
Measure = Callable[[str, argparse.Namespace], Iterable[Record]]


def _of(cases: Callable[[str], list[Case]]) -> Measure:
    return lambda size, options: (record for case in cases(size) for record in run(case, options.repeats))


def _needs_triton(module: str) -> Measure:
    """The ``report`` of a module that is imported when it runs: triton is optional."""
    return lambda size, _: import_module(f"bench.{module}").report(size)


# What a name runs, by size and options; the sizes that it has, and those that it runs by default.
BENCHMARKS: dict[str, tuple[Measure, Collection[str], Collection[str]]] = {
    "attention": (_of(operators.attention_cases), [*_STEPS, *_GRID], _GRID if DEVICE == "cuda" else ["pascal"]),
    "memory": (_of(operators.memory_cases), _STEPS, ["pascal"]),
    "loss": (_of(lambda size: operators.upsample_cases(size)[:1]), _STEPS, ["pascal"]),
    "argmax": (_of(lambda size: operators.upsample_cases(size)[1:]), _STEPS, ["pascal"]),
    "ffn": (_of(operators.ffn_cases), _STEPS, ["pascal_b0"]),
    "step": (lambda size, options: bench_train_step.measure(size, options.repeats), _STEPS, ["pascal_b0"]),
    "flops": (lambda size, _: bench_train_step.count(size), _STEPS, ["pascal", "cityscapes", "coco"]),
    "launches": (_needs_triton("launches"), _STEPS, ["pascal"]),
    "static": (_needs_triton("static"), _TARGETS, _TARGETS),
    "gpu": (lambda size, options: gpu.measure(size, options.budget), _STEPS, ["pascal"]),
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    sizes = sorted({size for _, known, _ in BENCHMARKS.values() for size in known})
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("benchmark", nargs="?", default="all", choices=[*BENCHMARKS, "all"])
    parser.add_argument("--size", choices=sizes, help="default: the benchmark's own; `all` skips those without it")
    parser.add_argument("--repeats", type=int, default=7, help="rounds, at least 5 for figures to quote")
    parser.add_argument("--budget", type=float, default=460, help="seconds that `gpu` may take; `all` leaves it out")
    parser.add_argument("--json", type=Path, help="write the records to this file as they come")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmarks named on the command line; what each finds is printed and written as soon as it is there."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    names = [options.benchmark] if options.benchmark != "all" else [name for name in BENCHMARKS if name != "gpu"]
    runs = []
    for measure, known, default in (BENCHMARKS[name] for name in names):
        runs += [(measure, size) for size in ([options.size] if options.size else default) if size in known]
    if not runs:
        parser.error(f"{names[0]} has no size {options.size}, choose from {', '.join(BENCHMARKS[names[0]][1])}")
    print(conditions())
    report(itertools.chain.from_iterable(measure(size, options) for measure, size in runs), options.json)


if __name__ == "__main__":
    main()
