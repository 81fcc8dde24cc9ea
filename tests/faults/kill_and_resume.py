"""Kills runs by SIGKILL, resumes them, and compares what they leave with an uninterrupted run.

Moments are random; every other kill then waits until the run is in a phase, in turn one of AIMS.

python -m tests.faults.kill_and_resume --kills 50
"""

import argparse
import mmap
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from allspark_fast.__main__ import main as command_line
from allspark_fast.training import trainer
from tests.helpers.runs import different_states, logged

# What a run does, by the function that does it.
PHASES = {
    (trainer, "train_step"): "step",
    (trainer, "save_checkpoint"): "checkpoint",
    (trainer, "evaluate"): "validation",
    (trainer, "draw_curves"): "plotting",
    (trainer, "draw_predictions"): "plotting",
}
NAMES = ["between", *dict.fromkeys(PHASES.values())]
AIMS = ("checkpoint", "validation", "plotting", "step")
# Seconds, at most, from the phase that a kill waits for to the kill: about as long as a checkpoint or validation takes.
DELAY = 0.1
# A checkpoint every other step and frequent validation: about as much time in each of them as in steps.
ARGUMENTS = {
    "data.crop": 64, "data.workers": 0, "model.backbone": "mit_tiny", "model.embedding-dim": 16, "train.epochs": 4,
    "train.batch-size": 2, "train.warmup-epochs": 1, "train.pseudo-from-epoch": 2, "eval.every": 1,
    "run.log-every": 1, "run.save-every": 2, "run.device": "cpu",
}  # fmt: skip


def start(folder: Path, phase: mmap.mmap) -> int:
    """Begins or resumes a run in a forked process, which saves the imports, and returns its id."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        output = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        for (module, name), label in PHASES.items():
            setattr(module, name, marked(getattr(module, name), NAMES.index(label), phase))
        options = [str(x) for name, value in ARGUMENTS.items() for x in (f"--{name}", value)]
        scenes = ["--data.scenes", "3", "8", "2"]
        status = command_line(["train", "scenes", *scenes, *options, "--run.output-dir", str(folder)])
    finally:
        os._exit(status)


def marked(function: Callable[..., object], number: int, phase: mmap.mmap) -> Callable[..., object]:
    """The function, which notes for the parent process that it runs."""

    def call(*args: object, **kwargs: object) -> object:
        phase[0] = number
        try:
            return function(*args, **kwargs)
        finally:
            phase[0] = 0

    return call


def wait_for(number: int, phase: mmap.mmap, process: int) -> None:
    """Waits until a run is in a phase, or has ended."""
    while phase[0] != number and os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.001)


def finish(process: int, folder: Path) -> None:
    _, status = os.waitpid(process, 0)
    assert status == 0, folder.with_suffix(".log").read_text()


def differences(whole: Path, broken: Path) -> list[str]:
    """What a resumed run has left otherwise than an uninterrupted one."""
    wrong = different_states(whole, broken)
    for name in ("best.safetensors", "config.json"):
        if (whole / name).read_bytes() != (broken / name).read_bytes():
            wrong.append(name)
    # As text, in which a NaN equals itself.
    if str(logged(whole)) != str(logged(broken)):
        wrong.append("metrics.jsonl")
    return wrong + [str(path) for path in broken.rglob(".*")]


def kill_and_resume(kills: int, seed: int, folder: Path) -> Counter[str]:
    """Kills runs until there were ``kills``; each is resumed, and killed again, until it comes to its end.

    Returns:
        kills by what the run was doing.

    Raises:
        AssertionError: a run fails, or does not end as the uninterrupted one.
    """
    torch.set_num_threads(1)
    moments, seconds = random.Random(seed), 0.0
    phase, killed = mmap.mmap(-1, 1), Counter()
    for name in ("warm-up", "whole"):
        started = time.monotonic()
        finish(start(folder / name, phase), folder / name)
        seconds = time.monotonic() - started
    number = 0
    while killed.total() < kills:
        broken = folder / f"broken{number}"
        process = start(broken, phase)
        time.sleep(moments.uniform(0, seconds))
        turn, waits = divmod(killed.total(), 2)
        if waits:
            wait_for(NAMES.index(AIMS[turn % len(AIMS)]), phase, process)
            time.sleep(moments.uniform(0, DELAY))
        if os.waitpid(process, os.WNOHANG) == (0, 0):
            os.kill(process, signal.SIGSTOP)
            killed[NAMES[phase[0]]] += 1
            phase[0] = 0
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        else:
            wrong = differences(folder / "whole", broken)
            assert not wrong, f"{broken} differs from the uninterrupted run: {wrong}"
            number += 1
    finish(start(folder / f"broken{number}", phase), folder / f"broken{number}")
    wrong = differences(folder / "whole", folder / f"broken{number}")
    assert not wrong, f"broken{number} differs from the uninterrupted run: {wrong}"
    killed["runs compared"] = number + 1
    return killed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        killed = kill_and_resume(options.kills, options.seed, Path(folder))
    print(", ".join(f"{name}: {count}" for name, count in killed.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
