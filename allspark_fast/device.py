"""The device that work runs on, and how many CPUs there are for it."""

import os
from typing import Literal, get_args

import torch

from allspark_fast.errors import InputError

DeviceName = Literal["auto", "cpu", "cuda"]


def choose_device(name: DeviceName) -> torch.device:
    """Return the device of a name, for ``auto`` a GPU if there is one; raises InputError if it is not available."""
    if name not in get_args(DeviceName):
        raise InputError(f"device must be one of {', '.join(get_args(DeviceName))}, got {name!r}")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device='cuda' requested, but no CUDA device is available: use cpu or auto")
    return torch.device(name)


def available_cpus() -> int:
    """Return how many CPUs this process may use."""
    # Affinity is not known on macOS and Windows.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def limit_threads(workers: int) -> None:
    """Leave CPUs to so many DataLoader workers, and to the other processes of this host; never use more threads."""
    cpus = available_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(min(torch.get_num_threads(), max(1, cpus - workers)))
