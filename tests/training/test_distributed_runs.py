"""Whole runs of two gloo ranks: torchrun, a killed rank, signals, and resume on as many or on another number of ranks.

As a program it is ``train.py`` whose model drops nothing, so that runs on any number of ranks agree.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from allspark_fast.__main__ import main
from allspark_fast.files import read_torch_file
from allspark_fast.model import Segmentor
from allspark_fast.signals import STOPPED
from allspark_fast.training import setup
from allspark_fast.training.checkpoint import list_checkpoints, load_latest_checkpoint
from allspark_fast.training.log import read_metrics
from allspark_fast.training.setup import build_model
from bench.bench_train_step import without_dropout
from tests.helpers.runs import assert_same_run

ROOT = Path(__file__).parents[2]
STEPS = 16
# Three validation images: one more on rank 0 than on rank 1. Adam would enlarge rounding errors.
ARGUMENTS = {
    "data.crop": 64, "data.workers": 0, "model.backbone": "mit_tiny", "model.embedding-dim": 16,
    "model.memory-sync": "all", "train.epochs": 4, "train.batch-size": 2, "train.warmup-epochs": 0,
    "train.pseudo-from-epoch": 0, "train.kv-source": "image", "train.optimizer": "sgd", "train.lr": 0.01,
    "eval.every": 4,
    "run.log-every": 1, "run.save-every": 2, "run.device": "cpu", "run.timeout": 1,
}  # fmt: skip


def arguments(folder: Path, **options: object) -> list[str]:
    settings = {**ARGUMENTS, **{f"train.{name}": value for name, value in options.items()}}
    pairs = [str(x) for name, value in settings.items() for x in (f"--{name}", value)]
    return ["scenes", "--data.scenes", "3", "8", "3", *pairs, "--run.output-dir", str(folder)]


def start(program: list[str], ranks: int) -> list[subprocess.Popen[str]]:
    """Start what torchrun would start, without its agent, which would end all processes as soon as one has ended."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    processes = []
    for rank in map(str, range(ranks)):
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        environment = {**os.environ, **address, **(places if ranks > 1 else {}), "PYTHONFAULTHANDLER": "1"}
        processes.append(
            subprocess.Popen(
                [sys.executable, *program],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return processes


def finish(processes: list[subprocess.Popen[str]], status: int = 0) -> list[str]:
    """Wait for all processes, which must end with this status, and return what they printed."""
    try:
        outputs = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [status] * len(processes), "\n".join(outputs)
    return outputs


def wait_for_step(folder: Path, step: int, processes: list[subprocess.Popen[str]]) -> None:
    while not (records := read_metrics(folder)) or records[-1]["step"] < step:
        assert all(process.poll() is None for process in processes), finish(processes)
        time.sleep(0.01)
    assert records[-1]["step"] < STEPS


def assert_close_runs(a: Path, b: Path) -> None:
    """Weights, memory and scores of runs on different numbers of ranks."""
    states = [load_latest_checkpoint(folder / "checkpoints") for folder in (a, b)]
    assert states[0]["step"] == states[1]["step"] == STEPS
    for name, x in states[0]["model"].items():
        torch.testing.assert_close(states[1]["model"][name], x, rtol=1e-5, atol=1e-5, msg=lambda s, n=name: f"{n}: {s}")
    scores = [read_metrics(folder)[-1] for folder in (a, b)]
    for name in ("miou", "pseudo_label_accuracy"):
        assert scores[0][name] == pytest.approx(scores[1][name], abs=1e-4), name


def assert_ended_for_another_rank(rank: int, process: subprocess.Popen[str], seconds: float) -> None:
    printed, _ = process.communicate(timeout=seconds)
    assert process.returncode == 1
    prefix = f"rank {rank}: " if rank else ""
    assert f"\n{prefix}error: another rank has ended or is stuck" in f"\n{printed}", printed
    assert "Traceback" not in printed


def build_model_without_dropout(*arguments: object, **options: object) -> Segmentor:
    return without_dropout(build_model(*arguments, **options))


WITHOUT_DROPOUT = ["-m", "tests.training.test_distributed_runs"]


def process_of_rank(rank: int, torchrun: subprocess.Popen[str]) -> int:
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    (process,) = (x for x in children if f"\0RANK={rank}\0".encode() in Path(f"/proc/{x}/environ").read_bytes())
    return int(process)


@pytest.mark.slow
def test_the_same_ranks_go_on_bit_for_bit(tmp_path: Path) -> None:
    """After torchrun was stopped or killed, and when it starts all again as one of them was killed."""
    whole, restarted = tmp_path / "whole", tmp_path / "restarted"
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "1",
        "train.py",
    ]
    (printed,) = finish(start([*torchrun, *arguments(whole, ema=0.9)], 1))
    assert "2 processes, 1 micro-batches each, of 1 + 1" in printed
    assert printed.count("mIoU  ") == printed.count(f"step {STEPS}: mIoU") == 1
    for number in (signal.SIGTERM, signal.SIGUSR1):  # torchrun passes the first on and dies of the other
        step = read_metrics(restarted)[-1]["step"] if restarted.exists() else 0
        (agent,) = start([*torchrun, *arguments(restarted, ema=0.9)], 1)
        wait_for_step(restarted, step + 1, [agent])
        agent.send_signal(number)
        printed, _ = agent.communicate(timeout=100)  # until the ranks too have closed their output
        assert agent.returncode != 0
        assert "stopped as asked at step" in printed
    (agent,) = start([*torchrun, *arguments(restarted, ema=0.9)], 1)
    wait_for_step(restarted, read_metrics(restarted)[-1]["step"] + 1, [agent])
    os.kill(process_of_rank(1, agent), signal.SIGKILL)
    (printed,) = finish([agent])
    assert printed.count("resumed at step") == 2
    assert_same_run(whole, restarted)


@pytest.mark.slow
def test_signals_and_other_numbers_of_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM to one of two ranks stops both; one goes on. SIGUSR1 stops one; two go on."""
    monkeypatch.setattr(setup, "build_model", build_model_without_dropout)
    alone, two_one, one_two = tmp_path / "alone", tmp_path / "two_one", tmp_path / "one_two"
    assert main(["train", *arguments(alone)]) == 0
    processes = start([*WITHOUT_DROPOUT, *arguments(two_one)], 2)
    wait_for_step(two_one, 3, processes)
    processes[1].send_signal(signal.SIGTERM)
    printed = finish(processes, STOPPED)
    assert "stopped as asked at step" in printed[0]
    assert main(["train", *arguments(two_one)]) == 0
    assert_close_runs(alone, two_one)

    (process,) = start([*WITHOUT_DROPOUT, *arguments(one_two)], 1)
    wait_for_step(one_two, 2, [process])
    process.send_signal(signal.SIGUSR1)
    finish([process], STOPPED)
    finish(start([*WITHOUT_DROPOUT, *arguments(one_two, sharding="replicate")], 2))
    assert_close_runs(alone, one_two)


@pytest.mark.slow
def test_after_one_of_two_ranks_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two go on after rank 1, one process after rank 0, which wrote the checkpoints."""
    monkeypatch.setattr(setup, "build_model", build_model_without_dropout)
    alone, broken = tmp_path / "alone", tmp_path / "broken"
    assert main(["train", *arguments(alone)]) == 0
    for killed in (1, 0):
        step = read_metrics(broken)[-1]["step"] if broken.exists() else 0
        processes = start([*WITHOUT_DROPOUT, *arguments(broken)], 2)
        wait_for_step(broken, step + 3, processes)
        processes[killed].kill()
        assert_ended_for_another_rank(1 - killed, processes[1 - killed], seconds=60)
        assert read_torch_file(list_checkpoints(broken / "checkpoints")[0])["step"] in range(2, STEPS, 2)
    assert main(["train", *arguments(broken)]) == 0
    assert_close_runs(alone, broken)


@pytest.mark.slow
def test_a_rank_that_is_stuck_does_not_hold_the_other_up(tmp_path: Path) -> None:
    processes = start(["train.py", *arguments(tmp_path / "run"), "--run.timeout", "0.2"], 2)
    wait_for_step(tmp_path / "run", 3, processes)
    processes[1].send_signal(signal.SIGSTOP)
    assert_ended_for_another_rank(0, processes[0], seconds=12 + 20)
    processes[1].kill()
    processes[1].communicate()


if __name__ == "__main__":
    setup.build_model = build_model_without_dropout
    sys.exit(main(["train", *sys.argv[1:]]))
