"""``evaluate``."""

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
from allspark_fast.errors import InputError
from allspark_fast.files import require_parent, write_atomically
from allspark_fast.inference.evaluate import evaluate
from allspark_fast.inference.scores import draw_confusion, score_record, score_table
from allspark_fast.recipes import RECIPES
from allspark_fast.weights.spec import load_model

PARSER = command_parser("evaluate")
PARSER.usage = "%(prog)s WEIGHTS [--split FILE] [--json FILE] [--confusion FILE] [RECIPE [--group.field value ...]]"
PARSER.epilog = (
    f"RECIPE ({', '.join(RECIPES)}) and its settings, as `check` takes them, say where the images are and how they "
    "are evaluated; without it, WEIGHTS must be a run folder, and the settings are those of the run. Crop and "
    "normalization are those of the weights."
)
PARSER.add_argument("weights", metavar="WEIGHTS", type=Path, help="a run folder, or a file; a file needs a RECIPE")
PARSER.add_argument("--split", type=Path, metavar="FILE", help="split file to score, if not the validation images")
PARSER.add_argument("--json", type=Path, metavar="FILE", help="write all scores to this file")
PARSER.add_argument(
    "--confusion",
    type=Path,
    metavar="FILE",
    help="draw the confusion matrix into this file; default for a run without RECIPE: its confusion.png",
)


def run(arguments: list[str]) -> int:
    """Score weights on the validation images of their run, or of a recipe."""
    options, settings = PARSER.parse_known_args(arguments)
    if settings and settings[0].startswith("-"):
        PARSER.error(f"unrecognized arguments: {' '.join(settings)} (settings come after a RECIPE)")
    if settings:
        _, config = parse_config(settings, "evaluate WEIGHTS")
        picture = options.confusion
    else:
        if not (options.weights / "config.json").is_file():
            raise FileNotFoundError(
                f"{options.weights}: not a run folder (no config.json); for other weights name a RECIPE"
            )
        config = Config.read(options.weights / "config.json")
        picture = options.confusion or options.weights / "confusion.png"
    if options.split is not None:
        if config.data.dataset == "scenes":
            raise InputError("--split: rendered scenes have no split files; leave it out")
        config = replace(config, data=replace(config.data, val=options.split))
    for file in filter(None, (options.json, picture)):
        require_parent(file)
    device = choose_device(config.run.device)
    model, spec = load_model(options.weights)
    info, images = open_val(replace(config.data, range=spec.range))
    known, found = len(spec.info.classes), len(info.classes)
    if known != found:
        raise InputError(f"{options.weights} has {known} classes, but the labels of {info.name} have {found}")
    workers, pin_memory = config.eval.workers, device.type == "cuda"
    samples = evaluation_loader(images, mean=spec.mean, std=spec.std, num_workers=workers, pin_memory=pin_memory)
    scores = evaluate(
        model.to(device),
        tqdm(samples, total=len(images.entries), unit="image", dynamic_ncols=True),
        found,
        mode=config.eval.mode,
        crop=spec.crop,
        device=device,
        batch_size=config.eval.batch_size,
        amp=config.train.amp,
    )
    print(score_table(scores, info))
    if options.json is not None:
        record = json.dumps(score_record(scores, info), indent=2)
        write_atomically(options.json, lambda temporary: temporary.write_text(record, encoding="utf-8"))
    if picture is not None:
        draw_confusion(picture, scores, info)
    return 0
