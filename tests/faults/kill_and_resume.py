"""Kills runs by SIGKILL, resumes them, and compares what they leave with an uninterrupted run.

Each kill comes a moment after the run has done something so many times, in turn one of AIMS; times and moments are
random.

python -m tests.faults.kill_and_resume --kills 50
"""

import argparse
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path

import torch

from allspark_fast.__main__ import main as command_line
from allspark_fast.config import Config, changed_fields
from allspark_fast.training import checkpoint, trainer
from allspark_fast.weights.files import read_weights
from tests.helpers.runs import assert_same_run, differences, tiny_arguments

AIMS = {
    "checkpoint": (checkpoint, "save_checkpoint"),
    "validation": (trainer, "evaluate"),
    "plotting": (trainer, "draw_pictures"),
    "step": (trainer, "train_step"),
}
# Seconds, at most, from the call to the kill: about as long as a checkpoint or validation takes.
DELAY = 0.1
# A checkpoint every other step and frequent validation: about as much time in each of them as in steps.
SETTINGS = {
    "train.epochs": 4, "train.warmup-epochs": 1, "train.pseudo-from-epoch": 2, "eval.every": 1, "run.log-every": 1,
    "run.save-every": 2,
}  # fmt: skip


def train(folder: Path, aim: str, times: int, delay: float) -> None:
    """Begin or resume a run, and kill this process after it has called a function so many times; 0 for never."""
    log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    module, name = AIMS[aim]
    original, left = getattr(module, name), times

    def counted(*args: object, **kwargs: object) -> object:
        nonlocal left
        left -= 1
        if left == 0:
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return original(*args, **kwargs)

    setattr(module, name, counted)
    sys.exit(command_line(["train", *tiny_arguments(folder, SETTINGS)]))


def is_killed(*run: object) -> bool:
    """Begin or resume a run, arguments as ``train``'s, and return whether it was killed before its end."""
    process = multiprocessing.get_context("fork").Process(target=train, args=run)  # saves the imports
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), Path(run[0]).with_suffix(".log").read_text()
    return process.exitcode != 0


def assert_left_the_same(whole: Path, broken: Path) -> None:
    """Compare all that two runs have left, but pictures and events."""
    assert_same_run(whole, broken)
    best = [folder / "best.safetensors" for folder in (whole, broken)]
    assert differences(*map(read_weights, best)) == []
    settings = (Config.read(folder / "config.json") for folder in (whole, broken))
    assert list(changed_fields(*settings)) == ["run.output_dir"]
    assert not list(broken.rglob(".*"))  # unfinished files


def main() -> None:
    """Kill runs until there were so many kills; each is resumed, and killed again, until it comes to its end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    draw, killed, compared = random.Random(options.seed), Counter(), 0
    with tempfile.TemporaryDirectory() as name:
        whole = Path(name, "whole")
        is_killed(whole, "step", 0, 0)
        unfinished = True
        while unfinished:
            aim, broken = [*AIMS][killed.total() % len(AIMS)], whole.with_name(f"broken{compared}")
            times = draw.randint(1, 4) if killed.total() < options.kills else 0
            if is_killed(broken, aim, times, draw.uniform(0, DELAY)):
                killed[aim] += 1
                continue
            assert_left_the_same(whole, broken)
            compared += 1
            unfinished = killed.total() < options.kills
    print(", ".join(f"{name}: {count}" for name, count in killed.items()), f"; {compared} runs compared", sep="")


if __name__ == "__main__":
    main()
