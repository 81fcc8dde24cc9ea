import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from allspark_fast.__main__ import main
from allspark_fast.data import loader
from allspark_fast.weights.files import save_weights
from allspark_fast.weights.spec import save_model
from tests.helpers.images import write_folder

SETTINGS = (
    "folder --data.root data --data.crop 64 --data.workers 0 --eval.workers 0 --model.backbone mit_tiny --eval.times 1 "
    "--model.weights None --model.embedding-dim 16 --train.batch-size 2 --train.steps 2 --run.device cpu"
)
TRAIN, CHECK = f"train {SETTINGS} --run.output-dir run", f"check {SETTINGS}"
SPLIT = "splits data --val 1/3"
PREDICT = "predict model.safetensors photo.png"
CONVERT = "convert old.pth a.safetensors"


@pytest.fixture(autouse=True)
def place(weights, tiny_spec, no_pictures, monkeypatch):
    """The working directory has data/ with split files, photo.png and weights of many kinds, but no shared memory."""
    monkeypatch.chdir(weights.parent)
    monkeypatch.delenv("ALLSPARK_DATA_DIR", raising=False)
    nothing_free = SimpleNamespace(f_bavail=0, f_frsize=1)
    monkeypatch.setattr(loader, "os", SimpleNamespace(environ=os.environ, statvfs=lambda _: nothing_free))
    write_folder(Path("data"), 8, labeled=6, names=tiny_spec.info.classes)
    shutil.copy("data/images/00.png", "photo.png")
    assert main(SPLIT.split()) == 0
    model = tiny_spec.build()
    save_weights(model, "old.pth")
    torch.save(model.backbone.state_dict(), "encoder.pth")
    others = replace(tiny_spec.info, classes=("kiwi", "fig", "date"))
    save_model(model, replace(tiny_spec, info=others), "others.safetensors")


def add_to_meta(found: re.Match[str] | Sequence[str]) -> None:
    file = Path("data/meta.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | json.loads(f"{{{found[1]}}}")))


def each(folder: str, change: Callable[[np.ndarray], np.ndarray], meta: str = "") -> Callable[[], object]:
    """Change the pixels of all images or labels, and the classes."""

    def write() -> None:
        for path in Path("data", folder).iterdir():
            Image.fromarray(change(np.asarray(Image.open(path)))).save(path, "TIFF")
        add_to_meta(("", meta))

    return write


def damage(pattern: str) -> Callable[[], object]:
    return lambda: (main(TRAIN.split()), [path.write_text("{") for path in Path().glob(pattern)])


def remove(found: re.Match[str]) -> None:
    shutil.rmtree(found[1]) if os.path.isdir(found[1]) else os.remove(found[1])


TWO = '"classes": ["ground", "cell"]'
# What was done before; a command, and what it says; the advice: more words for it, or what to do before it comes again.
ADVICE = [
    (TRAIN, f"{TRAIN} --train.lr 0.5", r"give another (--run\.output-dir)", r"\1 other"),
    (damage("run/config.json"), TRAIN, r"(\S+) holds no .* put it back or remove it", remove),
    (damage("run/data.json"), TRAIN, r"(\S+) is no record .* put it back or remove it", remove),
    (damage("run/checkpoints/*"), TRAIN, r"(\S+): none of .* remove the folder", remove),
    ("", f"{TRAIN} --train.batch-size 3", r"lower (train\.batch_size)", r"--\1 2"),
    ("", f"{TRAIN} --run.keep 3", r"use (run\.keep_last)", rf"{TRAIN} --\1 3"),
    ("", f"{TRAIN} --model.weights others.safetensors", r"(--model\.reset True)", r"\1"),
    ("", f"{TRAIN} --data.workers 1", r"use (--data\.workers 0 --eval\.workers 0)", r"\1"),
    ("", f"{TRAIN} --eval.workers 1", r"use (--data\.workers 0 --eval\.workers 0)", r"\1"),
    ("", "convert encoder.pth a.safetensors", r"(--model\.weights encoder\.pth)", rf"{TRAIN} \1"),
    ("", "evaluate model.safetensors", "for other weights name a RECIPE", SETTINGS),
    ("", "check folder --data.crop 64", r"pass (--data\.root)", r"\1 data"),
    (PREDICT, PREDICT, r"pass (--overwrite)", r"\1"),
    (PREDICT, PREDICT, r"write to another folder \((--out)\)", r"\1 other"),
    (CONVERT, CONVERT, r"pass (--overwrite)", r"\1"),
    ("", SPLIT, r"(--overwrite) replaces the lists", r"\1"),
    ("", SPLIT, r"(--out) FOLDER writes others", r"\1 other"),
    ("", "splits data 6", r"(\S+): 2 images stay aside .* remove the file", remove),
    ("", "predict old.pth photo.png", r"allspark_fast (convert old\.pth model\.safetensors)", r"\1 --overwrite"),
    (each("images", lambda x: x[..., 0] / np.float32(9)), CHECK, r"(--data\.range 1% 99%)", r"\1"),
    (each("images", lambda x: x[..., 0] // 16), CHECK, r"(--data\.range 0 15) ", r"\1"),
    (each("labels", lambda x: (x > 0) * np.uint8(255), '"classes": ["a"]'), CHECK, r"such as {(.*?)}", add_to_meta),
    (each("labels", lambda x: (x > 0) * np.uint8(255), TWO), CHECK, r'add ("values": \[0, 255\]) to', add_to_meta),
    (each("labels", lambda x: x * np.uint16(300), TWO), CHECK, r'write ("values": "nonzero") into', add_to_meta),
]


@pytest.mark.parametrize(("before", "command", "message", "advice"), ADVICE)
def test_advice_works(before, command, message, advice, capsys):
    def said(line: str) -> tuple[int, re.Match[str] | None]:
        return main(line.split()), re.search(message, "".join(capsys.readouterr()), re.DOTALL)

    before() if callable(before) else main(before.split())
    _, found = said(command)
    if callable(advice):
        advice(found)
    else:
        words = found.expand(advice)
        command = words if words.startswith(("train", "convert")) else f"{command} {words}"
    assert said(command) == (0, None)
