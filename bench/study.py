"""``python -m bench.study``: do unlabeled images help? Methods over seeds and splits, chosen on val, scored on test.

``python -m bench.study camvid --every-label splits/train.txt --test splits/test.txt``
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from allspark_fast.cli import evaluate
from allspark_fast.cli.recipe import parse_config
from allspark_fast.config import Config, Method
from allspark_fast.data.sources import open_sources
from allspark_fast.signals import STOPPED
from allspark_fast.training.log import read_metrics
from allspark_fast.training.trainer import train
from bench.harness import Record, conditions, table, write_records

METHODS: tuple[Method, ...] = ("supervised", "semi", "allspark")
_MEANS = ("mIoU on val", "mIoU on test", "minutes")
_COLUMNS = {name: (name, 1.0) for name in ("method", "labels", "seeds", *_MEANS)}


class Run(NamedTuple):
    """One run of the study; ``full`` is supervised with every label, what more labels are worth."""

    name: str
    config: Config
    folder: Path


def plan(
    config: Config, folder: Path, seeds: Sequence[int], methods: Sequence[Method], every_label: Path | None = None
) -> list[Run]:
    """Return the runs, all of a seed before the next seed.

    ``seed0`` in the paths of the split files becomes ``seed1``, ...; ``every_label`` is the split file of all training
    images with labels: ``full`` trains on these, in as many steps. A missing split file is a DataError.
    """
    full: list[tuple[str, Method]] = [] if every_label is None else [("full", "supervised")]
    runs = []
    for seed in seeds:
        paths = (config.data.labeled, config.data.unlabeled)
        labeled, unlabeled = (path and Path(str(path).replace("seed0", f"seed{seed}")) for path in paths)
        for name, method in [*full, *zip(methods, methods, strict=True)]:
            data = replace(config.data, labeled=every_label if name == "full" else labeled, unlabeled=unlabeled)
            open_sources(data)
            settings = replace(config, data=data, train=replace(config.train, seed=seed, method=method))
            runs.append(Run(name, settings, folder / f"{name}_seed{seed}"))
    return runs


def finish(run: Run, test: Path | None) -> Record:
    """Train, or go on, and score the weights that are best on val on the split ``test``, once; mIoU in percent.

    Minutes are those of the training, on the clock, of runs that went through at once; None for others.
    """
    minutes, begun, started = run.folder / "minutes.json", run.folder.exists(), time.monotonic()
    if not train(run.config, run.folder):
        sys.exit(STOPPED)
    if not begun:
        minutes.write_text(json.dumps((time.monotonic() - started) / 60), encoding="utf-8")
    scores = run.folder / "test.json"
    if test is not None and not scores.is_file():
        evaluate.run([str(run.folder), "--split", str(test), "--json", str(scores)])
    return {
        "method": run.name,
        "seed": run.config.train.seed,
        "labels": len(open_sources(run.config.data).labeled.entries),
        "mIoU on val": 100 * max(line["miou"] for line in read_metrics(run.folder) if "miou" in line),
        "mIoU on test": None if test is None else 100 * json.loads(scores.read_text())["miou"],
        "minutes": json.loads(minutes.read_text()) if minutes.is_file() else None,
    }


def summary(records: Sequence[Record]) -> str:
    """Return a Markdown table: for each method mean ± sample standard deviation over its seeds."""
    rows = []
    for method in dict.fromkeys(record["method"] for record in records):
        of_method = [record for record in records if record["method"] == method]
        row: Record = {"method": method, "labels": of_method[0]["labels"], "seeds": len(of_method)}
        rows.append(row | {name: _mean([record[name] for record in of_method]) for name in _MEANS})
    return table(rows, _COLUMNS)


def _mean(cells: Sequence[str | float | None]) -> str | None:
    values = [float(cell) for cell in cells if cell is not None]
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}" if values else None


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the study's own options; what it leaves is for ``parse_config``."""
    parser = argparse.ArgumentParser("python -m bench.study [RECIPE] [--group.field value ...]", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/study"), help="of the run folders: %(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=METHODS)
    parser.add_argument("--every-label", type=Path, metavar="FILE", help="split file with all labels: adds `full`")
    parser.add_argument("--test", type=Path, metavar="FILE", help="split file of the images to report on")
    parser.add_argument("--json", type=Path, help="write a record for each run to this file")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Run a study, or go on with it; after each run print the table, and write the file, of what is finished."""
    options, settings = build_parser().parse_known_args(arguments)
    _, config = parse_config(settings, "train")
    print(conditions())
    records: list[Record] = []
    for run in plan(config, options.folder, options.seeds, options.methods, options.every_label):
        records.append(finish(run, options.test))
        print(f"\n{summary(records)}", flush=True)
        if options.json is not None:
            write_records(options.json, records)


if __name__ == "__main__":
    main()
