"""Where the Triton kernels run. Triton itself is imported by each operator's kernel.py, and only when it is used."""

import importlib.util
import os

import torch
from torch import Tensor

_INSTALLED = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


# Operators with Triton kernels, and those that must do without in this process.
TRITON_OPS = (
    "channel_attention",
    "channel_semantic_grouping",
    "semantic_memory_enqueue",
    "upsample_cross_entropy",
    "upsample_argmax",
    "depthwise_gelu",
)
_disabled: set[str] = set()


def disable_triton(op: str) -> None:
    """Let an operator use plain torch in this process, but where ``backend="triton"`` is asked for.

    Call it before training, not between a forward pass and its backward pass.

    Args:
        op: a name in ``TRITON_OPS``.

    Raises:
        ValueError: ``op`` has no Triton kernels.
    """
    if op not in TRITON_OPS:
        raise ValueError(f"{op!r} has no Triton kernels; {', '.join(TRITON_OPS)} have")
    _disabled.add(op)


def why_no_triton(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on ``device``, or None if they can."""
    if not _INSTALLED:
        return "the package triton is not installed"
    if device.type != "cuda":
        return None if _INTERPRETED else f"the device is {device.type}, and TRITON_INTERPRET=1 is not set"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"the GPU has compute capability {major}.{minor}, the kernels need 8.0"


def is_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels."""
    return _INTERPRETED


def prefers_triton(op: str, tensor: Tensor) -> bool:
    """Whether the Triton kernels of an operator are the best choice for ``tensor``.

    They are for half or single precision on CUDA from sm_80, unless ``disable_triton`` was called.
    """
    return op not in _disabled and tensor.dtype in _DTYPES and _is_fast_on(tensor.device)


def _is_fast_on(device: torch.device) -> bool:
    return device.type == "cuda" and why_no_triton(device) is None


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
