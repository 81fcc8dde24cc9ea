"""Bytes that autograd keeps for backward."""

from collections.abc import Callable

import torch
from torch import Tensor


def saved_bytes(forward: Callable[[], Tensor]) -> int:
    """Bytes of all distinct storages that ``forward`` saves for backward."""
    storages: dict[int, int] = {}
    kept = []  # a freed storage could give its address to another

    def pack(x: Tensor) -> Tensor:
        kept.append(x)
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        forward()
    return sum(storages.values())
