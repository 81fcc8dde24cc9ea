"""Runs a function on several gloo ranks."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_on_ranks(work: Callable[[], Any], ranks: int, folder: Path) -> list[Any]:
    """Call a picklable function on every rank and return what each call returned."""
    # Ranks are forked from a process that has done nothing but import: that takes seconds, and they the most of a test.
    multiprocessing.set_forkserver_preload(["allspark_fast.training.trainer", "tests.training.test_distributed"])
    mp.start_processes(_run_on_rank, (work, ranks, folder), nprocs=ranks, start_method="forkserver")
    return [torch.load(folder / f"{index}.pt", weights_only=False) for index in range(ranks)]


def _run_on_rank(index: int, work: Callable[[], Any], ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=index, world_size=ranks)
    torch.save(work(), folder / f"{index}.pt")
    dist.destroy_process_group()
