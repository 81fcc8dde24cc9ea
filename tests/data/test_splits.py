import itertools
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from allspark_fast.config import DataConfig
from allspark_fast.data.check import check_sources
from allspark_fast.data.datasets import Entry, SegmentationDataset, read_split, scan_folder
from allspark_fast.data.info import DATASETS, VOC_PALETTE, DatasetInfo, read_info
from allspark_fast.data.sources import open_sources
from allspark_fast.data.splits import (
    Contents,
    Split,
    classes_of,
    doubts_about,
    make_split,
    parse_amount,
    read_contents,
    spread,
    write_lists,
)
from allspark_fast.errors import DataError, InputError
from tests.helpers.images import write_folder, write_image

ENTRIES = [Entry(f"{index}.jpg", f"{index}.png") for index in range(40)]
# Class 0 is everywhere, class 1 in every second entry, classes 2 to 5 in one entry each.
CONTENTS = {entry: Contents(np.zeros(256), np.zeros(3)) for entry in ENTRIES}
for number, (shares, _) in enumerate(CONTENTS.values()):
    shares[[0, number % 2, *({2 + number // 10} if number % 10 == 3 else ())]] = 1 / 3


def split(count, seed=0, entries=ENTRIES):
    return make_split(entries, spread(entries, seed, CONTENTS), (), count)


@pytest.mark.parametrize(
    ("text", "count"),
    [("1/16", 6), ("1/15", 7), ("1/8", 12), ("0.5", 50), ("7", 7), ("100", 100), ("1/1", 100), ("1/999", 1)],
)
def test_amounts(text, count):
    assert parse_amount(text, 100) == count


@pytest.mark.parametrize("text", ["", "0", "101", "-3", "1/0", "3/2", "half", "1.5", "0.0", "1/-4", "nan", "inf"])
def test_faulty_amounts(text):
    with pytest.raises(InputError, match="expected a fraction such as 1/16"):
        parse_amount(text, 100)


def test_parts_are_partitions_in_order_that_cover_all_classes_and_are_nested():
    for seed in range(5):
        part = split(6, seed)
        assert part == split(6, seed)
        assert len(part.labeled) == 6
        assert sorted(part.labeled + part.unlabeled, key=ENTRIES.index) == ENTRIES
        assert part.labeled == sorted(part.labeled, key=ENTRIES.index)
        assert (classes_of(part.labeled, CONTENTS)[:6] > 0).all()
        parts = [set(split(count, seed).labeled) for count in (1, 3, 6, 10, 40)]
        assert all(small < large for small, large in itertools.pairwise(parts))
    assert len({tuple(split(10, seed).labeled) for seed in range(8)}) > 1


def test_every_part_of_the_order_and_every_fold_has_the_classes_and_the_look_of_the_whole():
    """Half of the images hold class 1, others are bright; a random choice of 20 would have 6 to 14 of each."""
    rng = np.random.default_rng(0)
    entries = [Entry(f"{index}.jpg", f"{index}.png") for index in range(200)]
    holds, bright = rng.integers(2, size=(2, 200))
    contents = {x: Contents(np.eye(256)[holds[i]], np.full(3, 60.0 + 90 * bright[i])) for i, x in enumerate(entries)}
    for seed in range(5):
        order = spread(entries, seed, contents)
        assert sorted(order) == list(range(200))
        for part in (order[i : i + 20] for i in range(0, 181, 10)):
            for feature in (holds, bright):
                assert abs(feature[part].mean() - feature.mean()) < 0.11


def test_doubts_are_told():
    names = [f"class {index}" for index in range(255)]
    part = Split(ENTRIES[4:6], ENTRIES[6:20], ENTRIES[20:])
    absent, few, rare = doubts_about(part, CONTENTS, names)
    assert absent == "in no labeled image: class 3, class 4, class 5"
    assert few.startswith("20 validation images are too few to tell methods apart (aim at 30)")
    assert rare.endswith("so their IoU is mostly chance: class 3, class 4, class 5")
    assert doubts_about(Split(ENTRIES, [], []), CONTENTS, names) == []


def test_entries_without_a_label_stay_unlabeled():
    entries = [Entry("x.jpg", None), *ENTRIES[:5]]
    assert split(5, entries=entries).unlabeled == [entries[0]]
    repeated = split(3, entries=ENTRIES[:2] * 4)  # lines count one by one
    assert (len(repeated.labeled), len(repeated.unlabeled)) == (3, 5)


@pytest.mark.parametrize("name", ["b\udce4r.png", "two\nlines.png", "next\x85line.png", " blank.png", "a.png b.png"])
def test_names_that_no_split_file_can_hold_are_refused_before_anything_is_written(tmp_path, name):
    lists = {tmp_path / "splits/a": [Entry("a.png", "b.png")], tmp_path / "b": [Entry(name, None)]}
    with pytest.raises(DataError, match="rename the file"):
        write_lists(lists, overwrite=True)
    assert list(tmp_path.iterdir()) == []


def read_lists(folder: Path):
    return {file.stem: read_split(file) for file in folder.glob("*.txt")}


def test_validation_is_set_aside_and_training_keeps_rare_classes(tmp_path, command):
    entries = write_folder(tmp_path, 8, labeled=7, classes=2)
    write_image(tmp_path / entries[5].label, np.full((40, 50), 2, np.uint8))
    printed = command("splits", tmp_path, "--val", 3)
    assert "splits: 4 labeled, 1 unlabeled, 3 for validation\n" in printed
    lists = read_lists(tmp_path / "splits")
    assert entries[5] in lists["labeled"]
    assert lists["unlabeled"] == entries[7:]
    assert sorted(entry.image for part in lists.values() for entry in part) == [entry.image for entry in entries]
    # A folder has one list of validation images.
    assert "splits/val.txt exists" in command("splits", tmp_path, "1/2", "--val", 2, status=1)
    assert read_lists(tmp_path / "splits") == lists
    (tmp_path / "images/photo.heic").write_bytes(b"")
    aside = {entry.image for entry in lists["val"]}
    for amount, options in ("2", []), ("3", ["--list", "all.txt"]):
        (tmp_path / "all.txt").write_text("".join(f"./{entry.image} {entry.label}\n" for entry in entries[:7]))
        printed = command("splits", tmp_path, amount, *options)
        assert f"{tmp_path / 'splits/val.txt'}: 3 images stay aside for validation" in printed
        assert ("'images/photo.heic' first" in printed) == (not options)
        later = read_lists(tmp_path / "splits" / amount)
        assert not aside & {entry.image.removeprefix("./") for part in later.values() for entry in part}


def test_later_splits_know_of_validation_images_elsewhere(tmp_path, command):
    root, (first, second, third) = tmp_path / "data", (tmp_path / name for name in "ABC")
    write_folder(root, 12)
    command("splits", root, "--val", 3, "--out", first)
    root = root.rename(tmp_path / "moved")
    printed = command("splits", root, 4, "--out", second)
    assert f"{first / 'val.txt'}: 3 images stay aside for validation" in printed
    aside, later = {entry.image for entry in read_lists(first)["val"]}, read_lists(second)
    assert not aside & {entry.image for part in later.values() for entry in part}
    shutil.rmtree(root / "splits")
    (root / "splits").write_text("a file, so that nothing can be noted")
    printed = command("splits", root, "--val", 3, "--out", third)
    assert f"later splits will not know of {third / 'val.txt'}" in printed


def test_folds_validate_on_every_labeled_image_once(tmp_path, command):
    entries = write_folder(tmp_path, 9, labeled=8)
    printed = command("splits", tmp_path, 2, "--folds", 4, "--out", tmp_path / "folds")
    assert printed.count("2 labeled, 5 unlabeled, 2 for validation") == 4
    folds = [read_lists(tmp_path / f"folds/fold{number}") for number in (1, 2, 3, 4)]
    assert sorted((entry for fold in folds for entry in fold["val"]), key=entries.index) == entries[:8]
    for fold in folds:
        assert sorted(entry.image for part in fold.values() for entry in part) == [entry.image for entry in entries]
    assert "8 images have a label, expected at least 9" in command("splits", tmp_path, "--folds", 9, status=1)
    # Of a shell variable that is not set, say.
    assert "'': expected a fraction" in command("splits", tmp_path, "", status=1)


def test_contents_are_read_from_images_and_labels(tmp_path):
    write_image(tmp_path / "a.png", np.array([[1, 4], [255, 4]], np.uint8))
    write_image(tmp_path / "a.tiff", np.array([[1000, 3000]], np.uint16))
    entry = Entry("a.tiff", "a.png")
    info = DatasetInfo("toy", ("a", "b"), VOC_PALETTE, ignore_index=4)
    for described, expected in ((None, {1: 1 / 3, 4: 2 / 3}), (info, {1: 1.0})):
        shares, color = read_contents(SegmentationDataset(tmp_path, [entry], info=described))[entry]
        assert color.tolist() == [2000] * 3
        assert {int(i): shares[i] for i in np.flatnonzero(shares)} == expected


def test_camvid():
    root = Path(os.environ.get("ALLSPARK_DATA_DIR", "nowhere"), "camvid")
    if not root.is_dir():
        pytest.skip("needs camvid/ in $ALLSPARK_DATA_DIR")
    assert read_info(root) == DATASETS["camvid"]
    splits = {name: read_split(root / f"splits/{name}.txt") for name in ("train", "val", "test")}
    assert {name: len(entries) for name, entries in splits.items()} == {"train": 367, "val": 101, "test": 233}
    assert {entry for entries in splits.values() for entry in entries} == set(scan_folder(root))
    lists = {name: f"splits/1_8/seed0/{name}.txt" for name in ("labeled", "unlabeled")}
    sources = open_sources(DataConfig(dataset="camvid", root=root, **lists, val="splits/val.txt"))
    assert check_sources(sources, 320, sample=25)[0] == []
