"""The examples run as their docstrings say."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NEEDS = {"smp_unet": "segmentation_models_pytorch"}


@pytest.mark.parametrize("example", sorted(path.stem for path in (ROOT / "examples").glob("*.py")))
def test_example_runs(example: str) -> None:
    if example in NEEDS:
        pytest.importorskip(NEEDS[example], reason=f"this example needs {NEEDS[example]}")
    command = [sys.executable, f"examples/{example}.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "labels (2, 64, 64)" in done.stdout
