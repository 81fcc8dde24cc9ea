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

from allspark_fast.config import Config, DataConfig, EvalConfig
from allspark_fast.data.datasets import split_line
from allspark_fast.inference.evaluate import predict_labels
from allspark_fast.weights.spec import load_model, save_model
from tests.helpers.images import write_folder

CLASSES = ("apple", "pear", "plum")


@pytest.fixture
def data(tmp_path):
    """Three images with labels and a list of them, but no list to train on."""
    folder = tmp_path / "data"
    lines = [split_line(entry) for entry in write_folder(folder, 3, names=CLASSES)]
    (folder / "val.txt").write_text("\n".join(lines[:2]))
    (folder / "test.txt").write_text(lines[2])
    return folder


@pytest.fixture
def weights(tmp_path, tiny_spec):
    """Normalized otherwise than the recipe says."""
    spec = replace(tiny_spec, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    path = tmp_path / "weights" / "best.safetensors"
    path.parent.mkdir()
    save_model(spec.build(), spec, path)
    return path


@pytest.fixture
def evaluate(weights, data, command):
    recipe = ["folder", "--data.root", data, "--data.val", "val.txt", "--eval.workers", 0]
    return lambda *options: command("evaluate", weights, *options, *recipe)


def expected_confusion(weights: Path, data: Path, name: str) -> np.ndarray:
    model, spec = load_model(weights)
    image, label = (np.asarray(Image.open(data / folder / f"{name}.png")) for folder in ("images", "labels"))
    pixels = torch.from_numpy((image / 255 - spec.mean) / spec.std).permute(2, 0, 1)[None].float()
    predicted, _ = predict_labels(model, pixels)
    confusion = np.zeros((3, 3), int)
    np.add.at(confusion, (label, predicted[0].numpy()), 1)
    return confusion


def test_the_images_of_a_recipe_and_of_a_run(weights, data, evaluate, command):
    config = Config(data=DataConfig(dataset="folder", root=data, val=Path("val.txt")), eval=EvalConfig(workers=1))
    (weights.parent / "config.json").write_text(config.to_json())
    assert command("evaluate", weights.parent).startswith(evaluate())
    folder = weights.parent / "evaluation"
    command("evaluate", weights.parent, "--split", "test.txt", "--json", data / "scores.json")
    scores = json.loads((data / "scores.json").read_text())
    assert scores["confusion"] == expected_confusion(weights, data, "02").tolist()
    assert {path.name for path in weights.parent.glob("evaluation*")} == {"evaluation", "evaluation_test"}
    assert Image.open(folder / "worst.png").height > 2 * 200
    classes, images = (list(csv.DictReader((folder / name).open())) for name in ("classes.csv", "images.csv"))
    assert [(*row,) for row in (classes[0], images[0])] == [
        ("class", "iou", "dice", "accuracy", "boundary_f1", "pixels"),
        ("image", "iou", "dice", "accuracy", "boundary_f1", *(f"iou {name}" for name in CLASSES)),
    ]
    assert [row["image"] for row in images] == ["images/00.png", "images/01.png"]
    for row in images:
        confusion = expected_confusion(weights, data, Path(row["image"]).stem)
        ious = confusion.diagonal() / (confusion.sum(0) + confusion.sum(1) - confusion.diagonal())
        assert [float(row[f"iou {name}"]) for name in CLASSES] == pytest.approx(ious, abs=1e-4)
        assert float(row["iou"]) == pytest.approx(ious.mean(), abs=1e-4)
        assert float(row["accuracy"]) == pytest.approx(confusion.trace() / confusion.sum(), abs=1e-4)
    boundary = np.mean([float(row["boundary_f1"]) for row in images])
    assert np.mean([float(row["boundary_f1"]) for row in classes]) == pytest.approx(boundary, abs=1e-3)


@pytest.mark.parametrize("names", [("apple", "pear", "plum"), ("plum", "apple", "pear"), ("pear", "plum", "äpple")])
def test_labels_are_matched_by_the_names_of_their_classes(weights, data, tiny_spec, names, evaluate):
    """Whatever their order, and however accents are composed."""
    ours = tuple(sorted(names))
    spec = replace(tiny_spec, info=replace(tiny_spec.info, classes=ours))
    save_model(spec.build(), spec, weights)
    file, scores = data / "scores.json", []
    for classes in (ours, tuple(unicodedata.normalize("NFD", name) for name in names)):
        # The same masks: their values stay, and so do the names of these.
        meta = {"classes": classes, "values": [ours.index(unicodedata.normalize("NFC", name)) for name in classes]}
        (data / "meta.json").write_text(json.dumps(meta))
        assert ("matched by name" in evaluate("--json", file)) == (classes != ours)
        scores.append(json.loads(file.read_text()))
    assert scores[0] == scores[1]
    assert scores[0]["classes"] == list(ours)
