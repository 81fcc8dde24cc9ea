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
from pathlib import Path

from allspark_fast.training.log import read_metrics
from tests.helpers.runs import tiny_arguments

# More epochs than any soak takes; validation, pictures and checkpoints come often.
SETTINGS = {
    "data.workers": 1, "eval.workers": 1, "train.epochs": 100_000, "train.pseudo-from-epoch": 0, "eval.every": 20,
    "run.log-every": 10, "run.save-every": 100,
}  # fmt: skip


def read(process: int) -> tuple[float, int]:
    """Resident MB and file descriptors of a process and its children; pages that they share count for each."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    watched = [Path("/proc", x) for x in (str(process), *children)]
    pages = sum(int((x / "statm").read_text().split()[1]) for x in watched)
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6, sum(len(os.listdir(x / "fd")) for x in watched)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=int, default=60, help="at least 4")
    minutes = parser.parse_args().minutes
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
    # The first quarter warms up.
    columns, quarter = list(zip(*readings, strict=True)), minutes // 4
    early, late = (
        [statistics.mean(x[part]) for x in columns] for part in (slice(quarter, 2 * quarter), slice(-quarter, None))
    )
    memory, descriptors, speed = (x / y for x, y in zip(late, early, strict=True))
    print(f"last quarter against the second: memory {memory:.1%}, descriptors {descriptors:.1%}, speed {speed:.1%}")
    # Other work on the machine slows runs too.
    return int(memory > 1.03 or descriptors > 1.03 or speed < 0.7)


if __name__ == "__main__":
    sys.exit(main())
