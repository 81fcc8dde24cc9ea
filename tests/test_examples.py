"""The examples run."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NEEDS = {"smp_unet": "segmentation_models_pytorch"}


@pytest.mark.parametrize("example", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_example_runs(example: str, capsys: pytest.CaptureFixture[str]) -> None:
    if example in NEEDS:
        pytest.importorskip(NEEDS[example], reason=f"this example needs {NEEDS[example]}")
    # In this process: most of the time of another one would go into imports.
    runpy.run_path(str(EXAMPLES / f"{example}.py"), run_name="__main__")
    assert "labels (2, 64, 64)" in capsys.readouterr().out
