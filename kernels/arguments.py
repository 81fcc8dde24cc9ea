"""Checks of operator arguments: every message names the argument, its value and what was expected.

What is not of the right kind (no tensor, no number, another dtype) is a TypeError; a wrong value, shape, layout or
device is a ValueError.
"""

from collections.abc import Collection
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(
    name: str,
    value: object,
    layout: str,
    dtypes: Collection[torch.dtype],
    like: Tensor | None = None,
    sizes: dict[str, int] | None = None,
    not_empty: str = "",
) -> None:
    """Check for a dense tensor of a shape such as "(B, 3, H, W)", of one of ``dtypes``, and on the device of ``like``.

    ``sizes`` are those of axes by name, for the check of several tensors: what it does not hold yet is added to it.
    Of the axes named in ``not_empty``, separated by spaces, none may be 0.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {layout}, got {type(value).__name__}")
    if value.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must have dtype {names}, got {str(value.dtype).removeprefix('torch.')}")
    axes, sizes = [axis.strip() for axis in layout.strip("()").split(",") if axis], {} if sizes is None else sizes
    if value.ndim != len(axes):
        raise ValueError(f"{name} must have shape {layout}, got {tuple(value.shape)}")
    if value.layout != torch.strided:
        raise ValueError(f"{name} has layout {value.layout}, expected a dense tensor: to_dense() makes one")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name} is on {value.device}, expected {like.device} like the other arguments")
    for axis, side in zip(axes, value.shape, strict=True):
        sizes.setdefault(axis, int(axis) if axis.isdigit() else side)
    expected = tuple(sizes[axis] for axis in axes)
    if tuple(value.shape) != expected:
        raise ValueError(f"{name} must have shape {layout} = {expected}, got {tuple(value.shape)}")
    for axis in not_empty.split():
        if sizes[axis] == 0:
            raise ValueError(f"{name} has {axis} = 0 in shape {expected}, expected at least 1")


def check_number(name: str, value: object) -> None:
    """Check that ``value`` is a number of Python or NumPy, or symbolic in a traced graph."""
    if not isinstance(value, (Real, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be a number, got {value!r}")


def check_integer(name: str, value: object) -> None:
    """Check that ``value`` is an integer that fits in int64, of Python or NumPy, or symbolic in a traced graph."""
    if not isinstance(value, (Integral, torch.SymInt)):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if isinstance(value, Integral) and not -(2**63) <= int(value) < 2**63:
        raise ValueError(f"{name} must be in [-2^63, 2^63), got {value}")


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Check that ``value`` is an integer of at least ``least``."""
    check_integer(name, value)
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_size(name: str, value: object) -> None:
    """Check that ``value`` is a pair (H, W) of integers of at least 1."""
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name} must be a pair (H, W), got {value!r}")
    if len(value) != 2:
        raise ValueError(f"{name} must be a pair (H, W), got {value}")
    for axis, side in zip("HW", value, strict=True):
        check_count(f"{axis} of {name}", side)


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Check that ``value`` is one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
