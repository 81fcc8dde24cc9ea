"""Runs from beginning to end: what they leave, exact resume, mistakes."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from allspark_fast import trainer as trainer_module
from allspark_fast.__main__ import main
from allspark_fast.checkpoint import load_latest_checkpoint, save_checkpoint
from allspark_fast.config import Config, DataConfig, EvalConfig, ModelConfig, RunConfig, TrainConfig
from allspark_fast.data.loader import SemiBatch
from allspark_fast.model import build_segmentor
from allspark_fast.report import read_metrics
from allspark_fast.step import build_optimizer, compute_losses, pseudo_pass, train_step
from allspark_fast.trainer import Trainer, train

METHODS = ("allspark", "semi", "supervised")


def tiny_config(method: str = "allspark", **train_options: object) -> Config:
    """Three epochs of four steps on eight scenes of 64 pixels."""
    return Config(
        data=DataConfig(crop=64, scenes=(3, 8, 2), workers=0),
        model=ModelConfig(backbone="mit_tiny", embedding_dim=16),
        train=TrainConfig(method=method, epochs=3, batch_size=2, lr=0.01, warmup_epochs=1, **train_options),
        eval=EvalConfig(every=2),
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
        printed = capsys.readouterr().out
        assert "3 labeled, 8 unlabeled, 2 validation images" in printed
        assert "mIoU" in printed
        assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == config.run.keep

        # The same command again says that there is nothing to do.
        train(config, tmp_path / "run")
        assert "finished at step 12, best mIoU" in capsys.readouterr().out

        # The best weights score what the log says.
        best = max(record["miou"] for record in records if "miou" in record)
        assert main(["evaluate", str(tmp_path / "run")]) == 0
        assert f"{100 * best:.1f}" in capsys.readouterr().out

    def test_learns(self, tmp_path: Path) -> None:
        config = tiny_config(method="supervised")
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=12, lr=0.02))
        train(config, tmp_path)
        losses = [record["loss"] for record in read_metrics(tmp_path) if "loss" in record]
        assert losses[-1] < 0.8 * losses[0]


class Killed(Exception):  # noqa: N818 stands for kill -9
    """Raised in the middle of a run."""


def run_and_die(config: Config, folder: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 0

    def dying_step(*args: object, **kwargs: object) -> object:
        nonlocal steps
        steps += 1
        if steps > step:
            raise Killed
        return train_step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "train_step", dying_step)
        with pytest.raises(Killed):
            Trainer(config, folder).run()


class TestResume:
    """N steps = k steps + death + the rest, bit for bit."""

    @pytest.mark.parametrize("method", METHODS)
    def test_inside_an_epoch(self, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
        config = tiny_config(method, ema=0.9)
        Trainer(config, tmp_path / "whole").run()
        run_and_die(config, tmp_path / "broken", 7, monkeypatch)  # after the checkpoint of step 6, in epoch 1
        resumed = Trainer(config, tmp_path / "broken")
        assert resumed.step == 6
        resumed.run()
        assert_same_run(tmp_path / "whole", tmp_path / "broken")

    @pytest.mark.slow
    @pytest.mark.parametrize("method", METHODS)
    def test_after_kill_9_in_its_own_process(self, tmp_path: Path, method: str) -> None:
        command = [sys.executable, "-m", "allspark_fast", "train", "--data.scenes", "3", "8", "2"]
        options = {
            "data.crop": 64, "data.workers": 1, "model.backbone": "mit_tiny", "model.embedding-dim": 16,
            "train.method": method, "train.epochs": 20, "train.batch-size": 2, "eval.every": 5,
            "run.log-every": 1, "run.save-every": 7,
        }  # fmt: skip
        command += [str(x) for name, value in options.items() for x in (f"--{name}", value)]
        whole, broken = tmp_path / "whole", tmp_path / "broken"
        subprocess.run([*command, "--run.folder", whole], check=True, capture_output=True)
        process = subprocess.Popen(
            [*command, "--run.folder", broken], start_new_session=True, stderr=subprocess.DEVNULL
        )
        while not (steps := [x["step"] for x in read_metrics(broken)]) or steps[-1] < 11:
            assert process.poll() is None
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert 11 <= read_metrics(broken)[-1]["step"] < 80
        subprocess.run([*command, "--run.folder", broken], check=True, capture_output=True)
        assert_same_run(whole, broken)

    def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        for step in (1, 2):
            save_checkpoint(tmp_path, step, {"step": step}, keep=2)
        newest = tmp_path / "step_00000002.pt"
        newest.write_bytes(newest.read_bytes()[:100])
        state = load_latest_checkpoint(tmp_path)
        assert state == {"step": 1}
        assert "step_00000002.pt cannot be read" in caplog.text
        (tmp_path / "step_00000001.pt").write_bytes(b"")
        with pytest.raises(ValueError, match="none of 2 checkpoints can be read"):
            load_latest_checkpoint(tmp_path)

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


def batch() -> SemiBatch:
    images = torch.randn(2, 2, 3, 64, 64)
    valid = torch.ones(2, 64, 64, dtype=torch.bool)
    valid[:, 40:] = False
    return SemiBatch(images[0], torch.randint(3, (2, 64, 64)), images[1], valid, None)


class TestStep:
    """One step of each method."""

    @pytest.mark.parametrize("method", METHODS)
    def test_updates_what_it_uses(self, method: str) -> None:
        config = TrainConfig(method=method, lr=0.01)
        model = build_segmentor("mit_tiny", 3, (64, 64), allspark=method == "allspark", embedding_dim=16)
        before = {name: x.clone() for name, x in model.state_dict().items()}
        losses = train_step(model, build_optimizer(model, config), batch(), config, lr=0.01, use_memory=True)
        assert all(loss.isfinite() and not loss.requires_grad for loss in losses)
        assert (losses.unlabeled == 0) == (method == "supervised")
        changed = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
        # Without the unlabeled branch's own keys, a decoder would not learn from pseudo labels.
        unused = {"decoder.allspark.attn.queue_filled"}
        assert set(before) - changed <= unused

    @pytest.mark.parametrize("name", ["sgd", "adamw"])
    def test_learning_rates_of_backbone_and_rest(self, name: str) -> None:
        config = TrainConfig(optimizer=name, lr_multi=10.0)
        model = build_segmentor("mit_tiny", 3, (64, 64), embedding_dim=16)
        optimizer = build_optimizer(model, config)
        train_step(model, optimizer, batch(), config, lr=0.003, use_memory=False)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.003, 0.03])
        counted = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
        assert counted == sum(p.numel() for p in model.parameters())

    def test_pseudo_padding(self) -> None:
        model = build_segmentor("mit_tiny", 3, (64, 64), embedding_dim=16)
        data = batch()
        official = pseudo_pass(model, data, TrainConfig(pseudo_padding=True))[1]
        corrected = pseudo_pass(model, data, TrainConfig(pseudo_padding=False))[1]
        assert (official < 3).all()
        assert torch.equal(corrected, official.where(data.unlabeled_valid, 255))

    def test_attend_of_the_pseudo_pass(self) -> None:
        model = build_segmentor("mit_tiny", 3, (64, 64), embedding_dim=16)
        data = batch()
        alone = data._replace(unlabeled_image=data.unlabeled_image[:1])
        for attend, same in (("image", True), ("batch", False)):
            config = TrainConfig(attend=attend)
            both, one = (pseudo_pass(model, x, config)[0] for x in (data, alone))
            assert torch.allclose(both[:1], one, atol=1e-6) == same

    def test_ohem_is_for_the_labeled_images(self) -> None:
        model = build_segmentor("mit_tiny", 3, (64, 64), allspark=False, embedding_dim=16)
        model.decoder.decoder.dropout.p = 0.0
        for block in (x for stage in range(1, 5) for x in getattr(model.backbone, f"block{stage}")):
            block.drop_path = 0.0
        data = batch()
        plain = compute_losses(model, data, TrainConfig(method="semi"), use_memory=False)
        options = {"loss": "ohem", "ohem_threshold": 0.0, "ohem_min_kept": 100}
        mined = compute_losses(model, data, TrainConfig(method="semi", **options), use_memory=False)
        assert mined.labeled > plain.labeled
        torch.testing.assert_close(mined.unlabeled, plain.unlabeled, rtol=0.05, atol=0)

    def test_a_loss_that_is_not_finite_stops_the_run(self, tmp_path: Path) -> None:
        trainer = Trainer(tiny_config(), tmp_path)
        trainer.model.backbone.norm4.weight.data.fill_(float("nan"))
        with pytest.raises(RuntimeError, match=r"the loss is nan by step 3: lower train\.lr"):
            trainer.run()


class TestCommandLine:
    """Mistakes are named; help explains."""

    def test_help_documents_every_field(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as done:
            main(["train", "--help"])
        assert done.value.code == 0
        text = capsys.readouterr().out
        for group in dataclasses.fields(Config):
            for setting in dataclasses.fields(group.default_factory):
                assert f"--{group.name}.{setting.name.replace('_', '-')}" in text

    def test_every_field_has_a_description(self) -> None:
        for group in dataclasses.fields(Config):
            for setting in dataclasses.fields(group.default_factory):
                assert f"\n        {setting.name}: " in group.default_factory.__doc__

    def test_a_typo_gets_a_suggestion(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            main(["train", "--train.epoch", "3"])
        assert "--train.epochs" in capsys.readouterr().err

    def test_a_wrong_value_names_the_choices(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            main(["train", "--train.method", "fixmatch"])
        assert "supervised" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["train", "imagenet"], "there is no recipe 'imagenet'; recipes are scenes, camvid, pascal"),
            (["train", "pascal", "--data.root", "nowhere"], "there is no folder nowhere"),
            (["evaluate", "nowhere"], "nowhere: no run folder"),
            (["check", "pascal", "--data.root", "."], "split file splits/pascal/1_8/labeled.txt: not found"),
            (["train", "--run.device", "cuda"], "no GPU is there"),
            (["train", "--model.weights", "nowhere.pth"], "nowhere.pth: no such file"),
        ],
    )
    def test_errors(
        self,
        arguments: list[str],
        message: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        if "cuda" in arguments and torch.cuda.is_available():
            pytest.skip("there is a GPU")
        monkeypatch.chdir(tmp_path)
        assert main(arguments) == 1
        assert message in capsys.readouterr().err

    def test_a_bad_batch_size_is_found_before_training(self, tmp_path: Path) -> None:
        config = dataclasses.replace(tiny_config(), train=TrainConfig(batch_size=9))
        with pytest.raises(ValueError, match="8 unlabeled images do not fill a batch of 9"):
            Trainer(config, tmp_path)

    @pytest.mark.parametrize(("arguments", "status"), [([], 2), (["--help"], 0), (["fly"], 2)])
    def test_usage(self, arguments: list[str], status: int, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(arguments) == status
        printed = capsys.readouterr().err
        for command in ("train", "evaluate", "check", "splits"):
            assert f"``{command} " in printed


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
        assert main(["splits", str(root), "1/3", "--list", str(root / "train.txt"), "--out", str(root)]) == 0
        assert "1 labeled, 2 unlabeled" in capsys.readouterr().out
        shared = ["scenes", "--data.dataset", "folder", "--data.root", str(root), "--data.val", "val.txt"]
        shared += ["--data.labeled", "labeled.txt", "--data.unlabeled", "unlabeled.txt", "--data.crop", "64"]
        assert main(["check", *shared]) == 0
        run = ["--run.folder", str(tmp_path / "run"), "--train.epochs", "1", "--train.batch-size", "2"]
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

    def test_bad_data_is_listed_before_training(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        root = tmp_path / "data"
        make_folder(root)
        (root / "val.txt").write_text("images/3.png labels/3.png\n")
        (root / "images/1.png").write_bytes(b"")
        Image.new("L", (96, 80), 7).save(root / "labels/2.png")
        arguments = ["--data.dataset", "folder", "--data.root", str(root), "--data.val", "val.txt"]
        arguments += ["--data.crop", "64", "--run.folder", str(tmp_path / "run"), "--train.batch-size", "2"]
        assert main(["train", *arguments]) == 1
        message = capsys.readouterr().err
        assert "images/1.png" in message
        assert "labels/2.png" in message
        assert main(["check", *arguments]) == 1


def test_camvid_runs(data_dir: Path, tmp_path: Path) -> None:
    arguments = ["camvid", "--data.root", str(data_dir / "camvid"), "--run.folder", str(tmp_path)]
    arguments += ["--data.labeled", "splits/1_16/seed0/labeled.txt", "--data.crop", "64", "--train.epochs", "1"]
    (tmp_path / "few.txt").write_text("".join((data_dir / "camvid/splits/train.txt").open().readlines()[:4]))
    (tmp_path / "val.txt").write_text("".join((data_dir / "camvid/splits/val.txt").open().readlines()[:2]))
    arguments += ["--data.unlabeled", str(tmp_path / "few.txt"), "--data.val", str(tmp_path / "val.txt")]
    arguments += ["--model.backbone", "mit_tiny", "--train.batch-size", "2", "--data.workers", "0"]
    assert main(["train", *arguments]) == 0
    assert read_metrics(tmp_path)[-1]["miou"] > 0
