"""Commands of ``python -m allspark_fast``: a module each, whose ``run(arguments)`` returns the exit status.

Those that take more than a recipe have ``build_parser()`` too.
"""

import argparse
import sys
from typing import Any

# Each is imported only when it runs.
COMMANDS = {
    "train": "train [RECIPE] [--group.field value ...]: train, or go on with a run",
    "evaluate": "evaluate WEIGHTS [RECIPE ...]: score weights on the validation images of their run, or of a recipe",
    "predict": "predict WEIGHTS IMAGE|FOLDER|PATTERN ...: label images",
    "convert": "convert SRC DST: convert weights of the public code or of Hugging Face SegFormer to ours, and back",
    "export": "export WEIGHTS OUT: write a model as one graph (.pt2 or .onnx), or as weights (.safetensors)",
    "info": "info [WEIGHTS]: say what a file of weights holds, or, without one, what this machine runs",
    "selftest": "selftest: compile and check every Triton kernel on the device at hand",
    "check": "check [RECIPE] [--group.field value ...]: list every problem of the data",
    "splits": "splits ROOT [AMOUNT]: choose which images to train on with their labels, and which to validate on",
}


class _Parser(argparse.ArgumentParser):
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        # For a positional argument that is a second one, argparse before Python 3.12 gives an empty list.
        if list(sys.argv[1:] if args is None else args).count("--") > 1:
            self.error("-- can stand there once only")
        return super().parse_known_args(args, namespace)


def command_parser(name: str) -> argparse.ArgumentParser:
    """A parser for a command's arguments that says what the command is for."""
    _, _, description = COMMANDS[name].partition(": ")
    return _Parser(prog=f"python -m allspark_fast {name}", description=description)
