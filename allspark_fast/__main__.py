"""Command line: ``python -m allspark_fast COMMAND``; ``train.py`` is its train command."""

import argparse
import logging
import sys
from pathlib import Path

import tyro

from allspark_fast.config import Config
from allspark_fast.data.datasets import SegmentationDataset, read_split, scan_folder
from allspark_fast.data.info import read_info
from allspark_fast.data.loader import evaluation_loader
from allspark_fast.data.sources import check_sources, open_sources
from allspark_fast.data.splits import classes_of, make_split, parse_amount, write_split
from allspark_fast.evaluate import evaluate
from allspark_fast.recipes import RECIPES
from allspark_fast.report import score_table
from allspark_fast.trainer import build_model, train
from allspark_fast.weights import load_weights

DEFAULT_RECIPE = "scenes"


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    commands = {"train": train_command, "evaluate": evaluate_command, "check": check_command, "splits": splits_command}
    if not arguments or arguments[0] not in commands:
        print(_usage(), file=sys.stderr)
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
    try:
        return commands[arguments[0]](arguments[1:])
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130


def train_command(arguments: list[str]) -> int:
    """``train [RECIPE] [--group.field value ...]``."""
    recipe, config = parse_config(arguments, "train")
    train(config, config.run.folder or Path("runs") / recipe)
    return 0


def evaluate_command(arguments: list[str]) -> int:
    """``evaluate RUN``: score the best weights of a run folder, or others, on its validation images."""
    parser = argparse.ArgumentParser(prog="python -m allspark_fast evaluate", description=evaluate_command.__doc__)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--weights", type=Path, help="weights to score, if not the best of the run")
    options = parser.parse_args(arguments)
    config_file = options.run / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(f"{options.run}: no run folder, there is no config.json in it")
    config = Config.from_json(config_file.read_text(encoding="utf-8"))
    sources = open_sources(config.data)
    model = build_model(config, len(sources.info.classes))
    load_weights(model, options.weights or options.run / "best.safetensors")
    samples = evaluation_loader(sources.val, mean=config.data.mean, std=config.data.std)
    classes = len(sources.info.classes)
    scores = evaluate(model, samples, classes, mode=config.eval.mode, crop=config.data.crop)
    print(score_table(scores, sources.info))
    return 0


def check_command(arguments: list[str]) -> int:
    """``check [RECIPE] [--group.field value ...]``: list every problem of the data."""
    _, config = parse_config(arguments, "check")
    problems = check_sources(config.data)
    for problem in problems:
        print(problem)
    errors = sum(not problem.is_warning for problem in problems)
    print(f"{errors} errors, {len(problems) - errors} warnings")
    return int(errors > 0)


def splits_command(arguments: list[str]) -> int:
    """``splits ROOT AMOUNT``: choose which images are labeled; writes labeled.txt and unlabeled.txt."""
    parser = argparse.ArgumentParser(prog="python -m allspark_fast splits", description=splits_command.__doc__)
    parser.add_argument("root", type=Path, help="folder of the data set")
    parser.add_argument("amount", help="labeled part: 1/16, 0.125 or a count")
    parser.add_argument("--list", type=Path, help="split file to divide; all of images/ if not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder to write to; ROOT/splits/AMOUNT if not given")
    options = parser.parse_args(arguments)
    entries = scan_folder(options.root) if options.list is None else read_split(options.list)
    dataset = SegmentationDataset(options.root, entries)
    labeled = sum(entry.label is not None for entry in entries)
    split = make_split(entries, parse_amount(options.amount, labeled), options.seed, classes_of(dataset))
    out = options.out or options.root / "splits" / options.amount.replace("/", "_")
    write_split(out, split)
    print(f"{out}: {len(split.labeled)} labeled, {len(split.unlabeled)} unlabeled")
    if split.uncovered:
        names = read_info(options.root).classes
        print(f"in no labeled image: {', '.join(names[index] for index in split.uncovered)}")
    return 0


def parse_config(arguments: list[str], command: str) -> tuple[str, Config]:
    """The recipe's name and its settings with the overrides of the command line.

    Raises:
        ValueError: there is no such recipe.
    """
    named = bool(arguments) and not arguments[0].startswith("-")
    recipe = arguments[0] if named else DEFAULT_RECIPE
    if recipe not in RECIPES:
        raise ValueError(f"there is no recipe {recipe!r}; recipes are {', '.join(RECIPES)}")
    config = tyro.cli(
        Config,
        prog=f"python -m allspark_fast {command} [RECIPE]",
        description=f"Recipes: {', '.join(RECIPES)}. Defaults below are those of {recipe}. {RECIPES[recipe].__doc__}",
        args=arguments[named:],
        default=RECIPES[recipe](),
        config=(tyro.conf.FlagConversionOff,),
    )
    return recipe, config


def _usage() -> str:
    commands = (train_command, evaluate_command, check_command, splits_command)
    lines = "\n".join(f"  {command.__doc__}" for command in commands)
    return f"usage: python -m allspark_fast COMMAND ...\n\n{lines}\n\nCOMMAND --help tells more."


if __name__ == "__main__":
    sys.exit(main())
