"""Commands of ``python -m allspark_fast``: one module each, whose ``run(arguments)`` returns the exit status.

Those that take more than a recipe have a ``PARSER`` too.
"""

import argparse
from pathlib import Path

from allspark_fast.errors import InputError
from allspark_fast.files import require_parent

# Each is imported only when it runs.
COMMANDS = {
    "train": "train a recipe, or resume its run",
    "compare": "train methods over seeds: do unlabeled images help?",
    "evaluate": "score weights on the validation images of a run or a recipe",
    "predict": "label images",
    "convert": "convert weights of the public AllSpark code to ours, and back",
    "export": "write a model as one graph, .pt2 or .onnx",
    "info": "describe a file of weights",
    "selftest": "check every kernel on this machine's device",
    "check": "describe a data set and list every problem of it",
    "splits": "choose images to train on with labels, and to validate on",
}


def command_parser(name: str) -> argparse.ArgumentParser:
    """Build a parser for a command's arguments that says what the command is for."""
    return argparse.ArgumentParser(prog=f"python -m allspark_fast {name}", description=COMMANDS[name])


def require_new(path: Path, *, overwrite: bool) -> None:
    """Check, before work starts, that a file can be written without replacing one, unless that is asked for."""
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists: pass --overwrite to replace it")
    require_parent(path)
