from dataclasses import replace

import numpy as np
import pytest

from allspark_fast.config import DataConfig
from allspark_fast.data.check import check_sources
from allspark_fast.data.datasets import Entry, SegmentationDataset
from allspark_fast.data.info import VOC_PALETTE, DatasetInfo
from allspark_fast.data.sources import Sources, open_sources
from tests.helpers.images import exif, write_folder, write_image

INFO = DatasetInfo("toy", ("a", "b", "c"), VOC_PALETTE)
BLACK = np.zeros((40, 50, 3), np.uint8)


@pytest.fixture
def lists(tmp_path):
    entries = write_folder(tmp_path, 9)
    return {"labeled": entries[:3], "unlabeled": entries[3:6], "val": entries[6:]}


def check(root, lists, info=INFO, crop=32, sample=None):
    opened = {name: SegmentationDataset(root, entries, info=info) for name, entries in lists.items()}
    return check_sources(Sources(info, **opened), crop, sample=sample)


def found(*arguments, **options):
    return [(problem.kind, problem.file) for problem in check(*arguments, **options)]


def test_sound_data_has_no_problems(tmp_path, lists):
    (tmp_path / "labels/04.png").unlink()  # of an unlabeled image
    assert check(tmp_path, lists) == []


def test_scenes_have_no_problems():
    assert check_sources(open_sources(DataConfig(scenes=(1, 1, 1))), 513) == []


def test_files_that_cannot_be_read(tmp_path, lists):
    whole = (tmp_path / "images/00.png").read_bytes()
    (tmp_path / "images/00.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "labels/00.png").write_bytes(b"")
    (tmp_path / "images/01.png").unlink()
    (tmp_path / "images/03.png").write_bytes(b"")
    (tmp_path / "labels/06.png").write_bytes(b"text")
    write_image(tmp_path / "labels/07.png", BLACK + 255)  # no color of VOC
    write_image(tmp_path / "labels/02.png", np.repeat(np.array([0, 1, 3, 200, 255], np.uint8), 400).reshape(40, 50))
    (tmp_path / "labels/08.png").unlink()
    lists["unlabeled"] += [Entry("../x.png", None), Entry(str(tmp_path / "images/00.png"), None)]
    problems = check(tmp_path, lists)
    expected = [
        ("images/00.png", "cannot be read as an image"),
        ("labels/00.png", "the file is empty"),
        ("images/01.png", "no such file"),
        ("labels/02.png", "holds [3, 200], but the 3 classes of toy have the indices 0..2"),
        ("images/03.png", "the file is empty"),
        ("../x.png", "this path leaves the data root"),
        (str(tmp_path / "images/00.png"), "this path leaves the data root"),
        ("labels/06.png", "not an image in a supported format"),
        ("labels/07.png", "holds colors that do not stand for exactly one class"),
        ("labels/08.png", "no such file"),
    ]
    assert [(p.kind, p.file) for p in problems] == [("file", file) for file, _ in expected]
    for problem, (_, message) in zip(problems, expected, strict=True):
        assert problem.message.startswith(message)


def test_sizes_that_differ(tmp_path, lists):
    write_image(tmp_path / "labels/02.png", np.zeros((50, 40), np.uint8))
    write_image(tmp_path / "images/08.png", BLACK, exif=exif(6))
    problems = check(tmp_path, lists)
    assert [(p.kind, p.file) for p in problems] == [
        ("size_mismatch", "labels/02.png"),
        ("size_mismatch", "labels/08.png"),
    ]
    assert "is 40x50, its image images/02.png 50x40 pixels" in problems[0].message


def test_images_that_are_turned(tmp_path, lists):
    """Orientation 3 changes no size: the label may be upside down. Unlabeled images do not matter."""
    for index in (1, 2, 4, 6):
        write_image(tmp_path / f"images/{index:02}.png", BLACK, exif=exif(3))
    write_image(tmp_path / "labels/07.png", BLACK[..., 0], exif=exif(3))
    problems = check(tmp_path, lists)
    assert [(p.kind, p.file, p.is_warning) for p in problems] == [
        ("turned_image", "labeled", True),
        ("file", "labels/07.png", False),
        ("turned_image", "val", True),
    ]
    assert "EXIF turns 2 images with labels, images/01.png first" in problems[0].message


def test_black_and_white_masks_without_values(tmp_path, lists):
    mask = np.zeros((40, 50), np.uint8)
    mask[:9] = 255
    for entry in lists["labeled"]:
        write_image(tmp_path / entry.label, mask)
    (problem,) = check(tmp_path, lists, sample=2)
    assert (problem.kind, problem.is_warning) == ("black_and_white", False)
    assert 'add "values": [0, 255] to meta.json' in problem.message
    two = DatasetInfo("toy", ("a", "b"), VOC_PALETTE, values=(0, 255))
    assert found(tmp_path, {**lists, "val": lists["labeled"][:1]}, two) == [("train_and_val", "images/00.png")]
    (problem,) = check(tmp_path, lists, replace(INFO, values=(0, 1, 2)))
    assert (problem.kind, problem.is_warning) == ("absent_class", True)
    assert "no label holds b, c," in problem.message


def test_how_lists_fit_together(tmp_path, lists):
    lists["labeled"][0] = Entry("images/00.png", None)
    lists["unlabeled"] += [Entry("images/03.png", None), Entry("images/../images/02.png", None)]
    lists["val"].append(lists["labeled"][1])
    for sample in (None, 1):
        problems = check(tmp_path, lists, sample=sample)
        assert sorted((p.kind, p.file, p.is_warning) for p in problems) == [
            ("labeled_and_unlabeled", "images/02.png", False),
            ("missing_label", "images/00.png", False),
            ("train_and_val", "images/01.png", True),
        ]
    assert str(problems[0]) == "error: images/02.png: is in both lists: remove it from one of them"
    assert str(problems[1]).startswith("warning: images/01.png: ")
    empty = found(tmp_path, {**lists, "labeled": [], "val": []})
    assert empty == [("empty_list", "labeled"), ("empty_list", "val")]


def test_crops_larger_than_any_resized_image(tmp_path, lists):
    assert found(tmp_path, lists, crop=80) == []
    assert found(tmp_path, lists, crop=81) == [("crop_padding", "crop 81x81")]


def test_samples_are_bounded_and_the_same_again_and_hide_no_absent_file(tmp_path):
    entries = write_folder(tmp_path, 20)
    lists = {"labeled": entries[:2], "unlabeled": entries[2:], "val": entries[:1]}
    for entry in entries[2:]:
        (tmp_path / entry.image).write_text("no image")
    (tmp_path / entries[0].label).write_bytes(b"")
    (tmp_path / entries[1].image).unlink()
    problems = found(tmp_path, lists, sample=5)
    assert {("file", entries[0].label), ("file", entries[1].image)} < set(problems)
    assert sum(file in {entry.image for entry in entries[2:]} for _, file in problems) == 5
    assert problems == found(tmp_path, lists, sample=5)
    assert len(found(tmp_path, lists, sample=50)) == len(found(tmp_path, lists)) == len(problems) + 13


def test_camvid_is_sound(camvid):
    lists = {name: f"splits/1_8/seed0/{name}.txt" for name in ("labeled", "unlabeled")}
    sources = open_sources(DataConfig(dataset="camvid", root=camvid, **lists, val="splits/val.txt"))
    assert check_sources(sources, 320, sample=25) == []
