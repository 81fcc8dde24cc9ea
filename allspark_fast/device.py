"""The device that work runs on, and how many CPUs there are for it."""

import os
from typing import Literal, get_args

import torch

from allspark_fast.errors import InputError

DeviceName = Literal["auto", "cpu", "cuda"]


def choose_device(name: DeviceName) -> torch.device:
    """Return the device of a name; ``auto`` is a GPU where there is one.

    Raises:
        InputError: the name is none of these, or ``cuda`` was requested, but no CUDA device is available.
    """
    if name not in get_args(DeviceName):
        raise InputError(f"device must be one of {', '.join(get_args(DeviceName))}, got {name!r}")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device='cuda' requested, but no CUDA device is available: use cpu or auto")
    return torch.device(name)


def available_cpus() -> int:
    """Return how many CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def limit_threads(workers: int) -> None:
    """Leave CPUs to the DataLoader workers and to the other processes of this host.

    Threads that wait for a CPU which a worker has are slower than fewer threads. OMP_NUM_THREADS, or whoever set
    torch's number, may have asked for still fewer.

    Args:
        workers: DataLoader workers of this process.
    """
    cpus = available_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(min(torch.get_num_threads(), max(1, cpus - workers)))


def use_deterministic_operations() -> None:
    """Let torch use only operations that give the same bits every time, in this process; it raises where it cannot.

    Call it before the GPU is used.
    """
    # cuBLAS: one workspace for each stream (torch's notes on reproducibility).
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
