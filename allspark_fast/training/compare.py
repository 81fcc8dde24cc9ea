"""Methods against each other: each trained over the same seeds and numbers of labels, and scored on held-out images."""

import itertools
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from allspark_fast.config import Config, DataConfig, Method
from allspark_fast.data.datasets import SegmentationDataset
from allspark_fast.data.sources import open_sources, open_val
from allspark_fast.data.splits import make_split, read_contents, spread, write_lists
from allspark_fast.errors import InputError
from allspark_fast.files import write_atomically, write_text
from allspark_fast.inference.evaluate import evaluate_images
from allspark_fast.training.log import read_metrics
from allspark_fast.training.trainer import train
from allspark_fast.weights.spec import load_model

Record = dict[str, Any]
# Supervised with every label says what more labels are worth: the headroom of the others.
Compared = Literal["full", Method]
METHODS: tuple[Compared, ...] = get_args(Compared)
_MEANS = {"val": "mIoU on val", "test": "mIoU on test", "minutes": "minutes"}


class Run(NamedTuple):
    """One run of a comparison."""

    method: str
    config: Config
    folder: Path


def plan(
    config: Config,
    folder: Path,
    *,
    methods: Sequence[Compared],
    seeds: Sequence[int],
    labels: Sequence[int] = (),
    every_label: Path | None = None,
) -> list[list[Run]]:
    """Return groups of runs that differ in their method alone, one group for each number of labels and seed.

    Args:
        config: of all runs, whose method and seed are replaced.
        folder: where the folders of the runs lie.
        methods: some of ``METHODS``.
        seeds: of the runs; ``seed0`` in the paths of split files becomes ``seed1``.
        labels: numbers of images with labels, drawn by the seed from the labeled list; empty for all of it.
        every_label: split file of all training images with labels, for ``full``, and to draw from; not for scenes.

    Raises:
        DataError: a split file is missing, or holds too few labels.
        InputError: ``full`` is asked for without ``every_label``.
    """
    groups = []
    counts: Sequence[int | None] = labels or [None]
    for count, seed in itertools.product(counts, seeds):
        few, group = _choose_labels(config.data, folder, count, seed, every_label), []
        for method in methods:
            # It is the same for all numbers of labels.
            if method == "full" and count != counts[0]:
                continue
            data = _with_every_label(few, every_label) if method == "full" else few
            open_sources(data)
            own: Method = "supervised" if method == "full" else method
            settings = replace(config, data=data, train=replace(config.train, seed=seed, method=own))
            group.append(Run(method, settings, folder / f"{method}_{count or 'all'}_labels_seed{seed}"))
        groups.append(group)
    return groups


def _with_every_label(data: DataConfig, every_label: Path | None) -> DataConfig:
    if data.dataset == "scenes":
        _, unlabeled, val = data.scenes
        return replace(data, scenes=(unlabeled, unlabeled, val))
    if every_label is None:
        raise InputError("full trains on every label: say which with --every-label FILE, or leave it out of --methods")
    return replace(data, labeled=every_label)


def _choose_labels(
    data: DataConfig, folder: Path, count: int | None, seed: int, every_label: Path | None
) -> DataConfig:
    """Take the lists of a seed and keep so many labels; the other images of the list become unlabeled."""
    if data.dataset == "scenes":
        return data if count is None else replace(data, scenes=(count, *data.scenes[1:]))
    labeled, unlabeled = (x and Path(str(x).replace("seed0", f"seed{seed}")) for x in (data.labeled, data.unlabeled))
    data = replace(data, labeled=labeled, unlabeled=unlabeled)
    if count is None:
        return data
    sources = open_sources(data if every_label is None else replace(data, labeled=every_label))
    assert isinstance(sources.labeled, SegmentationDataset)
    entries = sources.labeled.entries
    split = make_split(entries, spread(entries, seed, read_contents(sources.labeled)), (), count)
    listed = {entry.image for entry in entries}
    others = [entry for entry in sources.unlabeled.entries if entry.image not in listed]
    place = (folder / "splits" / f"{count}_seed{seed}").absolute()
    lists = {"labeled": split.labeled, "unlabeled": [*split.unlabeled, *others]}
    write_lists({place / f"{name}.txt": part for name, part in lists.items()}, overwrite=True)
    return replace(data, labeled=place / "labeled.txt", unlabeled=place / "unlabeled.txt")


def compare(groups: Sequence[Sequence[Run]], test: Path | None, *, equal_time: bool = False) -> Iterator[Record | None]:
    """Train all that is not trained yet, and yield a record of each run; None, and no more, if a signal stopped it.

    Args:
        groups: of ``plan``.
        test: split file of held-out images; None for the validation images, or for scenes that no run sees.
        equal_time: also train ``supervised`` for as long as the slowest method of the group took.
    """
    for group in groups:
        records: list[Record] = []
        for run in group:
            if not train(run.config, run.folder):
                yield None
                return
            records.append(_record(run, test))
            yield records[-1]
        for run, record in zip(group, records, strict=True):
            if equal_time and run.method == "supervised":
                slowest = max(x["minutes"] for x in records)
                steps = round(record["steps"] * slowest / record["minutes"])
                longer = replace(run.config, train=replace(run.config.train, steps=steps))
                yield from compare([[Run("supervised, equal time", longer, Path(f"{run.folder}_equal_time"))]], test)


def _record(run: Run, test: Path | None) -> Record:
    """Score the last weights of a finished run, averaged if the run averages them; mIoU in percent."""
    config, lines = run.config, read_metrics(run.folder)
    evaluations = [line for line in lines if "miou" in line]
    streams = 1 if config.train.method == "supervised" else 2
    rates = [line["images_per_s"] / (streams * config.train.batch_size) for line in lines if "images_per_s" in line]
    scores = run.folder / "test.json"
    if not scores.is_file():
        images = open_val(config.data if test is None else replace(config.data, val=test), held_out=True)
        tested = evaluate_images(*load_model(run.folder / "last.safetensors"), *images, config)
        write_text(scores, json.dumps(tested.mean_iou))
    return {
        "method": run.method,
        "labels": len(open_sources(config.data).labeled.entries),
        "seed": config.train.seed,
        "steps": evaluations[-1]["step"],
        "minutes": evaluations[-1]["step"] / statistics.median(rates) / 60,
        "val": 100 * evaluations[-1]["miou"],
        "test": 100 * json.loads(scores.read_text(encoding="utf-8")),
    }


def summary(records: Sequence[Record]) -> str:
    """Return a Markdown table: mean ± sample standard deviation over seeds, and the test score of every seed."""
    header = ["method", "labels", "steps", *_MEANS.values(), "each seed"]
    rows = [header, ["---"] * len(header)]
    for (method, labels), part in _groups(records).items():
        means = [_mean([record[name] for record in part]) for name in _MEANS]
        seeds = ", ".join(f"{record['test']:.1f}" for record in part)
        steps = "/".join(str(steps) for steps in dict.fromkeys(record["steps"] for record in part))
        rows.append([method, str(labels), steps, *means, seeds])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _groups(records: Sequence[Record]) -> dict[tuple[str, int], list[Record]]:
    groups: dict[tuple[str, int], list[Record]] = {}
    for record in records:
        groups.setdefault((record["method"], record["labels"]), []).append(record)
    return groups


def _mean(values: Sequence[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def draw(path: Path, records: Sequence[Record]) -> None:
    """Draw the test score of every run, and the means, over the number of labels."""
    from matplotlib.figure import Figure  # noqa: PLC0415 slow to import

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for color, method in enumerate(dict.fromkeys(record["method"] for record in records)):
        points = {labels: part for (name, labels), part in _groups(records).items() if name == method}
        means = [statistics.mean(record["test"] for record in part) for part in points.values()]
        axes.plot(list(points), means, "o-", color=f"C{color}", label=method)
        each = [(labels, record["test"]) for labels, part in points.items() for record in part]
        axes.plot(*zip(*each, strict=True), ".", color=f"C{color}", alpha=0.5)
    axes.set(xscale="log", xlabel="images with labels", ylabel="mIoU in percent, held-out images")
    axes.legend()
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120))
