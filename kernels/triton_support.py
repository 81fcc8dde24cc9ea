"""Where the Triton kernels run. Triton itself is imported by each operator's kernel.py, and only when it is used."""

import importlib.util
import os

import torch
from torch import Tensor

_INSTALLED = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def prefers_triton(tensor: Tensor) -> bool:
    """Whether the Triton kernels are the best choice for ``tensor``: half or single precision on CUDA from sm_80."""
    if not (_INSTALLED and tensor.is_cuda and tensor.dtype in _DTYPES):
        return False
    return torch.cuda.get_device_capability(tensor.device) >= (8, 0)


def check_triton_runs(name: str, tensor: Tensor) -> None:
    """Check that the Triton kernels can run on ``tensor`` at all.

    Args:
        name: the argument's name, for the message.
        tensor: the argument.

    Raises:
        ValueError: triton is not installed, or ``tensor`` has a device or dtype that the kernels do not take.
    """
    if not _INSTALLED:
        raise ValueError("backend 'triton' needs the package triton, which is not installed: pip install triton")
    if not (tensor.is_cuda or _INTERPRETED):
        raise ValueError(
            f"backend 'triton' needs CUDA tensors (or TRITON_INTERPRET=1 for debugging), {name} is on {tensor.device}"
        )
    if tensor.dtype not in _DTYPES:
        raise ValueError(f"backend 'triton' has no kernels for {tensor.dtype}, the dtype of {name}")
