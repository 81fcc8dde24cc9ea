import itertools
import json
import multiprocessing
import os
import signal
from multiprocessing.synchronize import Event
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch._dynamo.testing import CompileCounterWithBackend

from allspark_fast.data.scenes import SCENES
from allspark_fast.data.sources import open_sources
from allspark_fast.errors import InputError, RunError
from allspark_fast.model.mit import compile_blocks
from allspark_fast.training import log
from allspark_fast.training import setup as prepare
from allspark_fast.training import trainer as trainer_module
from allspark_fast.training.checkpoint import list_checkpoints
from allspark_fast.training.cuda_graph import GraphedSteps
from allspark_fast.training.log import read_metrics
from allspark_fast.training.setup import build_model, claim_folder
from allspark_fast.training.step import train_step
from allspark_fast.training.trainer import Trainer, train
from allspark_fast.weights.files import save_weights
from tests.helpers.images import write_folder
from tests.helpers.runs import assert_same_run, changed, run_and_die, tiny_arguments, tiny_config
from tests.helpers.steps import BEYOND, METHODS


def test_leaves_what_it_promises(tmp_path, capsys, command):
    config = tiny_config(pseudo_from_epoch=1)
    train(config, tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    weights = {"best.safetensors", "last.safetensors"}
    pictures = {"curves.png", "predictions.png", "validation.png"}
    assert {"config.json", "metrics.jsonl", "checkpoints", *pictures, *weights} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    records = read_metrics(tmp_path / "run")
    assert [record["step"] for record in records if "loss" in record] == [3, 6, 9, 12]
    assert [record["step"] for record in records if "miou" in record] == [8, 12]
    for record in (record for record in records if record["step"] in (3, 9, 12) and "loss" in record):
        mean = (record["loss_labeled"] + record["loss_unlabeled"]) / 2
        expected = record["loss_labeled"] if record["step"] <= 4 else mean  # an epoch has four steps
        assert record["loss"] == pytest.approx(expected, rel=1e-5)
    for picture in pictures:
        assert len(Image.open(tmp_path / "run" / picture).convert("RGB").getcolors(1 << 20)) > 100
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    scored = [(record["step"], record["miou"]) for record in records if "miou" in record]
    assert [(x.step, x.value) for x in events.Scalars("miou")] == [(step, pytest.approx(x)) for step, x in scored]
    # What is measured of pseudo labels and memory: in 12 steps of 2 images it received all of their 128 channels.
    last = records[-1]
    assert sum(last["memory_received"]) == 12 * 2 * 128
    assert sum(last["label_share"]) == pytest.approx(1)
    assert len(last["pseudo_label_share"]) == len(last["pseudo_label_kept"]) == len(last["pseudo_label_recall"]) == 8
    for name in ("pseudo_label_accuracy", "pseudo_label_coverage"):
        assert events.Scalars(name)[-1].value == pytest.approx(last[name]), name
    printed = capsys.readouterr().out
    assert "3 labeled, 8 unlabeled, 2 validation images" in printed
    best = max(scored, key=lambda pair: pair[1])
    assert f"best    mIoU {100 * best[1]:.1f} of step {best[0]} (best.safetensors)" in printed
    assert f"last    mIoU {100 * last['miou']:.1f} of step 12 (last.safetensors)" in printed
    assert all(part in printed for part in ("steps 1 to 12, ", "for 12 steps", f"predict {tmp_path / 'run'} IMAGE"))
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == config.run.keep_last

    # The same command again says that there is nothing to do.
    train(config, tmp_path / "run")
    assert "finished at step 12, best mIoU" in capsys.readouterr().out

    # The best weights score what the log says, even where those that the run started from are gone.
    settings = tmp_path / "run" / "config.json"
    settings.write_text(settings.read_text().replace('"weights": null', '"weights": "gone.pth"'))
    assert "gone.pth" in settings.read_text()
    assert f"{100 * best[1]:.1f}" in command("evaluate", tmp_path / "run", "--json", tmp_path / "scores.json")
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["miou"] == best[1]
    assert sum(map(sum, scores["confusion"])) == 2 * 80 * 80


@pytest.mark.usefixtures("no_pictures")
def test_a_run_that_teaches_only_background_says_so(tmp_path, caplog):
    """All pseudo labels are background, from a classifier that is not trained."""
    config = changed(tiny_config("semi", steps=8, pseudo_from=0.5, lr=0.0), eval={"times": 2})
    trainer = Trainer(config, tmp_path)
    with torch.no_grad():
        trainer.state.model.decoder.decoder.linear_pred.bias[0] = 100
    trainer.run()
    assert [record["step"] for record in read_metrics(tmp_path) if "miou" in record] == [4, 8]
    for text in ("step 8: ball gets almost no pseudo labels", "ball is almost never predicted", "certain of all its"):
        assert text in caplog.text
    assert "step 4: " not in caplog.text  # no pseudo label counted
    caplog.clear()
    Trainer(changed(config, train={"pseudo_from": 1.0}), tmp_path / "never")
    assert "pseudo labels: never used, since that begins at step 8 and the run ends at 8" in caplog.text


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_compiled_blocks_train_and_validation_compiles_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that it is put back
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(prepare, "compile_blocks", lambda model, _: compile_blocks(model, counter))
    torch._dynamo.reset()
    trainer = Trainer(changed(tiny_config(compile="on"), run={"device": "cpu"}), tmp_path)
    assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) == tmp_path / "allspark_fast" / "inductor"
    trainer.run()
    # Four stages in training, one more without stochastic depth in the first, four in the pseudo-label pass.
    assert 8 <= counter.frame_count <= 9
    expected = Trainer(changed(tiny_config(), run={"device": "cpu"}), tmp_path / "plain")
    expected.run()
    for actual, x in zip(trainer.state.model.parameters(), expected.state.model.parameters(), strict=True):
        torch.testing.assert_close(actual, x, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [*({"method": method, "ema": 0.9} for method in METHODS), {**BEYOND, "optimizer": "adamw"}], ids=str
)
def test_a_run_on_a_gpu_resumes(options, tmp_path, monkeypatch):
    """Its recorded steps differ from ordinary ones by their noise."""
    config = changed(tiny_config(**options), run={"device": "cuda", "log_every": 1})
    device = torch.device("cuda")
    run_and_die(Trainer(config, tmp_path, device), 7, monkeypatch)
    trainer = Trainer(config, tmp_path, device)
    assert 0 < trainer.step <= 7
    assert 0 < trainer.run().mean_iou < 1
    assert isinstance(trainer.train_step, GraphedSteps)
    assert trainer.train_step.recording
    assert trainer.state.skipped == 0
    assert (tmp_path / "predictions.png").exists()


@pytest.mark.usefixtures("no_pictures")
def test_supervised_learns_from_labeled_images_and_counts_no_others(tmp_path, monkeypatch):
    step = Mock(wraps=train_step)
    monkeypatch.setattr(trainer_module, "train_step", step)
    # One second for each line of the log.
    monkeypatch.setattr(trainer_module.time, "perf_counter", itertools.count().__next__)
    for method, unlabeled, epochs in (("supervised", 0, 8), ("semi", 2, 2)):
        step.reset_mock()
        Trainer(tiny_config(method, epochs=epochs, lr=0.02), tmp_path / method).run()
        batches = [call.args[1] for call in step.call_args_list]
        assert {(len(batch.image), len(batch.unlabeled_image)) for batch in batches} == {(2, unlabeled)}
        record = read_metrics(tmp_path / method)[1]
        assert ("loss_unlabeled" in record) == (method == "semi")
        assert record["images_per_s"] == 3 * (2 + unlabeled)  # three steps in a line
    losses = [record["loss"] for record in read_metrics(tmp_path / "supervised") if "loss" in record]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.usefixtures("no_pictures")
class TestResume:
    """N steps = k steps + death + the rest, bit for bit."""

    def test_with_other_settings_that_do_not_decide_the_numbers(self, tmp_path, monkeypatch, caplog):
        """Recomputation among them, which the advice on too little memory recommends; tests/test_signals.py: none."""
        caplog.set_level("INFO", logger="allspark_fast")
        config = tiny_config(ema=0.9)
        Trainer(config, tmp_path / "whole").run()
        run_and_die(Trainer(config, tmp_path / "broken"), 7, monkeypatch)  # after the checkpoint of step 6, in epoch 1
        other = {"data": {"workers": 1}, "model": {"activation_checkpointing": True}, "run": {"save_every": 5}}
        resumed = Trainer(changed(config, train={"max_skipped": 7}, **other), tmp_path / "broken")
        assert "model.activation_checkpointing: False -> True" in caplog.text
        assert resumed.step == 6
        assert resumed.state.model.backbone.activation_checkpointing
        resumed.run()
        assert_same_run(tmp_path / "whole", tmp_path / "broken")

    def test_a_second_run_in_the_same_folder_is_refused(self, tmp_path):
        """As long as the first one lives: it ends here without any cleaning up."""
        context = multiprocessing.get_context("fork")
        locked = context.Event()
        process = context.Process(target=hold_lock, args=(tmp_path, locked))
        process.start()
        locked.wait()
        with pytest.raises(InputError, match=rf"process {process.pid} on \S+ is training there"):
            Trainer(tiny_config(), tmp_path)
        process.kill()
        process.join()
        assert claim_folder(tmp_path, tiny_config(), open_sources(tiny_config().data)) is not None

    @pytest.mark.parametrize(("name", "length"), [("epochs", 1), ("steps", 4)])
    def test_a_finished_run_is_extended_and_other_settings_are_refused_by_name(self, name, length, tmp_path):
        short, long = ({name: length * factor} for factor in (1, 2))
        assert train(tiny_config(**short), tmp_path)
        with pytest.raises(InputError, match=r"data \(train.lr: 0.01 -> 0.02; .*gradient_accumulation_steps: 1 -> 2\)"):
            Trainer(tiny_config(**short, lr=0.02, gradient_accumulation_steps=2), tmp_path)
        assert train(tiny_config(**long), tmp_path)
        assert [record["step"] for record in read_metrics(tmp_path) if "miou" in record] == [4, 8]
        with pytest.raises(InputError, match=f"train.{name}: {2 * length} -> {length}"):
            Trainer(tiny_config(**short), tmp_path)

    def test_starting_weights_may_be_gone_and_statistics_of_an_earlier_version_missing(self, tmp_path):
        """From a run that was begun; otherwise nothing is written before it is known that weights are gone."""
        config, weights = tiny_config(epochs=1), tmp_path / "start.safetensors"
        save_weights(build_model(config, SCENES), weights)
        config = changed(config, model={"weights": weights})
        train(config, tmp_path / "run")
        weights.unlink()
        path = list_checkpoints(tmp_path / "run/checkpoints")[0]
        state = torch.load(path)
        shares = state["classes"].pop("shares")
        torch.save(state, path)
        resumed = Trainer(config, tmp_path / "run")
        assert resumed.finished
        assert torch.equal(resumed.state.classes.shares, torch.zeros_like(shares))
        with pytest.raises(FileNotFoundError, match=r"start\.safetensors"):
            Trainer(config, tmp_path / "another")
        assert not (tmp_path / "another").exists()

    def test_settings_that_led_to_no_checkpoint_may_be_mended(self, tmp_path, monkeypatch):
        config = tiny_config()
        run_and_die(Trainer(config, tmp_path), 1, monkeypatch)
        assert Trainer(changed(config, train={"lr": 0.005}), tmp_path).step == 0
        assert json.loads((tmp_path / "config.json").read_text())["train"]["lr"] == 0.005


def hold_lock(folder: Path, locked: Event) -> None:
    lock = claim_folder(folder, tiny_config(), open_sources(tiny_config().data))
    assert lock is not None
    locked.set()
    signal.pause()


def test_a_picture_that_cannot_be_drawn_does_not_end_a_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(log, "draw_curves", Mock(side_effect=RuntimeError("no fonts")))
    assert train(tiny_config(epochs=1), tmp_path)
    assert "the pictures of step 4 were not drawn: RuntimeError('no fonts')" in caplog.text
    assert (tmp_path / "best.safetensors").exists()


@pytest.mark.usefixtures("no_pictures")
def test_deterministic_operations_train(tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is put back
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    try:
        assert train(tiny_config(epochs=1, deterministic=True), tmp_path)
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)


def test_recording_where_it_cannot_be_is_told(tmp_path, caplog):
    Trainer(changed(tiny_config(cuda_graph="on"), run={"device": "cpu"}), tmp_path)
    assert "train.cuda_graph on: no step is recorded, because nothing on the device cpu is" in caplog.text


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("max_skipped", "stopped_at", "limit"), [(2, 3, r"train\.max_skipped .*, 2"), (50, 9, "half of the run, 6")]
)
def test_too_many_skipped_steps_stop_the_run(tmp_path, max_skipped, stopped_at, limit):
    """A run of 12 steps, fewer than the default of max_skipped."""
    trainer = Trainer(tiny_config(max_skipped=max_skipped), tmp_path)
    trainer.state.model.backbone.norm4.weight.data.fill_(float("nan"))
    with pytest.raises(RunError, match=rf"^{stopped_at} steps .* by step {stopped_at}, more than .*{limit}: .*lr"):
        trainer.run()
    record = read_metrics(tmp_path)[-1]
    assert record["skipped_steps"] == stopped_at
    assert "loss" not in record


@pytest.fixture
def root(tmp_path):
    """A data set of one's own: the last two of six images have no label."""
    write_folder(tmp_path, 6, labeled=4, names=["one", "two", "three"])
    (tmp_path / "val.txt").write_text("images/03.png labels/03.png\n")
    return tmp_path


def test_needs_no_split_files_but_for_validation_and_no_hidden_labels(root, tmp_path, monkeypatch):
    drawn = Mock()
    monkeypatch.setattr(trainer_module, "draw_pictures", drawn)
    folder = {"dataset": "folder", "root": root, "val": Path("val.txt")}
    trainer = Trainer(changed(tiny_config(epochs=1), data=folder), tmp_path / "run")
    assert [entry.image for entry in trainer.data.sources.labeled.entries] == [f"images/0{i}.png" for i in range(3)]
    assert [entry.image for entry in trainer.data.sources.unlabeled.entries] == ["images/04.png", "images/05.png"]
    trainer.run()
    _, (_, labels), validation, *_ = drawn.call_args.args
    assert list(labels) == ["pseudo label", "prediction"]
    assert [name for name, *_ in validation] == ["images/03.png"]
    assert "pseudo_label_accuracy" not in read_metrics(tmp_path / "run")[-1]


def test_bad_data_is_listed_before_training(root, tmp_path, command):
    (root / "images/01.png").write_bytes(b"")
    arguments = tiny_arguments(tmp_path / "run", {"data.dataset": "folder", "data.root": root, "data.val": "val.txt"})
    assert "images/01.png" in command("train", *arguments, status=1)
    assert not (tmp_path / "run").exists()
