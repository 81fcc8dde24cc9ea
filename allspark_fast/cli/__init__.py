"""Commands of ``python -m allspark_fast``: one module each, whose ``run(arguments)`` returns the exit status.

Those that take more than a recipe have a ``PARSER`` too.
"""

import argparse
import sys
from collections.abc import Mapping
from typing import Any

# Each is imported only when it runs.
COMMANDS = {
    "train": "train [RECIPE] [--group.field value ...]: train, or resume a run",
    "compare": "compare [RECIPE] [--methods ...] [--seeds ...] [--labels ...]: do unlabeled images help?",
    "evaluate": "evaluate WEIGHTS [RECIPE ...]: score weights on the validation images of their run, or of a recipe",
    "predict": "predict WEIGHTS IMAGE|FOLDER|PATTERN ...: label images",
    "convert": "convert SRC DST: convert weights of the public AllSpark code or of Hugging Face to ours, and back",
    "export": "export WEIGHTS OUT: write a model as one graph, .pt2 or .onnx",
    "info": "info [WEIGHTS]: describe a file of weights, or, without one, this machine",
    "selftest": "selftest: check every kernel on this machine's device",
    "check": "check [RECIPE] [--group.field value ...]: list every problem of the data set",
    "splits": "splits ROOT [AMOUNT]: choose which images to train on with their labels, and which to validate on",
}


class _Parser(argparse.ArgumentParser):
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        # Before Python 3.12, argparse gives an empty list for a positional argument that is a second "--".
        if list(sys.argv[1:] if args is None else args).count("--") > 1:
            self.error("-- is allowed only once")
        return super().parse_known_args(args, namespace)


def command_parser(name: str) -> argparse.ArgumentParser:
    """Build a parser for a command's arguments that says what the command is for."""
    _, _, description = COMMANDS[name].partition(": ")
    return _Parser(prog=f"python -m allspark_fast {name}", description=description)


def property_table(properties: Mapping[str, str]) -> str:
    """Return a line for each property, values aligned."""
    width = max(map(len, properties))
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in properties.items())
