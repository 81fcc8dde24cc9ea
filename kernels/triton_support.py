"""Where the Triton kernels run. Triton itself is imported by each operator's kernel.py, and only when it is used."""

import os
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

Kernels = Literal["auto", "triton", "torch"]

_INSTALLED = find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_kernels: Kernels = "auto"


def set_kernels(kernels: Kernels) -> Kernels:
    """Set where the operators of this process use Triton; ``backend="triton"`` of an operator overrides it.

    Call it between training steps, not between a forward pass and its backward pass.

    Args:
        kernels: ``auto`` (on CUDA from sm_80), ``triton`` (also on CPU tensors, if Triton's interpreter runs the
            kernels) or ``torch`` (nowhere); another value is a ValueError.

    Returns:
        the previous value.
    """
    global _kernels
    if kernels not in ("auto", "triton", "torch"):
        raise ValueError(f"kernels must be auto, triton or torch, got {kernels!r}")
    previous, _kernels = _kernels, kernels
    return previous


def why_no_triton(device: torch.device) -> str | None:
    """Return why the Triton kernels cannot run on ``device``, or None if they can."""
    if not _INSTALLED:
        return "the package triton is not installed"
    if device.type != "cuda":
        return None if _INTERPRETED else f"the device is {device.type}, and TRITON_INTERPRET=1 is not set"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"the GPU has compute capability {major}.{minor}, the kernels need 8.0"


def prefers_triton(*tensors: Tensor) -> bool:
    """Return whether an operator on ``tensors`` should use its Triton kernels, as ``set_kernels`` has it."""
    if _kernels == "torch" or any(x.dtype not in _DTYPES for x in tensors):
        return False
    devices = {x.device for x in tensors}
    return all((_kernels == "triton" or x.type == "cuda") and why_no_triton(x) is None for x in devices)


def implementation(fallback: ModuleType, *tensors: Tensor) -> ModuleType:
    """Return the ``kernel`` module beside ``fallback`` if an operator should use it on ``tensors``, else ``fallback``.

    Operators call it inside, where tensors are real: tracing needs no device.
    """
    return import_module(f"{fallback.__package__}.kernel") if prefers_triton(*tensors) else fallback


def check_triton_runs(name: str, tensor: Tensor) -> None:
    """Check that triton is installed and has kernels for the device and dtype of the argument ``name``."""
    if not _INSTALLED:
        raise ValueError("backend 'triton' needs the package triton, which is not installed: pip install triton")
    if not (tensor.is_cuda or _INTERPRETED):
        raise ValueError(
            f"backend 'triton' needs CUDA tensors (or TRITON_INTERPRET=1 for debugging), {name} is on {tensor.device}"
        )
    if tensor.dtype not in _DTYPES:
        raise ValueError(f"backend 'triton' has no kernels for {tensor.dtype}, the dtype of {name}")
