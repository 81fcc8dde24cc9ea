"""Runs from beginning to end: what they leave, exact resume, mistakes."""

import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch._dynamo.testing import CompileCounterWithBackend

from allspark_fast.__main__ import main
from allspark_fast.config import Config, DataConfig, EvalConfig, ModelConfig, RunConfig, TrainConfig
from allspark_fast.data.loader import SemiBatch
from allspark_fast.model.mit import compile_blocks
from allspark_fast.training import setup as prepare
from allspark_fast.training import trainer as trainer_module
from allspark_fast.training.checkpoint import load_latest_checkpoint
from allspark_fast.training.cuda_graph import GraphedSteps
from allspark_fast.training.log import read_metrics
from allspark_fast.training.setup import build_model, lock_folder
from allspark_fast.training.step import TrainState, train_step
from allspark_fast.training.trainer import Trainer, train

METHODS = ("allspark", "semi", "supervised")


def tiny_config(method: str = "allspark", **train_options: object) -> Config:
    """Three epochs of four steps on eight scenes of 64 pixels."""
    return Config(
        data=DataConfig(crop=64, scenes=(3, 8, 2), workers=0),
        model=ModelConfig(backbone="mit_tiny", embedding_dim=16),
        train=TrainConfig(method=method, epochs=3, batch_size=2, lr=0.01, warmup_epochs=1, **train_options),
        eval=EvalConfig(every=2, workers=0),
        run=RunConfig(log_every=3, save_every=3),
    )


def logged(folder: Path) -> list[dict]:
    """Records without what depends on the clock."""
    return [{key: x for key, x in record.items() if key != "images_per_s"} for record in read_metrics(folder)]


def assert_same_run(a: Path, b: Path) -> None:
    states = [load_latest_checkpoint(folder / "checkpoints") for folder in (a, b)]
    flat = [torch.utils._pytree.tree_flatten_with_path(state)[0] for state in states]
    assert len(flat[0]) == len(flat[1]) > 100
    for (path, x), (other, y) in zip(*flat, strict=True):
        assert path == other
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, path
    assert logged(a) == logged(b)


class TestRun:
    """One whole run."""

    def test_leaves_what_it_promises(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        config = tiny_config()
        train(config, tmp_path / "run")
        names = {path.name for path in (tmp_path / "run").iterdir()}
        promised = {"config.json", "metrics.jsonl", "checkpoints", "curves.png", "predictions.png", "best.safetensors"}
        assert promised <= names
        assert any(name.startswith("events.out.tfevents") for name in names)
        assert not any(name.endswith(".tmp") or ".tmp." in name for name in names)
        records = read_metrics(tmp_path / "run")
        assert [record["step"] for record in records if "loss" in record] == [3, 6, 9, 12]
        assert [record["step"] for record in records if "miou" in record] == [8, 12]
        for picture in ("curves.png", "predictions.png"):
            assert len(Image.open(tmp_path / "run" / picture).convert("RGB").getcolors(1 << 20)) > 100
        events = EventAccumulator(str(tmp_path / "run")).Reload()
        assert events.Tags()["images"] == ["predictions"]
        assert [image.step for image in events.Images("predictions")] == [8, 12]
        scored = [(record["step"], record["miou"]) for record in records if "miou" in record]
        assert [(x.step, x.value) for x in events.Scalars("miou")] == [(step, pytest.approx(x)) for step, x in scored]
        printed = capsys.readouterr().out
        assert "3 labeled, 8 unlabeled, 2 validation images" in printed
        assert "mIoU" in printed
        assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == config.run.keep_last

        # The same command again says that there is nothing to do.
        train(config, tmp_path / "run")
        assert "finished at step 12, best mIoU" in capsys.readouterr().out

        # The best weights score what the log says, even where those that the run started from are gone.
        settings = tmp_path / "run" / "config.json"
        settings.write_text(settings.read_text().replace('"weights": null', '"weights": "gone.pth"'))
        assert "gone.pth" in settings.read_text()
        best = max(record["miou"] for record in records if "miou" in record)
        assert main(["evaluate", str(tmp_path / "run"), "--json", str(tmp_path / "scores.json")]) == 0
        assert f"{100 * best:.1f}" in capsys.readouterr().out
        scores = json.loads((tmp_path / "scores.json").read_text())
        assert scores["miou"] == best
        assert sum(map(sum, scores["confusion"])) == 2 * 80 * 80
        assert Image.open(tmp_path / "run" / "confusion.png").width > 100

        # They carry what one must know to use them.
        Image.new("RGB", (70, 50)).save(tmp_path / "photo.png")
        assert (
            main(["predict", str(tmp_path / "run"), str(tmp_path / "photo.png"), "--out", str(tmp_path / "out")]) == 0
        )
        assert Image.open(tmp_path / "out" / "labels" / "photo.png").size == (70, 50)

    @pytest.mark.usefixtures("no_pictures")
    def test_pseudo_labels_count_from_their_epoch_on(self, tmp_path: Path) -> None:
        train(tiny_config(pseudo_from_epoch=1), tmp_path)
        for record in (record for record in read_metrics(tmp_path) if "loss" in record and record["step"] != 6):
            mean = (record["loss_labeled"] + record["loss_unlabeled"]) / 2
            expected = record["loss_labeled"] if record["step"] <= 4 else mean
            assert record["loss"] == pytest.approx(expected, rel=1e-5)

    @pytest.mark.usefixtures("no_pictures")
    @pytest.mark.parametrize(("seconds", "expected"), [(0, [3, 6, 8, 9, 12, 12]), (60, [8, 12])])
    def test_curves_are_drawn_meanwhile(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: int, expected: list[int]
    ) -> None:
        drawn = []
        monkeypatch.setattr(trainer_module, "_SECONDS_BETWEEN_CURVES", seconds)
        monkeypatch.setattr(trainer_module, "draw_curves", lambda _, records, __: drawn.append(records[-1]["step"]))
        train(tiny_config(), tmp_path)
        assert drawn == expected

    @pytest.mark.usefixtures("no_pictures")
    def test_learns(self, tmp_path: Path) -> None:
        config = tiny_config(method="supervised")
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=12, lr=0.02))
        train(config, tmp_path)
        losses = [record["loss"] for record in read_metrics(tmp_path) if "loss" in record]
        assert losses[-1] < 0.8 * losses[0]

    def test_checkpointing_reaches_the_backbone(self) -> None:
        config = tiny_config()
        assert not build_model(config, 3).backbone.activation_checkpointing
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, activation_checkpointing=True))
        assert build_model(config, 3).backbone.activation_checkpointing


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_compiled_blocks_train_and_validation_compiles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(prepare, "compile_blocks", lambda model, _: compile_blocks(model, counter))
    torch._dynamo.reset()
    trainer = Trainer(dataclasses.replace(tiny_config(compile=True), run=RunConfig(device="cpu")), tmp_path)
    trainer.run()
    # Four stages in training, one more without stochastic depth in the first, four in the pseudo-label pass.
    assert 8 <= counter.frame_count <= 9
    expected = Trainer(dataclasses.replace(tiny_config(), run=RunConfig(device="cpu")), tmp_path / "plain")
    expected.run()
    for actual, x in zip(trainer.state.model.parameters(), expected.state.model.parameters(), strict=True):
        torch.testing.assert_close(actual, x, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_a_run_on_a_gpu_resumes(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(
        tiny_config(method, ema=0.9, cuda_graph=True), run=RunConfig(device="cuda", save_every=3, log_every=1)
    )
    run_and_die(config, tmp_path, 7, monkeypatch)
    trainer = Trainer(config, tmp_path)
    assert 0 < trainer.step <= 7
    assert isinstance(trainer.train_step, GraphedSteps)
    assert 0 < trainer.run().mean_iou < 1
    assert trainer.state.skipped == 0
    assert (tmp_path / "predictions.png").exists()


@pytest.mark.usefixtures("no_pictures")
def test_supervised_loads_logs_and_counts_labeled_images_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def recorded_step(state: TrainState, batch: SemiBatch, **options: bool) -> object:
        sizes.append((len(batch.image), len(batch.unlabeled_image)))
        return train_step(state, batch, **options)

    # One second for each line of the log.
    monkeypatch.setattr(trainer_module.time, "perf_counter", itertools.count().__next__)
    monkeypatch.setattr(trainer_module, "train_step", recorded_step)
    for method, unlabeled in (("supervised", 0), ("semi", 2)):
        sizes.clear()
        Trainer(tiny_config(method), tmp_path / method).run()
        assert set(sizes) == {(2, unlabeled)}
        first = read_metrics(tmp_path / method)[0]
        assert ("loss_unlabeled" in first) == (method == "semi")
        assert first["images_per_s"] == 3 * (2 + unlabeled)  # three steps in a line


class Killed(Exception):  # noqa: N818 stands for kill -9
    """Raised in the middle of a run."""


def run_and_die(config: Config, folder: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 0

    take_step = Trainer._take_step

    def dying_step(trainer: Trainer, batch: SemiBatch) -> None:
        nonlocal steps
        steps += 1
        if steps > step:
            raise Killed
        take_step(trainer, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_take_step", dying_step)
        with pytest.raises(Killed):
            Trainer(config, folder).run()


@pytest.mark.usefixtures("no_pictures")
class TestResume:
    """N steps = k steps + death + the rest, bit for bit."""

    def test_a_checkpoint_of_another_model_is_passed_over(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        config = tiny_config()
        larger = dataclasses.replace(config, model=dataclasses.replace(config.model, embedding_dim=24))
        for name, x in (("run", config), ("larger", larger)):
            run_and_die(x, tmp_path / name, 3, monkeypatch)
        (saved,) = (tmp_path / "larger" / "checkpoints").iterdir()
        checkpoints = tmp_path / "run" / "checkpoints"
        shutil.copy(saved, checkpoints / "step_00000009.pt")
        assert Trainer(config, tmp_path / "run").step == 3
        assert "step_00000009.pt is a checkpoint of another model" in caplog.text
        (checkpoints / "step_00000003.pt").unlink()
        with pytest.raises(
            ValueError, match=r"none of 1 checkpoints can be read \(\S+ is a checkpoint of another model"
        ):
            Trainer(config, tmp_path / "run")

    @pytest.mark.parametrize("method", METHODS)
    def test_inside_an_epoch(self, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
        config = tiny_config(method, ema=0.9)
        Trainer(config, tmp_path / "whole").run()
        run_and_die(config, tmp_path / "broken", 7, monkeypatch)  # after the checkpoint of step 6, in epoch 1
        resumed = Trainer(config, tmp_path / "broken")
        assert resumed.step == 6
        resumed.run()
        assert_same_run(tmp_path / "whole", tmp_path / "broken")

    def test_saved_in_the_background(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        config = tiny_config("allspark", ema=0.9)
        Trainer(config, tmp_path / "whole").run()
        run = dataclasses.replace(config.run, save_in_background=True)
        run_and_die(dataclasses.replace(config, run=run), tmp_path / "broken", 7, monkeypatch)
        Trainer(dataclasses.replace(config, run=run), tmp_path / "broken").run()
        assert_same_run(tmp_path / "whole", tmp_path / "broken")

    @pytest.mark.slow
    @pytest.mark.parametrize("method", METHODS)
    def test_after_kill_9_in_its_own_process(self, tmp_path: Path, method: str) -> None:
        command = [sys.executable, "-m", "allspark_fast", "train", "--data.scenes", "3", "8", "2"]
        options = {
            "data.crop": 64, "data.workers": 1, "model.backbone": "mit_tiny", "model.embedding-dim": 16,
            "train.method": method, "train.epochs": 10, "train.batch-size": 2, "eval.every": 5,
            "run.log-every": 1, "run.save-every": 7,
        }  # fmt: skip
        command += [str(x) for name, value in options.items() for x in (f"--{name}", value)]
        whole, broken = tmp_path / "whole", tmp_path / "broken"
        subprocess.run([*command, "--run.output-dir", whole], check=True, capture_output=True)
        process = subprocess.Popen(
            [*command, "--run.output-dir", broken], start_new_session=True, stderr=subprocess.DEVNULL
        )
        while not (steps := [x["step"] for x in read_metrics(broken)]) or steps[-1] < 11:
            assert process.poll() is None
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert 11 <= read_metrics(broken)[-1]["step"] < 40
        subprocess.run([*command, "--run.output-dir", broken], check=True, capture_output=True)
        assert_same_run(whole, broken)

    def test_a_second_run_in_the_same_folder_is_refused(self, tmp_path: Path) -> None:
        """As long as the first one lives: it ends here without any cleaning up."""
        code = (
            "import sys, time, pathlib; from allspark_fast.training.setup import lock_folder;"
            "file = lock_folder(pathlib.Path(sys.argv[1])); print('locked', flush=True); time.sleep(60)"
        )
        with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "locked\n"
            with pytest.raises(ValueError, match=rf"process {process.pid} on \S+ is training there"):
                Trainer(tiny_config(), tmp_path)
            process.kill()
        assert lock_folder(tmp_path) is not None

    def test_other_settings_are_refused_by_name(self, tmp_path: Path) -> None:
        train(dataclasses.replace(tiny_config(), train=dataclasses.replace(tiny_config().train, epochs=1)), tmp_path)
        with pytest.raises(ValueError, match=r"other settings \(train.epochs: 1 -> 3\)"):
            Trainer(tiny_config(), tmp_path)

    def test_settings_that_led_to_no_checkpoint_may_be_mended(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = tiny_config()
        run_and_die(config, tmp_path, 1, monkeypatch)
        mended = dataclasses.replace(config, train=dataclasses.replace(config.train, lr=0.005))
        assert Trainer(mended, tmp_path).step == 0
        assert json.loads((tmp_path / "config.json").read_text())["train"]["lr"] == 0.005


@pytest.mark.usefixtures("no_pictures")
class TestSkippedSteps:
    """Losses that are not finite."""

    def test_too_many_stop_the_run(self, tmp_path: Path) -> None:
        trainer = Trainer(tiny_config(max_skipped=2), tmp_path)
        trainer.state.model.backbone.norm4.weight.data.fill_(float("nan"))
        with pytest.raises(RuntimeError, match=r"3 steps .* step 3, more than train\.max_skipped .*, 2: .* train\.lr"):
            trainer.run()
        (record,) = read_metrics(tmp_path)
        assert record["skipped_steps"] == 3
        assert "loss" not in record

    def test_a_run_shorter_than_max_skipped_does_not_succeed_without_a_step(self, tmp_path: Path) -> None:
        trainer = Trainer(tiny_config(), tmp_path)
        assert trainer.total_steps < trainer.config.train.max_skipped
        trainer.state.model.backbone.norm4.weight.data.fill_(float("nan"))
        with pytest.raises(RuntimeError, match=r"9 steps .* by step 9, more than .* half of the run, 6"):
            trainer.run()

    def test_a_few_are_counted(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        step = 0

        def step_on_bad_image(state: TrainState, batch: SemiBatch, **options: bool) -> object:
            nonlocal step
            step += 1
            image = batch.image * float("nan") if step in (2, 5) else batch.image
            return train_step(state, batch._replace(image=image), **options)

        monkeypatch.setattr(trainer_module, "train_step", step_on_bad_image)
        Trainer(tiny_config(), tmp_path).run()
        records = [record for record in read_metrics(tmp_path) if "loss" in record]
        assert [record["skipped_steps"] for record in records] == [1, 2, 2, 2]
        assert all(0 < record["loss"] < 10 for record in records)


def make_folder(root: Path, images: int = 6) -> None:
    """A data set of one's own: squares of class 1 on class 0; two images without a label."""
    for part in ("images", "labels"):
        (root / part).mkdir(parents=True)
    for i in range(images):
        label = torch.zeros(80, 96, dtype=torch.uint8)
        label[10 + 4 * i : 40, 20:60] = 1
        Image.fromarray((label * 200).numpy()).save(root / "images" / f"{i}.png")
        if i < images - 2:
            Image.fromarray(label.numpy()).save(root / "labels" / f"{i}.png")
    (root / "meta.json").write_text(json.dumps({"classes": ["ground", "square"]}))


class TestOnesOwnData:
    """splits, check, train and evaluate on a folder."""

    def test_from_folder_to_score(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        root = tmp_path / "data"
        make_folder(root)
        (root / "val.txt").write_text("images/3.png labels/3.png\n")
        (root / "train.txt").write_text("".join(f"images/{i}.png labels/{i}.png\n" for i in range(3)))
        assert main(["splits", str(root), "1/3", "--list", "train.txt", "--out", str(root)]) == 0
        assert "1 labeled, 2 unlabeled" in capsys.readouterr().out
        shared = ["scenes", "--data.dataset", "folder", "--data.root", str(root), "--data.val", "val.txt"]
        shared += ["--data.labeled", "labeled.txt", "--data.unlabeled", "unlabeled.txt", "--data.crop", "64"]
        assert main(["check", *shared]) == 0
        run = ["--run.output-dir", str(tmp_path / "run"), "--train.epochs", "1", "--train.batch-size", "2"]
        assert main(["train", *shared, *run, "--data.workers", "0"]) == 0
        assert "square" in capsys.readouterr().out

    def test_a_folder_needs_no_split_files_but_for_validation(self, tmp_path: Path) -> None:
        root = tmp_path / "data"
        make_folder(root)
        (root / "val.txt").write_text("images/3.png labels/3.png\n")
        config = tiny_config()
        data = dataclasses.replace(config.data, dataset="folder", root=root, val=Path("val.txt"))
        sources = Trainer(dataclasses.replace(config, data=data), tmp_path / "run").sources
        assert [entry.image for entry in sources.labeled.entries] == [f"images/{i}.png" for i in range(3)]
        assert [entry.image for entry in sources.unlabeled.entries] == ["images/4.png", "images/5.png"]

    @pytest.mark.parametrize("hidden", [True, False])
    def test_a_picture_shows_hidden_labels_where_there_are_some(self, hidden: bool, tmp_path: Path) -> None:
        root = tmp_path / "data"
        make_folder(root)
        for i in (4, 5) if hidden else ():
            Image.new("L", (96, 80), 1).save(root / f"labels/{i}.png")
        for part, ids in (("labeled", (0, 1)), ("unlabeled", (4, 5)), ("val", (3,))):
            (root / f"{part}.txt").write_text("".join(f"images/{i}.png labels/{i}.png\n" for i in ids))
        config = tiny_config()
        names = {part: Path(f"{part}.txt") for part in ("labeled", "unlabeled", "val")}
        data = dataclasses.replace(config.data, dataset="folder", root=root, **names)
        _, pictured, measured = Trainer(dataclasses.replace(config, data=data), tmp_path / "run")._pseudo_labels()
        assert list(pictured) == ["truth"] * hidden + ["pseudo label", "prediction"]
        assert ("pseudo_label_accuracy" in measured) == hidden

    def test_bad_data_is_listed_before_training(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        root = tmp_path / "data"
        make_folder(root)
        (root / "val.txt").write_text("images/3.png labels/3.png\n")
        (root / "images/1.png").write_bytes(b"")
        Image.new("L", (96, 80), 7).save(root / "labels/2.png")
        arguments = ["--data.dataset", "folder", "--data.root", str(root), "--data.val", "val.txt"]
        arguments += ["--data.crop", "64", "--run.output-dir", str(tmp_path / "run"), "--train.batch-size", "2"]
        assert main(["train", *arguments]) == 1
        message = capsys.readouterr().err
        assert "images/1.png" in message
        assert "labels/2.png" in message
        assert main(["check", *arguments]) == 1


def test_camvid_runs(data_dir: Path, tmp_path: Path) -> None:
    arguments = ["camvid", "--data.root", str(data_dir / "camvid"), "--run.output-dir", str(tmp_path)]
    arguments += ["--data.labeled", "splits/1_16/seed0/labeled.txt", "--data.crop", "64", "--train.epochs", "1"]
    (tmp_path / "few.txt").write_text("".join((data_dir / "camvid/splits/train.txt").open().readlines()[:4]))
    (tmp_path / "val.txt").write_text("".join((data_dir / "camvid/splits/val.txt").open().readlines()[:2]))
    arguments += ["--data.unlabeled", str(tmp_path / "few.txt"), "--data.val", str(tmp_path / "val.txt")]
    arguments += ["--train.batch-size", "2", "--data.workers", "0"]
    assert main(["train", *arguments]) == 0
    assert read_metrics(tmp_path)[-1]["miou"] > 0
