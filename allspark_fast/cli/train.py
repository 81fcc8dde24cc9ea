"""``train``."""

from pathlib import Path

from allspark_fast.cli.recipe import parse_config
from allspark_fast.signals import STOPPED
from allspark_fast.training.trainer import train


def run(arguments: list[str]) -> int:
    """Train, or resume a run; the status is 75 if a signal stopped it."""
    recipe, config = parse_config(arguments, "train")
    return 0 if train(config, config.run.output_dir or Path("runs") / recipe) else STOPPED
