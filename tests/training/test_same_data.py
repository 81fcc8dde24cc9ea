import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from allspark_fast.config import Config
from allspark_fast.errors import InputError
from allspark_fast.training.trainer import Trainer
from tests.helpers.images import write_folder
from tests.helpers.runs import changed, tiny_config

META = {"classes": ["apple", "pear", "plum"], "values": [0, 1, 2]}
LISTS = {"labeled": range(2), "unlabeled": range(2, 6), "val": range(6, 8)}


def meta(**changes: object) -> Callable[[], object]:
    return lambda: Path("data/meta.json").write_text(json.dumps(META | changes))


def lines(name: str, *texts: str) -> Callable[[], object]:
    """Write a list of these lines, of numbered images if they are digits."""
    written = [f"images/0{x}.png labels/0{x}.png" if x.isdecimal() else x for x in texts]
    return lambda: Path(f"data/{name}.txt").write_text("\n".join(written))


def config(root: str, **lists: str) -> Config:
    paths = {name: Path(f"{name}.txt") for name in LISTS} | {name: Path(path) for name, path in lists.items()}
    return changed(tiny_config(epochs=1), data={"dataset": "folder", "root": Path(root), **paths})


@pytest.fixture
def run(tmp_path, monkeypatch, no_pictures):
    """A finished run, on data/ in the working directory."""
    monkeypatch.chdir(tmp_path)
    write_folder(Path("data"), 9)
    meta()()
    for name, numbers in LISTS.items():
        lines(name, *map(str, numbers))()
    Trainer(config("data"), Path("run")).run()
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (meta(classes=["apple", "plum", "pear"], values=[0, 2, 1]), r"classes\[1\]: pear -> plum"),
        (meta(values=[0, 2, 1]), r"values\[1\]: 1 -> 2"),
        (meta(ignore_index=7), "ignore_index: 255 -> 7"),
        (meta(palette=[[9, 9, 9], [0, 0, 1], [0, 0, 2]]), r"palette\[0\]: \[0, 0, 0\] -> \[9, 9, 9\]"),
        (lines("labeled", "0", "1", "8"), r"list data\.labeled has .*: 1 added, 0 removed, first images/08\.png"),
        (lines("labeled", "0", "images/01.png labels/00.png"), "data.labeled .*: 1 added, 1 removed"),
        (lines("val", "7", "6"), "data.val .*: 0 added, 0 removed, first none: their order differs"),
    ],
)
def test_other_classes_or_lists_are_refused_by_name(run, change, message):
    change()
    with pytest.raises(InputError, match=f"{run.name} holds a run with other settings or data .*{message}"):
        Trainer(config("data"), run)


def test_the_same_data_elsewhere(run, monkeypatch, command):
    data = run.parent / "data"
    os.symlink(data, "link")
    lines("again", "./images/00.png labels//00.png", "1")()
    (data / "val.txt").rename("val.txt")
    for root in (str(data), "link/", "run/../data", "data"):
        assert Trainer(config(root, labeled="again.txt"), run).finished
    monkeypatch.chdir("/")
    moved = data.rename(data.with_name("moved"))
    message = f"there is no folder /data, nor {data}, from where the run started: give another --data.root"
    assert message in command("evaluate", run, status=1)
    command("evaluate", run, "--data.root", moved)
    with pytest.raises(InputError, match=r"no folder /nowhere: give another"):
        Trainer(config("/nowhere"), run)
    assert Trainer(config(str(moved)), run).finished
    moved.rename(data)
    monkeypatch.chdir(run.parent)
    assert Trainer(config("data"), run).finished
    monkeypatch.chdir("/")
    command("evaluate", run)
    assert Trainer(config("data"), run).finished


def test_a_run_without_its_record_goes_on_and_says_so(run, caplog):
    (run / "data.json").unlink()
    assert Trainer(config("data"), run).finished
    assert "run: without data.json it is unknown whether classes and lists are the same" in caplog.text
    assert (run / "data.json").exists()
