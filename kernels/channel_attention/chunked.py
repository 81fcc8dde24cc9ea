"""Channel attention in plain torch, some rows of the map at a time: no (Cq, L) map exists, forward or backward.

This is the CPU path and the fallback on any device. It runs at the rate of its matrix products: two in forward, five in
backward, where the rows are computed again. A block of whole rows is made in chunks of columns that stay in the caches.
Softmax needs the variance of the whole map first, for which the rows would have to be computed once more. So here it is
taken of N x N matrices: with q and k the channels of query and key, k̄ the mean of the latter and Σ their covariance,

    var(S) = <E[q qᵀ], Σ> + var(q · k̄)  (E and var over channels)
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from allspark_fast.kernels.channel_attention.dropout import hash_keys, keep_mask
from allspark_fast.kernels.channel_attention.inputs import Inputs, accumulation_dtype, pack_rows

# On a CPU a chunk of a block, 256 KB in float32, stays in the L2 cache, and the products still run at their full rate.
BLOCK_ROWS = 128
CHUNK = 512
# A block of short rows has up to four times as many, because each of its operations costs a start and an end.
BLOCK_ENTRIES = 2**21
# Exponentials and logarithms have base 2, and rows this factor: exp2 takes half of the time of exp on a CPU.
_LOG2E = math.log2(math.e)


class _Maps:
    """The operands of all maps in the accumulation dtype, and the numbers of their norm.

    Attributes:
        query: (maps, samples, Cq, N), the samples that share a key.
        key: (maps, N, L), without its mean, and zero at masked columns.
        value: (maps, N, L).
        bias: (L,), -inf at masked columns; None without a mask.
        count: columns that count, at least 1; a tensor if there is a mask, so that nothing waits for the device.
        mean: of the key's tokens, (maps, 1, N, 1).
        covariance: of the key's tokens, (maps, 1, N, N).
        moment: mean over channels of the products of two of the query's tokens, (maps, samples, N, N).
        shift: products of query and key's mean without their own mean, (maps, samples, Cq, 1).
    """

    def __init__(self, inputs: Inputs) -> None:
        query, key, value, column_mask, self.dropout_p, seed = inputs
        dtype, self.shape = accumulation_dtype(key.dtype), query.shape
        self.key, self.value = key.flatten(0, 1).to(dtype, copy=True), value.flatten(0, 1).to(dtype)
        self.bias: Tensor | None = None
        self.count: Tensor | int = key.shape[3]
        if column_mask is not None:
            self.bias = self.value.new_zeros(key.shape[3]).masked_fill_(~column_mask, -torch.inf)
            self.count = column_mask.sum().clamp(min=1)
            self.key.masked_fill_(~column_mask, 0)
        mean = self.key.sum(-1, keepdim=True) / self.count
        self.key -= mean
        if column_mask is not None:
            self.key.masked_fill_(~column_mask, 0)
        self.query = self.rows(query).unflatten(1, (-1, query.shape[3]))
        self.mean, self.covariance = mean[:, None], (self.key @ self.key.mT / self.count)[:, None]
        self.moment = self.query.mT @ self.query / query.shape[3]
        self.shift = self.query @ self.mean
        self.shift -= self.shift.mean(2, keepdim=True)
        self.keys: tuple[Tensor, Tensor] | None = None
        if seed is not None:
            row_key, column_key = hash_keys(seed, *query.shape[:2], query.shape[3], key.shape[3])
            self.keys = pack_rows(row_key[:, :, None], len(self.key))[:, 0], column_key

    def rows(self, x: Tensor) -> Tensor:
        """(B, H, N, C) -> (maps, rows, N)."""
        return pack_rows(x, len(self.key)).mT.to(self.key.dtype).contiguous()

    def unpack(self, rows: Tensor) -> Tensor:
        """(maps, rows, N) -> (B, H, N, C)."""
        batch, heads, _, channels = self.shape
        samples = rows.unflatten(1, (-1, channels)).permute(1, 0, 3, 2)
        return samples.reshape(batch, heads, -1, channels).contiguous()

    def blocks(self) -> Iterator[slice]:
        """Rows of a map to be computed at a time."""
        block = min(max(BLOCK_ROWS, BLOCK_ENTRIES // self.key.shape[2]), 4 * BLOCK_ROWS)
        return _slices(self.query.shape[1] * self.query.shape[2], block)

    def chunks(self) -> Iterator[slice]:
        """Columns of a block to be computed at a time."""
        return _slices(self.key.shape[2], CHUNK)

    def logits(self, rows: Tensor, chunk: slice) -> Tensor:
        """Products (maps, rows, chunk) of rows (maps, rows, N) and the chunk's keys, masked columns at -inf."""
        key = self.key[..., chunk]
        return torch.bmm(rows, key) if self.bias is None else torch.baddbmm(self.bias[chunk], rows, key)

    def drop(self, x: Tensor, block: slice, chunk: slice) -> Tensor:
        """Return x (maps, rows, chunk) with zeros where dropout has them; without dropout x itself."""
        if self.keys is None:
            return x
        row_key, column_key = self.keys
        return x * keep_mask(row_key[:, block], column_key[chunk], self.dropout_p)


def _slices(size: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def forward(inputs: Inputs, eps: float) -> tuple[Tensor, Tensor]:
    """softmax(InstanceNorm(queryᵀ key)) valueᵀ.

    Returns:
        the output (B, H, N, Cq) in the query's dtype, and in the accumulation dtype (2, B, H, Cq): the log-sum-exp of
        every row's normalized logits, without their constant and in units of log2, and the factor rstd of its map.
        Rows whose columns are all masked give zeros.
    """
    own = _Maps(inputs)
    variance = (own.moment * own.covariance).sum((2, 3), keepdim=True) + own.shift.square().mean(2, keepdim=True)
    # Both terms are sums of squares, but the first is formed from products that can cancel below zero.
    rstd = torch.rsqrt(variance.clamp_min(0) + eps)
    rows = (own.query * (rstd * _LOG2E)).flatten(1, 2)
    output, lse = torch.zeros_like(rows), torch.empty_like(rows[..., :1])
    for block in own.blocks():
        logits = [own.logits(rows[:, block], chunk) for chunk in own.chunks()]
        maximum = torch.stack([x.amax(-1) for x in logits]).amax(0)[..., None]
        maximum.clamp_(min=torch.finfo(rows.dtype).min)  # so that a row without a column gives exp2(-inf - max) = 0
        total = torch.zeros_like(maximum)
        for chunk, x in zip(own.chunks(), logits, strict=True):
            probability = x.sub_(maximum).exp2_()
            total += probability.sum(-1, keepdim=True)
            output[:, block].baddbmm_(own.drop(probability, block, chunk), own.value[..., chunk].mT)
        total.masked_fill_(total == 0, 1)
        output[:, block] /= total * (1 - own.dropout_p)
        lse[:, block] = maximum + total.log2()
    statistics = torch.cat([lse, rstd.expand_as(own.shift).flatten(1, 2)], -1)
    return own.unpack(output).to(inputs.query.dtype), own.unpack(statistics).permute(2, 0, 1, 3).contiguous()


def backward(grad: Tensor, statistics: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, given that of the output and what ``forward`` returned with it."""
    query, key, value, column_mask, dropout_p, _ = inputs
    own = _Maps(inputs)
    lse, rstd = own.rows(statistics.permute(1, 2, 0, 3)).split(1, -1)
    rows, grad_output = own.query.flatten(1, 2) * rstd, own.rows(grad) / (1 - dropout_p)
    grad_rows, grad_key, grad_value = (torch.zeros_like(x) for x in (rows, own.key, own.key))
    for block in own.blocks():
        operands = rows[:, block], grad_output[:, block], lse[:, block]
        _add_block_gradients(own, block, *operands, grad_rows[:, block], grad_key, grad_value)
    # rstd multiplies the query, so its gradient is their product; then the derivatives of the variance.
    grad_rows, rstd = (x.view_as(y) for x, y in ((grad_rows, own.query), (rstd, own.shift)))
    grad_variance = -(rstd[:, :, :1] ** 3) / 2 * (grad_rows * own.query).sum((2, 3), keepdim=True)
    slope = 2 * grad_variance / query.shape[3]
    grad_query = grad_rows * rstd + slope * (own.query @ own.covariance + own.shift * own.mean.mT)
    slope = 2 * grad_variance / own.count
    grad_key.baddbmm_((slope * own.moment).sum(1), own.key)
    grad_key += (slope * (own.query.mT @ own.shift)).sum(1) / query.shape[3]
    if column_mask is not None:
        grad_key.masked_fill_(~column_mask, 0)
    return (
        own.unpack(grad_query.flatten(1, 2)).to(query.dtype),
        grad_key.view(key.shape).to(key.dtype),
        grad_value.view(value.shape).to(value.dtype),
    )


def _add_block_gradients(
    own: _Maps, block: slice, rows: Tensor, grad_output: Tensor, lse: Tensor, *grads: Tensor
) -> None:
    grad_rows, grad_key, grad_value = grads
    delta, total = torch.zeros_like(lse), torch.zeros_like(lse)
    log2_rows, chunks = rows * _LOG2E, []
    for chunk in own.chunks():
        probability = own.logits(log2_rows, chunk).sub_(lse).exp2_()
        kept = own.drop(probability, block, chunk)
        grad_value[..., chunk].baddbmm_(grad_output.mT, kept)
        product = torch.bmm(grad_output, own.value[..., chunk]).mul_(kept)
        delta += product.sum(-1, keepdim=True)
        total += probability.sum(-1, keepdim=True)
        chunks.append((chunk, probability, product))
    # A row of the gradient sums to zero, however P is rounded: where one key gets it all, little else is left.
    delta /= total.masked_fill_(total == 0, 1)
    for chunk, probability, product in reversed(chunks):  # the last ones are still in the caches
        grad_logits = product.addcmul_(probability, delta, value=-1)
        grad_key[..., chunk].baddbmm_(rows.mT, grad_logits)
        grad_rows.baddbmm_(grad_logits, own.key[..., chunk].mT)
