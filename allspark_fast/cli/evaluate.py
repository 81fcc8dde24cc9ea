"""``evaluate``."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from allspark_fast.cli import command_parser
from allspark_fast.cli.recipe import parse_config
from allspark_fast.config import Config
from allspark_fast.data.loader import evaluation_loader
from allspark_fast.data.sources import open_val
from allspark_fast.device import choose_device
from allspark_fast.files import require_parent, write_atomically
from allspark_fast.inference.evaluate import evaluate
from allspark_fast.inference.scores import draw_confusion, score_record, score_table
from allspark_fast.recipes import RECIPES
from allspark_fast.weights.spec import find_weights, load_model


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = command_parser("evaluate")
    parser.usage = "%(prog)s WEIGHTS [--split FILE] [--json FILE] [RECIPE [--group.field value ...]]"
    parser.epilog = (
        f"RECIPE ({', '.join(RECIPES)}) and its settings, as `check` takes them, say where the images are and whether "
        "they are taken whole; without, WEIGHTS is the folder of a run, whose images are scored. Crop and "
        "normalisation are the weights'."
    )
    parser.add_argument(
        "weights", metavar="WEIGHTS", type=Path, help="folder of a run, or a file; confusion.png goes beside them"
    )
    parser.add_argument("--split", type=Path, metavar="FILE", help="images to score, if not the validation images")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all scores to this file")
    return parser


def run(arguments: list[str]) -> int:
    """Score weights on the validation images of their run, or of a recipe; writes confusion.png beside them."""
    parser = build_parser()
    options, settings = parser.parse_known_args(arguments)
    if settings and settings[0].startswith("-"):
        parser.error(f"unrecognized arguments: {' '.join(settings)} (settings come after a RECIPE)")
    config = parse_config(settings, "evaluate WEIGHTS")[1] if settings else _config_of_run(options.weights)
    if options.split is not None:
        if config.data.dataset == "scenes":
            raise ValueError("--split: rendered scenes have no split files; leave it out")
        config = replace(config, data=replace(config.data, val=options.split))
    if options.json is not None:
        require_parent(options.json)
    device = choose_device(config.run.device)
    info, images = open_val(config.data)
    model, spec = load_model(options.weights)
    classes = len(info.classes)
    if len(spec.info.classes) != classes:
        known = len(spec.info.classes)
        raise ValueError(f"{options.weights} knows {known} classes, the labels of {info.name} are of {classes}")
    samples = evaluation_loader(images, mean=spec.mean, std=spec.std, num_workers=config.eval.workers)
    seen = tqdm(samples, total=len(images.entries), unit="image", dynamic_ncols=True)
    scores = evaluate(model.to(device), seen, classes, mode=config.eval.mode, crop=spec.crop, device=device)
    print(score_table(scores, info))
    if options.json is not None:
        record = json.dumps(score_record(scores, info), indent=2)
        write_atomically(options.json, lambda temporary: temporary.write_text(record, encoding="utf-8"))
    draw_confusion(find_weights(options.weights).parent / "confusion.png", scores, info)
    return 0


def _config_of_run(folder: Path) -> Config:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder}: no run folder, there is no config.json in it; to score other weights name a RECIPE after them"
        )
    return Config.read(folder / "config.json")
