from dataclasses import replace

import numpy as np
import pytest
from PIL import ExifTags, Image

from allspark_fast.data.datasets import Entry, SegmentationDataset, read_split, scan_folder
from allspark_fast.data.info import VOC_PALETTE, DatasetInfo, hex_palette
from allspark_fast.errors import DataError


def write(path, text):
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize(
    ("line", "image", "label"),
    [
        ("a/1.jpg b/1.png", "a/1.jpg", "b/1.png"),
        ("a/1.jpg", "a/1.jpg", None),
        ("  a/1.JPG\t b/1.PNG  ", "a/1.JPG", "b/1.PNG"),
        ("my images/1 a.jpg my labels/1 a.png", "my images/1 a.jpg", "my labels/1 a.png"),
        ("my images/1 a.jpg", "my images/1 a.jpg", None),
        ("bilder/ä.jpeg marken/ä.tif", "bilder/ä.jpeg", "marken/ä.tif"),
    ],
)
def test_lines(tmp_path, line, image, label):
    assert read_split(write(tmp_path / "s.txt", line)) == [Entry(image, label)]


def test_dialects_of_whole_files(tmp_path):
    text = "\ufeffa.jpg b.png\r\n\r\nc.jpg   \r\na.jpg b.png"
    expected = [Entry("a.jpg", "b.png"), Entry("c.jpg", None), Entry("a.jpg", "b.png")]
    assert read_split(write(tmp_path / "s.txt", text)) == expected
    assert read_split(write(tmp_path / "empty.txt", "\n \n")) == []


@pytest.mark.parametrize(
    ("line", "message"), [("a.jpg b", "expected `image_path"), ("a.jpg b.png c.png", "more than two image paths")]
)
def test_faulty_lines_are_named(tmp_path, line, message):
    with pytest.raises(DataError, match=rf"s\.txt, line 3: {message}"):
        read_split(write(tmp_path / "s.txt", f"a.jpg b.png\n\n{line}\n"))


def test_absent_and_binary_split_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"absent\.txt: cannot be read"):
        read_split(tmp_path / "absent.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x81")
    with pytest.raises(DataError, match=r"binary\.txt: cannot be read"):
        read_split(tmp_path / "binary.txt")


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_scan_folder(tmp_path):
    touch(tmp_path, "images/b/2.jpg", "images/a.png", "images/c.jpg", "images/notes.txt", "images/.d.png")
    touch(tmp_path, "labels/b/2.png", "labels/a.png", "labels/orphan.png")
    assert scan_folder(tmp_path) == [
        Entry("images/a.png", "labels/a.png"),
        Entry("images/b/2.jpg", "labels/b/2.png"),
        Entry("images/c.jpg", None),
    ]


def test_scan_folder_without_labels(tmp_path):
    touch(tmp_path, "images/a.png")
    assert scan_folder(tmp_path) == [Entry("images/a.png", None)]


def test_labels_of_no_image_are_told(tmp_path):
    touch(tmp_path, "images/a.jpg", "labels/a_mask.png")
    with pytest.raises(DataError, match=r"a_mask\.png would belong to an image a_mask\.jpg"):
        scan_folder(tmp_path)


def test_values_stand_for_classes(tmp_path):
    Image.fromarray(np.array([[0, 255, 9]], np.uint8)).save(tmp_path / "a.png")
    info = DatasetInfo("toy", ("a", "b"), VOC_PALETTE, ignore_index=9, values=(0, 255))
    dataset = SegmentationDataset(tmp_path, [Entry("a.jpg", "a.png")], info=info)
    assert np.asarray(dataset.label(0)).tolist() == [[0, 1, 255]]
    dataset.info = replace(info, ignore_index=255)
    with pytest.raises(DataError, match=r"a\.png: holds \[9\], but the 2 classes of toy have the values \[0, 255\]"):
        dataset.label(0)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_colours_stand_for_classes(tmp_path, mode):
    colors = np.array([[[255, 200, 0], [0, 0, 0], [9, 9, 9], [255, 200, 0]]], np.uint8)
    Image.fromarray(colors).convert(mode).save(tmp_path / "a.png")
    info = DatasetInfo("toy", ("a", "b"), hex_palette("090909 ffc800"))
    dataset = SegmentationDataset(tmp_path, [Entry("a.jpg", "a.png")], info=info)
    assert np.asarray(dataset.label(0)).tolist() == [[1, 255, 0, 1]]
    dataset.info = replace(info, values=(7, 0))
    assert np.asarray(dataset.label(0)).tolist() == [[1, 255, 0, 1]]
    for palette, unknown in (
        ("000000 ffc800", r"\[\[9, 9, 9\]\]"),
        ("090909 090909", r"\[\[9, 9, 9\], \[255, 200, 0\]\]"),
    ):
        dataset.info = replace(info, palette=hex_palette(palette))
        with pytest.raises(DataError, match=rf"a\.png: holds colours .* of one class: {unknown}; known are"):
            dataset.label(0)
    dataset.info = replace(info, values=(0, 255))  # then 255 is not ignored, and black stands for nothing
    with pytest.raises(DataError, match=r"one class: \[\[0, 0, 0\]\]"):
        dataset.label(0)


def test_scan_folder_errors(tmp_path):
    with pytest.raises(DataError, match="expected a folder with images/"):
        scan_folder(tmp_path)
    touch(tmp_path, "images/a.png", "images/a.jpg")
    with pytest.raises(DataError, match=r"a\.png: has the same stem as a\.jpg"):
        scan_folder(tmp_path)


def test_dataset_reads_pairs(tmp_path, make_folder):
    entries = make_folder(2)
    dataset = SegmentationDataset(tmp_path, [*entries, Entry(entries[0].image, None)])
    image, label = dataset[1]
    assert len(dataset) == 3
    assert (image.mode, image.size, label.mode, label.size) == ("RGB", (50, 40), "L", (50, 40))
    np.testing.assert_array_equal(np.asarray(label), np.asarray(Image.open(tmp_path / entries[1].label)))
    np.testing.assert_array_equal(np.asarray(dataset.image(1)), np.asarray(image))
    assert dataset[2][1] is None


def test_ignored_index_becomes_255(tmp_path, make_folder):
    entries = make_folder(1)
    raw = np.asarray(Image.open(tmp_path / entries[0].label))
    label = SegmentationDataset(tmp_path, entries, info=DatasetInfo("toy", ("a", "b", "c"), VOC_PALETTE, 1)).label(0)
    np.testing.assert_array_equal(np.asarray(label), np.where(raw == 1, 255, raw))


def test_sizes_that_differ_are_refused(tmp_path, make_folder):
    entries = make_folder(1)
    Image.new("L", (9, 8)).save(tmp_path / entries[0].label)
    with pytest.raises(DataError, match=r"images/00\.png is 50x40 .* labels/00\.png is 9x8"):
        SegmentationDataset(tmp_path, entries)[0]


def test_sizes_are_compared_upright(tmp_path, make_folder):
    entries = make_folder(1)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (40, 50)).save(tmp_path / entries[0].image, exif=exif)
    image, label = SegmentationDataset(tmp_path, entries)[0]
    assert image.size == label.size == (50, 40)


def test_paths_outside_the_root(tmp_path, make_folder):
    make_folder(1)
    entries = [Entry("../images/00.png", None)]
    with pytest.raises(DataError, match="leaves the data root"):
        SegmentationDataset(tmp_path / "labels", entries).image(0)
    assert SegmentationDataset(tmp_path / "labels", entries, allow_outside=True).image(0).size == (50, 40)


def test_camvid_splits(camvid):
    splits = {name: read_split(camvid / f"splits/{name}.txt") for name in ("train", "val", "test")}
    assert {name: len(entries) for name, entries in splits.items()} == {"train": 367, "val": 101, "test": 233}
    found = {entry for entries in splits.values() for entry in entries}
    assert found == set(scan_folder(camvid))
    image, label = SegmentationDataset(camvid, splits["val"])[0]
    assert image.size == label.size == (480, 360)
    assert set(np.unique(label)) <= {*range(11), 255}
