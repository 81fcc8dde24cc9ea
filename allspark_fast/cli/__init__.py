"""Commands of ``python -m allspark_fast``: one module each, whose ``run(arguments)`` returns the exit status.

Those that take more than a recipe have a ``PARSER`` too.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

from allspark_fast.errors import InputError
from allspark_fast.files import require_parent

# Each is imported only when it runs.
COMMANDS = {
    "train": "train [RECIPE] [--group.field value ...]: train, or resume a run",
    "compare": "compare [RECIPE] [--methods ...] [--seeds ...] [--labels ...]: do unlabeled images help?",
    "evaluate": "evaluate WEIGHTS [RECIPE ...]: score weights on the validation images of their run, or of a recipe",
    "predict": "predict WEIGHTS IMAGE|FOLDER|PATTERN ...: label images",
    "convert": "convert SRC DST: convert weights of the public AllSpark code to ours, and back",
    "export": "export WEIGHTS OUT: write a model as one graph, .pt2 or .onnx",
    "info": "info WEIGHTS: describe a file of weights",
    "selftest": "selftest: check every kernel on this machine's device",
    "check": "check [RECIPE] [--json] [--group.field value ...]: describe the data set and list every problem of it",
    "splits": "splits ROOT [AMOUNT]: choose which images to train on with their labels, and which to validate on",
}


def command_parser(name: str) -> argparse.ArgumentParser:
    """Build a parser for a command's arguments that says what the command is for."""
    _, _, description = COMMANDS[name].partition(": ")
    return argparse.ArgumentParser(prog=f"python -m allspark_fast {name}", description=description)


def require_new(path: Path, *, overwrite: bool) -> None:
    """Check, before work starts, that a file can be written without replacing one, unless that is asked for."""
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists: pass --overwrite to replace it")
    require_parent(path)


def property_table(properties: Mapping[str, str]) -> str:
    """Return a line for each property, values aligned."""
    width = max(map(len, properties))
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in properties.items())
