"""What the forms of channel attention take, and how samples that share their keys become rows of one map."""

from typing import NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    """The arguments of the operator, as its forms take them.

    Attributes:
        query: (B, H, N, Cq), tokens first.
        key: (B, H, N, L), or (1, H, N, L) for all samples.
        value: the shape and dtype of ``key``.
        column_mask: bool (L,); columns that are False leave softmax and norm. None if all count.
        dropout_p: probability of dropping an entry of the attention map.
        seed: int64 (), from which the dropout mask is hashed; None without dropout.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    column_mask: Tensor | None
    dropout_p: float
    seed: Tensor | None


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which values of ``dtype`` are summed: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def pack_rows(x: Tensor, maps: int) -> Tensor:
    """(B, H, N, C) -> (maps, N, R): samples that share their keys are rows of one map, whose keys are read once."""
    samples = x.reshape(-1, maps, *x.shape[2:])
    return samples.permute(1, 2, 0, 3).reshape(maps, x.shape[2], -1)
