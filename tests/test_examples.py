import os
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("example", ["plain_model", "smp_unet"])
def test_example_runs(example, capsys):
    if example == "smp_unet":
        pytest.importorskip("segmentation_models_pytorch", reason="needs segmentation_models_pytorch")
    # In this process: most of the time of another one would go into imports.
    runpy.run_path(str(EXAMPLES / f"{example}.py"), run_name="__main__")
    assert "labels (2, 64, 64)" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_notebook_runs_and_holds_no_outputs(tmp_path, monkeypatch):
    nbformat, client = (pytest.importorskip(x, reason=f"needs {x}") for x in ("nbformat", "nbclient"))
    pytest.importorskip("onnxruntime", reason="needs the extra export")
    notebook = nbformat.read(EXAMPLES / "tour.ipynb", as_version=4)
    assert all(cell.get("outputs", []) == [] for cell in notebook.cells)
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    client.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": tmp_path}}).execute()
    assert (tmp_path / "runs/tour/model.onnx").is_file()


def test_two_classes_are_drawn():
    draw = runpy.run_path(str(EXAMPLES / "two_classes.py"))["draw"]
    for index in range(3):
        image, mask = draw(index)
        assert image.shape == (128, 128, 3)
        assert set(mask.ravel().tolist()) == {0, 1}
        red, ground = image[mask == 1].mean(0), image[mask == 0].mean(0)
        assert red[0] / red[1] > 1.2 * ground[0] / ground[1]  # in every light
