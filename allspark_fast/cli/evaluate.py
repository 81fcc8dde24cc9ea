"""``evaluate``."""

import csv
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from allspark_fast.cli import command_parser
from allspark_fast.cli.recipe import parse_config
from allspark_fast.config import Config
from allspark_fast.data.info import IGNORE_INDEX, match_classes
from allspark_fast.data.loader import EvalSample, evaluation_loader
from allspark_fast.data.sources import find_data, open_val
from allspark_fast.device import choose_device
from allspark_fast.errors import InputError
from allspark_fast.files import make_folder, require_parent, write_atomically
from allspark_fast.inference.evaluate import evaluate
from allspark_fast.inference.metrics import score_image, score_record, score_table
from allspark_fast.inference.pictures import Row, comparison, draw_panel
from allspark_fast.recipes import RECIPES
from allspark_fast.text import progress
from allspark_fast.weights.spec import ModelSpec, load_model

PARSER = command_parser("evaluate")
PARSER.usage = "%(prog)s WEIGHTS [--split FILE] [--out FOLDER] [--json FILE] [RECIPE] [--group.field value ...]"
PARSER.epilog = (
    f"RECIPE ({', '.join(RECIPES)}) and its settings, as `check` takes them, say where the images are and how they "
    "are evaluated; without it, WEIGHTS must be a run folder or a file of it, and other settings are those of the run. "
    "Crop, normalization and classes are those of the weights; labels are matched to them by name."
)
PARSER.add_argument("weights", metavar="WEIGHTS", type=Path, help="a run folder, or a file; a file needs a RECIPE")
PARSER.add_argument("--split", type=Path, metavar="FILE", help="split file to score, if not the validation images")
PARSER.add_argument(
    "--out",
    type=Path,
    metavar="FOLDER",
    help="for scores by class and by image, classes.csv and images.csv, and the images of the lowest mIoU, worst.png; "
    "default: evaluation/ in the run folder, or evaluation_SPLIT/; nothing is written for other weights",
)
PARSER.add_argument("--json", type=Path, metavar="FILE", help="write all scores and the confusion matrix to this file")
# Scores of an image, in its classes or, for accuracy, in its pixels; and images that worst.png shows.
_MEANS = ("iou", "dice", "accuracy", "boundary_f1")
_WORST = 6


def run(arguments: list[str]) -> int:
    """Score weights on the validation images of their run, or of a recipe."""
    options, settings = PARSER.parse_known_args(arguments)
    # A run folder, or that of a file in it, such as checkpoints/step_00000012.pt.
    folders = (options.weights, *options.weights.parents[:2])
    run = next((folder for folder in folders if (folder / "config.json").is_file()), None)
    if settings and not settings[0].startswith("-"):
        _, config = parse_config(settings, "evaluate WEIGHTS")
    elif run is not None:
        _, config = parse_config(settings, "evaluate WEIGHTS", Config.read(run / "config.json"))
        config = replace(config, data=find_data(config.data, run))
        options.out = options.out or run / ("evaluation" + (f"_{options.split.stem}" if options.split else ""))
    else:
        raise FileNotFoundError(
            f"{options.weights}: not a run folder (no config.json); for other weights name a RECIPE"
        )
    if options.split is not None:
        if config.data.dataset == "scenes":
            raise InputError("--split: rendered scenes have no split files; leave it out")
        config = replace(config, data=replace(config.data, val=options.split))
    if options.json is not None:
        require_parent(options.json)
    if options.out is not None:
        make_folder(options.out)
    device = choose_device(config.run.device)
    model, spec = load_model(options.weights)
    info, images = open_val(replace(config.data, range=spec.range))
    order = match_classes(spec.info.classes, info)
    indices = torch.tensor([*order, *[IGNORE_INDEX] * (256 - len(order))])  # by value of a label
    workers, pin_memory = config.eval.workers, device.type == "cuda"
    loader = evaluation_loader(images, mean=spec.mean, std=spec.std, num_workers=workers, pin_memory=pin_memory)
    bar = progress(loader, total=len(images.entries), unit="image")
    details = _Details([entry.image for entry in images.entries], spec)
    scores = evaluate(
        model.to(device),
        (sample._replace(label=indices[sample.label.long()]) for sample in bar),
        len(spec.info.classes),
        mode=config.eval.mode,
        crop=spec.crop,
        device=device,
        batch_size=config.eval.batch_size,
        amp=config.train.amp,
        each=details.note,
    )
    if spec.info.classes != info.classes:
        print(f"classes in the order of the weights; the labels of {info.name} have another, and are matched by name")
    scores = replace(scores, by_class={**scores.by_class, "boundary_f1": torch.stack(details.boundary).nanmean(0)})
    print(score_table(scores, spec.info))
    if options.json is not None:
        record = json.dumps(score_record(scores, spec.info), indent=2)
        write_atomically(options.json, lambda temporary: temporary.write_text(record, encoding="utf-8"))
    if options.out is not None:
        columns = {**scores.by_class, "pixels": scores.confusion.sum(1)}
        rows = zip(spec.info.classes, *(values.tolist() for values in columns.values()), strict=True)
        _write_csv(options.out / "classes.csv", ("class", *columns), rows)
        iou = (f"iou {name}" for name in spec.info.classes)
        _write_csv(options.out / "images.csv", ("image", *_MEANS, *iou), sorted(details.rows))
        if details.worst:
            draw_panel(options.out / "worst.png", [row for _, row in details.worst], spec.info)
        print(f"{options.out}: classes.csv, images.csv and, with the images of the lowest mIoU, worst.png")
    return 0


class _Details:
    """What is noted of each image: its scores, and pictures of the worst ones."""

    def __init__(self, names: Sequence[str], spec: ModelSpec) -> None:
        self.names, self.spec = names, spec
        self.boundary: list[Tensor] = []
        self.rows: list[tuple[Any, ...]] = []
        self.worst: list[tuple[float, Row]] = []

    def note(self, index: int, sample: EvalSample, labels: Tensor) -> None:
        """Note an image, see ``evaluate``."""
        name, classes = self.names[index], len(self.spec.info.classes)
        scores = score_image(labels, sample.label[0].to(labels.device), classes)
        by_class = {score: x.cpu().where(scores.present.cpu(), math.nan) for score, x in scores.by_class.items()}
        means = {score: x.nanmean().item() for score, x in by_class.items()} | {"accuracy": scores.pixel_accuracy}
        self.boundary.append(scores.by_class["boundary_f1"])
        self.rows.append((name, *(means[score] for score in _MEANS), *by_class["iou"].tolist()))
        if means["iou"] < (self.worst[-1][0] if len(self.worst) == _WORST else math.inf):
            row = f"{name}: mIoU {100 * means['iou']:.1f}", comparison(sample, labels, self.spec)
            self.worst = sorted([*self.worst, (means["iou"], row)], key=lambda image: image[0])[:_WORST]


def _write_csv(path: Path, header: Iterable[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table of text and numbers; NaN is empty."""

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            for row in rows:
                cells = (f"{x:.4f}" if isinstance(x, float) else x for x in row)
                writer.writerow("" if cell == "nan" else cell for cell in cells)

    write_atomically(path, write)
