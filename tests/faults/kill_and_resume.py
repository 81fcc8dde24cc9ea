"""Kills runs by SIGKILL, resumes them, and compares what they leave with an uninterrupted run.

Each kill waits until the run has come to a phase so many times, in turn one of AIMS, and then for a moment; times and
moments are random.

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
from allspark_fast.config import Config, changed_fields
from allspark_fast.training import trainer
from tests.helpers.runs import different_states, logged

# What a run does, by the function that does it, and what kills wait for.
PHASES = {
    "train_step": "step",
    "save_checkpoint": "checkpoint",
    "evaluate": "validation",
    "draw_curves": "plotting",
    "draw_predictions": "plotting",
}
AIMS = ("checkpoint", "validation", "plotting", "step")
# Seconds, at most, from the phase to the kill: about as long as a checkpoint or validation takes.
DELAY = 0.1
# A checkpoint every other step and frequent validation: about as much time in each of them as in steps.
ARGUMENTS = """
train scenes --data.scenes 3 8 2 --data.crop 64 --data.workers 0 --model.backbone mit_tiny --model.embedding-dim 16
--train.epochs 4 --train.batch-size 2 --train.warmup-epochs 1 --train.pseudo-from-epoch 2 --eval.every 1
--run.log-every 1 --run.save-every 2 --run.device cpu --run.output-dir
""".split()  # noqa: SIM905 as one types them


class Run:
    """A run that begins or goes on in a forked process, which saves the imports, and tells its parent what it does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder.with_suffix(".log")
        self._times = mmap.mmap(-1, len(AIMS))  # how often it has come to each phase
        self._phase = mmap.mmap(-1, 1)  # in which it is, counted from 1
        self.process = os.fork()
        if not self.process:
            status = 1
            try:
                output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                for stream in (1, 2):
                    os.dup2(output, stream)
                for name, phase in PHASES.items():
                    setattr(trainer, name, self._marked(getattr(trainer, name), AIMS.index(phase)))
                status = command_line([*ARGUMENTS, str(folder)])
            finally:
                os._exit(status)

    def _marked(self, function: Callable[..., object], number: int) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            self._times[number] += 1
            self._phase[0] = number + 1
            try:
                return function(*args, **kwargs)
            finally:
                self._phase[0] = 0

        return call

    def wait_for(self, aim: str, times: int) -> None:
        """Wait until it has come so often to a phase, or has ended."""
        while self._times[AIMS.index(aim)] < times and not self.ended():
            time.sleep(0.001)

    def ended(self) -> bool:
        return os.waitid(os.P_PID, self.process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def kill(self) -> str:
        """Kill it; return the phase in which it was."""
        os.kill(self.process, signal.SIGSTOP)
        phase = ("between", *AIMS)[self._phase[0]]
        os.kill(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)
        return phase

    def finish(self) -> None:
        _, status = os.waitpid(self.process, 0)
        assert status == 0, self.log.read_text()


def differences(whole: Path, broken: Path) -> list[str]:
    """What a resumed run has left otherwise than an uninterrupted one."""
    wrong = different_states(whole, broken)
    if (whole / "best.safetensors").read_bytes() != (broken / "best.safetensors").read_bytes():
        wrong.append("best.safetensors")
    settings = (Config.read(folder / "config.json") for folder in (whole, broken))
    wrong += [change.name for change in changed_fields(*settings) if change.name != "run.output_dir"]
    # As text, in which a NaN equals itself.
    if str(logged(whole)) != str(logged(broken)):
        wrong.append("metrics.jsonl")
    return wrong + [str(path) for path in broken.rglob(".*")]


def kill_and_resume(kills: int, seed: int, folder: Path) -> tuple[Counter[str], int]:
    """Kill runs until there were so many kills; each is resumed, and killed again, until it comes to its end.

    Returns:
        kills by what the run was doing, and how many runs were compared.

    Raises:
        AssertionError: a run fails, or does not end as the uninterrupted one.
    """
    torch.set_num_threads(1)
    draw, killed, compared = random.Random(seed), Counter(), 0
    Run(folder / "whole").finish()
    while True:
        broken = folder / f"broken{compared}"
        run = Run(broken)
        if killed.total() < kills:
            run.wait_for(AIMS[killed.total() % len(AIMS)], times=draw.randint(1, 4))
            time.sleep(draw.uniform(0, DELAY))
            if not run.ended():
                killed[run.kill()] += 1
                continue
        run.finish()
        wrong = differences(folder / "whole", broken)
        assert not wrong, f"{broken} differs from the uninterrupted run: {wrong}"
        compared += 1
        if killed.total() == kills:
            return killed, compared


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        killed, compared = kill_and_resume(options.kills, options.seed, Path(folder))
    print(", ".join(f"{name}: {count}" for name, count in killed.items()), f"; {compared} runs compared", sep="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
