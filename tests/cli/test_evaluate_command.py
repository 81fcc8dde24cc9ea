"""``evaluate``: weights with the images of a recipe. Those of a run are scored in test_trainer.py."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from allspark_fast.__main__ import main
from allspark_fast.config import Config, DataConfig, EvalConfig
from allspark_fast.data.datasets import split_line
from allspark_fast.data.info import DatasetInfo
from allspark_fast.inference.evaluate import predict_labels
from allspark_fast.weights.spec import ModelSpec, load_model, save_model
from tests.helpers.images import write_folder

CLASSES = ("apple", "pear", "plum")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three images with labels and a list of them, but no list to train on."""
    folder = tmp_path / "data"
    folder.mkdir()
    lines = [split_line(entry) for entry in write_folder(folder, 3)]
    (folder / "meta.json").write_text(json.dumps({"classes": CLASSES}))
    (folder / "val.txt").write_text("\n".join(lines[:2]))
    (folder / "test.txt").write_text(lines[2])
    return folder


@pytest.fixture
def weights(tmp_path: Path, tiny_spec: ModelSpec) -> Path:
    """Normalized otherwise than the recipe says."""
    spec = replace(tiny_spec, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    (tmp_path / "weights").mkdir()
    save_model(spec.build(), spec, tmp_path / "weights" / "best.safetensors")
    return tmp_path / "weights" / "best.safetensors"


def expected_confusion(weights: Path, data: Path, names: list[str]) -> np.ndarray:
    model, spec = load_model(weights)
    confusion = np.zeros((3, 3), int)
    for name in names:
        image, label = (np.asarray(Image.open(data / folder / f"{name}.png")) for folder in ("images", "labels"))
        pixels = torch.from_numpy((image / 255 - spec.mean) / spec.std).permute(2, 0, 1)[None].float()
        predicted, _ = predict_labels(model, pixels)
        np.add.at(confusion, (label, predicted[0].numpy()), 1)
    return confusion


@pytest.mark.parametrize(("split", "names"), [([], ["00", "01"]), (["--split", "test.txt"], ["02"])])
def test_the_images_of_a_recipe(weights: Path, data: Path, tmp_path: Path, split: list[str], names: list[str]) -> None:
    scores = tmp_path / "scores.json"
    recipe = ["folder", "--data.root", str(data), "--data.val", "val.txt", "--eval.workers", "0"]
    assert main(["evaluate", str(weights), *split, "--json", str(scores), *recipe]) == 0
    assert json.loads(scores.read_text())["confusion"] == expected_confusion(weights, data, names).tolist()


def test_the_images_of_a_run(weights: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = Config(data=DataConfig(dataset="folder", root=data, val=Path("val.txt")), eval=EvalConfig(workers=1))
    (weights.parent / "config.json").write_text(config.to_json())
    assert main(["evaluate", str(weights), "folder", "--data.root", str(data), "--data.val", "val.txt"]) == 0
    of_recipe = capsys.readouterr().out
    assert main(["evaluate", str(weights.parent)]) == 0
    assert capsys.readouterr().out == of_recipe


def test_what_cannot_be_scored(
    weights: Path, data: Path, tiny_spec: ModelSpec, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(weights)]) == 1
    assert "not a run folder (no config.json); for other weights name a RECIPE" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["evaluate", str(weights), "--data.root", str(data)])
    assert "unrecognized arguments: --data.root" in capsys.readouterr().err
    recipe = ["folder", "--data.root", str(data), "--data.val"]
    assert main(["evaluate", str(weights), *recipe, "nowhere.txt"]) == 1
    assert "split file nowhere.txt: not found" in capsys.readouterr().err
    assert main(["evaluate", str(weights), "--json", str(data / "new" / "file"), *recipe, "val.txt"]) == 1
    assert "there is no folder" in capsys.readouterr().err
    spec = replace(tiny_spec, info=DatasetInfo("two", CLASSES[:2], tiny_spec.info.palette))
    save_model(spec.build(), spec, weights)
    assert main(["evaluate", str(weights), *recipe, "val.txt"]) == 1
    assert "best.safetensors has 2 classes, but the labels of data have 3" in capsys.readouterr().err
