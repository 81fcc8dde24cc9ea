"""Activation checkpointing: recompute activations in backward instead of keeping them (Chen et al. 2016)."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch.utils.checkpoint import checkpoint

T = TypeVar("T")


def checkpointed(function: Callable[..., T], *arguments: object, preserve_rng_state: bool = False) -> T:
    """Return ``function(*arguments)``, computed again in backward; ``preserve_rng_state``: whether it draws numbers."""
    if not torch.is_grad_enabled():  # checkpoint has a cost even without gradients
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=preserve_rng_state)
