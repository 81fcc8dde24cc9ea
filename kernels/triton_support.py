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


def why_no_triton(device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Return why the Triton kernels cannot run, or None if they can."""
    if not _INSTALLED:
        return "the package triton is not installed: pip install triton"
    if dtype not in _DTYPES:
        return f"there are no kernels for {dtype}"
    if device.type != "cuda":
        return None if _INTERPRETED else f"the device is {device.type}, and TRITON_INTERPRET=1 is not set"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"the GPU has compute capability {major}.{minor}, the kernels need 8.0"


def implementation(fallback: ModuleType, *tensors: Tensor, backend: str = "auto") -> ModuleType:
    """Return the ``kernel`` module beside ``fallback`` if an operator should use it on ``tensors``, else ``fallback``.

    With ``backend`` auto, ``set_kernels`` decides; triton is a ValueError if it cannot run; any other is ``fallback``.
    Operators call it inside, where tensors are real: tracing needs no device.
    """
    wanted = {"auto": _kernels, "triton": "triton"}.get(backend, "torch")
    if wanted == "torch" or (wanted == "auto" and not all(x.is_cuda for x in tensors)):
        return fallback
    reason = next((why for x in tensors if (why := why_no_triton(x.device, x.dtype))), None)
    if reason is None:
        return import_module(f"{fallback.__package__}.kernel")
    if backend == "triton":
        raise ValueError(f"backend 'triton' cannot run: {reason}")
    return fallback
