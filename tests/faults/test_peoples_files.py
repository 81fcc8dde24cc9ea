"""Folders as people have them: each kind of fault is named, or the files are read as they are meant."""

import json
import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from allspark_fast.__main__ import main
from tests.helpers.images import exif, write_folder

DATA = Path("data")
SPLITS, CHECK = "splits data --val 2 --out lists", "check folder --data.root data --data.crop 64"
PREDICT = "predict model.safetensors --out out data/images"
PLAIN = "0 errors, 0 warnings"


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """The working directory has data/ with eight images, six masks of three classes, and lists."""
    monkeypatch.chdir(tmp_path)
    write_folder(DATA, 8, labeled=6, names=["a", "b", "c"])
    assert main(["splits", "data", "--val", "2"]) == 0


def each(
    folder: str,
    convert: Callable[[np.ndarray], object] = np.asarray,
    *,
    kind: str = "PNG",
    some: slice = slice(None),
    **options: object,
) -> None:
    """Save images or labels anew: other pixels, another format."""
    for path in sorted((DATA / folder).iterdir())[some]:
        changed = convert(np.asarray(Image.open(path)))
        image = changed if isinstance(changed, Image.Image) else Image.fromarray(np.asarray(changed))
        image.save(path, kind, **options)


def move(source: str, target: str) -> None:
    (DATA / target).parent.mkdir(parents=True, exist_ok=True)
    (DATA / source).rename(DATA / target)


def rename(image: str, label: str) -> None:
    """Give the first image and its label other names."""
    move("images/00.png", f"images/{image}")
    move("labels/00.png", f"labels/{label}")


def copy(source: str, target: str) -> None:
    shutil.copy(DATA / source, DATA / target)


def lists(change: Callable[[str], str], encoding: str = "utf-8", name: str = "*") -> None:
    for path in (DATA / "splits").glob(f"{name}.txt"):
        path.write_bytes(change(path.read_text()).encode(encoding))


def meta(**changes: object) -> None:
    (DATA / "meta.json").write_text(json.dumps({"classes": ["a", "b", "c"], **changes}))


def colored(gray: np.ndarray) -> Image.Image:
    image = Image.fromarray(gray)
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    return image


def not_a_number(pixels: np.ndarray) -> np.ndarray:
    return np.where(pixels[..., 0] > 200, np.nan, pixels[..., 0] / 255).astype(np.float32)


def split_elsewhere() -> None:
    shutil.rmtree("data/splits")
    main(SPLITS.split())


TWO_IMAGES = "images/00.png labels/00.png\nimages/01.png labels/00.png\n"
SECOND = {"save_all": True, "append_images": [Image.new("RGB", (50, 40))]}
FIRST_PAGE = "images have several pages, .*; only the first page is read"
# By kind: what is done to the folder, the command, its exit status, and what it says.
FAULTS = {
    "hangs": [
        (lambda: os.mkfifo(DATA / "images/a.png"), SPLITS, 0, "left out, .*: a broken link, or no file"),
        (lambda: os.mkfifo(DATA / "images/a.png"), PREDICT, 1, r"a\.png: a broken link, a folder or a device"),
        (lambda: os.mkfifo(DATA / "images/a.png"), f"{PREDICT}/a.png", 1, "a folder or a device"),
    ],
    "files left out": [
        (lambda: (DATA / "images/a.png").symlink_to("gone"), SPLITS, 0, "left out, 'images/a.png' first: a broken"),
        (lambda: (DATA / "labels/site").symlink_to("gone"), CHECK, 0, "left out, 'labels/site' first: a broken link"),
        (lambda: (DATA / "images/a").symlink_to("gone"), PREDICT, 1, "images/a: left out, a broken link"),
        ((DATA / "images/Thumbs.db").touch, CHECK, 0, "left out, 'images/Thumbs.db' first: its suffix is"),
        (partial(rename, "IMG_0.JPG", "img_0.png"), SPLITS, 0, r"'labels/img_0\.png' first: images/IMG_0\.JPG"),
        (partial(rename, "e\u0301.jpg", "\u00e9.png"), SPLITS, 0, "first: images/e\u0301.jpg"),
        (partial(rename, "0.jpg", "0_mask.png"), SPLITS, 0, r"'labels/0_mask\.png' first: images/0\.jpg"),
        (partial(rename, "0.jpg", "0.jpg.png"), SPLITS, 0, r"'labels/0\.jpg\.png' first: images/0\.jpg"),
        (partial(rename, "0.jpg", "seg-0.png"), SPLITS, 0, r"'labels/seg-0\.png' first: images/0\.jpg"),
        (partial(rename, "0.jpg", "10.png"), SPLITS, 0, r"'labels/10\.png' first: no image has that name"),
        (partial(rename, "0.HEIC", "0.png"), SPLITS, 0, r"0\.HEIC' first: its suffix.* images/0\.HEIC is"),
        (partial(move, "images/07.png", "images/07.jfif"), PREDICT, 1, r"07\.jfif: left out, because of its suffix"),
        (partial(move, "labels/00.png", "labels/00 .png"), SPLITS, 0, r"'labels/00 \.png' first: images/00"),
        (partial(move, "labels/00.png", "labels/sub/00.png"), SPLITS, 0, r"'labels/sub/00\.png' first: images/00"),
        (partial(move, "images/07.png", "images/07.PNG"), SPLITS, 0, "4 labeled, 2 unlabeled, 2 for validation"),
    ],
    "files taken in": [
        (partial(copy, "images/00.png", "images/._07.png"), SPLITS, 0, "4 labeled, 2 unlabeled, 2 for validation"),
        (partial(move, "images/07.png", "images/.@__thumb/07.png"), SPLITS, 0, "4 labeled, 1 unlabeled, 2 for"),
        (partial(copy, "images/00.png", "images/00.bmp"), SPLITS, 1, r"00\.png: has the same stem as 00\.bmp"),
        (partial(copy, "images/00.png", "images/00.jpg"), PREDICT, 1, r"would share one file 00\.png"),
    ],
    "what a mask means": [
        (partial(each, "labels", lambda x: np.stack([x, x + 255], -1)), SPLITS, 1, "mode LA; convert it to class ind"),
        (partial(each, "labels", lambda x: x.astype(np.uint16)), CHECK, 0, PLAIN),
        (partial(each, "labels", lambda x: x * np.uint16(300)), SPLITS, 1, r"found 0\.\.600"),
        (partial(each, "labels", colored, transparency=0), CHECK, 0, PLAIN),
        (partial(each, "labels", kind="TIFF", compression="tiff_lzw"), CHECK, 0, PLAIN),
        (partial(each, "labels", kind="TIFF", compression="jpeg"), CHECK, 1, "jpeg compression changes class indices"),
        (partial(each, "labels", lambda x: np.stack([x] * 3, -1), kind="WEBP"), SPLITS, 1, "WEBP compression"),
        (partial(each, "labels", lambda x: (x > 0) * np.uint8(255), some=slice(2)), CHECK, 0, "hold only 0 and 255"),
        (partial(each, "labels", lambda x: x.T), CHECK, 1, "its image .* is 50x40 .* the label is 40x50"),
        (partial(each, "labels", exif=exif(6)), CHECK, 1, "its EXIF orientation is 6"),
        (partial(each, "images", exif=exif(3)), CHECK, 0, "EXIF turns 4 images with labels"),
        (lambda: lists(lambda _: TWO_IMAGES, name="labeled"), CHECK, 0, r"labels/00\.png: is the label of 2 images"),
        (partial(meta, palette=[[0, 0, 0], [1, 1, 1], [255] * 4]), CHECK, 1, r"\[r, g, b\] without alpha"),
        (partial(meta, values=[0, 1, "2"]), CHECK, 1, "list of 3 different integers"),
    ],
    "what a pixel means": [
        (partial(each, "images", lambda x: x[..., 0] * np.uint16(16)), CHECK, 0, r"I;16, 16 bits hold .* 0 4095 "),
        (partial(each, "images", lambda x: x[..., 0].astype(">u2"), kind="TIFF"), CHECK, 0, "I;16B, 16 .* 0 255 "),
        (partial(each, "images", lambda x: x // 8 + 9), CHECK, 0, r"RGB, 8 bits hold 9\.\.40 .* --data\.range 0 63 "),
        (partial(each, "images", lambda x: x[..., 0] / np.float32(9), kind="TIFF"), CHECK, 1, "floating point pixels"),
        (partial(each, "images", not_a_number, kind="TIFF"), CHECK, 1, "holds values that are not finite"),
        (partial(each, "images", not_a_number, kind="TIFF"), SPLITS, 0, "4 labeled, 2 unlabeled, 2 for"),
        (partial(each, "images", **SECOND), CHECK, 0, FIRST_PAGE),
        (partial(each, "images", kind="GIF", **SECOND), CHECK, 0, FIRST_PAGE),
        (partial(each, "images", kind="MPO", **SECOND), PREDICT, 0, r"00\.png: has 2 pages, of which only the first"),
        (partial(each, "images", lambda x: Image.fromarray(x).convert("CMYK"), kind="JPEG"), CHECK, 0, PLAIN),
        (partial(each, "images", lambda x: Image.fromarray(x).convert("LA")), CHECK, 0, PLAIN),
        (partial(each, "images", lambda x: x[..., 0] * np.int32(300), kind="TIFF"), PREDICT, 1, "train with one"),
    ],
    "validation leaks": [
        (split_elsewhere, "splits data 2 --out others", 0, r"lists/val\.txt: 2 images stay aside"),
        (partial(lists, lambda x: x * 2), CHECK, 0, "val: 2 lines repeat an image"),
        (lambda: lists(lambda x: x.replace("s/", "s/../images/"), name="unlabeled"), CHECK, 0, PLAIN),
    ],
    "one bad item": [
        (lambda: os.truncate(DATA / "images/01.png", 99), CHECK, 1, r"01\.png: cannot be read"),
        ((DATA / "images/01.png").unlink, CHECK, 1, r"images/01\.png: no such file; .* 1 errors, 0 warnings"),
        ((DATA / "labels/02.png").unlink, CHECK, 1, r"labels/02\.png: no such file"),
        (lambda: (DATA / "labels/02.png").write_text("text"), CHECK, 1, r"02\.png: not an image"),
        (partial(each, "labels", lambda x: x + 2), CHECK, 1, r"holds \[3, 4\], .* the indices 0\.\.2"),
        (partial(each, "labels", lambda x: np.stack([x + 99] * 3, -1)), CHECK, 1, "stand for exactly one class"),
        (lambda: (DATA / "images/00.png").write_bytes(b""), PREDICT, 1, "1 failed.*the file is empty"),
        (lambda: (DATA / "labels/00.png").write_bytes(b""), CHECK, 1, r"labels/00\.png: the file is empty"),
    ],
    "where it runs": [
        (lambda: lists(lambda x: f"{x}../x.png\n", name="unlabeled"), CHECK, 1, "this path leaves the data root"),
        (lambda: lists(str, "utf-16"), CHECK, 0, PLAIN),
        (lambda: lists(lambda x: x.replace("\n", " \t\r\n"), "utf-8-sig"), CHECK, 0, PLAIN),
        (lambda: lists(lambda x: x.replace("/", "\\")), CHECK, 1, "folders are separated by /"),
        (lambda: lists(lambda x: x.replace("im", f"{Path.cwd()}/data/im")), CHECK, 1, "or is absolute"),
        (lambda: lists(lambda x: f"# mine\n{x}"), CHECK, 1, r"labeled\.txt, line 1: expected `image_path"),
    ],
    "text from people": [
        (partial(meta, classes=["a", "b", "a "]), SPLITS, 1, "'classes' holds equal names: a;"),
        (partial(meta, classes=["$x_1$", '"b", \\frac{', "道\n路"]), CHECK, 0, r'\$x_1\$ .*"b", \\frac\{ .*道\\n路 '),
        (partial(move, "images/07.png", "images/a\nb.png"), SPLITS, 1, "a split file cannot hold such a name"),
        (partial(move, "images/07.png", "images/-x.png"), SPLITS, 0, "4 labeled, 2 unlabeled"),
    ],
}


@pytest.mark.parametrize(
    ("change", "command", "status", "said"),
    [pytest.param(*case, id=f"{kind} {number}") for kind, cases in FAULTS.items() for number, case in enumerate(cases)],
)
def test_it_is_said_or_read_as_meant(change, command, status, said, request, capsys):
    change()
    if command.startswith("predict"):
        request.getfixturevalue("weights")
    capsys.readouterr()
    assert main(command.split()) == status
    printed = " ".join(line for text in capsys.readouterr() for line in text.splitlines())
    assert re.search(said, printed), printed
