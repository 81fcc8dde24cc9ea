"""Trains for a given time and watches memory and file descriptors of all its processes, and speed: a leak is a slope.

python -m tests.faults.soak --minutes 60
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from allspark_fast.training.log import read_metrics

PAGE = os.sysconf("SC_PAGE_SIZE")
# More epochs than any soak takes; validation, pictures and checkpoints come often.
ARGUMENTS = {
    "data.crop": 64, "data.workers": 1, "model.backbone": "mit_tiny", "model.embedding-dim": 16,
    "train.epochs": 100_000, "train.batch-size": 2, "train.pseudo-from-epoch": 0, "eval.every": 20,
    "run.log-every": 10, "run.save-every": 100, "run.device": "cpu",
}  # fmt: skip


class Reading(NamedTuple):
    """Sums over a process and its children, and the steps that it has taken."""

    seconds: float
    resident_mb: float
    descriptors: int
    step: int


def read(process: int, folder: Path, started: float) -> Reading:
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    watched = [Path("/proc", x) for x in (str(process), *children)]
    # Pages that they share count for each of them: a growth of any shows all the same.
    resident = sum(int((x / "statm").read_text().split()[1]) for x in watched) * PAGE
    descriptors = sum(len(os.listdir(x / "fd")) for x in watched)
    steps = [record["step"] for record in read_metrics(folder)]
    return Reading(time.monotonic() - started, resident / 1e6, descriptors, max(steps, default=0))


def speed(readings: Sequence[Reading]) -> float:
    """Steps a second from the first reading to the last."""
    return (readings[-1].step - readings[0].step) / (readings[-1].seconds - readings[0].seconds)


def worsened(readings: Sequence[Reading]) -> list[str]:
    """What grew or slowed: the last quarter of the readings against the second one; the first warms up.

    Other work on the machine slows runs too, so only a loss of more than three tenths of the speed counts.
    """
    quarter = len(readings) // 4
    early, late = readings[quarter : 2 * quarter], readings[-quarter:]
    found = []
    growth = statistics.mean(x.resident_mb for x in late) / statistics.mean(x.resident_mb for x in early)
    if growth > 1.03:
        found.append(f"resident memory grew by {growth - 1:.1%}")
    if min(x.descriptors for x in late) > max(x.descriptors for x in early):
        found.append("file descriptors were never again as few as before")
    # Steps are counted from the reading before.
    before, after = speed(readings[quarter - 1 : 2 * quarter]), speed(readings[-quarter - 1 :])
    if after < 0.7 * before:
        found.append(f"speed fell from {before:.2f} to {after:.2f} steps a second")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=int, default=60, help="at least 4")
    minutes = parser.parse_args().minutes
    if minutes < 4:
        parser.error(f"--minutes must be at least 4, got {minutes}")
    options = [str(x) for name, value in ARGUMENTS.items() for x in (f"--{name}", value)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        command = [sys.executable, "-m", "allspark_fast", "train", "scenes", "--data.scenes", "3", "8", "2", *options]
        with (Path(name) / "log").open("w") as log:
            process = subprocess.Popen([*command, "--run.output-dir", str(folder)], stdout=log, stderr=log)
        started = time.monotonic()
        print("minute  resident MB  descriptors  steps/s", flush=True)
        readings = [Reading(0.0, 0.0, 0, 0)]
        for minute in range(1, minutes + 1):
            time.sleep(max(0.0, started + 60 * minute - time.monotonic()))
            if process.poll() is not None:
                print((Path(name) / "log").read_text(), file=sys.stderr)
                return 1
            now = read(process.pid, folder, started)
            readings.append(now)
            print(f"{minute:6}  {now.resident_mb:11.1f}  {now.descriptors:11}  {speed(readings[-2:]):7.2f}", flush=True)
        process.kill()
        process.wait()
    found = worsened(readings[1:])
    print("\n".join(found) or "nothing grew, no speed was lost")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
