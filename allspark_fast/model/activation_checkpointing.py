"""Activations that backward computes again instead of keeping them (activation checkpointing, Chen et al. 2016)."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch.utils.checkpoint import checkpoint

T = TypeVar("T")


def recompute(function: Callable[..., T], *arguments: object, random: bool = False) -> T:
    """Call a function and keep only its arguments for backward, which calls it again as far as it needs to.

    Args:
        function: may not change anything but its own tensors.
        arguments: what it is called with.
        random: whether it draws random numbers, which then have to be the same again.
    """
    if not torch.is_grad_enabled():  # checkpoint would take its time even so
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=random)
