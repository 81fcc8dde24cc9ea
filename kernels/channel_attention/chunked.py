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
from allspark_fast.kernels.channel_attention.inputs import Inputs, accumulation_dtype

# On a CPU a chunk of a block, 256 KB in float32, stays in the L2 cache, and the products still run at their full rate.
BLOCK_ROWS = 128
CHUNK = 512
# A block of short rows has up to four times as many, because each of its operations costs a start and an end.
BLOCK_ENTRIES = 2**21
# Exponentials and logarithms have base 2, and rows this factor: exp2 takes half of the time of exp on a CPU.
_LOG2E = math.log2(math.e)


def _rows_first(x: Tensor, maps: int) -> Tensor:
    """(B, H, N, C) -> (maps, rows, N); samples that share a key are rows of one map: its keys are read once."""
    return x.reshape(-1, maps, *x.shape[2:]).permute(1, 0, 3, 2).reshape(maps, -1, x.shape[2])


def _samples_first(x: Tensor, shape: torch.Size) -> Tensor:
    """(maps, rows, N) -> (B, H, N, C)."""
    return x.unflatten(1, (-1, shape[3])).permute(1, 0, 3, 2).reshape(shape).contiguous()


class _Map:
    """The operands of all maps in the accumulation dtype, and the numbers of their norm.

    Attributes:
        query: (B, H, N, Cq).
        key: (maps, N, L), without its mean, and zero at masked columns.
        value: (maps, N, L).
        bias: (L,), -inf at masked columns; None without a mask.
        count: columns that count, at least 1; a tensor if there is a mask, so that nothing waits for the device.
        key_mean: (B or 1, H, N, 1).
        covariance: of the key's tokens, (B or 1, H, N, N).
        moment: mean over channels of the products of two of the query's tokens, (B, H, N, N).
        shift: products of query and key's mean without their own mean, (B, H, 1, Cq).
    """

    def __init__(self, inputs: Inputs) -> None:
        query, key, value, column_mask, dropout_p, seed = inputs
        dtype = accumulation_dtype(key.dtype)
        self.query = query.to(dtype)
        self.key = key.flatten(0, 1).to(dtype, copy=True)
        self.value = value.flatten(0, 1).to(dtype)
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
        self.key_mean = mean.unflatten(0, key.shape[:2])
        self.covariance = (self.key @ self.key.mT / self.count).unflatten(0, key.shape[:2])
        self.moment = self.query @ self.query.mT / query.shape[3]
        shift = (self.key_mean * self.query).sum(2, keepdim=True)
        self.shift = shift - shift.mean(-1, keepdim=True)
        self.dropout_p = dropout_p
        if seed is not None:
            row_key, self.column_key = hash_keys(seed, *query.shape[:2], *(x.shape[3] for x in (query, key)))
            self.row_key = _rows_first(row_key[:, :, None], len(self.key))[..., 0]

    def blocks(self) -> Iterator[slice]:
        """Rows of a map to be computed at a time."""
        rows = self.query.numel() // self.query.shape[2] // len(self.key)
        block = min(max(BLOCK_ROWS, BLOCK_ENTRIES // self.key.shape[2]), 4 * BLOCK_ROWS)
        return (slice(start, min(start + block, rows)) for start in range(0, rows, block))

    def chunks(self) -> Iterator[slice]:
        """Columns of a block to be computed at a time."""
        columns = self.key.shape[2]
        return (slice(start, min(start + CHUNK, columns)) for start in range(0, columns, CHUNK))

    def logits(self, rows: Tensor, chunk: slice) -> Tensor:
        """Products (maps, rows, chunk) of rows (maps, rows, N) and the chunk's keys, masked columns at -inf."""
        key = self.key[..., chunk]
        return torch.bmm(rows, key) if self.bias is None else torch.baddbmm(self.bias[chunk], rows, key)

    def drop(self, x: Tensor, block: slice, chunk: slice) -> Tensor:
        """Return x (maps, rows, chunk) with zeros where dropout has them; without dropout x itself."""
        if self.dropout_p == 0:
            return x
        return x * keep_mask(self.row_key[:, block], self.column_key[chunk], self.dropout_p)


def forward(inputs: Inputs, eps: float) -> tuple[Tensor, Tensor]:
    """softmax(InstanceNorm(queryᵀ key)) valueᵀ.

    Returns:
        the output (B, H, N, Cq) in the query's dtype, and in the accumulation dtype (2, B, H, Cq): the log-sum-exp of
        every row's normalized logits, without their constant and in units of log2, and the factor rstd of its map.
        Rows whose columns are all masked give zeros.
    """
    query, own, dropout_p = inputs.query, _Map(inputs), inputs.dropout_p
    maps = len(own.key)
    variance = (own.moment * own.covariance).sum((-2, -1)) + own.shift.square().mean(-1)[..., 0]
    # Both terms are sums of squares, but the first is formed from products that can cancel below zero.
    rstd = torch.rsqrt(variance.clamp_min(0) + eps)[..., None, None]
    rows = _rows_first(own.query * (rstd * _LOG2E), maps)
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
        output[:, block] /= total * (1 - dropout_p)
        lse[:, block] = maximum + total.log2()
    lse = _samples_first(lse, torch.Size((*query.shape[:2], 1, query.shape[3])))[:, :, 0]
    statistics = torch.stack([lse, rstd[..., 0].expand_as(lse)])
    return _samples_first(output, query.shape).to(query.dtype), statistics


def backward(grad: Tensor, statistics: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, given that of the output and what ``forward`` returned beside it."""
    query, key, value, column_mask, dropout_p, _ = inputs
    own = _Map(inputs)
    maps = len(own.key)
    lse, rstd = _rows_first(statistics[0][:, :, None], maps), statistics[1][:, :, None, :1]
    rows = _rows_first(own.query * rstd, maps)
    grad_output = _rows_first(grad.to(rows.dtype) / (1 - dropout_p), maps)
    grad_rows, grad_key, grad_value = (torch.zeros_like(x) for x in (rows, own.key, own.key))
    for block in own.blocks():
        operands = rows[:, block], grad_output[:, block], lse[:, block]
        _add_block_gradients(own, block, *operands, grad_rows[:, block], grad_key, grad_value)
    grad_query = _samples_first(grad_rows, query.shape)
    # rstd multiplies the query, so its gradient is their product; then the derivatives of the variance.
    grad_variance = -(rstd**3) / 2 * (grad_query * own.query).sum((-2, -1), keepdim=True)
    slope = 2 * grad_variance / query.shape[3]
    grad_query = grad_query * rstd + slope * (own.covariance @ own.query + own.key_mean * own.shift)
    slope = 2 * grad_variance / own.count
    of_key = slope * own.moment, slope * (own.query * own.shift).mean(-1, keepdim=True)
    matrix, offset = (x.reshape(-1, maps, *x.shape[2:]).sum(0) for x in of_key)  # over samples that share their keys
    grad_key.baddbmm_(matrix, own.key).add_(offset)
    if column_mask is not None:
        grad_key.masked_fill_(~column_mask, 0)
    return (
        grad_query.to(query.dtype),
        grad_key.view(key.shape).to(key.dtype),
        grad_value.view(value.shape).to(value.dtype),
    )


def _add_block_gradients(
    own: _Map,
    block: slice,
    rows: Tensor,
    grad_output: Tensor,
    lse: Tensor,
    grad_rows: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
) -> None:
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
    for chunk, probability, product in chunks:
        grad_logits = product.addcmul_(probability, delta, value=-1)
        grad_key[..., chunk].baddbmm_(rows.mT, grad_logits)
        grad_rows.baddbmm_(grad_logits, own.key[..., chunk].mT)
