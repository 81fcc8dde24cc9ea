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

    def samples(self, which: slice) -> "Inputs":
        """Return the arguments for some of the samples."""
        own = slice(None) if self.key.shape[0] == 1 else which
        return self._replace(query=self.query[which], key=self.key[own], value=self.value[own])


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which values of ``dtype`` are summed: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
