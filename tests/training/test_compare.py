"""The comparison: which runs, going on, and the table."""

import json
from pathlib import Path

import pytest
from PIL import Image

from allspark_fast.__main__ import main
from allspark_fast.config import Config, DataConfig
from allspark_fast.data.datasets import read_split
from allspark_fast.errors import DataError, InputError
from allspark_fast.signals import STOPPED
from allspark_fast.training import compare
from tests.helpers.images import write_folder
from tests.helpers.runs import tiny_arguments


@pytest.fixture
def folder_data(tmp_path):
    """Eight images: for seed 0 the first one is labeled, for seed 1 the second; the last two are val and test."""
    root = tmp_path / "data"
    root.mkdir()
    names = [f"{entry.image} {entry.label}\n" for entry in write_folder(root, 8)]
    (root / "meta.json").write_text('{"classes": ["a", "b", "c"]}')
    for seed in (0, 1):
        (root / f"seed{seed}").mkdir()
        (root / f"seed{seed}/labeled.txt").write_text(names[seed])
        (root / f"seed{seed}/unlabeled.txt").write_text("".join(x for x in names[:6] if x != names[seed]))
    for name, lines in {"train": names[:6], "val": names[6:7], "test": names[7:]}.items():
        (root / f"{name}.txt").write_text("".join(lines))
    return root


def settings(root: Path) -> DataConfig:
    paths = {name: Path(f"seed0/{name}.txt") for name in ("labeled", "unlabeled")}
    return DataConfig(dataset="folder", root=root, val=Path("val.txt"), **paths)


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_a_comparison_goes_on_and_reports_each_method(folder_data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = {"data.dataset": "folder", "data.root": folder_data, "data.val": "val.txt", "train.steps": 4}
    options |= {f"data.{name}": f"seed0/{name}.txt" for name in ("labeled", "unlabeled")}
    arguments = [x for x in tiny_arguments(tmp_path, {**options, "run.log-every": 2}) if x != str(tmp_path)][:-1]
    arguments += ["--seeds", "1", "--every-label", "train.txt", "--test", "test.txt"]
    assert main(["compare", *arguments, "--methods", "full"]) == 0
    scored = []
    score = compare.evaluate_images
    monkeypatch.setattr(compare, "evaluate_images", lambda *arguments: scored.append(arguments) or score(*arguments))
    assert main(["compare", *arguments, "--methods", "full", "supervised", "semi", "--equal-time"]) == 0
    assert len(scored) == 3
    printed = capsys.readouterr().out
    assert "finished at step 4" in printed
    out = tmp_path / "runs/compare_scenes"
    records = json.loads((out / "compare.json").read_text())
    assert [(x["method"], x["labels"]) for x in records] == [
        ("full", 6), ("supervised", 1), ("semi", 1), ("supervised, equal time", 1),
    ]  # fmt: skip
    times = {record["method"]: record["minutes"] / record["steps"] for record in records[:3]}
    longest = max(times.values()) / times["supervised"]
    assert records[3]["steps"] == round(4 * longest)
    assert printed.rstrip().endswith(compare.summary(records))
    assert Image.open(out / "compare.png").width > 100
    config = json.loads((out / "supervised_all_labels_seed1/config.json").read_text())
    assert config["data"]["labeled"] == "seed1/labeled.txt"


def test_the_plan_holds_every_method_of_a_seed_before_the_next(tmp_path):
    groups = compare.plan(Config(), tmp_path, methods=compare.METHODS, seeds=(3, 4))
    assert [[(run.config.train.seed, run.method, run.config.train.method) for run in group] for group in groups] == [
        [(seed, "full", "supervised"), *((seed, name, name) for name in compare.METHODS[1:])] for seed in (3, 4)
    ]
    assert len({run.folder for group in groups for run in group}) == 8
    assert {run.config.data.scenes[0] for group in groups for run in group[1:]} == {8}
    assert {group[0].config.data.scenes[0] for group in groups} == {504}


def test_numbers_of_labels(folder_data, tmp_path):
    config = Config(data=settings(folder_data))
    methods, every_label = ("full", "semi"), Path("train.txt")
    groups = compare.plan(config, tmp_path, methods=methods, seeds=(0, 1), labels=(2, 4), every_label=every_label)
    assert [[run.method for run in group] for group in groups] == [["full", "semi"]] * 2 + [["semi"]] * 2
    lists = [
        [{entry.image for entry in read_split(file)} for file in (data.labeled, data.unlabeled)]
        for data in (group[-1].config.data for group in groups)
    ]
    assert [(len(labeled), len(unlabeled)) for labeled, unlabeled in lists] == [(2, 4), (2, 4), (4, 2), (4, 2)]
    assert all(len(labeled | unlabeled) == 6 for labeled, unlabeled in lists)
    assert lists[0][0] < lists[2][0] != lists[3][0] > lists[1][0]
    scenes = compare.plan(Config(), tmp_path, methods=["semi"], seeds=(0,), labels=(2, 4))
    assert [group[0].config.data.scenes[0] for group in scenes] == [2, 4]


def test_what_is_missing_is_found_before_any_run(folder_data, tmp_path):
    config = Config(data=settings(folder_data))
    with pytest.raises(DataError, match=r"seed2/labeled\.txt"):
        compare.plan(config, tmp_path, methods=["semi"], seeds=(0, 2))
    with pytest.raises(InputError, match="--every-label FILE"):
        compare.plan(config, tmp_path, methods=["full"], seeds=(0,))


def test_mean_and_deviation_by_hand():
    common = {"labels": 46, "steps": 9, "val": 1.0}
    records = [
        {**common, "method": method, "test": test, "minutes": minutes}
        for method, test, minutes in (("semi", 30.0, 2.0), ("semi", 34.0, 3.0), ("allspark", 40.0, 4.0))
    ]
    assert compare.summary(records).splitlines()[2:] == [
        "| semi | 46 | 9 | 1.0 ± 0.0 | 32.0 ± 2.8 | 2.5 ± 0.7 | 30.0, 34.0 |",
        "| allspark | 46 | 9 | 1.0 | 40.0 | 4.0 | 40.0 |",
    ]


def test_a_comparison_stops_with_the_run_that_a_signal_stopped(monkeypatch, tmp_path):
    monkeypatch.setattr(compare, "train", lambda *_: False)
    assert main(["compare", "--out", str(tmp_path)]) == STOPPED
