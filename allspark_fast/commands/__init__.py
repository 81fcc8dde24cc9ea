"""Commands of ``python -m allspark_fast``: a module each, whose ``run(arguments)`` returns the exit status.

Those that take more than a recipe have ``build_parser()`` too.
"""

import argparse

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


def command_parser(name: str) -> argparse.ArgumentParser:
    """A parser for a command's arguments that says what the command is for."""
    _, _, description = COMMANDS[name].partition(": ")
    return argparse.ArgumentParser(prog=f"python -m allspark_fast {name}", description=description)
