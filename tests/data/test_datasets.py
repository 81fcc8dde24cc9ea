from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from allspark_fast.data.datasets import Entry, SegmentationDataset, read_split, scan_folder
from allspark_fast.data.info import VOC_PALETTE, DatasetInfo, hex_palette
from allspark_fast.errors import DataError
from tests.helpers.images import exif, write_folder, write_image


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        ("  a/1.JPG\t b/1.PNG  ", [("a/1.JPG", "b/1.PNG")]),
        ("my images/1 a.jpg my labels/1 a.png", [("my images/1 a.jpg", "my labels/1 a.png")]),
        ("my images/1 a.jpg", [("my images/1 a.jpg", None)]),
        ("bilder/ä.jpeg marken/ä.tif", [("bilder/ä.jpeg", "marken/ä.tif")]),
        ("\ufeffa.jpg b.png\r\n\r\nc.jpg  \r\na.jpg b.png", [("a.jpg", "b.png"), ("c.jpg", None), ("a.jpg", "b.png")]),
        ("\n \n", []),
    ],
)
def test_split_files(tmp_path, text, entries):
    (tmp_path / "s.txt").write_bytes(text.encode())
    assert read_split(tmp_path / "s.txt") == [Entry(*entry) for entry in entries]


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_scan_folder(tmp_path):
    touch(tmp_path, "images/b/2.jpg", "images/a.png", "images/c.jpg", "images/notes.txt", "images/.d.png")
    assert scan_folder(tmp_path) == [Entry(f"images/{name}", None) for name in ("a.png", "b/2.jpg", "c.jpg")]
    touch(tmp_path, "labels/b/2.png", "labels/a.png", "labels/orphan.png")
    assert scan_folder(tmp_path) == [
        Entry("images/a.png", "labels/a.png"),
        Entry("images/b/2.jpg", "labels/b/2.png"),
        Entry("images/c.jpg", None),
    ]


def label_of(root, info):
    return np.asarray(SegmentationDataset(root, [Entry("a.jpg", "a.png")], info=info).label(0)).tolist()


def test_values_stand_for_classes(tmp_path):
    write_image(tmp_path / "a.png", np.array([[0, 255, 9]], np.uint8))
    info = DatasetInfo("toy", ("a", "b"), VOC_PALETTE, ignore_index=9, values=(0, 255))
    assert label_of(tmp_path, info) == [[0, 1, 255]]
    assert label_of(tmp_path, DatasetInfo("toy", tuple("abcdefghij"), VOC_PALETTE, ignore_index=0)) == [[255, 255, 9]]


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_colors_stand_for_classes(tmp_path, mode):
    write_image(tmp_path / "a.png", np.array([[[255, 200, 0], [0, 0, 0], [9, 9, 9], [255, 200, 0]]], np.uint8), mode)
    info = DatasetInfo("toy", ("a", "b"), hex_palette("090909 ffc800"))
    for good in (info, replace(info, values=(7, 0))):
        assert label_of(tmp_path, good) == [[1, 255, 0, 1]]
    for bad, unknown in (
        (replace(info, palette=hex_palette("000000 ffc800")), r"\[9, 9, 9\]"),
        (replace(info, palette=hex_palette("090909 090909")), r"\[9, 9, 9\], \[255, 200, 0\]"),
        (replace(info, values=(0, 255)), r"\[0, 0, 0\]"),  # 255 is not ignored, so black stands for nothing
    ):
        with pytest.raises(DataError, match=rf"a\.png: holds colors .* exactly one class: {unknown}; known are"):
            label_of(tmp_path, bad)


def test_sizes_are_compared_upright(tmp_path):
    entries = write_folder(tmp_path, 1)
    write_image(tmp_path / entries[0].image, np.zeros((50, 40, 3), np.uint8), exif=exif(6))
    dataset = SegmentationDataset(tmp_path, [*entries, Entry(entries[0].image, None)])
    image, label = dataset[0]
    assert (image.mode, image.size, label.mode, label.size) == ("RGB", (50, 40), "L", (50, 40))
    np.testing.assert_array_equal(np.asarray(label), np.asarray(Image.open(tmp_path / entries[0].label)))
    assert dataset[1][1] is None
