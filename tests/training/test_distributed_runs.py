"""Whole runs of two gloo ranks: torchrun, a killed rank, signals, and resume on another number of ranks."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from allspark_fast.signals import STOPPED
from allspark_fast.training.checkpoint import list_checkpoints, load_latest_checkpoint
from allspark_fast.training.log import read_metrics
from tests.helpers.ranks import Fault, start_run
from tests.helpers.runs import assert_same_run, tiny_arguments

ROOT = Path(__file__).parents[2]
STEPS = 4
# Three validation images: one more on rank 0 than on rank 1. Adam would enlarge rounding errors.
# One crop a rank has no partner for CutMix, and a threshold turns rounding into other pixels.
SETTINGS = {
    "train.cutmix": 0, "train.conf-mode": "threshold", "train.conf-thresh": 0,
    "data.scenes": "3 8 3", "model.memory-sync": "all", "train.epochs": 1, "train.warmup-epochs": 0,
    "train.pseudo-from-epoch": 0, "train.kv-source": "image", "train.optimizer": "sgd", "train.lr": 0.01,
    "train.ema": 0.9, "eval.every": 1, "run.log-every": 1, "run.save-every": 1,
}  # fmt: skip
ANOTHER_ENDED = "error: another rank has ended or is stuck"


def arguments(folder: Path, **options: object) -> list[str]:
    return tiny_arguments(folder, {**SETTINGS, **options})


def assert_close_runs(a: Path, b: Path) -> None:
    """Weights, their average, memory and scores of runs on different numbers of ranks."""
    states = [load_latest_checkpoint(folder / "checkpoints") for folder in (a, b)]
    assert states[0]["step"] == states[1]["step"] == STEPS
    torch.testing.assert_close(states[1]["model"], states[0]["model"], rtol=1e-5, atol=1e-5)
    averages = [load_file(folder / "best.safetensors") for folder in (a, b)]
    torch.testing.assert_close(averages[1], averages[0], rtol=1e-5, atol=1e-5)
    scores = [read_metrics(folder)[-1] for folder in (a, b)]
    for name in ("miou", "pseudo_label_accuracy"):
        assert scores[0][name] == pytest.approx(scores[1][name], abs=1e-4), name


@pytest.mark.slow
def test_the_same_ranks_go_on_bit_for_bit_under_torchrun(tmp_path):
    """After torchrun was stopped or killed, and when it starts all again as one of them was killed."""
    whole, restarted = tmp_path / "whole", tmp_path / "restarted"
    adamw = {"train.optimizer": "adamw"}
    ranks = start_run(arguments(whole, **adamw), 2, dropout=True)
    printed = "".join(x.finish() for x in ranks)
    assert "2 processes, 1 micro-batches each, of 1 + 1" in printed
    assert printed.count("pixel accuracy") == printed.count(f"step {STEPS}: mIoU") == 1

    def torchrun(*fault: str) -> tuple[int, str]:
        options = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "-m", "tests.helpers.ranks"]
        command = [sys.executable, "-m", "torch.distributed.run", *options, *fault, *arguments(restarted, **adamw)]
        # It ends when the ranks too have closed their output.
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    # torchrun passes the first signal on and dies of the other.
    for step, name in ((0, "SIGTERM"), (1, "SIGUSR1")):
        status, printed = torchrun("0", str(step), name, "torchrun")
        assert status != 0
        assert f"stopped as asked at step {step + 1}" in printed
    status, printed = torchrun("1", "3", "SIGKILL", "self")
    assert status == 0, printed
    assert printed.count("resumed at step") == 2
    assert_same_run(whole, restarted)


@pytest.mark.slow
def test_signals_deaths_and_other_numbers_of_ranks(tmp_path):
    """Runs of two ranks, and of one, two and again one, end as a run of one process."""
    alone, both, broken = tmp_path / "alone", tmp_path / "both", tmp_path / "broken"
    for process in (*start_run(arguments(alone), 1), *start_run(arguments(both), 2)):
        process.finish()
    assert_close_runs(alone, both)

    (process,) = start_run(arguments(broken), 1, Fault(0, 0, signal.SIGUSR1))
    assert "stopped as asked at step 1" in process.finish(STOPPED)

    # A signal to one of two ranks stops both.
    ranks = start_run(arguments(broken), 2, Fault(1, 1, signal.SIGTERM))
    printed = [x.finish(STOPPED) for x in ranks]
    assert "now there are 2: dropout draws other numbers" in printed[0]
    assert "stopped as asked at step 2" in printed[0]

    # Whichever rank dies, the other one ends with an error; rank 0 writes the checkpoints.
    for killed, step, sharding in ((1, 2, "replicate"), (0, 3, "fsdp")):
        ranks = start_run(arguments(broken, **{"train.sharding": sharding}), 2, Fault(killed, step, signal.SIGKILL))
        ranks[killed].finish(-signal.SIGKILL)
        printed = ranks[1 - killed].finish(1)
        assert ("rank 1: " * (killed == 0)) + ANOTHER_ENDED in printed
        assert "Traceback" not in printed
        assert list_checkpoints(broken / "checkpoints")[0].name == f"step_{step:08}.pt"

    (process,) = start_run(arguments(broken), 1)
    process.finish()
    assert_close_runs(alone, broken)


@pytest.mark.slow
def test_a_rank_that_is_stuck_does_not_hold_the_other_up(tmp_path):
    stuck, waits = reversed(start_run(arguments(tmp_path), 2, Fault(1, 2, signal.SIGSTOP)))
    try:
        assert ANOTHER_ENDED in waits.finish(1)
    finally:
        stuck.kill()
