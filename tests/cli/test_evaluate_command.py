"""``evaluate``: weights with the images of a recipe. Those of a run are scored in test_trainer.py."""

import csv
import json
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from allspark_fast.__main__ import main
from allspark_fast.config import Config, DataConfig, EvalConfig
from allspark_fast.data.datasets import split_line
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
    path = tmp_path / "weights" / "best.safetensors"
    path.parent.mkdir()
    save_model(spec.build(), spec, path)
    return path


def evaluate(weights: Path, data: Path, *options: str) -> int:
    recipe = ["folder", "--data.root", str(data), "--data.val", "val.txt", "--eval.workers", "0"]
    return main(["evaluate", str(weights), *options, *recipe])


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
    assert evaluate(weights, data, *split, "--json", str(tmp_path / "scores.json")) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["confusion"] == expected_confusion(weights, data, names).tolist()


def test_the_images_of_a_run(weights: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = Config(data=DataConfig(dataset="folder", root=data, val=Path("val.txt")), eval=EvalConfig(workers=1))
    (weights.parent / "config.json").write_text(config.to_json())
    assert evaluate(weights, data) == 0
    of_recipe = capsys.readouterr().out
    assert main(["evaluate", str(weights.parent)]) == 0
    assert capsys.readouterr().out.startswith(of_recipe)
    folder = weights.parent / "evaluation"
    assert main(["evaluate", str(weights.parent), "--split", "test.txt"]) == 0
    assert {path.name for path in weights.parent.glob("evaluation*")} == {"evaluation", "evaluation_test"}
    assert Image.open(folder / "worst.png").height > 2 * 200
    classes, images = (list(csv.DictReader((folder / name).open())) for name in ("classes.csv", "images.csv"))
    assert [(*row,) for row in (classes[0], images[0])] == [
        ("class", "iou", "dice", "accuracy", "boundary_f1", "pixels"),
        ("image", "iou", "dice", "accuracy", "boundary_f1", *(f"iou {name}" for name in CLASSES)),
    ]
    assert [row["image"] for row in images] == ["images/00.png", "images/01.png"]
    for row in images:
        confusion = expected_confusion(weights, data, [Path(row["image"]).stem])
        ious = confusion.diagonal() / (confusion.sum(0) + confusion.sum(1) - confusion.diagonal())
        assert [float(row[f"iou {name}"]) for name in CLASSES] == pytest.approx(ious, abs=1e-4)
        assert float(row["iou"]) == pytest.approx(ious.mean(), abs=1e-4)
        assert float(row["accuracy"]) == pytest.approx(confusion.trace() / confusion.sum(), abs=1e-4)
    boundary = np.mean([float(row["boundary_f1"]) for row in images])
    assert np.mean([float(row["boundary_f1"]) for row in classes]) == pytest.approx(boundary, abs=1e-3)


def test_what_cannot_be_scored(weights: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(weights)]) == 1
    assert "not a run folder (no config.json); for other weights name a RECIPE" in capsys.readouterr().err
    assert main(["evaluate", str(weights), "--data.root", str(data)]) == 1
    assert "for other weights name a RECIPE" in capsys.readouterr().err
    for option, message in (("--split", "split file nowhere/a: not found"), ("--json", "there is no folder nowhere")):
        assert evaluate(weights, data, option, "nowhere/a") == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("names", [("apple", "pear", "plum"), ("plum", "apple", "pear"), ("pear", "plum", "äpple")])
def test_labels_are_matched_by_the_names_of_their_classes(
    weights: Path, data: Path, tiny_spec: ModelSpec, names: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever their order, and however accents are composed."""
    ours = tuple(sorted(names))
    spec = replace(tiny_spec, info=replace(tiny_spec.info, classes=ours))
    save_model(spec.build(), spec, weights)
    file, scores = data / "scores.json", []
    for classes in (ours, tuple(unicodedata.normalize("NFD", name) for name in names)):
        # The same masks: their values stay, and so do the names of these.
        meta = {"classes": classes, "values": [ours.index(unicodedata.normalize("NFC", name)) for name in classes]}
        (data / "meta.json").write_text(json.dumps(meta))
        assert evaluate(weights, data, "--json", str(file)) == 0
        assert ("matched by name" in capsys.readouterr().out) == (classes != ours)
        scores.append(json.loads(file.read_text()))
    assert scores[0] == scores[1]
    assert scores[0]["classes"] == list(ours)


@pytest.mark.parametrize("names", [("apple", "pear"), ("apple", "pear", "Plum")])
def test_other_names_of_classes_are_refused(
    weights: Path, data: Path, tiny_spec: ModelSpec, names: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    spec = replace(tiny_spec, info=replace(tiny_spec.info, classes=names))
    save_model(spec.build(), spec, weights)
    assert evaluate(weights, data) == 1
    message = f"weights are {', '.join(names)}, but those of the labels of data are {', '.join(CLASSES)}: "
    assert message in (error := capsys.readouterr().err)
    renamed, fits = weights.with_name("renamed.safetensors"), len(names) == len(CLASSES)
    assert ("name the classes of the weights by `convert --classes`" in error) == fits
    assert main(["convert", str(weights), str(renamed), "--classes", str(data / "meta.json")]) == (0 if fits else 1)
    assert not fits or evaluate(renamed, data) == 0
