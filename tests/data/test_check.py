import numpy as np
import pytest
from PIL import ExifTags, Image

from allspark_fast.data.check import check_dataset
from allspark_fast.data.datasets import Entry, read_split
from allspark_fast.data.info import DATASETS, VOC_PALETTE, DatasetInfo, hex_palette

INFO = DatasetInfo("toy", ("a", "b", "c"), VOC_PALETTE)


@pytest.fixture
def lists(make_folder):
    entries = make_folder(9)
    return {"labeled": entries[:3], "unlabeled": entries[3:6], "val": entries[6:]}


def found(root, lists, crop_size=32, **options):
    return [(problem.kind, problem.file) for problem in check_dataset(root, INFO, lists, crop_size, **options)]


def test_sound_data_has_no_problems(tmp_path, lists):
    assert found(tmp_path, lists) == []


def test_missing_files(tmp_path, lists):
    for file in (lists["labeled"][1].image, lists["unlabeled"][0].image, lists["val"][2].label):
        (tmp_path / file).unlink()
    expected = [("missing_file", "images/01.png"), ("missing_file", "images/03.png"), ("missing_file", "labels/08.png")]
    assert found(tmp_path, lists) == expected


def test_unreadable_files(tmp_path, lists):
    whole = (tmp_path / "images/00.png").read_bytes()
    (tmp_path / "images/00.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "images/03.png").write_bytes(b"")
    (tmp_path / "labels/06.png").write_bytes(b"text")
    Image.new("RGB", (50, 40), "white").save(tmp_path / "labels/07.png")  # no colour of VOC
    expected = ["images/00.png", "images/03.png", "labels/06.png", "labels/07.png"]
    assert found(tmp_path, lists) == [("unreadable", file) for file in expected]


def test_sizes_that_differ(tmp_path, lists):
    Image.new("L", (40, 50)).save(tmp_path / "labels/02.png")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (50, 40)).save(tmp_path / "images/08.png", exif=exif)
    problems = check_dataset(tmp_path, INFO, lists, 32)
    assert [(p.kind, p.file) for p in problems] == [
        ("size_mismatch", "labels/02.png"),
        ("size_mismatch", "labels/08.png"),
    ]
    assert "is 40x50, its image images/02.png 50x40 pixels" in problems[0].message


def test_images_that_are_turned(tmp_path, lists):
    """Orientation 3 changes no size: the label may be upside down. Unlabeled images do not matter."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    for index in (1, 2, 4, 6):
        Image.new("RGB", (50, 40)).save(tmp_path / f"images/{index:02}.png", exif=exif)
    Image.new("L", (50, 40)).save(tmp_path / "labels/07.png", exif=exif)
    problems = check_dataset(tmp_path, INFO, lists, 32)
    assert [(p.kind, p.file, p.is_warning) for p in problems] == [
        ("turned_image", "labeled", True),
        ("unreadable", "labels/07.png", False),
        ("turned_image", "val", True),
    ]
    assert "2 images with labels, images/01.png first, are turned" in problems[0].message


def test_label_values(tmp_path, lists):
    values = np.zeros((40, 50), np.uint8)
    values[:4] = np.array([[1], [3], [200], [255]])
    Image.fromarray(values).save(tmp_path / "labels/01.png")
    problems = check_dataset(tmp_path, INFO, lists, 32)
    assert [(p.kind, p.file) for p in problems] == [("label_value", "labels/01.png")]
    assert "holds [3, 200], but the 3 classes of toy have the indices 0..2" in problems[0].message
    other = DatasetInfo("toy", INFO.classes, VOC_PALETTE, ignore_index=200)
    assert "holds [3]," in check_dataset(tmp_path, other, lists, 32)[0].message


def test_colours_of_labels(tmp_path, lists):
    info = DatasetInfo("toy", INFO.classes, hex_palette("ff0000 00ff00 0000ff"))
    colors = np.array(info.palette[:4], np.uint8)  # the fourth, black, is ignored
    rng = np.random.default_rng(0)
    for entry in (*lists["labeled"], *lists["val"]):
        Image.fromarray(colors[rng.integers(4, size=(40, 50))]).save(tmp_path / entry.label)
    assert check_dataset(tmp_path, info, lists, 32) == []
    Image.new("RGB", (50, 40), (0, 255, 1)).save(tmp_path / "labels/01.png")
    (problem,) = check_dataset(tmp_path, info, lists, 32)
    assert (problem.kind, problem.file, problem.is_warning) == ("unreadable", "labels/01.png", False)
    assert "not those of one class: [[0, 255, 1]]; known are [[0, 0, 0], [0, 0, 255]," in problem.message
    assert "Correct 'palette' in meta.json" in problem.message


def test_black_and_white_masks_without_values(tmp_path, lists):
    mask = np.zeros((40, 50), np.uint8)
    mask[:9] = 255
    for entry in lists["labeled"]:
        Image.fromarray(mask).save(tmp_path / entry.label)
    (problem,) = check_dataset(tmp_path, INFO, lists, 32, sample=2)
    assert (problem.kind, problem.is_warning) == ("black_and_white", False)
    assert 'add "values": [0, 255] to meta.json' in problem.message
    info = DatasetInfo("toy", ("a", "b"), VOC_PALETTE, values=(0, 255))
    assert check_dataset(tmp_path, info, {**lists, "val": lists["labeled"][:1]}, 32, sample=2)[0].is_warning
    meant = DatasetInfo("toy", INFO.classes, VOC_PALETTE, values=(0, 1, 2))
    (problem,) = check_dataset(tmp_path, meant, lists, 32)
    assert (problem.kind, problem.is_warning) == ("absent_class", True)
    assert "no label holds b, c," in problem.message


def test_paths_outside_the_root(tmp_path, lists):
    lists["unlabeled"] = [Entry("../x.png", None), Entry(str(tmp_path / "images/00.png"), None)]
    assert found(tmp_path, lists) == [("outside_root", entry.image) for entry in lists["unlabeled"]]
    assert found(tmp_path, lists, allow_outside=True) == [("missing_file", "../x.png")]


def test_missing_labels(tmp_path, lists):
    lists["labeled"][0] = Entry("images/00.png", None)
    lists["unlabeled"][0] = Entry("images/03.png", None)
    assert found(tmp_path, lists, hidden_labels=True) == [("missing_label", "images/00.png")]


def test_hidden_labels_are_checked_on_request(tmp_path, lists):
    (tmp_path / "labels/04.png").unlink()
    assert found(tmp_path, lists) == []
    assert found(tmp_path, lists, hidden_labels=True) == [("missing_file", "labels/04.png")]


def test_empty_lists(tmp_path, lists):
    assert found(tmp_path, {**lists, "labeled": [], "val": []}) == [("empty_split", "labeled"), ("empty_split", "val")]


def test_overlapping_lists(tmp_path, lists):
    lists["unlabeled"].append(Entry("images/../images/02.png", None))
    lists["val"].append(lists["labeled"][0])
    problems = check_dataset(tmp_path, INFO, lists, 32)
    assert [(p.kind, p.file, p.is_warning) for p in problems] == [
        ("labeled_and_unlabeled", "images/02.png", False),
        ("train_and_val", "images/00.png", True),
    ]
    assert "take it out of one" in problems[0].message
    assert str(problems[1]).startswith("warning: images/00.png: ")
    assert str(problems[1]).startswith("warning: images/00.png: ")


@pytest.mark.parametrize("crop_size", [31, (64, 16)])
def test_too_small_crops(tmp_path, lists, crop_size):
    (problem,) = check_dataset(tmp_path, INFO, lists, crop_size)
    assert problem.kind == "crop_size"
    assert str(problem).startswith("error: crop ")


def test_crops_larger_than_any_resized_image(tmp_path, lists):
    assert found(tmp_path, lists, (80, 100)) == []
    assert found(tmp_path, lists, (81, 64)) == [("crop_padding", "crop 81x64")]


def test_all_problems_are_found_at_once(tmp_path, lists):
    (tmp_path / "images/00.png").unlink()
    (tmp_path / "labels/00.png").write_bytes(b"")
    (tmp_path / "images/05.png").write_bytes(b"")
    Image.fromarray(np.full((4, 5), 9, np.uint8)).save(tmp_path / "labels/06.png")
    kinds = sorted(kind for kind, _ in found(tmp_path, {**lists, "test": []}, 8))
    expected = ["crop_size", "empty_split", "label_value", "missing_file", "size_mismatch"]
    assert kinds == sorted([*expected, "unreadable", "unreadable"])


def test_samples_are_seeded_and_bounded(tmp_path, make_folder):
    lists = {"unlabeled": make_folder(20)}
    for entry in lists["unlabeled"]:
        (tmp_path / entry.image).write_text("no image")
    first = found(tmp_path, lists, sample=5)
    assert len(set(first)) == 5
    assert first == found(tmp_path, lists, sample=5)
    assert first != found(tmp_path, lists, sample=5, seed=1)
    assert len(found(tmp_path, lists, sample=50)) == 20


def test_samples_do_not_hide_files_that_are_not_there(tmp_path, lists):
    (tmp_path / "images/02.png").unlink()
    (tmp_path / "labels/01.png").write_bytes(b"")
    (tmp_path / "images/04.png").unlink()
    lists["labeled"][0] = Entry("images/00.png", None)
    for sample in (None, 1):
        problems = set(found(tmp_path, lists, sample=sample))
        assert problems >= {
            ("missing_file", "images/02.png"),
            ("unreadable", "labels/01.png"),
            ("missing_file", "images/04.png"),
            ("missing_label", "images/00.png"),
        }


def test_samples_do_not_hide_overlaps(tmp_path, lists):
    lists["unlabeled"].append(lists["labeled"][0])
    assert ("labeled_and_unlabeled", "images/00.png") in found(tmp_path, lists, sample=1)


def test_camvid_is_sound(camvid):
    folder = camvid / "splits" / "1_8" / "seed0"
    lists = {name: read_split(folder / f"{name}.txt") for name in ("labeled", "unlabeled")}
    lists["val"] = read_split(camvid / "splits" / "val.txt")
    assert check_dataset(camvid, DATASETS["camvid"], lists, 320, hidden_labels=True, sample=25) == []
