import itertools
import shutil

import numpy as np
import pytest

from allspark_fast.cli.splits import run
from allspark_fast.data.datasets import Entry, SegmentationDataset, read_split
from allspark_fast.data.info import VOC_PALETTE, DatasetInfo
from allspark_fast.data.splits import Split, make_split, parse_amount, read_classes, write_split
from allspark_fast.errors import DataError, InputError
from tests.helpers.images import write_folder, write_image

ENTRIES = [Entry(f"{index}.jpg", f"{index}.png") for index in range(40)]
# Class 0 is everywhere, class 1 in every second entry, classes 2 to 5 in one entry each.
CLASSES = {
    entry: {0, index % 2, *({2 + index // 10} if index % 10 == 3 else ())} for index, entry in enumerate(ENTRIES)
}


def split(count, seed=0, entries=ENTRIES):
    return make_split(entries, count, seed, CLASSES)


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


def test_parts_are_a_partition_in_order_that_covers_all_classes():
    for seed in range(5):
        part = split(6, seed)
        assert len(part.labeled) == 6
        assert sorted(part.labeled + part.unlabeled, key=ENTRIES.index) == ENTRIES
        assert part.labeled == sorted(part.labeled, key=ENTRIES.index)
        assert set().union(*(CLASSES[entry] for entry in part.labeled)) == set(range(6))
        assert part.uncovered == []


def test_parts_are_nested_and_seeded():
    parts = [set(split(count, seed=2).labeled) for count in (1, 3, 6, 10, 40)]
    assert all(small < large for small, large in itertools.pairwise(parts))
    assert split(10, seed=2) == split(10, seed=2)
    assert len({tuple(split(10, seed=seed).labeled) for seed in range(8)}) > 1


def test_beyond_the_cover_the_choice_is_uniform():
    chosen = np.zeros(len(ENTRIES))
    for seed in range(200):
        chosen[[ENTRIES.index(entry) for entry in split(14, seed).labeled]] += 1
    rest = np.array([index for index in range(40) if index % 10 != 3])
    expected = 200 * 10 / 36
    assert np.abs(chosen[rest] - expected).max() < 5 * expected**0.5


def test_classes_that_do_not_fit_are_named():
    part = split(2)
    found = set().union(*(CLASSES[entry] for entry in part.labeled))
    assert len(part.uncovered) == 2
    assert part.uncovered == sorted(set(range(6)) - found)


def test_entries_without_a_label_stay_unlabeled():
    entries = [Entry("x.jpg", None), *ENTRIES[:5]]
    assert split(5, entries=entries).unlabeled == [entries[0]]
    with pytest.raises(DataError, match="6 labeled entries were requested, but only 5 have a label"):
        split(6, entries=entries)


def test_repeated_lines_count_one_by_one():
    part = split(3, entries=ENTRIES[:2] * 4)
    assert (len(part.labeled), len(part.unlabeled)) == (3, 5)


@pytest.mark.parametrize("name", ["b\udce4r.png", "two\nlines.png", "next\x85line.png", " blank.png", "a.png b.png"])
def test_names_that_no_split_file_can_hold_are_refused_before_anything_is_written(tmp_path, name):
    with pytest.raises(DataError, match="rename the file"):
        write_split(tmp_path / "splits", Split([Entry("a.png", "b.png")], [Entry(name, None)], []))
    assert not (tmp_path / "splits").exists()


def test_validation_is_set_aside_and_training_keeps_rare_classes(tmp_path, capsys):
    entries = write_folder(tmp_path, 8, classes=2)
    write_image(tmp_path / entries[5].label, np.full((40, 50), 2, np.uint8))
    (tmp_path / entries[7].label).unlink()
    assert run([str(tmp_path), "--val", "3"]) == 0
    assert "splits: 4 labeled, 1 unlabeled, 3 for validation\n" in capsys.readouterr().out
    lists = {name: read_split(tmp_path / "splits" / f"{name}.txt") for name in ("labeled", "unlabeled", "val")}
    assert entries[5] in lists["labeled"]
    assert lists["unlabeled"] == [Entry(entries[7].image, None)]
    assert sorted(entry.image for part in lists.values() for entry in part) == [entry.image for entry in entries]
    (tmp_path / "images/photo.heic").write_bytes(b"")
    aside = {entry.image for entry in lists["val"]}
    for amount, options in ("2", []), ("3", ["--list", "all.txt"]):
        (tmp_path / "all.txt").write_text("".join(f"{entry.image} {entry.label}\n" for entry in entries[:7]))
        assert run([str(tmp_path), amount, *options]) == 0
        printed = capsys.readouterr().out
        assert f"{tmp_path / 'splits/val.txt'}: 3 images stay aside for validation" in printed
        assert ("'images/photo.heic' first" in printed) == (not options)
        trained_on = [read_split(tmp_path / "splits" / amount / f"{name}.txt") for name in ("labeled", "unlabeled")]
        assert not aside & {entry.image for part in trained_on for entry in part}
    assert run([str(tmp_path), "1/2", "--val", "3"]) == 0
    assert len(read_split(tmp_path / "splits/1_2/labeled.txt")) == 2
    with pytest.raises(ValueError, match="--val 7 leaves no label to train on: 7 images have one"):
        run([str(tmp_path), "--val", "7"])
    shutil.rmtree(tmp_path / "labels")
    with pytest.raises(DataError, match="no image has a label"):
        run([str(tmp_path)])


def test_classes_are_read_from_labels(tmp_path):
    write_image(tmp_path / "a.png", np.array([[1, 4], [255, 4]], np.uint8))
    entry = Entry("a.jpg", "a.png")
    assert read_classes(SegmentationDataset(tmp_path, [entry])) == {entry: {1, 4}}
    info = DatasetInfo("toy", ("a", "b"), VOC_PALETTE, ignore_index=4)
    assert read_classes(SegmentationDataset(tmp_path, [entry], info=info)) == {entry: {1}}
