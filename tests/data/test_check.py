import json
import re
import shutil

import numpy as np
import pytest

from allspark_fast.data.check import check_sources
from allspark_fast.data.datasets import Entry, SegmentationDataset, Sources
from allspark_fast.data.info import VOC_PALETTE, DatasetInfo
from tests.helpers.images import write_folder, write_image

INFO = DatasetInfo("toy", ("a", "b", "c"), VOC_PALETTE)
BLACK = np.zeros((40, 50, 3), np.uint8)


@pytest.fixture
def lists(tmp_path):
    entries = write_folder(tmp_path, 9)
    return {"labeled": entries[:3], "unlabeled": entries[3:6], "val": entries[6:]}


def check(root, lists, info=INFO, crop=32, **options):
    opened = {name: SegmentationDataset(root, entries, info=info) for name, entries in lists.items()}
    return list(map(str, check_sources(Sources(info, **opened), crop, **options)[0]))


def test_how_lists_fit_together(tmp_path, lists):
    lists["labeled"][0] = Entry("images/00.png", None)
    (tmp_path / "images/link.png").symlink_to(tmp_path / "images/02.png")
    shutil.copy(tmp_path / "images/04.png", tmp_path / "images/copy.png")
    lists["unlabeled"] += [Entry("images/03.png", None), Entry("images/../images/link.png", None)]
    lists["val"] += [lists["labeled"][1], Entry("images/copy.png", "labels/07.png")]
    expected = [
        "warning: unlabeled: 1 lines repeat an image, images/03.png first; each counts",
        "error: images/02.png: is in both lists: remove it from one of them",
        "warning: images/01.png: is trained on and also in val, which makes the score too good",
        "warning: images/copy.png: is in val, and its copy images/04.png is trained on, which makes the score too good",
        "warning: labels/07.png: is the label of 2 images; correct the lists",
        "error: images/00.png: has no label, but its list needs labels",
    ]
    for sample in (None, 1):
        assert check(tmp_path, lists, sample=sample) == expected
    assert check(tmp_path, lists, labeled_only=True) == [expected[0], *expected[2:]]


def test_sound_data_has_no_problem_but_for_crops_larger_than_any_resized_image(tmp_path, lists):
    (tmp_path / "labels/04.png").unlink()  # of an unlabeled image
    assert check(tmp_path, lists, crop=80) == []
    [problem] = check(tmp_path, lists, crop=81)
    assert problem.startswith("warning: crop 81x81: every crop holds padding")


def test_samples_are_bounded_and_the_same_again_and_hide_no_absent_file(tmp_path):
    entries = write_folder(tmp_path, 20)
    lists = {"labeled": entries[:2], "unlabeled": entries[2:], "val": []}
    for entry in entries[2:]:
        (tmp_path / entry.image).write_text("no image")
    (tmp_path / entries[0].label).write_bytes(b"")
    (tmp_path / entries[1].image).unlink()
    problems = check(tmp_path, lists, sample=5)
    starts = ("error: val: ", "error: labels/00.png: the file is empty", "error: images/01.png: no such")
    assert all(map(str.startswith, problems, starts))
    assert len(problems) == 3 + 5
    assert problems == check(tmp_path, lists, sample=5)
    assert len(check(tmp_path, lists, sample=50)) == len(check(tmp_path, lists)) == 3 + 18


def test_what_the_command_prints(tmp_path, lists, command):
    write_image(tmp_path / "images/04.jpg", BLACK[:20] + 200)
    (tmp_path / "images/04.png").rename(tmp_path / "images/more.png")
    write_image(tmp_path / "labels/00.png", np.full((40, 50), 255, np.uint8))
    (tmp_path / "meta.json").write_text('{"classes": ["sea", "land", "ice"]}')
    for name, entries in lists.items():
        lines = [f"{x.image} {x.label}" if name != "unlabeled" else x.image for x in entries]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines).replace("04.png", "04.jpg"))
    arguments = ["check", "folder", "--data.root", tmp_path, "--data.crop", 64]
    arguments += [word for name in lists for word in (f"--data.{name}", f"{name}.txt")]
    printed = command(*arguments)
    for line in (
        "labeled         3 images of 50x40, RGB, 8 bits",
        "unlabeled       2 images of 50x40, RGB, 8 bits",
        "unlabeled       1 images of 50x20, RGB, 8 bits",
        "val             3 masks of 50x40, L, 8 bits",
        "val        values of RGB, 8 bits: 0..255",
        "class     labeled pixels         masks       val pixels         masks",
        "ignored           33.33%     1 of    3            0.00%     0 of    3",
        "in no list: 1 images, images/more.png first",
        "0 errors, 1 warnings",
    ):
        assert f"{line}\n" in printed
    assert re.search(r"^land +2\d\.\d\d% +2 of +3 +3\d\.\d\d% +3 of +3$", printed, re.MULTILINE)
    (tmp_path / "labels/04.png").rename(tmp_path / "labels/lone.png")
    report = json.loads(command(*arguments, "--json"))
    assert report["unlabeled"]["images"] == {"50x40, RGB, 8 bits": 2, "50x20, RGB, 8 bits": 1}
    assert report["labeled"]["pixels"]["ignored"] == 2000
    assert report["in no list"] == ["images/more.png"]
    assert [problem["file"] for problem in report["problems"]] == ["labeled", "labels"]
