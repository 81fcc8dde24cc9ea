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
from types import EllipsisType

import torch
from torch import Tensor

from allspark_fast.kernels.channel_attention.dropout import hash_keys, keep_mask
from allspark_fast.kernels.channel_attention.inputs import Inputs

# On a CPU a chunk of so many rows, 512 KB in float32, stays in the caches, and products run at their full rate.
# Backward keeps two maps of a block and takes half of the rows: that of Pascal holds 44 MB.
BLOCK_ROWS = 512
CHUNK = 256
# Exponentials and logarithms have base 2, and rows this factor: exp2 takes half of the time of exp on a CPU.
_LOG2E = math.log2(math.e)

# Where the rows of a block are in tensors (B, H, ..., Cq).
_Block = tuple[int, EllipsisType, slice]


class _Maps:
    """The operands of all maps in the accumulation dtype, and what their norm is made of: see above."""

    def __init__(self, inputs: Inputs) -> None:
        query, key, value, column_mask, self.dropout_p, seed = inputs
        (batch, heads, _, channels), columns = query.shape, key.shape[3]
        dtype = torch.promote_types(key.dtype, torch.float32)
        self.query, self.value = query.to(dtype), value.to(dtype)  # (B, H, N, Cq), (B or 1, H, N, L)
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
        self.moment = self.query @ self.query.mT / channels  # (B, H, N, N)
        self.shift = self.mean.mT @ self.query  # (B, H, 1, Cq)
        self.shift -= self.shift.mean(-1, keepdim=True)
        self.hash_keys = None if seed is None else hash_keys(seed, batch, heads, channels, columns)
        self.chunks = [slice(start, start + CHUNK) for start in range(0, columns, CHUNK)]

    def blocks(self, size: int) -> Iterator[tuple[_Block, int]]:
        """So many rows of a sample at a time, and the index of their keys."""
        for sample, start in itertools.product(range(len(self.query)), range(0, self.query.shape[3], size)):
            yield (sample, ..., slice(start, start + size)), sample % len(self.key)

    def logits(self, rows: Tensor, own: int, chunk: slice) -> Tensor:
        """Products (H, rows, chunk) of rows (H, rows, N) and the chunk's keys, masked columns at -inf."""
        key = self.key[own][..., chunk]
        return torch.bmm(rows, key) if self.bias is None else torch.baddbmm(self.bias[chunk], rows, key)

    def drop(self, x: Tensor, block: _Block, chunk: slice) -> Tensor:
        """Return x (H, rows, chunk) with zeros where dropout has them; without dropout x itself."""
        if self.hash_keys is None:
            return x
        row_key, column_key = self.hash_keys
        bits = torch.int32 if x.itemsize == 4 else torch.int64
        # On a CPU a product with the mask would first make a copy in the dtype of x.
        keep = keep_mask(row_key[block], column_key[chunk], self.dropout_p).neg_().to(bits)
        return keep.bitwise_and_(x.view(bits)).view(x.dtype)


def forward(inputs: Inputs, eps: float) -> tuple[Tensor, Tensor]:
    """softmax(InstanceNorm(queryᵀ key)) valueᵀ.

    Returns:
        the output (B, H, N, Cq) in the query's dtype, and in the accumulation dtype (2, B, H, Cq): the log-sum-exp of
        every row's normalized logits, without their constant and in units of log2, and the factor rstd of its map.
        Rows whose columns are all masked give zeros.
    """
    maps = _Maps(inputs)
    variance = (maps.moment * maps.covariance).sum((2, 3), keepdim=True) + maps.shift.square().mean(3, keepdim=True)
    # Both terms are sums of squares, but the first is formed from products that can cancel below zero.
    rstd = torch.rsqrt(variance.clamp_min(0) + eps)
    query = maps.query * (rstd * _LOG2E)
    output, lse = query.new_empty(query.shape), torch.empty_like(maps.shift)
    for block, own in maps.blocks(BLOCK_ROWS):
        rows = query[block].mT.contiguous()
        # A row without a column gives exp2(-inf - maximum) = 0.
        maximum = torch.full_like(lse[block].mT, torch.finfo(rows.dtype).min)
        total, attended = torch.zeros_like(maximum), rows.new_zeros(rows.mT.shape)
        for chunk in maps.chunks:
            logits, last = maps.logits(rows, own, chunk), maximum
            maximum = torch.maximum(last, logits.amax(-1, keepdim=True))
            scale = (last - maximum).exp2_()
            probability = logits.sub_(maximum).exp2_()
            total = probability.sum(-1, keepdim=True).addcmul_(total, scale)
            attended *= scale.mT
            attended.baddbmm_(maps.value[own][..., chunk], maps.drop(probability, block, chunk).mT)
        total.masked_fill_(total == 0, 1)
        output[block] = attended / (total * (1 - maps.dropout_p)).mT
        lse[block] = (maximum + total.log2()).mT
    return output.to(inputs.query.dtype), torch.stack([lse, rstd.expand_as(lse)]).squeeze(3)


def backward(grad: Tensor, statistics: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, given that of the output and what ``forward`` returned with it."""
    maps, (lse, rstd) = _Maps(inputs), statistics.unsqueeze(3)
    query, grad = maps.query * rstd, grad.to(lse.dtype) / (1 - maps.dropout_p)
    grad_key, grad_value = torch.zeros_like(maps.key), torch.zeros_like(maps.key)
    grad_query = query.new_empty(query.shape)
    for block, own in maps.blocks(BLOCK_ROWS // 2):
        rows, grad_rows = query[block].mT.contiguous(), grad[block].mT.contiguous()
        log2_rows = rows * _LOG2E
        entries, delta, total = [], rows.new_zeros(lse[block].mT.shape), rows.new_zeros(lse[block].mT.shape)
        for chunk in maps.chunks:
            probability = maps.logits(log2_rows, own, chunk).sub_(lse[block].mT).exp2_()
            kept = maps.drop(probability, block, chunk)
            grad_value[own][..., chunk].baddbmm_(grad_rows.mT, kept)
            product = torch.bmm(grad_rows, maps.value[own][..., chunk]).mul_(kept)
            delta += product.sum(-1, keepdim=True)
            total += probability.sum(-1, keepdim=True)
            entries.append((chunk, probability, product))
        # A row of the gradient sums to zero, however P is rounded: where one key gets it all, little else is left.
        delta /= total.masked_fill_(total == 0, 1)
        summed = rows.new_zeros(rows.mT.shape)
        for chunk, probability, product in reversed(entries):  # the last ones are still in the caches
            grad_logits = product.addcmul_(probability, delta, value=-1)
            grad_key[own][..., chunk].baddbmm_(rows.mT, grad_logits)
            summed.baddbmm_(maps.key[own][..., chunk], grad_logits.mT)
        grad_query[block] = summed
    # rstd multiplies the query, so its gradient is their product; then the derivatives of the variance.
    rstd = rstd[..., :1]
    grad_variance = -(rstd**3) / 2 * (grad_query * maps.query).sum((2, 3), keepdim=True)
    slope = 2 * grad_variance / maps.query.shape[3]
    grad_query = grad_query * rstd + slope * (maps.covariance @ maps.query + maps.mean * maps.shift)
    # Gradients of shared keys are added over the samples.
    matrix = (2 * grad_variance / maps.count * maps.moment).sum_to_size(maps.covariance.shape)
    grad_key.flatten(0, 1).baddbmm_(matrix.flatten(0, 1), maps.key.flatten(0, 1))
    grad_key += (slope / maps.count * (maps.query @ maps.shift.mT)).sum_to_size(maps.mean.shape)
    if inputs.column_mask is not None:
        grad_key.masked_fill_(~inputs.column_mask, 0)
    dtype = inputs.query.dtype
    return grad_query.to(dtype).contiguous(), grad_key.to(dtype), grad_value.to(dtype)
