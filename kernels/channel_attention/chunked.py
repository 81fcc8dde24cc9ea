"""Channel attention in plain torch, a block of rows of the map at a time: no (Cq, L) map exists, forward or backward.

This is the CPU path and the fallback on any device. It runs at the rate of its matrix products: two in forward, five in
backward, where a block of the map is computed again. A softmax cannot start before the norm's factor is known, and that
is one number of the whole map; a product more for it would cost as much time as the output. So here the norm is taken
of N x N matrices:

    InstanceNorm(S) = rstd S + constant,    var(S) = <Σq + q̄q̄ᵀ, Σk> + k̄ᵀ Σq k̄

with means q̄, k̄ over channels and covariances Σq, Σk (N, N).
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from allspark_fast.kernels.channel_attention.dropout import hash_keys, keep_mask

# Entries of a block of rows, unless its rows would be fewer than MIN_ROWS: of all maps together.
BLOCK_ENTRIES = 3 << 19
MIN_ROWS = 32
# Exponentials and logarithms have base 2, and rows this factor: exp2 takes half of the time of exp on a CPU.
_LOG2E = math.log2(math.e)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of ``dtype`` are summed: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Keys(NamedTuple):
    """Keys and values in the accumulation dtype.

    Attributes:
        centered: (maps, N, L), without their mean, and zero at masked columns.
        mean: (maps, N, 1), of the columns that count.
        count: how many these are, at least 1; a tensor if there is a mask, so that nothing waits for the device.
        value: (maps, N, L).
        bias: (L,), -inf at masked columns.
    """

    centered: Tensor
    mean: Tensor
    count: Tensor | int
    value: Tensor
    bias: Tensor

    def covariance(self) -> Tensor:
        """Of tokens over columns, (maps, N, N)."""
        return self.centered @ self.centered.mT / self.count


def _prepare(key: Tensor, value: Tensor, column_mask: Tensor | None) -> _Keys:
    dtype = accumulation_dtype(key.dtype)
    value = value.flatten(0, 1).to(dtype)
    centered = key.flatten(0, 1).to(dtype, copy=True)
    bias = value.new_zeros(key.shape[-1])
    count: Tensor | int = key.shape[-1]
    if column_mask is not None:
        bias.masked_fill_(~column_mask, -torch.inf)
        count = column_mask.sum().clamp(min=1)
        centered.masked_fill_(~column_mask, 0)
    mean = centered.sum(-1, keepdim=True) / count
    centered -= mean
    if column_mask is not None:
        centered.masked_fill_(~column_mask, 0)
    return _Keys(centered, mean, count, value, bias)


class _Query(NamedTuple):
    """The query in the accumulation dtype, and its statistics.

    Attributes:
        query: (B, H, N, Cq).
        mean: (B, H, N, 1).
        second_moment: (B, H, N, N), mean of the products of two tokens.
    """

    query: Tensor
    mean: Tensor
    second_moment: Tensor

    def times_covariance(self, x: Tensor) -> Tensor:
        """The covariance of tokens over channels, times x (B or 1, H, N, 1)."""
        return self.second_moment @ x - self.mean * (self.mean * x).sum(2, keepdim=True)


def _query(query: Tensor) -> _Query:
    query = query.to(accumulation_dtype(query.dtype))
    mean = query.mean(-1, keepdim=True)
    centered = query - mean
    covariance = centered @ centered.mT / query.shape[3]
    return _Query(query, mean, covariance + mean @ mean.mT)


def _rows_first(x: Tensor, maps: int) -> Tensor:
    """(B, H, N, C) -> (maps, rows, N); samples that share a key are rows of one map: its keys are read once."""
    return x.permute(1, 0, 3, 2).reshape(maps, -1, x.shape[2]) if maps == x.shape[1] else x.mT.flatten(0, 1)


def _samples_first(x: Tensor, shape: torch.Size) -> Tensor:
    """(maps, rows, N) -> (B, H, N, C)."""
    batch, heads, tokens, channels = shape
    if len(x) == heads:
        return x.view(heads, batch, channels, tokens).permute(1, 0, 3, 2).contiguous()
    return x.view(batch, heads, channels, tokens).mT.contiguous()


class _Blocks:
    """Blocks of rows, and what dropout keeps of them."""

    def __init__(self, shape: torch.Size, maps: int, columns: int, dropout_p: float, seed: Tensor | None) -> None:
        batch, heads, _, channels = shape
        self.rows = batch * heads * channels // maps
        self.step = max(MIN_ROWS, BLOCK_ENTRIES // (maps * columns))
        self.dropout_p = dropout_p
        if dropout_p > 0:
            assert seed is not None
            row_key, self.column_key = hash_keys(seed, batch, heads, channels, columns)
            self.row_key = _rows_first(row_key[:, :, None], maps)[..., 0]

    def __iter__(self) -> Iterator[slice]:
        return (slice(start, min(start + self.step, self.rows)) for start in range(0, self.rows, self.step))

    def keep(self, block: slice) -> Tensor | int:
        """The mask (maps, rows of the block, L)."""
        return 1 if self.dropout_p == 0 else keep_mask(self.row_key[:, block], self.column_key, self.dropout_p)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    column_mask: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """softmax(InstanceNorm(queryᵀ key)) valueᵀ.

    Args:
        query: (B, H, N, Cq).
        key: (B or 1, H, N, L).
        value: (B or 1, H, N, L).
        column_mask: bool (L,) or None.
        eps: of the norm.
        dropout_p: dropout of the attention map.
        seed: int64 (), needed if ``dropout_p`` > 0.

    Returns:
        the output (B, H, N, Cq) in the query's dtype, and in the accumulation dtype (2, B, H, Cq): for every row the
        log-sum-exp of its normalized logits, without their constant and in units of log2, and the factor rstd of its
        map. Rows whose columns are all masked give zeros.
    """
    keys, samples = _prepare(key, value, column_mask), _query(query)
    maps, _, columns = keys.centered.shape
    batch_first = key.shape[:2]
    key_mean = keys.mean.unflatten(0, batch_first)
    variance = (samples.second_moment * keys.covariance().unflatten(0, batch_first)).sum((-2, -1), keepdim=True)
    variance = variance + (key_mean * samples.times_covariance(key_mean)).sum(2, keepdim=True)
    # Both terms are sums of squares, but the first is formed from products that can cancel below zero.
    rstd = torch.rsqrt(variance.clamp_min(0) + eps)
    blocks = _Blocks(query.shape, maps, columns, dropout_p, seed)
    rows = _rows_first(samples.query * (rstd * _LOG2E), maps)
    output, lse = torch.empty_like(rows), rows.new_empty((maps, blocks.rows, 1))
    for block in blocks:
        probability = torch.baddbmm(keys.bias, rows[:, block], keys.centered)
        # Finite, so that rows without a column give exp2(-inf - max) = 0 rather than NaN.
        maximum = probability.amax(-1, keepdim=True).clamp_(min=torch.finfo(rows.dtype).min)
        probability.sub_(maximum).exp2_()
        total = probability.sum(-1, keepdim=True)
        probability *= blocks.keep(block)
        divisor = total.masked_fill(total == 0, 1)
        output[:, block] = (probability @ keys.value.mT).div_(divisor * (1 - dropout_p))
        lse[:, block] = maximum + divisor.log2_()
    lse = _samples_first(lse, torch.Size((*query.shape[:2], 1, query.shape[3])))
    return _samples_first(output, query.shape).to(query.dtype), torch.stack([lse, rstd.expand_as(lse)])[:, :, :, 0]


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    statistics: Tensor,
    column_mask: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``forward`` with respect to query, key and value.

    Args:
        grad: gradient of the output, (B, H, N, Cq).
        query: as in ``forward``.
        key: as in ``forward``.
        value: as in ``forward``.
        statistics: what ``forward`` returned beside the output.
        column_mask: as in ``forward``.
        dropout_p: as in ``forward``.
        seed: as in ``forward``.

    Returns:
        gradients in the shapes and dtypes of query, key and value.
    """
    keys, samples = _prepare(key, value, column_mask), _query(query)
    maps, _, columns = keys.centered.shape
    blocks = _Blocks(query.shape, maps, columns, dropout_p, seed)
    lse = _rows_first(statistics[0][:, :, None], maps)
    rstd = statistics[1, :, :, None, :1]
    rows = _rows_first(samples.query * rstd, maps)
    grad_output = _rows_first(grad, maps).to(rows.dtype) / (1 - dropout_p)
    grad_rows = torch.empty_like(rows)
    grad_key, grad_value = torch.zeros_like(keys.centered), torch.zeros_like(keys.centered)
    for block in blocks:
        probability = torch.baddbmm(keys.bias, rows[:, block] * _LOG2E, keys.centered).sub_(lse[:, block]).exp2_()
        kept = probability * blocks.keep(block)
        grad_value.baddbmm_(grad_output[:, block].mT, kept)
        grad_logits = torch.bmm(grad_output[:, block], keys.value).mul_(kept)
        del kept
        # Of these very numbers: what dO · O rounds would not cancel where a row attends to one key.
        delta = grad_logits.sum(-1, keepdim=True)
        grad_logits.addcmul_(probability, delta, value=-1)
        grad_key.baddbmm_(rows[:, block].mT, grad_logits)
        grad_rows[:, block] = grad_logits @ keys.centered.mT
    grad_query = _samples_first(grad_rows, query.shape)
    # rstd multiplies the query, so its gradient is their product. The rest are derivatives of the variance.
    grad_variance = -(rstd**3) / 2 * (grad_query * samples.query).sum((-2, -1), keepdim=True)
    batch_first = key.shape[:2]
    key_mean = keys.mean.unflatten(0, batch_first)
    shift = (key_mean * (samples.query - samples.mean)).sum(2, keepdim=True)
    covariance = keys.covariance().unflatten(0, batch_first)
    grad_query *= rstd
    grad_query += 2 * grad_variance / query.shape[3] * (covariance @ samples.query + key_mean * shift)
    factor = 2 * grad_variance / keys.count
    matrix, offset = factor * samples.second_moment, factor * samples.times_covariance(key_mean)
    # Samples that share their keys are added.
    matrix, offset = (x.view(-1, maps, *x.shape[2:]).sum(0) for x in (matrix, offset))
    grad_key.baddbmm_(matrix, keys.centered).add_(offset)
    if column_mask is not None:
        grad_key.masked_fill_(~column_mask, 0)
    return (
        grad_query.to(query.dtype),
        grad_key.view(key.shape).to(key.dtype),
        grad_value.view(value.shape).to(value.dtype),
    )
