"""``python -m bench``: one table for each operator and size."""

import argparse
import json
from pathlib import Path

from bench import bench_channel_attention, bench_semantic_memory, bench_upsample
from bench.harness import Record, conditions, run, table

BENCHMARKS = {
    "attention": bench_channel_attention.cases,
    "memory": bench_semantic_memory.cases,
    "loss": lambda size: bench_upsample.cases(size)[:1],
    "argmax": lambda size: bench_upsample.cases(size)[1:],
}


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmarks named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("benchmark", nargs="?", default="all", choices=[*BENCHMARKS, "all"])
    parser.add_argument("--size", default="pascal", choices=bench_channel_attention.SIZES)
    parser.add_argument("--repeats", type=int, default=7, help="rounds, at least 5 for figures to quote")
    parser.add_argument("--json", type=Path, help="write the records of the tables to this file")
    options = parser.parse_args(arguments)
    names = list(BENCHMARKS) if options.benchmark == "all" else [options.benchmark]
    print(conditions())
    records: list[Record] = []
    for case in (case for name in names for case in BENCHMARKS[name](options.size)):
        records += (new := run(case, options.repeats))
        print(f"\n{case.op}, {case.size}\n\n{table(new)}", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"conditions": conditions(), "records": records}, indent=1))


if __name__ == "__main__":
    main()
