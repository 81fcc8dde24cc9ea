"""``evaluate``."""

import json
from dataclasses import replace
from pathlib import Path

from allspark_fast.cli import command_parser
from allspark_fast.cli.recipe import parse_config
from allspark_fast.config import Config
from allspark_fast.data.sources import find_data, open_val
from allspark_fast.errors import InputError
from allspark_fast.files import make_folder, require_parent, write_text
from allspark_fast.inference.evaluate import Report, evaluate_images
from allspark_fast.inference.metrics import score_record, score_table
from allspark_fast.recipes import RECIPES
from allspark_fast.weights.spec import load_model

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
    model, spec = load_model(options.weights)
    info, images = open_val(replace(config.data, range=spec.range))
    report = Report([entry.image for entry in images.entries], spec)
    scores = report.complete(evaluate_images(model, spec, info, images, config, each=report.note))
    if spec.info.classes != info.classes:
        print(f"classes in the order of the weights; the labels of {info.name} have another, and are matched by name")
    print(score_table(scores, spec.info))
    if options.json is not None:
        write_text(options.json, json.dumps(score_record(scores, spec.info), indent=2))
    if options.out is not None:
        report.write(options.out, scores)
        print(f"{options.out}: classes.csv, images.csv and, with the images of the lowest mIoU, worst.png")
    return 0
