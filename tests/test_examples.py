"""The examples run."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NEEDS = {"smp_unet": "segmentation_models_pytorch"}


@pytest.mark.parametrize("example", ["plain_model", "smp_unet"])
def test_example_runs(example: str, capsys: pytest.CaptureFixture[str]) -> None:
    if example in NEEDS:
        pytest.importorskip(NEEDS[example], reason=f"this example needs {NEEDS[example]}")
    # In this process: most of the time of another one would go into imports.
    runpy.run_path(str(EXAMPLES / f"{example}.py"), run_name="__main__")
    assert "labels (2, 64, 64)" in capsys.readouterr().out


def test_two_classes_are_drawn() -> None:
    draw = runpy.run_path(str(EXAMPLES / "two_classes.py"))["draw"]
    for index in range(3):
        image, mask = draw(index)
        assert image.shape == (128, 128, 3)
        assert set(mask.ravel().tolist()) == {0, 1}
        red, ground = image[mask == 1].mean(0), image[mask == 0].mean(0)
        assert red[0] / red[1] > 1.2 * ground[0] / ground[1]  # in every light
