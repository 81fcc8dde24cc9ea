"""The study: which runs, going on, and the table."""

import json
from pathlib import Path

import pytest

from allspark_fast.cli import evaluate
from allspark_fast.config import Config, DataConfig
from allspark_fast.errors import DataError
from allspark_fast.signals import STOPPED
from bench import study
from tests.helpers.images import write_folder

TINY = {
    "data.crop": 32, "data.workers": 0, "model.embedding-dim": 8, "train.epochs": 1, "train.batch-size": 2,
}  # fmt: skip


@pytest.fixture
def folder_data(tmp_path: Path) -> Path:
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


@pytest.mark.slow
def test_a_study_goes_on_and_reports_each_method(
    folder_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {**TINY, "data.dataset": "folder", "data.root": folder_data, "data.val": "val.txt"}
    options |= {f"data.{name}": f"seed0/{name}.txt" for name in ("labeled", "unlabeled")}
    arguments = [str(x) for name, value in options.items() for x in (f"--{name}", value)]
    arguments += ["--seeds", "1", "--every-label", "train.txt", "--test", "test.txt"]
    arguments += [f"--{name}={tmp_path / name}" for name in ("folder", "json")]
    scored = []
    monkeypatch.setattr(evaluate, "run", lambda options, run=evaluate.run: scored.append(options) or run(options))
    study.main([*arguments, "--methods"])
    study.main([*arguments, "--methods", "supervised"])
    assert [Path(folder).name for folder, *_ in scored] == ["full_seed1", "supervised_seed1"]
    printed = capsys.readouterr().out
    assert "full_seed1: finished at step 2" in printed
    records = json.loads((tmp_path / "json").read_text())
    assert [(record["method"], record["labels"]) for record in records] == [("full", 6), ("supervised", 1)]
    for record in records:
        scores = json.loads((tmp_path / "folder" / f"{record['method']}_seed1/test.json").read_text())
        assert record["mIoU on test"] == 100 * scores["miou"]
        assert sum(map(sum, scores["confusion"])) == 50 * 40  # one image, that of test
    assert printed.endswith(f"{study.summary(records)}\n")
    config = json.loads((tmp_path / "folder/supervised_seed1/config.json").read_text())
    assert config["data"]["labeled"] == "seed1/labeled.txt"


def test_the_plan_holds_every_method_of_a_seed_before_the_next(tmp_path: Path) -> None:
    runs = study.plan(Config(), tmp_path, seeds=(3, 4), methods=study.METHODS)
    assert [(run.config.train.seed, run.config.train.method) for run in runs] == [
        (seed, method) for seed in (3, 4) for method in ("supervised", "semi", "allspark")
    ]
    assert len({run.folder for run in runs}) == 6


def test_a_missing_split_is_found_before_any_run(folder_data: Path, tmp_path: Path) -> None:
    paths = {name: Path(f"seed0/{name}.txt") for name in ("labeled", "unlabeled")}
    data = DataConfig(dataset="folder", root=folder_data, val=Path("val.txt"), **paths)
    with pytest.raises(DataError, match=r"seed2/labeled\.txt"):
        study.plan(Config(data=data), tmp_path, seeds=(0, 2), methods=study.METHODS)


def test_mean_and_deviation_by_hand() -> None:
    records = [
        {"method": method, "labels": 46, "mIoU on val": val, "mIoU on test": None, "minutes": minutes}
        for method, val, minutes in (("semi", 30.0, None), ("semi", 34.0, 2.5), ("allspark", 40.0, None))
    ]
    assert study.summary(records).splitlines()[2:] == [
        "| semi | 46 | 2 | 32.0 ± 2.8 | n/a | 2.5 |",
        "| allspark | 46 | 1 | 40.0 | n/a | n/a |",
    ]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[study.Run]:
    """Two runs, of which the second was begun; training is an evaluation only."""

    def train(_: Config, folder: Path) -> bool:
        folder.mkdir(exist_ok=True)
        (folder / "metrics.jsonl").write_text('{"step": 1, "miou": 0.5}')
        return True

    monkeypatch.setattr(study, "train", train)
    runs = study.plan(Config(), tmp_path, seeds=(0,), methods=("semi", "allspark"))
    runs[1].folder.mkdir()
    return runs


def test_only_runs_that_went_through_at_once_have_minutes(runs: list[study.Run]) -> None:
    whole, resumed = (study.finish(run, None) for run in runs)
    assert whole["minutes"] > 0
    assert resumed["minutes"] is None
    assert [study.finish(run, None) for run in runs] == [whole, resumed]


def test_a_study_stops_with_the_run_that_a_signal_stopped(
    runs: list[study.Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "train", lambda *_: False)
    with pytest.raises(SystemExit, match=str(STOPPED)):
        study.finish(runs[0], None)


def test_scenes_have_no_split_to_evaluate(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(Config().to_json())
    with pytest.raises(ValueError, match="rendered scenes have no split files"):
        evaluate.run([str(tmp_path), "--split", "test.txt"])
