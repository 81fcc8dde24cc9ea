"""Runs that are asked to stop by a signal, and go on: in a step, and in an evaluation."""

import multiprocessing
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import pytest

from allspark_fast.__main__ import main
from allspark_fast.inference.evaluate import evaluate
from allspark_fast.inference.metrics import Scores
from allspark_fast.signals import stop_signals
from allspark_fast.training import checkpoint
from allspark_fast.training import trainer as trainer_module
from allspark_fast.training.checkpoint import load_latest_checkpoint
from allspark_fast.training.log import read_metrics
from allspark_fast.training.step import TrainState, train_step
from allspark_fast.training.trainer import Trainer, train
from tests.helpers.runs import assert_same_run, changed, tiny_arguments, tiny_config

pytestmark = pytest.mark.usefixtures("no_pictures", "ctrl_c")


@pytest.fixture
def ctrl_c():
    """It is not ignored, as in the jobs that a shell starts in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_after_signals_that_ask_to_stop(tmp_path, monkeypatch):
    """SIGTERM, SIGUSR1 and that of Ctrl-C, to loading processes too: the step in hand is finished and saved."""
    config = changed(tiny_config(), data={"workers": 1})
    Trainer(config, tmp_path / "whole").run()
    signals = {3: signal.SIGTERM, 5: signal.SIGUSR1, 7: signal.SIGINT}

    def signaled_step(state: TrainState, *args: object, **kwargs: object) -> object:
        if (number := signals.pop(int(state.step) + 1, None)) is not None:
            loading = multiprocessing.active_children()
            assert loading
            for process in (*(child.pid for child in loading), os.getpid()):
                os.kill(process, number)
            time.sleep(0.2)
            assert all(child.is_alive() for child in loading)
        return train_step(state, *args, **kwargs)

    monkeypatch.setattr(trainer_module, "train_step", signaled_step)
    for step in (3, 5, 7):
        assert not train(config, tmp_path / "broken")
        assert load_latest_checkpoint(tmp_path / "broken" / "checkpoints")["step"] == step
    assert train(config, tmp_path / "broken")
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_a_second_ctrl_c_ends_at_once(capfd):
    with stop_signals() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        assert asked()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert "Ctrl-C again ends the run at once" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_after_signals_during_evaluations(tmp_path, monkeypatch):
    """One in the middle of the run, then one at the end: either is broken off, saved as due, and made on resuming.

    Between them the run dies, after the record of the resumed evaluation and before its checkpoint.
    """
    config = tiny_config()
    Trainer(config, tmp_path / "whole").run()
    broken = tmp_path / "broken"
    evaluations = 0

    def signaled_evaluate(*args: object, **options: object) -> Scores:
        nonlocal evaluations
        evaluations += 1
        if evaluations in (1, 4):
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args, **options)

    monkeypatch.setattr(trainer_module, "evaluate", signaled_evaluate)
    assert not train(config, broken)
    first = load_latest_checkpoint(broken / "checkpoints")
    assert first["evaluation_due"]
    assert not any("miou" in record for record in read_metrics(broken))
    with monkeypatch.context() as dying:
        dying.setattr(checkpoint, "save_checkpoint", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(config, broken)
    assert "miou" in read_metrics(broken)[-1]
    assert not train(config, broken)
    last = Trainer(config, broken)
    assert (last.step, last.finished) == (last.total_steps, False)
    del last
    assert train(config, broken)
    assert_same_run(tmp_path / "whole", broken)


def test_a_run_in_a_thread(tmp_path):
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(train, tiny_config(), tmp_path).result()


def test_a_run_without_standard_streams(tmp_path, monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert main(["train", *tiny_arguments(tmp_path, {"train.epochs": 1})]) == 0
    assert main(["trian"]) == 2
