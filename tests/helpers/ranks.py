"""Functions and whole runs on several gloo ranks.

As a program, ``train.py`` with a fault: ``python -m tests.helpers.ranks RANK STEP SIGNAL self|torchrun ARGUMENTS``.
"""

import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from allspark_fast.__main__ import main
from allspark_fast.distributed import rank
from allspark_fast.training import setup, trainer
from allspark_fast.training.step import Losses, TrainState
from bench.bench_train_step import without_dropout

# Ranks are forked from a process that has done nothing but import, which would take most of the time of a test.
multiprocessing.set_forkserver_preload(["tests.helpers.ranks"])


def run_on_ranks(work: Callable[[], Any], ranks: int, folder: Path) -> list[Any]:
    """Call a picklable function on every rank and return what each call returned."""
    mp.start_processes(_run_on_rank, (work, ranks, folder), nprocs=ranks, start_method="forkserver")
    return [torch.load(folder / f"{index}.pt", weights_only=False) for index in range(ranks)]


def _run_on_rank(index: int, work: Callable[[], Any], ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=index, world_size=ranks)
    torch.save(work(), folder / f"{index}.pt")
    dist.destroy_process_group()


class Fault(NamedTuple):
    """A signal that a rank sends to itself, or to torchrun and waits, before it takes the step after so many."""

    rank: int
    step: int
    number: int
    to: str = "self"


class Run:
    """One rank of a run in a process of its own, without an agent that would end all ranks as soon as one has ended."""

    def __init__(self, *arguments: Any) -> None:
        self._printed = Path(tempfile.mkstemp()[1])
        context = multiprocessing.get_context("forkserver")
        self.process = context.Process(target=_train, args=(self._printed, *arguments), daemon=True)
        self.process.start()

    def finish(self, status: int = 0) -> str:
        """Wait until it has ended with this status, negative for a signal, and return what it printed."""
        self.process.join()
        printed = self._printed.read_text()
        self._printed.unlink()
        assert self.process.exitcode == status, printed
        return printed


def start_run(arguments: list[str], ranks: int, fault: Fault | None = None, *, dropout: bool = False) -> list[Run]:
    """Start the train command on so many ranks; without dropout, runs on any number of ranks agree."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    places = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    own = [{**places, "RANK": index, "LOCAL_RANK": index} if ranks > 1 else {} for index in range(ranks)]
    return [Run(arguments, environment, fault, dropout) for environment in own]


def _train(printed: Path, arguments: list[str], environment: dict, fault: Fault | None, dropout: bool) -> None:
    sys.stdout = sys.stderr = printed.open("w", buffering=1)
    os.environ.update({name: str(value) for name, value in environment.items()})
    if not dropout:
        build = setup.build_model
        setup.build_model = lambda *args, **options: without_dropout(build(*args, **options))
    sys.exit(train_with_fault(arguments, fault))


def train_with_fault(arguments: list[str], fault: Fault | None) -> int:
    """Run the train command in a process that is used for nothing else."""
    take_step, stop_signals = trainer.train_step, trainer.stop_signals
    asked: Callable[[], bool] = bool

    @contextmanager
    def noted_stop_signals() -> Iterator[Callable[[], bool]]:
        nonlocal asked
        with stop_signals() as asked:
            yield asked

    def step(state: TrainState, *args: Any, **options: Any) -> Losses:
        if (rank(), int(state.step)) == (fault.rank, fault.step):
            os.kill(os.getpid() if fault.to == "self" else os.getppid(), fault.number)
            while fault.to == "torchrun" and not asked():
                time.sleep(0.01)
        return take_step(state, *args, **options)

    if fault is not None:
        trainer.stop_signals, trainer.train_step = noted_stop_signals, step
    return main(["train", *arguments])


if __name__ == "__main__":
    number, step, name, to, *rest = sys.argv[1:]
    started_again = os.environ["TORCHELASTIC_RESTART_COUNT"] != "0"
    sys.exit(train_with_fault(rest, None if started_again else Fault(int(number), int(step), signal.Signals[name], to)))
