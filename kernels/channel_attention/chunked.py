"""Softmax attention in chunks of key channels, in plain torch: no (Cq, L) map exists, forward or backward.

This is the CPU path and the fallback on any device. It runs at the rate of its matrix products: two in forward,
five in backward, where the chunk of the map is computed again (FlashAttention-2, Dao 2023, alg. 1 and 2).
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from allspark_fast.kernels.channel_attention.dropout import hash_keys, keep_mask
from allspark_fast.kernels.channel_attention.similarity_norm import accumulation_dtype

# At 2048 query rows (a training step on Pascal) one float32 chunk of the map is 2 MB. In wider ones the passes over a
# chunk leave the caches, above all with few tokens; in narrower ones the products do less at a time.
CHUNK = 256

# Exponentials and logarithms have base 2, and rows this factor: exp2 takes half of the time of exp on a CPU.
_LOG2E = math.log2(math.e)


def _rows_first(x: Tensor, shared_key: bool) -> Tensor:
    """(B, H, N, Cq) -> (maps, rows, N); samples that share a key are rows of one map: its keys are read once."""
    batch, heads, tokens, channels = x.shape
    if shared_key:
        return x.permute(1, 0, 3, 2).reshape(heads, batch * channels, tokens)
    return x.permute(0, 1, 3, 2).reshape(batch * heads, channels, tokens)


def _samples_first(x: Tensor, query_shape: torch.Size, shared_key: bool) -> Tensor:
    """(maps, N or 1, rows) -> (B, H, N or 1, Cq)."""
    batch, heads, _, channels = query_shape
    if shared_key:
        return x.view(heads, x.shape[1], batch, channels).permute(2, 0, 1, 3).contiguous()
    return x.view(batch, heads, x.shape[1], channels)


class _Chunks:
    """The chunks of key and value, and what the columns of each bring to softmax and dropout."""

    def __init__(
        self,
        key: Tensor,
        value: Tensor,
        key_mean: Tensor,
        query_shape: torch.Size,
        column_mask: Tensor | None,
        dropout_p: float,
        seed: Tensor | None,
    ) -> None:
        batch, heads, _, channels = query_shape
        columns = key.shape[-1]
        self.key = key.flatten(0, 1)
        self.value = value.flatten(0, 1)
        self.key_mean = key_mean.flatten(0, 1)
        self.dtype = accumulation_dtype(key.dtype)
        self.bias = self.key_mean.new_zeros(columns)
        if column_mask is not None:
            self.bias.masked_fill_(~column_mask, -torch.inf)
        self.dropout_p = dropout_p
        if dropout_p > 0:
            assert seed is not None
            row_key, self.column_key = hash_keys(seed, batch, heads, channels, columns)
            self.row_key = _rows_first(row_key[:, :, None], key.shape[0] == 1)[..., 0]

    def __iter__(self) -> Iterator[slice]:
        columns = self.key.shape[-1]
        return (slice(start, min(start + CHUNK, columns)) for start in range(0, columns, CHUNK))

    def keys(self, chunk: slice) -> Tensor:
        return self.key[..., chunk] - self.key_mean

    def values(self, chunk: slice) -> Tensor:
        return self.value[..., chunk].to(self.dtype)

    def logits(self, rows: Tensor, chunk: slice) -> Tensor:
        """Products (maps, rows, chunk) of rows (maps, rows, N) and the chunk's keys, masked columns at -inf."""
        return torch.baddbmm(self.bias[chunk], rows, self.keys(chunk))

    def dropout(self, chunk: slice) -> Tensor | None:
        """The mask (maps, rows, chunk), or None without dropout."""
        if self.dropout_p == 0:
            return None
        return keep_mask(self.row_key, self.column_key[chunk], self.dropout_p)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: Tensor,
    key_mean: Tensor,
    column_mask: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale · queryᵀ key) valueᵀ by an online softmax over chunks.

    Args:
        query: (B, H, N, Cq) in the accumulation dtype.
        key: (B or 1, H, N, L).
        value: (B or 1, H, N, L), the key's dtype.
        scale: (B, H, 1, 1) in the accumulation dtype.
        key_mean: (B or 1, H, N, 1) in the accumulation dtype, subtracted from the key: softmax ignores it, rounding
            does not.
        column_mask: bool (L,) or None.
        dropout_p: dropout of the attention map.
        seed: int64 (), needed if ``dropout_p`` > 0.

    Returns:
        the output (B, H, N, Cq) in the key's dtype, and the log-sum-exp of every row, (B, H, 1, Cq) in the
        accumulation dtype. Rows whose columns are all masked give zeros and -inf.
    """
    shared_key = key.shape[0] == 1
    chunks = _Chunks(key, value, key_mean, query.shape, column_mask, dropout_p, seed)
    rows = _rows_first(query * scale * _LOG2E, shared_key)
    output = torch.zeros_like(rows.mT, memory_format=torch.contiguous_format)
    total = rows.new_zeros((*rows.shape[:2], 1))
    # Finite, so that rows with no column yet (all masked) give exp2(-inf - max) = 0 rather than NaN.
    maximum = torch.full_like(total, torch.finfo(chunks.dtype).min)
    for chunk in chunks:
        probability = chunks.logits(rows, chunk)
        new_maximum = torch.maximum(maximum, probability.amax(-1, keepdim=True))
        rescale = torch.exp2(maximum - new_maximum)
        probability.sub_(new_maximum).exp2_()
        total = total * rescale + probability.sum(-1, keepdim=True)
        keep = chunks.dropout(chunk)
        if keep is not None:
            probability *= keep
        output.mul_(rescale.mT).baddbmm_(chunks.values(chunk), probability.mT)
        maximum = new_maximum
    lse = (maximum + total.log2()) / _LOG2E
    output /= (total * (1 - dropout_p)).masked_fill_(total == 0, 1).mT
    return (
        _samples_first(output.to(key.dtype), query.shape, shared_key),
        _samples_first(lse.mT, query.shape, shared_key),
    )


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: Tensor,
    key_mean: Tensor,
    output: Tensor,
    lse: Tensor,
    column_mask: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``forward`` with respect to query, key, value and scale.

    Args:
        grad: gradient of the output, (B, H, N, Cq).
        query: as in ``forward``.
        key: as in ``forward``.
        value: as in ``forward``.
        scale: as in ``forward``.
        key_mean: as in ``forward``.
        output: what ``forward`` returned.
        lse: what ``forward`` returned.
        column_mask: as in ``forward``.
        dropout_p: as in ``forward``.
        seed: as in ``forward``.

    Returns:
        gradients in the shapes and dtypes of query, key, value and scale.
    """
    shared_key = key.shape[0] == 1
    chunks = _Chunks(key, value, key_mean, query.shape, column_mask, dropout_p, seed)
    rows = _rows_first(query * scale, shared_key)
    grad_output = _rows_first(grad, shared_key).to(chunks.dtype)
    # Row sums of P * dP, with or without dropout (FlashAttention-2, sec. 3.1).
    delta = (grad_output * _rows_first(output, shared_key)).sum(-1, keepdim=True)
    grad_output = grad_output / (1 - dropout_p)
    rows_2, lse_2 = rows * _LOG2E, _rows_first(lse, shared_key) * _LOG2E
    lse_2 = lse_2.masked_fill(lse_2.isneginf(), 0)
    grad_rows = torch.zeros_like(rows.mT, memory_format=torch.contiguous_format)
    grad_key, grad_value = torch.empty_like(chunks.key), torch.empty_like(chunks.value)
    for chunk in chunks:
        probability = chunks.logits(rows_2, chunk).sub_(lse_2).exp2_()
        keep = chunks.dropout(chunk)
        kept = probability if keep is None else probability * keep
        grad_value[..., chunk] = grad_output.mT @ kept
        grad_logits = (grad_output @ chunks.values(chunk)).mul_(kept).addcmul_(probability, delta, value=-1)
        grad_key[..., chunk] = rows.mT @ grad_logits
        grad_rows.baddbmm_(chunks.keys(chunk), grad_logits.mT)
    grad_scaled = _samples_first(grad_rows, query.shape, shared_key)
    grad_scale = (grad_scaled * query).sum((-2, -1), keepdim=True)
    return grad_scaled * scale, grad_key.view(key.shape), grad_value.view(value.shape), grad_scale
