"""Channel attention by library products of whole rows, with Triton kernels between them.

With N = 289 to 1369 features in a dot product, storing an entry of the similarity map costs less than making it again.
So the matrix library makes all products, and row_kernels.py does what lies between. All columns of a sample's rows are
there at once: the variance of the instance norm is a statistic of rows, its gradient one more term of theirs, and what
the gradient of softmax subtracts from a row is the sum of these very numbers.

    forward     S = qᵀk                row statistics, rstd, softmax    O = v Pᵀ
    backward    S = qᵀk, dP = dOᵀv     row sums, dS                     dV = dO P, dK = q dS, dQ = k dSᵀ

docs/kernels.md has the derivation, and counts FLOPs and bytes.
"""

import math

import torch
import triton
from torch import Tensor

from allspark_fast.kernels.channel_attention import row_kernels

# As many samples are computed at a time as fit in: forward keeps one map of their rows, backward two.
WORKSPACE_BYTES = 256 * 2**20
# Products over L have small results. They are made in pieces of about so many columns, to occupy all processors.
PIECE_COLUMNS = 4096
# Entries of a tile, its columns (at most, and at least: tiles of narrow maps have more rows), and warps.
SOFTMAX_TILE, SOFTMAX_COLUMNS, SOFTMAX_WARPS = 8192, 4096, 8
GRADIENT_TILE, GRADIENT_COLUMNS, GRADIENT_WARPS = 4096, 1024, 4
MIN_COLUMNS = 512


class _Samples:
    """Some samples, and their keys as the products take them; row_kernels.py says what the attributes are.

    Args:
        first: number of the first of these samples.
        others: arguments of ``forward``, cut to these samples.
    """

    def __init__(
        self,
        first: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        column_mask: Tensor | None,
        dropout_p: float,
        seed: Tensor | None,
    ) -> None:
        batch, heads, _, channels = query.shape
        self.query = query.contiguous()
        self.key, self.value = (x.flatten(0, 1).contiguous() for x in (key, value))
        self.column_mask = None if column_mask is None else column_mask.contiguous()
        self.maps, self.tokens, columns = self.key.shape
        self.sizes = channels, batch * heads * channels // self.maps, columns
        self.half_key = torch.empty_like(self.key, dtype=_half(key.dtype))
        self.key_unit = key.new_empty(self.maps, dtype=torch.float32)
        self.mean, peak, self.count = self.key_unit.new_empty((3, self.maps, self.tokens))
        row_kernels.key_statistics_kernel[(self.maps * self.tokens,)](
            self.key, self.column_mask, self.mean, peak, self.count, columns,
            BLOCK_L=_width(columns, SOFTMAX_COLUMNS), num_warps=SOFTMAX_WARPS,
        )  # fmt: skip
        row_kernels.half_key_kernel[triton.cdiv(self.tokens, 16), triton.cdiv(columns, 512), self.maps](
            self.key, self.column_mask, self.mean, peak, self.half_key, self.key_unit, self.tokens, columns,
            BLOCK_N=16, BLOCK_L=512, num_warps=8,
        )  # fmt: skip
        row_key = column_key = None
        if dropout_p > 0:
            row_key = torch.empty((batch, heads, channels), dtype=torch.int32, device=key.device)
            column_key = torch.empty(columns, dtype=torch.int32, device=key.device)
            rows = row_key.numel()
            row_kernels.hash_keys_kernel[(triton.cdiv(max(rows, columns), 1024),)](
                seed, row_key, column_key, first * heads * channels, rows, columns, BLOCK=1024
            )
        # Hashes below the threshold are dropped, see dropout.keep_mask.
        self.mask = self.column_mask, row_key, column_key, round(dropout_p * 2**32) - 2**31
        self.keep_scale = 1 / (1 - dropout_p)

    def pack(
        self, x: Tensor, rows: Tensor | None, half_rows: Tensor | None, unit: Tensor, shift: Tensor | None = None
    ) -> None:
        """Pack the query, or a gradient, which has no shift and will meet the value."""
        channels, row_count, _ = self.sizes
        mean, key_unit = (None, None) if shift is None else (self.mean, self.key_unit)
        peak = None
        if half_rows is not None and shift is None:
            peak = torch.linalg.vector_norm(self.value, math.inf, (1, 2), dtype=torch.float32)
        # Sums of N products of numbers below 2 and 2 · range_factor stay within float16.
        range_factor = 2**13 / triton.next_power_of_2(self.tokens)
        row_kernels.pack_kernel[triton.cdiv(row_count, 32), self.maps](
            x, mean, key_unit, peak, rows, half_rows, unit, shift, self.tokens, channels, row_count, range_factor,
            BLOCK_R=32, BLOCK_N=64,
        )  # fmt: skip


def _half(dtype: torch.dtype) -> torch.dtype:
    """What S is made of and stored in: bfloat16 has too few digits; over powers of two its numbers fit float16."""
    return torch.float32 if dtype == torch.float32 else torch.float16


def _width(columns: int, most: int) -> int:
    return min(most, max(MIN_COLUMNS, triton.next_power_of_2(columns)))


def _parts(query: Tensor, key: Tensor, buffers: int) -> list[slice]:
    """Samples to compute at a time: as many as fit into the workspace with so many maps each, at least one."""
    batch, heads, _, channels = query.shape
    step = max(1, WORKSPACE_BYTES // (buffers * heads * channels * key.shape[3] * key.itemsize))
    return [slice(start, min(start + step, batch)) for start in range(0, batch, step)]


def _product(a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool = False) -> None:
    """Set ``out`` to a b, batched, or add that to it; sums are float32, whatever the dtype of ``out``."""
    if a.device.type == "cpu":  # whose products of half precision are slow, and have no other dtype for the result
        a, b = a.float(), b.float()
    if a.dtype == out.dtype:
        torch.baddbmm(out, a, b, beta=int(accumulate), out=out)
    elif a.device.type == "cpu":
        out.copy_(a @ b)
    elif accumulate:
        torch.baddbmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.bmm(a, b, out_dtype=out.dtype, out=out)


def _pieces_product(a: Tensor, b: Tensor) -> Tensor:
    """Return a (maps, N, L) times b (maps, R, L) transposed, as float32 pieces (pieces, maps, N, R) to be added."""
    maps, tokens, columns = a.shape
    fewest = triton.cdiv(columns, PIECE_COLUMNS)
    # Pieces of equal width, with rows of whole 16 bytes.
    pieces = next((x for x in range(fewest, 4 * fewest) if columns % (8 * x) == 0), 1)
    parts = a.new_empty((pieces, maps, tokens, b.shape[1]), dtype=torch.float32)
    a, b = (x.unflatten(2, (pieces, -1)) for x in (a, b))
    if maps < pieces:
        for i in range(maps):
            _product(a[i].transpose(0, 1), b[i].permute(1, 2, 0), parts[:, i])
    else:
        for i in range(pieces):
            _product(a[:, :, i], b[:, :, i].mT, parts[i])
    return parts


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    column_mask: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As ``chunked.forward``, for float16, bfloat16 and float32."""
    batch, heads, _, channels = query.shape
    output = query.new_empty(query.shape)
    statistics = query.new_empty((2, batch, heads, channels), dtype=torch.float32)
    for which in _parts(query, key, buffers=1):
        own = slice(None) if key.shape[0] == 1 else which
        samples = _Samples(which.start, query[which], key[own], value[own], column_mask, dropout_p, seed)
        lse, rstd = statistics[:, which]
        _attend(samples, eps, output[which], lse, rstd)
    return output, statistics


def _attend(samples: _Samples, eps: float, output: Tensor, lse: Tensor, rstd: Tensor) -> None:
    """Fill output, lse and rstd."""
    maps, tokens, (channels, rows, columns) = samples.maps, samples.tokens, samples.sizes
    half_rows = samples.half_key.new_empty((maps, tokens, rows))
    unit, shift, maximum, squares = lse.new_empty((4, *lse.shape))
    samples.pack(samples.query, None, half_rows, unit, shift)

    probability = samples.key.new_empty((maps, rows, columns))
    logits = probability.view(half_rows.dtype)
    _product(half_rows.mT, samples.half_key, logits)
    width = _width(columns, SOFTMAX_COLUMNS)
    row_kernels.row_statistics_kernel[rows, maps](
        logits, samples.column_mask, maximum, squares, *samples.sizes, BLOCK_L=width, num_warps=SOFTMAX_WARPS
    )
    block_c = triton.next_power_of_2(channels)
    row_kernels.rstd_kernel[rows // channels, maps](
        squares, unit, shift, samples.count, rstd, tokens, channels, eps, BLOCK_C=block_c
    )
    block_r, tiles = SOFTMAX_TILE // width, triton.cdiv(columns, width)
    sums = lse.new_empty((tiles, *lse.shape))
    row_kernels.softmax_kernel[triton.cdiv(rows, block_r), tiles, maps](
        probability, logits, unit, rstd, maximum, *samples.mask, sums, *samples.sizes,
        BLOCK_R=block_r, BLOCK_L=width, num_warps=SOFTMAX_WARPS,
    )  # fmt: skip
    parts = _pieces_product(samples.value, probability)
    row_kernels.finish_kernel[triton.cdiv(rows, 128), triton.cdiv(tokens, 16), maps](
        parts, sums, unit, rstd, maximum, lse, None, None, None, output, tokens, channels, rows, len(parts), tiles,
        samples.keep_scale, BLOCK_R=128, BLOCK_N=16,
    )  # fmt: skip


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
    """As ``chunked.backward``, for float16, bfloat16 and float32."""
    parts = _parts(query, key, buffers=2)
    shared = key.shape[0] == 1
    grad, grad_query = grad.contiguous(), query.new_empty(query.shape)
    # What several parts add to shared keys is rounded once.
    dtype = torch.float32 if shared and len(parts) > 1 else key.dtype
    grad_key, grad_value = (key.new_empty(key.shape, dtype=dtype) for _ in range(2))
    for which in parts:
        own = slice(None) if shared else which
        samples = _Samples(which.start, query[which], key[own], value[own], column_mask, dropout_p, seed)
        lse, rstd = statistics[:, which]
        grads = grad_query[which], grad_key[own].flatten(0, 1), grad_value[own].flatten(0, 1)
        _differentiate(samples, grad[which], lse, rstd, grads, accumulate=shared and which.start > 0)
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


def _differentiate(
    samples: _Samples, grad_output: Tensor, lse: Tensor, rstd: Tensor, grads: tuple[Tensor, ...], *, accumulate: bool
) -> None:
    """Fill the gradients of query, key and value, or add to the last two."""
    grad_query, grad_key, grad_value = grads
    maps, tokens, (channels, rows, columns) = samples.maps, samples.tokens, samples.sizes
    packed_query, packed_grad = samples.key.new_empty((2, maps, tokens, rows))
    half_rows = samples.half_key.new_empty((maps, tokens, rows))
    unit, shift, grad_unit, delta, slope, offset = lse.new_empty((6, *lse.shape))
    samples.pack(samples.query, packed_query, half_rows, unit, shift)
    # The gradient of a scaled loss can be so large that dP overflows float16.
    half_grad = torch.empty_like(half_rows) if samples.key.dtype == torch.float16 else None
    samples.pack(grad_output, packed_grad, half_grad, grad_unit)

    probability, grad_logits = samples.key.new_empty((2, maps, rows, columns))
    logits = probability.view(half_rows.dtype)
    _product(half_rows.mT, samples.half_key, logits)
    _product((packed_grad if half_grad is None else half_grad).mT, samples.value, grad_logits)
    width = _width(columns, GRADIENT_COLUMNS)
    block_r, tiles = GRADIENT_TILE // width, triton.cdiv(columns, width)
    grid = triton.cdiv(rows, block_r), tiles, maps
    sums = lse.new_empty((4, tiles, *lse.shape))
    entries = unit, None if half_grad is None else grad_unit, rstd, lse, *samples.mask, samples.keep_scale
    row_kernels.row_sums_kernel[grid](
        grad_logits, logits, *entries, sums, *samples.sizes, BLOCK_R=block_r, BLOCK_L=width, num_warps=GRADIENT_WARPS
    )
    block_c = triton.next_power_of_2(channels)
    row_kernels.norm_gradient_kernel[rows // channels, maps](
        sums, shift, rstd, samples.count, delta, slope, offset, tokens, channels, tiles, BLOCK_C=block_c
    )
    row_kernels.gradient_kernel[grid](
        probability, grad_logits, logits, grad_logits, *entries, delta, slope, offset, sums[0], *samples.sizes,
        BLOCK_R=block_r, BLOCK_L=width, num_warps=GRADIENT_WARPS,
    )  # fmt: skip
    _product(packed_grad, probability, grad_value, accumulate=accumulate)
    _product(packed_query, grad_logits, grad_key, accumulate=accumulate)
    parts = _pieces_product(samples.key, grad_logits)
    row_kernels.finish_kernel[triton.cdiv(rows, 128), triton.cdiv(tokens, 16), maps](
        parts, sums[0], None, rstd, None, None, offset, samples.count, samples.mean, grad_query, tokens, channels,
        rows, len(parts), tiles, samples.keep_scale, BLOCK_R=128, BLOCK_N=16,
    )  # fmt: skip
