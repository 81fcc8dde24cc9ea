"""Folders, settings, weights and runs as people have them: what is wrong is named, and the advice to mend it works."""

import json
import os
import re
import shutil
import signal
import subprocess
from dataclasses import replace
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import DEFAULT, Mock

import numpy as np
import pytest
import torch
from PIL import Image

from allspark_fast.__main__ import main
from allspark_fast.cli import COMMANDS
from allspark_fast.data import loader
from allspark_fast.data.datasets import SegmentationDataset
from allspark_fast.inference import predict
from allspark_fast.training import trainer
from allspark_fast.weights.files import save_weights
from allspark_fast.weights.spec import load_model, save_model
from tests.helpers.images import exif, write_folder

DATA = Path("data")
NAMES = ["apple", "pear", "plum"]
SETTINGS = (
    "folder --data.root data --data.crop 64 --data.workers 0 --eval.workers 0 --model.backbone mit_tiny --eval.times 1 "
    "--model.weights None --model.embedding-dim 16 --train.batch-size 2 --train.steps 1 --run.device cpu"
)
CHECK, SPLITS = f"check {SETTINGS}", "splits data --val 2 --out lists --overwrite"
TRAIN, NEW = (f"train {SETTINGS} --run.output-dir {folder}" for folder in ("run", "new"))
PHOTO, PHOTOS = "predict model.safetensors photo.png", "predict model.safetensors data/images"
LABEL = "predict model.safetensors --out out --overwrite data/images"
EVALUATE, CONVERT = f"evaluate others.safetensors {SETTINGS}", "convert old.pth a.safetensors"
COMPARE = f"compare {SETTINGS} --seeds 0 --out runs"
CHANGED = {shutil: "disk_usage", trainer: "train_step", predict: "predict_labels"}
PLAIN = "0 errors, 0 warnings"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with data/, lists of its images, a finished run on them, and weights of many kinds."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(trainer, "draw_pictures", lambda *_: None)
        write_folder(DATA, 8, labeled=6, names=NAMES)
        assert [main(command.split()) for command in ("splits data --val 2", TRAIN)] == [0, 0]
        shutil.copy("data/images/00.png", "photo.png")
        shutil.copy("run/best.safetensors", "model.safetensors")
        model, spec = load_model("run")
        save_weights(model, "old.pth")
        torch.save(model.backbone.state_dict(), "encoder.pth")
        save_model(model, replace(spec, info=replace(spec.info, classes=("kiwi", "fig", "date"))), "others.safetensors")
    return folder


@pytest.fixture(autouse=True)
def place(made, tmp_path, no_pictures, monkeypatch):
    """The working directory is a copy of that folder, on a machine without a GPU and shared memory.

    What rows change elsewhere is put back.
    """
    shutil.copytree(made, tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALLSPARK_DATA_DIR", "")
    monkeypatch.delenv("ALLSPARK_DATA_DIR")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    nothing_free = SimpleNamespace(f_bavail=0, f_frsize=1)
    monkeypatch.setattr(loader, "os", SimpleNamespace(environ=os.environ, statvfs=lambda _: nothing_free))
    for owner, name in {**CHANGED, SegmentationDataset: "image"}.items():
        monkeypatch.setattr(owner, name, getattr(owner, name))


def do(function, *arguments, **options):
    return lambda *_: function(*arguments, **options)


def enter(line):
    """Run words of bash, and commands of ours, joined by &&."""
    for part in line.split(" && "):
        if part.split()[0] in COMMANDS:
            assert main(part.split()) == 0
        else:
            subprocess.run(["bash", "-c", part], check=True)


def each(folder, convert=np.asarray, *, kind="PNG", some=slice(None), **options):
    """Save images or labels anew: other pixels, another format."""
    for path in sorted((DATA / folder).iterdir())[some]:
        changed = convert(np.asarray(Image.open(path)))
        image = changed if isinstance(changed, Image.Image) else Image.fromarray(np.asarray(changed))
        image.save(path, kind, **options)


labels, images = (partial(do, each, folder) for folder in ("labels", "images"))


def redraw(*_):
    """Save all images and labels as they were."""
    write_folder(DATA, 8, labeled=6)


def meta(*_, **changes):
    (DATA / "meta.json").write_text(json.dumps({"classes": NAMES, **changes}))


def no_meta():
    black_and_white()
    (DATA / "meta.json").unlink()


def add_to_meta(found):
    file = DATA / "meta.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | json.loads(f"{{{found[1]}}}")))


def black_and_white(more='"classes": ["ground", "cell"]', white=255):
    each("labels", lambda x: (x > 0) * np.uint16(white))
    add_to_meta(("", more))


RED, BLUE = [[255, 0, 0], [0, 0, 0], [0, 255, 0]], [[0, 0, 0], [255, 0, 0], [0, 255, 0]]


def colored(gray, palette=BLUE):
    image = Image.fromarray(gray)
    image.putpalette(list(chain(*palette)))
    return image


def rgb(gray):
    return colored(gray if gray.ndim == 2 else gray[..., 0].copy()).convert("RGB")


def rgb_with_palette(*_):
    each("labels", rgb)
    meta(palette=BLUE)


def other_palette(**changes):
    """Of the first label, or of meta.json if there is one."""
    each("labels", colored)
    each("labels", lambda x: colored(x, RED), some=slice(0 if changes else 1))
    meta(**changes)


def gray(factor, kind):
    return lambda pixels: (pixels[..., 0] * float(factor)).astype(kind)


def not_a_number(pixels):
    return np.where(pixels[..., 0] > 200, np.nan, pixels[..., 0] / 255).astype(np.float32)


def lack_memory_once():
    """The first step, and the first image, find none."""
    for owner, name in ((trainer, "train_step"), (predict, "predict_labels")):
        first_fails = chain([MemoryError], repeat(DEFAULT))
        setattr(owner, name, Mock(wraps=getattr(owner, name), side_effect=first_fails))


def kill_workers():
    """As the kernel ends one that reads an image when memory is short."""
    read, here = SegmentationDataset.image, os.getpid()
    SegmentationDataset.image = lambda *x: read(*x) if os.getpid() == here else os.kill(os.getpid(), signal.SIGKILL)
    loader.os = os


def fill_disk(folder):
    usage = shutil.disk_usage
    shutil.disk_usage = lambda path: SimpleNamespace(free=0) if folder in str(path) else usage(path)


def save_timm():
    spec = replace(load_model("model.safetensors")[1], backbone="timm/test_efficientnet")
    save_model(spec.build(), spec, "timm.safetensors")


SECOND = {"save_all": True, "append_images": [Image.new("RGB", (50, 40))]}
SECOND_MASK = {"save_all": True, "append_images": [Image.new("L", (50, 40))]}
FIRST_PAGE = "images have several pages, .*; only the first page is read"
PROBABLY = r"'(labels/[^']+)' first: images/(.+)\.\w+ is probably its image; give image and label the same name"
NEXT = "4 labeled, 2 unlabeled, 2 for validation"
FIFO, JFIF, TO_PNG = "mkfifo data/images/a.png", "mv data/images/07.{png,jfif}", "$ mv data/images/07.{jfif,png}"
SAME_NAME = r"$ mv 'data/\1' data/labels/\2.png"
ANEW, REMOVE = "$ splits data --val 2 --overwrite", r"$ rm -r \1"
ALONE = r"error: (\S+): its prediction would replace that of .*; name it alone, with another (--out)"
COLORS = "Correct 'palette' in meta.json"
OTHER_CLASSES = r"convert the label, or list the missing classes, or the values of the classes, in meta\.json"
STAY = r"(\S+): 2 images stay aside for validation; remove the file to split them too"
LISTS = " ".join(f"--data.{name} splits/{name}.txt" for name in ("labeled", "unlabeled", "val"))
EPOCHS, OTHER = CHECK.replace("--train.steps 1", "--train.epochs 1"), r"--\1 \2 --run.output-dir other"
ACCUMULATE, MIXED = f"{NEW} --train.gradient-accumulation-steps 2", f"{NEW} --train.cutmix 0.5"
TIMM, CHECKPOINTING = f"{NEW} --model.backbone timm/test_efficientnet", "--model.activation-checkpointing True"
WILD = f"{NEW} --train.lr 100 --train.lr-multi 1000 --train.max-skipped 0 --train.steps 4"
SMALLER = r"\1 32 \2 1 \3 --run.output-dir other"
ELSEWHERE = "rm -r data/splits && splits data --val 2 --out lists"
OUTSIDE = "mkdir pics; cp photo.png pics/x.png; echo ../pics/x.png >> data/splits/unlabeled.txt"
LINK = "$ ln -s ../pics data/pics; sed -i s,../pics,pics, data/splits/unlabeled.txt"
RENAMED = "$ convert others.safetensors others.safetensors --classes data/meta.json --overwrite"
MASKS = "for x in data/labels/*; do mv $x ${x%.png}_m.png; done"
NO_MASKS = "$ for x in data/labels/*; do mv $x ${x%_m.png}.png; done"
PBM = "(echo P4 50 40; head -c 280 /dev/zero) > data/labels/00.png"
RANGED = f"$ {NEW} --data.range 1% 99% && cp new/best.safetensors model.safetensors"
A_STEP = "predict run/checkpoints/step_00000001.pt photo.png"
SCENES = f"train {SETTINGS} --data.scenes 2 2 1 --run.output-dir toy".replace("folder --data.root data", "scenes")
NO_LISTS = "check pascal --data.root data --data.crop 64 --data.labeled None --data.unlabeled None --data.val None"
# By kind: what is done before; a command; what it says; and its exit status or, where it says what to do, how that is
# done: by more words, by another command, or, before the same command, by lines after "$ " or a function.
CASES = {
    "hangs": [
        (FIFO, SPLITS, "left out, .*: a broken link, or no file", 0),
        (FIFO, LABEL, r"(\S+a\.png): a broken link, .* expected; replace it", r"$ rm \1; cp photo.png \1"),
        (None, f"{NEW} --data.workers 1", r"use (--data\.workers 0 --eval\.workers 0)", r"\1"),
        (None, f"{NEW} --eval.workers 1", r"use (--data\.workers 0 --eval\.workers 0)", r"\1"),
        (kill_workers, f"{NEW} --data.workers 1", "a DataLoader worker died .*: use fewer workers", "--data.workers 0"),
    ],
    "files left out": [
        ("ln -s gone data/images/a.png", SPLITS, "left out, 'images/a.png' first: a broken link", 0),
        ("ln -s gone data/labels/site", CHECK, "left out, 'labels/site' first: a broken link", 0),
        ("ln -s gone data/images/a", LABEL, "images/a: left out, a broken link", 1),
        ("touch data/images/Thumbs.db", CHECK, "left out, 'images/Thumbs.db' first: its suffix is", 0),
        (None, f"{PHOTOS} --out data", "all its images lie in data, .*: give another (--out)", r"\1 other"),
        ("mv data/images/{00.png,IMG_0.JPG}; mv data/labels/{00.png,img_0.png}", SPLITS, PROBABLY, SAME_NAME),
        ("mv data/images/{00.png,e\u0301.jpg}; mv data/labels/{00.png,\u00e9.png}", SPLITS, PROBABLY, SAME_NAME),
        ("mv data/images/{00.png,0.jpg}; mv data/labels/{00.png,0_mask.png}", SPLITS, PROBABLY, SAME_NAME),
        ("mv data/images/{00.png,0.jpg}; mv data/labels/{00.png,0.jpg.png}", SPLITS, PROBABLY, SAME_NAME),
        ("mv data/images/{00.png,0.jpg}; mv data/labels/{00.png,seg-0.png}", SPLITS, PROBABLY, SAME_NAME),
        ("mv data/labels/00.png 'data/labels/00 .png'", SPLITS, PROBABLY, SAME_NAME),
        ("mkdir data/labels/sub; mv data/labels/{,sub/}00.png", SPLITS, PROBABLY, SAME_NAME),
        ("cd data; mv images/{00.png,0.jpg}; mv labels/{00,10}.png", SPLITS, r"10\.png' first: no image has that", 0),
        ("mv data/images/00.{png,HEIC}", SPLITS, r"00\.HEIC' first: its suffix.* images/00\.HEIC is", 0),
        (JFIF, SPLITS, r"07\.jfif' first: its suffix is none .*; convert images", TO_PNG),
        (JFIF, LABEL, r"07\.jfif: left out, because of its suffix; convert it", TO_PNG),
        (JFIF, LABEL, r"error: (\S+): left out, .* or name it alone", r"predict model.safetensors \1"),
        (MASKS, SPLITS, "give each label the name of its image", NO_MASKS),
        ("rm -r data/labels", SPLITS, r"labels/a\.png belongs to images/a\.jpg", redraw),
        ("mv data/images data/Images", SPLITS, "expected a folder with images/", "$ mv data/Images data/images"),
        ("touch data/images/notes.txt", LABEL, "1 files that are no images were left out", 0),
    ],
    "files taken in": [
        ("cp data/images/{00,._07}.png", SPLITS, NEXT, 0),
        ("mkdir data/images/.@__thumb; mv data/images/{,.@__thumb/}07.png", SPLITS, "4 labeled, 1 unlabeled, 2 for", 0),
        ("cp data/images/00.{png,bmp}", SPLITS, r"(\S+): has the same stem as 00\.bmp; keep one", REMOVE),
        ("cp data/images/00.{png,jpg}", LABEL, "8 images labeled, 1 failed", 1),
        ("cp data/images/00.{png,jpg}", LABEL, ALONE, r"predict model.safetensors \1 \2 other"),
    ],
    "what a mask means": [
        (labels(lambda x: np.stack([x, x], -1)), SPLITS, "mode LA; convert it to class indices", redraw),
        (labels(lambda x: np.stack([x, x], -1)), SPLITS, "to RGB with 'palette' in meta", rgb_with_palette),
        (do(black_and_white, white=300), CHECK, r'write ("values": "nonzero") into', add_to_meta),
        (labels(colored, transparency=0), CHECK, PLAIN, 0),
        (labels(kind="TIFF", compression="tiff_lzw"), CHECK, PLAIN, 0),
        (labels(kind="TIFF", compression="jpeg"), CHECK, "jpeg compression .*; save labels as PNG", redraw),
        (labels(rgb, kind="WEBP"), SPLITS, "WEBP compression .*; save labels as PNG", redraw),
        (labels(kind="TIFF", **SECOND_MASK), CHECK, "holds 2 pages, .* save the one that counts", redraw),
        (PBM, CHECK, "stores white as 0 .* save it as PNG", redraw),
        (black_and_white, CHECK, r'add ("values": \[0, 255\]) to', add_to_meta),
        (black_and_white, CHECK, r'or ("values": \[0, 1), ...\]', do(add_to_meta, ("", '"values": [0, 1]'))),
        (do(black_and_white, '"classes": ["a"]'), CHECK, r"such as {(.*?)}", add_to_meta),
        (no_meta, CHECK, r"no meta\.json; write (\S+), such as (\{.*?\})", r"$ echo '\2' > \1"),
        (labels(lambda x: (x > 0) * np.uint8(255), some=slice(2)), CHECK, "save them with the n", redraw),
        (labels(lambda x: x.T), CHECK, "its image .* is 50x40 .* the label is 40x50.* be equal", redraw),
        (labels(exif=exif(6)), CHECK, "its EXIF orientation is 6, .*; save it upright", redraw),
        (images(exif=exif(3)), CHECK, "EXIF turns 4 images with labels", 0),
        ("ln -sf 00.png data/labels/01.png", CHECK, r"labels/00\.png: is the label of 2 images; correct the lists", 0),
        (labels(lambda x: np.full_like(x, 255)), CHECK, r"val: 2 labels hold ignored pixels only, labels/0", 1),
        ("sed -i s,labels.*,labels/00.png, data/splits/labeled.txt", CHECK, "of 4 images; correct the lists", ANEW),
        (labels(lambda x: x * 0), CHECK, "warning: labeled: no label holds pear, plum", 0),
        (labels(lambda x: x + 2), CHECK, rf"holds \[3, 4\], .*; {OTHER_CLASSES}", redraw),
        (labels(lambda x: x + 2), CHECK, OTHER_CLASSES, do(meta, classes=[*NAMES, "date", "fig"])),
        (labels(lambda x: x + 2), CHECK, OTHER_CLASSES, do(meta, values=[2, 3, 4])),
        (labels(rgb), CHECK, f"exactly one class: .*{COLORS}", do(meta, palette=BLUE)),
        (labels(rgb), CHECK, f"{COLORS} .*, or repaint these pixels", redraw),
        (do(other_palette, palette=RED), CHECK, "convert this label to RGB, whose", labels(rgb)),
        (do(other_palette, palette=RED), CHECK, "or correct one of the palettes", do(meta, palette=BLUE)),
        (other_palette, CHECK, "one of the two has its classes swapped, draw it again", labels(colored)),
        (do(other_palette, palette=[[0] * 3, [9] * 3, [8] * 3]), CHECK, "6 labels have colors .* their numbers c", 0),
        (do(meta, palette=[[0] * 3, [1] * 3, [255] * 4]), CHECK, r"\[r, g, b\] without alpha", do(meta, palette=BLUE)),
        (do(meta, palette=[0, 0, 0, 255] * 3), CHECK, r"leave out the alpha", do(meta, palette=list(chain(*BLUE)))),
        (do(meta, palette=[0, 0, 0, 255] * 3), CHECK, r"or write \[\[r, g, b\], ...\]", do(meta, palette=BLUE)),
        (do(meta, values=[0, 1, "2"]), CHECK, r"list of 3 different integers in 0\.\.255", do(meta, values=[0, 1, 2])),
        (do(meta, ignore_index=1), CHECK, "'ignore_index' 1 is also .*: change it or", do(meta, ignore_index=9)),
        (do(meta, ignore_index=1), CHECK, "change it or 'values'", do(meta, ignore_index=1, values=[0, 3, 2])),
    ],
    "what a pixel means": [
        (images(gray(16, np.uint16)), CHECK, r"I;16, 16 .* (--data\.range 0 4095) ", r"\1"),
        (images(gray(16, np.uint16)), CHECK, "or percentiles, (1% 99%)", r"--data.range \1"),
        (images(gray(1, ">u2"), kind="TIFF"), CHECK, "I;16B, 16.* (--.* 0 255) ", r"\1"),
        (images(lambda x: x // 8 + 9), CHECK, r"hold 9\.\.40 .* (--data\.range 0 63) ", r"\1"),
        (images(gray(1 / 9, np.float32), kind="TIFF"), CHECK, r"(--data\.range 1% 99%)", r"\1"),
        (images(gray(1 / 9, np.float32), kind="TIFF"), LABEL, "train with one, such", RANGED),
        (images(gray(300, np.int32), kind="TIFF"), LABEL, "outside 0..65535, here", 1),
        (images(gray(0, np.uint16)), CHECK, r"hold 0\.\.0 of 0\.\.65535, so few gray levels are left .*0 errors", 0),
        (images(not_a_number, kind="TIFF"), CHECK, "values that are not finite; replace them", redraw),
        (images(not_a_number, kind="TIFF"), SPLITS, NEXT, 0),
        (images(**SECOND), CHECK, FIRST_PAGE, 0),
        (images(kind="MPO", **SECOND), LABEL, r"00\.png: has 2 pages, of which only the first", 0),
        (images(lambda x: Image.fromarray(x).convert("CMYK"), kind="JPEG"), CHECK, PLAIN, 0),
        (images(lambda x: Image.fromarray(x).convert("LA")), CHECK, PLAIN, 0),
        (None, f"{CHECK} --data.crop 256", "every crop holds padding, .*; a smaller crop", "--data.crop 64"),
    ],
    "validation leaks": [
        (ELSEWHERE, "splits data 6 --out others", STAY, REMOVE),
        (ELSEWHERE, "splits data --val 1", r"also in val|validate with (\S+) only", rf"{CHECK} --data.val \1"),
        ("sed -i s,s/,s/../images/, data/splits/unlabeled.txt", CHECK, PLAIN, 0),
        ("sed -i '$a images/06.png labels/00.png' data/splits/*.txt", CHECK, "in both lists: remove it from one", ANEW),
        (None, SPLITS, "label more, or compare means over (--folds 4)", r"splits data \1"),
        (None, "splits data --val 2", "(--overwrite) replaces the lists", r"\1"),
        (None, "splits data --val 2", "(--out) FOLDER writes others", r"\1 other"),
    ],
    "one bad item": [
        ("truncate -s 99 data/images/01.png", CHECK, r"01\.png: cannot be read .* or download it again", redraw),
        ("rm data/images/01.png", CHECK, "no such file; check .* the split file that lists it", ANEW),
        ("echo text > data/labels/02.png", CHECK, r"02\.png: not an image .*; convert it or download it again", redraw),
        ("truncate -s 0 data/images/00.png", LABEL, r"1 failed.*is empty \(0 bytes\); download it again", redraw),
        ("truncate -s 0 data/labels/00.png", CHECK, r"labels/00\.png: the file is empty .*; download it again", redraw),
        (images(lambda x: np.tile(x, (2, 2, 1))), LABEL, "cut it into tiles of at most 3000 pixels", redraw),
    ],
    "where it runs": [
        ("echo ../x.png >> data/splits/unlabeled.txt", CHECK, "this path leaves the data root", 1),
        ("sed -i s,im,$PWD/data/im, data/splits/*.txt", CHECK, "is absolute; make it relative", ANEW),
        (OUTSIDE, CHECK, "or create a symbolic link to the folder inside the root", LINK),
        ("for x in data/splits/*.txt; do iconv -t utf-16 -o u $x; mv u $x; done", CHECK, PLAIN, 0),
        (r"sed -i '1s/^/\xef\xbb\xbf/; s/$/ \t\r/' data/splits/*.txt", CHECK, PLAIN, 0),
        (r"sed -i 's,/,\\,g' data/splits/*.txt", CHECK, "; .*in which folders are separated by /", ANEW),
        ("sed -i 's/ /,/' data/splits/*.txt", CHECK, r"line 1: expected `image_path .*, found 'im\S+,labels", ANEW),
        ("sed -i '1i # mine' data/splits/*.txt", CHECK, r"labeled\.txt, line 1: expected `image_path label_path`", 1),
        ("sed -i 's/$/ a.png/' data/splits/*.txt", CHECK, "line 1: more than two image paths", 1),
        ("truncate -s 0 data/splits/val.txt", CHECK, "val: holds no image; check its split file", ANEW),
        ("rm -r data/splits", CHECK, r"not found below .*`python -m allspark_fast splits`", ANEW),
        (None, f"{CHECK} --data.val val.txt", "not found below .*; check both paths", "--data.val splits/val.txt"),
        (None, NO_LISTS, r"splits` writes labeled\.txt and unlabeled\.txt", LISTS),
        (None, "check folder --data.crop 64", r"pass (--data\.root) with the folder", r"\1 data"),
        (None, "check folder --data.crop 64", r"or set \$(\w+)", lambda x: os.environ.update({x[1]: "data"})),
        (None, f"{CHECK} --data.root date", r"there is no folder .*date: give another (--data\.root)", r"\1 data"),
    ],
    "text from people": [
        (do(meta, classes=["a", "b", "a "]), SPLITS, "'classes' holds equal names: a; give each class a name of", meta),
        (do(meta, classes=["$x_1$", '"b", \\frac{', "道\n路"]), CHECK, r'\$x_1\$ .*"b", \\frac\{ .*道\\n路 ', 0),
        ("mv data/images/{07.png,$'a\n.png'}", SPLITS, "such a name, rename the file", "$ mv data/images/{a*,07.png}"),
        ("mv data/images/{07,-x}.png", SPLITS, "4 labeled, 2 unlabeled", 0),
    ],
    "settings": [
        (None, "train imagenet", "no recipe 'imagenet'; recipes are scenes, camvid, folder, pascal", 1),
        (None, "train --train.method fixmatch", "supervised", 2),
        (None, f"{NEW} --data.scale 2 0.5", r"data\.scale is", 2),
        (None, f"{CHECK} --train.epochs 1", "train.epochs has no effect beside .*: give one of them", EPOCHS),
        (None, f"{CHECK} --run.keep 3", r"use (run\.keep_last)", rf"{CHECK} --\1 3"),
        (None, f"{CHECK} --train.lrr 0.1", r"did you mean (train\.lr)\?", rf"{CHECK} --\1 0.1"),
        (None, CHECK.replace("folder", "foldr"), r"did you mean (folder)\?", CHECK),
        (None, CHECK.replace("check", "heck"), r"did you mean (check)\?", CHECK),
        (None, f"{CHECK} --train.conf-thresh 0", r"(train\.conf_thresh) is 0.0, expected more than 0", r"--\1 1"),
        (None, f"{CHECK} --data.augment none", r"(train\.strong) is True, expected (False)", r"--\1 \2"),
        (None, f"{CHECK} --data.range 9 1", "or two +percentiles such as (1% 99%)", r"--data.range \1"),
        ("echo train: 3 > a.yaml", f"{CHECK} --config a.yaml", r"such as `(.*?)` \(", r"$ echo '\1' > a.yaml"),
        (None, f"{NEW} --train.warmup 1", r"set (train\.warmup) to a part of the run, such as (0\.25)", OTHER),
        (None, f"{NEW} --train.pseudo-from 1", r"set (train\.pseudo_from) to .*, such as (0\.25)", OTHER),
        (None, f"{NEW} --train.warmup-epochs 3", "Memory: never used.*; train longer", "--train.steps 4"),
        (None, f"{ACCUMULATE} --train.batch-size 3", "set it to a multiple of (2)", r"--train.batch-size \1"),
        (None, f"{NEW} --train.batch-size 3", r"lower (train\.batch_size)", r"--\1 2"),
        (None, f"{NEW} --train.batch-size 3", "add images", f"$ cp data/images/{{07,08}}.png && {ANEW[2:]}"),
        (None, f"{MIXED} --train.batch-size 1", r"a (train\.batch_size) that is a multiple of (2)", OTHER),
        (None, f"{NEW} --model.backbone mit_b9", "backbone must be one of (mit_tiny)", r"--model.backbone \1"),
        (None, f"{NEW} --model.backbone timm/test_efficientne", r"did you mean (\w+)", r"--model.backbone timm/\1"),
        (None, f"{TIMM} --train.compile on", r"(train\.compile) auto or (off)", r"--\1 \2"),
        (None, f"{TIMM} {CHECKPOINTING}", r"activation_checkpointing is for mit_\* .*: leave it (False)", TIMM),
        (None, f"{NEW} --run.device cuda", "use (cpu) or auto", r"--run.device \1"),
        (None, f"{PHOTO} --device cuda", "use cpu or (auto)", r"--device \1"),
        (None, f"{COMPARE} --methods full", "with (--every-label) FILE", r"\1 data/splits/labeled.txt"),
        (None, f"{COMPARE} --methods semi --labels 9", "but only (4) have a label", r"--labels \1"),
        (None, "splits data x", r"expected a fraction such as (1/16), a share such as 0\.125", r"splits data \1"),
        (None, "splits data x", r"a share such as (0\.125) or a count", r"splits data \1"),
        (None, "splits data 9", r"or a count up to (\d)", r"splits data \1"),
        (None, "splits data --folds 1", "--folds needs at least (2), and takes the place of --val", r"--folds \1"),
        (None, "splits data --folds 2 --val 2", "--folds .* takes the place of --val", "splits data --folds 2"),
        (None, "splits data --overwrite --val 6", "--val 6 leaves no label .*: give less than 6", "--val 5"),
    ],
    "weights": [
        ("touch a.pt2", "export model.safetensors a.pt2", "pass --overwrite", 1),
        (None, f"{NEW} --model.weights nowhere.pth", r"nowhere\.pth: no such file", 1),
        (None, "evaluate model.safetensors --data.root data", "for other weights name a RECIPE", 1),
        (None, "evaluate run --split nowhere/a", "split file nowhere/a: not found", 1),
        (None, "evaluate run --json nowhere/a", "there is no folder nowhere", 1),
        (do(meta, classes=NAMES[:2]), EVALUATE, r"are kiwi, fig, date, but .* are apple, pear: correct meta\.json", 1),
        (None, "convert encoder.pth a.safetensors", r"(--model\.weights encoder\.pth)", rf"{NEW} \1"),
        (None, "predict old.pth photo.png", r"allspark_fast (convert old\.pth model\.safetensors)", r"\1 --overwrite"),
        (None, f"{CONVERT} --classes nowhere", r"nowhere: no meta\.json, and no data set", "--classes data/meta.json"),
        (None, f"{CONVERT} --classes pascal", "has 3 classes, but pascal names 21", "--classes data/meta.json"),
        (None, "convert old.pth a.bin", r"weights are saved as (\.safetensors) or \.pth", r"convert old.pth a\1"),
        (None, "convert old.pth new/a.pth", "there is no folder new, make it first", "$ mkdir new"),
        (save_timm, "convert timm.safetensors a.pth", r"use (\.safetensors)", r"convert timm.safetensors a\1"),
        (None, "export model.safetensors a.pth", "`(convert)` writes weights", r"\1 model.safetensors a.pth"),
        (CONVERT, CONVERT, "pass (--overwrite)", r"\1"),
        (None, f"{NEW} --model.weights imagenet", "no imagenet for mit_tiny: .* or (None)", r"--model.weights \1"),
        (None, f"{NEW} --model.weights imagenet", "no imagenet for .*: give a file", "--model.weights encoder.pth"),
        (None, f"{NEW} --model.weights others.safetensors", r"(--model\.reset True) starts classifier", r"\1"),
        (None, f"{NEW} --data.crop 96 --model.weights old.pth", r"Pass (--model\.reset True)", r"\1"),
        (None, EVALUATE, r"correct meta\.json", do(meta, classes=["kiwi", "fig", "date"])),
        (None, EVALUATE, "or name the classes of the weights by `convert --classes`", RENAMED),
        (None, "evaluate model.safetensors", "for other weights name a RECIPE", SETTINGS),
        (SCENES, "evaluate toy --split a.txt", "have no split files; leave it out", "evaluate toy"),
        (PHOTO, PHOTO, "pass (--overwrite)", r"\1"),
        (PHOTO, PHOTO, r"write to another folder \((--out)\)", r"\1 other"),
        (None, f"{PHOTO} --out photo.png", "it or a parent is a file: give another name", "--out other"),
        (lack_memory_once, PHOTO, "out of memory: pass (--window)", r"\1"),
    ],
    "runs": [
        (None, f"{NEW} --run.output-dir photo.png/run", "photo.png/run: expected a folder", 1),
        ("mkdir empty; touch empty/config.json", "evaluate empty", r"config\.json holds no settings of a run", 1),
        (None, f"{TRAIN} --train.lr 0.5", r"give another (--run\.output-dir)", r"\1 other"),
        (None, f"{TRAIN} --train.lr 0.5", "or what was there before", TRAIN),
        ("cp run/config.json kept; echo { > run/config.json", TRAIN, r"(\S+) holds no .* or remove it", REMOVE),
        ("cp run/config.json kept; echo { > run/config.json", TRAIN, r"(\S+) holds no .* put it back", r"$ mv kept \1"),
        ("cp run/data.json kept; echo { > run/data.json", TRAIN, r"(\S+) is no record .* or remove it", REMOVE),
        ("cp run/data.json kept; echo { > run/data.json", TRAIN, r"(\S+) is no record .* put it back", r"$ mv kept \1"),
        ("truncate -s 9 run/checkpoints/*", TRAIN, r"(\S+): none of .* remove the folder", REMOVE),
        ("truncate -s 9 run/checkpoints/*", TRAIN, r"or give another (--run\.output-dir)", r"\1 other"),
        ("rm run/best.safetensors", "predict run photo.png", "until then .* checkpoints/step_", A_STEP),
        (do(fill_disk, "new"), NEW, r"are free, but .* or give a (--run\.output-dir) elsewhere", r"\1 other"),
        (lack_memory_once, NEW, r"the same run goes on with (--model\.activation-checkpointing True)", r"\1"),
        (lack_memory_once, NEW, r"a new one \((--run\S+)\) with (--train\S+ 2)", r"\1 other \2"),
        (lack_memory_once, NEW, r"smaller (--data\.crop) or (--train\.b\S+), .* (--eval\.mode sliding)", SMALLER),
        (None, WILD, r"start again in another (--run\.output-dir) with a lower (train\.lr)", r"\1 other --\2 0.00001"),
        (None, NEW, r"allspark_fast (evaluate new)", r"\1"),
        (None, NEW, r"allspark_fast (predict new) IMAGE_OR_FOLDER", r"\1 data/images"),
    ],
}


@pytest.mark.parametrize(
    ("before", "command", "said", "then"),
    [
        pytest.param(*case, id=f"{kind} {number}" + ", advice" * (not isinstance(case[-1], int)))
        for kind, cases in CASES.items()
        for number, case in enumerate(cases)
    ],
)
def test_it_is_said_or_read_as_meant(before, command, said, then, capsys, caplog):
    def run(line):
        caplog.clear()
        try:
            status = main(line.split())
        except SystemExit as stop:  # how argparse and tyro end
            status = stop.code
        printed = " ".join(line for text in (*capsys.readouterr(), caplog.text) for line in text.splitlines())
        print(printed)  # shown if the test fails
        return status, re.search(said, printed)

    if re.search("timm|imagenet", command):
        pytest.importorskip("timm", reason="needs the extra timm")
    if isinstance(before, str):
        enter(before)
    elif before is not None:
        before()
    capsys.readouterr()
    status, found = run(command)
    assert found is not None
    if isinstance(then, int):
        assert status == then
        return
    if callable(then):
        then(found)
    elif then.startswith("$ "):
        enter(found.expand(then.removeprefix("$ ")))
    else:
        words = found.expand(then)
        command = words if words.split()[0] in COMMANDS else f"{command} {words}"
    capsys.readouterr()
    assert run(command) == (0, None)
