"""What the soak calls worse, with made-up readings, and whom it watches."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.soak import read, worsened


@pytest.mark.parametrize(
    ("growth_mb", "descriptors", "late_steps", "found"),
    [
        (1, 0, 480, []),
        (5, 0, 600, ["resident memory grew by 4.3%"]),
        (0, 1, 600, ["file descriptors were never again as few as before"]),
        (0, 0, 360, ["speed fell to 60%"]),
    ],
)
def test_what_grows_or_slows_is_told(growth_mb: float, descriptors: int, late_steps: int, found: list[str]) -> None:
    """After the first four of 16 minutes, which do not count; memory swings by 100 MB."""
    readings = [
        (900 + growth_mb * i + 100 * (-1) ** i, 20 + i % 3 + descriptors * i, 600 if i <= 8 else late_steps)
        for i in range(1, 17)
    ]
    assert worsened([(100, 3, 1)] * 4 + readings[4:]) == found


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc to find children")
def test_children_count() -> None:
    before = read(os.getpid())
    waits = "import sys; held = bytearray(10**8); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", waits], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        after = read(os.getpid())
        process.stdin.close()
    # Three of the child, and this process's ends of the two pipes.
    assert after[1] == before[1] + 5
    assert after[0] > before[0] + 90
