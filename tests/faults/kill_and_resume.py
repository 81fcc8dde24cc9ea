"""Kills runs by SIGKILL, resumes them, and compares what they leave with an uninterrupted run.

Each kill waits until the run has come to a phase so many times, in turn one of AIMS, and then for a moment; times and
moments are random.

python -m tests.faults.kill_and_resume --kills 50
"""

import argparse
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.synchronize import Event
from pathlib import Path

import torch

from allspark_fast.__main__ import main as command_line
from allspark_fast.config import Config, changed_fields
from allspark_fast.training import trainer
from allspark_fast.weights.files import read_weights
from tests.helpers.runs import assert_same_run, differences, tiny_arguments

# What kills wait for, and the function of the trainer that does it.
AIMS = {"checkpoint": "save_checkpoint", "validation": "evaluate", "plotting": "draw_curves", "step": "train_step"}
# Seconds, at most, from the phase to the kill: about as long as a checkpoint or validation takes.
DELAY = 0.1
# A checkpoint every other step and frequent validation: about as much time in each of them as in steps.
SETTINGS = {
    "train.epochs": 4, "train.warmup-epochs": 1, "train.pseudo-from-epoch": 2, "eval.every": 1, "run.log-every": 1,
    "run.save-every": 2,
}  # fmt: skip


def train(folder: Path, function: str, times: int, reached: Event) -> None:
    """Begin or resume a run, and tell when it has called a function of the trainer so many times."""
    log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    original, left = getattr(trainer, function), times

    def counted(*args: object, **kwargs: object) -> object:
        nonlocal left
        left -= 1
        if left == 0:
            reached.set()
        return original(*args, **kwargs)

    setattr(trainer, function, counted)
    sys.exit(command_line(["train", *tiny_arguments(folder, SETTINGS)]))


def train_and_kill(folder: Path, aim: str, times: int, delay: float) -> bool:
    """Begin or resume a run, and kill it after it has come to a phase so many times; return whether it came to that."""
    fork = multiprocessing.get_context("fork")  # saves the imports
    reached = fork.Event()
    run = fork.Process(target=train, args=(folder, AIMS[aim], times, reached))
    run.start()
    while run.is_alive():
        if reached.wait(0.01):
            time.sleep(delay)
            run.kill()
            break
    run.join()
    assert run.exitcode in (0, -signal.SIGKILL), folder.with_suffix(".log").read_text()
    return run.exitcode != 0


def assert_left_the_same(whole: Path, broken: Path) -> None:
    """Compare all that two runs have left, but pictures and events."""
    assert_same_run(whole, broken)
    best = [folder / "best.safetensors" for folder in (whole, broken)]
    assert differences(*map(read_weights, best)) == []
    settings = (Config.read(folder / "config.json") for folder in (whole, broken))
    assert [change.name for change in changed_fields(*settings)] == ["run.output_dir"]
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
        folder = Path(name)
        train_and_kill(folder / "whole", "step", times=0, delay=0)
        unfinished = True
        while unfinished:
            aim = [*AIMS][killed.total() % len(AIMS)]
            times = draw.randint(1, 4) if killed.total() < options.kills else 0
            if train_and_kill(folder / f"broken{compared}", aim, times, draw.uniform(0, DELAY)):
                killed[aim] += 1
                continue
            assert_left_the_same(folder / "whole", folder / f"broken{compared}")
            compared += 1
            unfinished = killed.total() < options.kills
    print(", ".join(f"{name}: {count}" for name, count in killed.items()), f"; {compared} runs compared", sep="")


if __name__ == "__main__":
    main()
