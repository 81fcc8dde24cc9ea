"""Channel attention in plain torch, some rows of the map at a time: no (Cq, L) map exists, forward or backward.

This is the CPU path and the fallback on any device. It runs at the rate of its matrix products: two in forward, five in
backward, where the rows are computed again. A block of whole rows is made in chunks of columns that stay in the caches.
Softmax needs the variance of the whole map first, for which the rows would have to be computed once more. So here it is
taken of N x N matrices: with q and k the channels of query and key, k̄ the mean of the latter and Σ their covariance,

    var(S) = <E[q qᵀ], Σ> + var(q · k̄)  (E and var over channels)
"""

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from allspark_fast.kernels.channel_attention.dropout import hash_keys, keep_mask
from allspark_fast.kernels.channel_attention.inputs import Inputs

# On a CPU a chunk of so many rows, 512 KB in float32, stays in the caches, and products run at their full rate.
# Backward keeps two maps of a block and takes half of the rows: that of Pascal holds 44 MB in both directions.
BLOCK_ROWS = 512
CHUNK = 256
# Exponentials and logarithms have base 2, and rows this factor: exp2 takes half of the time of exp on a CPU.
_LOG2E = math.log2(math.e)


class _Maps:
    """The operands of all maps in the accumulation dtype, and what their norm is made of: see above."""

    def __init__(self, inputs: Inputs) -> None:
        query, key, value, column_mask, self.dropout_p, seed = inputs
        (batch, heads, _, channels), columns = query.shape, key.shape[3]
        dtype = torch.promote_types(key.dtype, torch.float32)
        self.query, self.value = query.mT.to(dtype).contiguous(), value.to(dtype)  # (B, H, Cq, N), (B or 1, H, N, L)
        # (B or 1, H, N, L), contiguous: its gradient is laid out alike, and added to in flattened views.
        self.key = key.to(dtype, copy=True, memory_format=torch.contiguous_format)
        self.bias: Tensor | None = None  # (L,)
        self.count: Tensor | int = columns  # a tensor if there is a mask, so that nothing waits for the device
        if column_mask is not None:
            self.bias = self.value.new_zeros(columns).masked_fill_(~column_mask, -torch.inf)
            self.count = column_mask.sum().clamp(min=1)
            self.key.masked_fill_(~column_mask, 0)
        self.mean = self.key.sum(-1, keepdim=True) / self.count  # (B or 1, H, N, 1)
        self.key -= self.mean
        if column_mask is not None:
            self.key.masked_fill_(~column_mask, 0)
        self.covariance = self.key @ self.key.mT / self.count  # (B or 1, H, N, N)
        self.moment = self.query.mT @ self.query / channels  # (B, H, N, N)
        self.shift = self.query @ self.mean  # (B, H, Cq, 1)
        self.shift -= self.shift.mean(2, keepdim=True)
        self.hash_keys = None if seed is None else hash_keys(seed, batch, heads, channels, columns)
        self.chunks = [slice(start, start + CHUNK) for start in range(0, columns, CHUNK)]

    def blocks(self, size: int) -> Iterator[tuple[tuple[int, slice, slice], int]]:
        """So many rows of a sample at a time, as an index of (B, H, Cq), and the index of their keys."""
        samples, _, rows, _ = self.query.shape
        for sample, start in itertools.product(range(samples), range(0, rows, size)):
            yield (sample, slice(None), slice(start, start + size)), sample % len(self.key)

    def logits(self, rows: Tensor, own: int, chunk: slice) -> Tensor:
        """Products (H, rows, chunk) of rows (H, rows, N) and the chunk's keys, masked columns at -inf."""
        key = self.key[own][..., chunk]
        return torch.bmm(rows, key) if self.bias is None else torch.baddbmm(self.bias[chunk], rows, key)

    def drop(self, x: Tensor, block: tuple[int, slice, slice], chunk: slice) -> Tensor:
        """Return x (H, rows, chunk) with zeros where dropout has them; without dropout x itself."""
        if self.hash_keys is None:
            return x
        row_key, column_key = self.hash_keys
        return x * keep_mask(row_key[block], column_key[chunk], self.dropout_p)


def forward(inputs: Inputs, eps: float) -> tuple[Tensor, Tensor]:
    """softmax(InstanceNorm(queryᵀ key)) valueᵀ.

    Returns:
        the output (B, H, N, Cq) in the query's dtype, and in the accumulation dtype (2, B, H, Cq): the log-sum-exp of
        every row's normalized logits, without their constant and in units of log2, and the factor rstd of its map.
        Rows whose columns are all masked give zeros.
    """
    maps = _Maps(inputs)
    variance = (maps.moment * maps.covariance).sum((2, 3), keepdim=True) + maps.shift.square().mean(2, keepdim=True)
    # Both terms are sums of squares, but the first is formed from products that can cancel below zero.
    rstd = torch.rsqrt(variance.clamp_min(0) + eps)
    rows = maps.query * (rstd * _LOG2E)
    output, lse = torch.zeros_like(rows), torch.empty_like(maps.shift)
    for block, own in maps.blocks(BLOCK_ROWS):
        logits = [maps.logits(rows[block], own, chunk) for chunk in maps.chunks]
        maximum = torch.stack([x.amax(-1) for x in logits]).amax(0)[..., None]
        maximum.clamp_(min=torch.finfo(rows.dtype).min)  # so that a row without a column gives exp2(-inf - max) = 0
        total = torch.zeros_like(maximum)
        for chunk, x in zip(maps.chunks, logits, strict=True):
            probability = x.sub_(maximum).exp2_()
            total += probability.sum(-1, keepdim=True)
            output[block].baddbmm_(maps.drop(probability, block, chunk), maps.value[own][..., chunk].mT)
        total.masked_fill_(total == 0, 1)
        output[block] /= total * (1 - maps.dropout_p)
        lse[block] = maximum + total.log2()
    statistics = torch.cat([lse, rstd.expand_as(lse)], 3)
    return output.mT.to(inputs.query.dtype).contiguous(), statistics.permute(3, 0, 1, 2).contiguous()


def backward(grad: Tensor, statistics: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, given that of the output and what ``forward`` returned with it."""
    maps, (lse, rstd) = _Maps(inputs), statistics[..., None]
    rows, grad_output = maps.query * rstd, grad.mT.to(lse.dtype) / (1 - maps.dropout_p)
    grad_rows, grad_key, grad_value = (torch.zeros_like(x) for x in (rows, maps.key, maps.key))
    for block, own in maps.blocks(BLOCK_ROWS // 2):
        log2_rows, entries = rows[block] * _LOG2E, []
        delta, total = torch.zeros_like(lse[block]), torch.zeros_like(lse[block])
        for chunk in maps.chunks:
            probability = maps.logits(log2_rows, own, chunk).sub_(lse[block]).exp2_()
            kept = maps.drop(probability, block, chunk)
            grad_value[own][..., chunk].baddbmm_(grad_output[block].mT, kept)
            product = torch.bmm(grad_output[block], maps.value[own][..., chunk]).mul_(kept)
            delta += product.sum(-1, keepdim=True)
            total += probability.sum(-1, keepdim=True)
            entries.append((chunk, probability, product))
        # A row of the gradient sums to zero, however P is rounded: where one key gets it all, little else is left.
        delta /= total.masked_fill_(total == 0, 1)
        for chunk, probability, product in reversed(entries):  # the last ones are still in the caches
            grad_logits = product.addcmul_(probability, delta, value=-1)
            grad_key[own][..., chunk].baddbmm_(rows[block].mT, grad_logits)
            grad_rows[block].baddbmm_(grad_logits, maps.key[own][..., chunk].mT)
    # rstd multiplies the query, so its gradient is their product; then the derivatives of the variance.
    rstd = rstd[:, :, :1]
    grad_variance = -(rstd**3) / 2 * (grad_rows * maps.query).sum((2, 3), keepdim=True)
    slope = 2 * grad_variance / maps.query.shape[2]
    grad_query = grad_rows * rstd + slope * (maps.query @ maps.covariance + maps.shift * maps.mean.mT)
    # Gradients of shared keys are added over the samples.
    matrix = (2 * grad_variance / maps.count * maps.moment).sum_to_size(maps.covariance.shape)
    grad_key.flatten(0, 1).baddbmm_(matrix.flatten(0, 1), maps.key.flatten(0, 1))
    grad_key += (slope / maps.count * (maps.query.mT @ maps.shift)).sum_to_size(maps.mean.shape)
    if inputs.column_mask is not None:
        grad_key.masked_fill_(~inputs.column_mask, 0)
    dtype = inputs.query.dtype
    return grad_query.mT.to(dtype).contiguous(), grad_key.to(dtype), grad_value.to(dtype)
