"""What the soak calls worse, with made-up readings, and whom it watches."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.soak import Reading, read, worsened

MINUTES = 16


def readings(
    growth_mb: float = 0.0, descriptors: int = 0, speeds: tuple[float, float] = (10.0, 10.0), noise: float = 0.0
) -> list[Reading]:
    """One a minute; memory and descriptors grow by so much a minute, the speed changes half way, memory swings."""
    taken, step = [], 0.0
    for minute in range(1, MINUTES + 1):
        step += 60 * speeds[minute > MINUTES // 2]
        resident = 900 + growth_mb * minute + noise * (-1) ** minute
        taken.append(Reading(60.0 * minute, resident, 20 + minute % 3 + descriptors * minute, int(step)))
    return taken


def test_a_steady_run_is_not_worse() -> None:
    assert worsened(readings(growth_mb=1.0, speeds=(10.0, 8.0), noise=100.0)) == []


def test_the_shortest_soak_has_quarters_of_one_reading() -> None:
    assert worsened(readings()[:4]) == []


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"growth_mb": 5.0}, "resident memory grew by 4.3%"),
        ({"descriptors": 1}, "file descriptors were never again as few as before"),
        ({"speeds": (10.0, 6.0)}, "speed fell from 10.00 to 6.00 steps a second"),
        ({"speeds": (10.0, 0.0)}, "speed fell from 10.00 to 0.00 steps a second"),
    ],
)
def test_what_grows_or_slows_is_told(change: dict[str, object], found: str) -> None:
    assert worsened(readings(**change)) == [found]


def test_the_first_quarter_does_not_count() -> None:
    warmed = readings()
    warmed[: MINUTES // 4] = [x._replace(resident_mb=100, descriptors=3) for x in warmed[: MINUTES // 4]]
    assert worsened(warmed) == []


def test_children_count(tmp_path: Path) -> None:
    own = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    if not own.exists():
        pytest.skip("needs /proc to find children")
    before = read(os.getpid(), tmp_path, time.monotonic())
    waits = "import sys; held = bytearray(10**8); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", waits], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        after = read(os.getpid(), tmp_path, time.monotonic())
        process.stdin.close()
    # Three of the child, and this process's ends of the two pipes.
    assert after.descriptors == before.descriptors + 5
    assert after.resident_mb > before.resident_mb + 90
