"""Trains for a given time and watches memory, file descriptors and speed: what leaks shows as a slope.

python -m tests.faults.soak --minutes 60
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from allspark_fast.report import read_metrics

PAGE = os.sysconf("SC_PAGE_SIZE")
# More epochs than any soak takes; validation, pictures and checkpoints come often.
ARGUMENTS = {
    "data.crop": 64, "data.workers": 1, "model.backbone": "mit_tiny", "model.embedding-dim": 16,
    "train.epochs": 100_000, "train.batch-size": 2, "train.pseudo-from-epoch": 0, "eval.every": 20,
    "run.log-every": 10, "run.save-every": 100, "run.device": "cpu",
}  # fmt: skip


class Reading(NamedTuple):
    """State of a process and the steps that it has taken."""

    seconds: float
    resident_mb: float
    descriptors: int
    step: int


def read(process: int, folder: Path, started: float) -> Reading:
    resident = int(Path(f"/proc/{process}/statm").read_text().split()[1]) * PAGE
    descriptors = len(os.listdir(f"/proc/{process}/fd"))
    steps = [record["step"] for record in read_metrics(folder)]
    return Reading(time.monotonic() - started, resident / 1e6, descriptors, max(steps, default=0))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=int, default=60)
    minutes = parser.parse_args().minutes
    options = [str(x) for name, value in ARGUMENTS.items() for x in (f"--{name}", value)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        command = [sys.executable, "-m", "allspark_fast", "train", "scenes", "--data.scenes", "3", "8", "2", *options]
        with (Path(name) / "log").open("w") as log:
            process = subprocess.Popen([*command, "--run.folder", str(folder)], stdout=log, stderr=log)
        started = time.monotonic()
        print("minute  resident MB  descriptors  steps/s", flush=True)
        before = Reading(0.0, 0.0, 0, 0)
        for minute in range(1, minutes + 1):
            time.sleep(max(0.0, started + 60 * minute - time.monotonic()))
            if process.poll() is not None:
                print((Path(name) / "log").read_text(), file=sys.stderr)
                return 1
            now = read(process.pid, folder, started)
            speed = (now.step - before.step) / (now.seconds - before.seconds)
            print(f"{minute:6}  {now.resident_mb:11.1f}  {now.descriptors:11}  {speed:7.2f}", flush=True)
            before = now
        process.kill()
        process.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
