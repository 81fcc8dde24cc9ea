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

from allspark_fast.training.log import read_metrics
from tests.helpers.runs import tiny_arguments

# More epochs than any soak takes; validation, pictures and checkpoints come often.
SETTINGS = {
    "data.workers": 1, "train.epochs": 100_000, "train.pseudo-from-epoch": 0, "eval.every": 20, "run.log-every": 10,
    "run.save-every": 100,
}  # fmt: skip


def read(process: int) -> tuple[float, int]:
    """Resident MB and file descriptors of a process and its children; pages that they share count for each."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    watched = [Path("/proc", x) for x in (str(process), *children)]
    pages = sum(int((x / "statm").read_text().split()[1]) for x in watched)
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6, sum(len(os.listdir(x / "fd")) for x in watched)


def worsened(readings: Sequence[tuple[float, int, int]]) -> list[str]:
    """What grew or slowed in the last quarter of the minutes, against the second one; the first warms up.

    Args:
        readings: of each minute, resident MB, file descriptors and steps taken in it.
    """
    quarter = len(readings) // 4
    early, late = (list(zip(*x, strict=True)) for x in (readings[quarter : 2 * quarter], readings[-quarter:]))
    growth, speed = (statistics.mean(late[i]) / statistics.mean(early[i]) for i in (0, 2))
    found = {
        f"resident memory grew by {growth - 1:.1%}": growth > 1.03,
        "file descriptors were never again as few as before": min(late[1]) > max(early[1]),
        f"speed fell to {speed:.0%}": speed < 0.7,  # other work on the machine slows runs too
    }
    return [text for text, is_so in found.items() if is_so]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=int, default=60, help="at least 4")
    minutes = parser.parse_args().minutes
    if minutes < 4:
        parser.error(f"--minutes must be at least 4, got {minutes}")
    readings: list[tuple[float, int, int]] = []
    with tempfile.TemporaryDirectory() as folder:
        arguments = tiny_arguments(Path(folder, "run"), SETTINGS)
        command = [sys.executable, "-m", "allspark_fast", "train", *arguments]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            taken, started = 0, time.monotonic()
            print("minute  resident MB  descriptors  steps", flush=True)
            while len(readings) < minutes:
                time.sleep(max(0.0, started + 60 * (len(readings) + 1) - time.monotonic()))
                if process.poll() is not None:
                    return 1
                step = max((record["step"] for record in read_metrics(Path(folder, "run"))), default=0)
                readings.append((*read(process.pid), step - taken))
                taken = step
                print("{:6}  {:11.1f}  {:11}  {:5}".format(len(readings), *readings[-1]), flush=True)
            process.kill()
    found = worsened(readings)
    print("\n".join(found) or "nothing grew, no speed was lost")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
