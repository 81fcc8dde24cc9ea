"""The device that work runs on."""

import os
from typing import Literal, get_args

import torch

from allspark_fast.kernels.arguments import check_choice

DeviceName = Literal["auto", "cpu", "cuda"]


def choose_device(name: DeviceName) -> torch.device:
    """The device of a name; ``auto`` is a GPU where there is one.

    Raises:
        ValueError: the name is none of these, or there is no GPU, but ``cuda`` was asked for.
    """
    check_choice("device", name, get_args(DeviceName))
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("the device is to be cuda, but no GPU is there: use cpu or auto")
    return torch.device(name)


def use_deterministic_operations() -> None:
    """Let torch use only operations that give the same bits every time, in this process; it raises where it cannot.

    Call it before the GPU is used.
    """
    # cuBLAS: one workspace for each stream (torch's notes on reproducibility).
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
