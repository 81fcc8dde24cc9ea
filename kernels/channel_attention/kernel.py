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
from collections.abc import Iterator
from typing import NamedTuple

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
# Largest magnitude of a sum of N products of numbers below 2, in half precision.
_HALF_RANGE = 2**15


class _Samples(NamedTuple):
    """Some samples, and the keys of their maps as the products take them.

    Attributes:
        query: (B, H, N, Cq).
        key: (maps, N, L); there are H maps if the samples share their keys, else B · H.
        value: (maps, N, L).
        half_key: (maps, N, L), see row_kernels.py, as are the next three.
        key_unit: (maps,).
        mean: (maps, N).
        count: (maps, N).
        column_mask: bool (L,) or None.
        row_key: (B, H, Cq) or None.
        column_key: (L,) or None.
        threshold: hashes below are dropped, see dropout.keep_mask.
        keep_scale: factor of what is kept.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    half_key: Tensor
    key_unit: Tensor
    mean: Tensor
    count: Tensor
    column_mask: Tensor | None
    row_key: Tensor | None
    column_key: Tensor | None
    threshold: int
    keep_scale: float

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Channels Cq, rows R of a map and columns L."""
        channels = self.query.shape[3]
        return channels, self.query.shape[0] * self.query.shape[1] * channels // len(self.key), self.key.shape[2]

    def parts(self, buffers: int) -> Iterator[tuple[slice, slice, "_Samples"]]:
        """As many samples as fit into the workspace with so many buffers, at least one: which, their maps, and they."""
        batch, heads, _, channels = self.query.shape
        shared = len(self.key) == heads
        step = max(1, WORKSPACE_BYTES // (buffers * heads * channels * self.key.shape[2] * self.key.itemsize))
        for start in range(0, batch, step):
            samples = slice(start, min(start + step, batch))
            maps = slice(0, heads) if shared else slice(samples.start * heads, samples.stop * heads)
            own = {name: getattr(self, name)[maps] for name in ("key", "value", "half_key", "key_unit", "mean", "count")}
            row_key = None if self.row_key is None else self.row_key[samples]
            yield samples, maps, self._replace(query=self.query[samples], row_key=row_key, **own)

    def pack(
        self, x: Tensor, rows: Tensor | None, half_rows: Tensor | None, unit: Tensor, shift: Tensor | None = None
    ) -> None:
        """Launch pack_kernel on the query, or on a gradient, which has no shift and meets the value."""
        channels, row_count, _ = self.sizes
        maps, tokens, _ = self.key.shape
        of_key = (None, None) if shift is None else (self.mean, self.key_unit)
        peak = None
        if half_rows is not None and shift is None:
            peak = torch.linalg.vector_norm(self.value, math.inf, (1, 2), dtype=torch.float32)
        row_kernels.pack_kernel[triton.cdiv(row_count, 32), maps](
            x, *of_key, peak, rows, half_rows, unit, shift, tokens, channels, row_count,
            _HALF_RANGE / (4 * triton.next_power_of_2(tokens)), BLOCK_R=32, BLOCK_N=64,
        )  # fmt: skip


def _prepare(
    query: Tensor, key: Tensor, value: Tensor, column_mask: Tensor | None, dropout_p: float, seed: Tensor | None
) -> _Samples:
    """All samples."""
    batch, heads, tokens, channels = query.shape
    key, value = (x.flatten(0, 1).contiguous() for x in (key, value))
    column_mask = None if column_mask is None else column_mask.contiguous()
    maps, _, columns = key.shape
    mean, peak, count = key.new_empty((3, maps, tokens), dtype=torch.float32)
    row_kernels.key_statistics_kernel[(maps * tokens,)](
        key, column_mask, mean, peak, count, columns, BLOCK_L=_width(columns, SOFTMAX_COLUMNS), num_warps=8
    )
    half_key = torch.empty_like(key, dtype=_half(key.dtype))
    key_unit = mean.new_empty(maps)
    row_kernels.half_key_kernel[triton.cdiv(tokens, 16), triton.cdiv(columns, 1024), maps](
        key, column_mask, mean, peak, half_key, key_unit, tokens, columns, BLOCK_N=16, BLOCK_L=1024, num_warps=8
    )
    row_key = column_key = None
    if dropout_p > 0:
        row_key = torch.empty((batch, heads, channels), dtype=torch.int32, device=key.device)
        column_key = torch.empty(columns, dtype=torch.int32, device=key.device)
        blocks = triton.cdiv(max(row_key.numel(), columns), 1024)
        row_kernels.hash_keys_kernel[(blocks,)](seed, row_key, column_key, row_key.numel(), columns, BLOCK=1024)
    threshold, keep_scale = round(dropout_p * 2**32) - 2**31, 1 / (1 - dropout_p)
    return _Samples(
        query.contiguous(), key, value, half_key, key_unit, mean, count, column_mask, row_key, column_key,
        threshold, keep_scale,
    )  # fmt: skip


def _half(dtype: torch.dtype) -> torch.dtype:
    """What products S are made of and stored in: bfloat16 has too few digits, and fits float16 over powers of two."""
    return torch.float32 if dtype == torch.float32 else torch.float16


def _width(columns: int, most: int) -> int:
    return min(most, max(MIN_COLUMNS, triton.next_power_of_2(columns)))


def _product(a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool = False) -> None:
    """Set ``out`` to a b, batched, or add that to float32; sums are float32, whatever the dtype of ``out``."""
    if a.device.type == "cpu":  # whose products of half precision are slow, and have no other dtype for the result
        a, b = a.float(), b.float()
    if a.dtype == out.dtype:
        torch.baddbmm(out, a, b, out=out) if accumulate else torch.bmm(a, b, out=out)
    elif a.device.type == "cpu":
        out.copy_(a @ b)
    elif accumulate:
        torch.baddbmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.bmm(a, b, out_dtype=out.dtype, out=out)


def _pieces_product(a: Tensor, b: Tensor) -> Tensor:
    """a (maps, N, L) times b (maps, R, L) transposed, as float32 pieces (pieces, maps, N, R) that nobody has added."""
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
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    statistics = query.new_empty((2, batch, heads, channels), dtype=torch.float32)
    for samples, _, part in _prepare(query, key, value, column_mask, dropout_p, seed).parts(buffers=1):
        _attend(part, eps, output[samples], *statistics[:, samples])
    return output, statistics


def _attend(part: _Samples, eps: float, output: Tensor, lse: Tensor, rstd: Tensor) -> None:
    maps, tokens, _ = part.key.shape
    channels, rows, columns = sizes = part.sizes
    half_rows = part.half_key.new_empty((maps, tokens, rows))
    unit, shift, maximum, squares = lse.new_empty((4, *lse.shape))
    part.pack(part.query, None, half_rows, unit, shift)

    probability = part.key.new_empty((maps, rows, columns))
    logits = probability.view(part.half_key.dtype)
    _product(half_rows.mT, part.half_key, logits)
    width = _width(columns, SOFTMAX_COLUMNS)
    row_kernels.row_statistics_kernel[rows, maps](
        logits, part.column_mask, maximum, squares, *sizes, BLOCK_L=width, num_warps=SOFTMAX_WARPS
    )
    row_kernels.rstd_kernel[rows // channels, maps](
        squares, unit, shift, part.count, rstd, tokens, channels, eps, BLOCK_C=triton.next_power_of_2(channels)
    )
    block_r, tiles = SOFTMAX_TILE // width, triton.cdiv(columns, width)
    sums = lse.new_empty((tiles, *lse.shape))
    row_kernels.softmax_kernel[triton.cdiv(rows, block_r), tiles, maps](
        logits, probability, unit, rstd, maximum, part.column_mask, part.row_key, part.column_key, part.threshold, sums,
        *sizes, BLOCK_R=block_r, BLOCK_L=width, num_warps=SOFTMAX_WARPS,
    )  # fmt: skip
    parts = _pieces_product(part.value, probability)
    row_kernels.finish_kernel[triton.cdiv(rows, 128), triton.cdiv(tokens, 16), maps](
        parts, sums, unit, rstd, maximum, lse, None, None, None, output, tokens, channels, rows, len(parts), tiles,
        part.keep_scale, BLOCK_R=128, BLOCK_N=16,
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
    parts = [*_prepare(query, key, value, column_mask, dropout_p, seed).parts(buffers=2)]
    grad = grad.contiguous()
    grad_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    # Several parts that share their keys are added before they are rounded.
    accumulate = len(parts) > 1 and key.shape[0] == 1
    dtype = torch.float32 if accumulate else key.dtype
    shape = key.flatten(0, 1).shape
    grad_key, grad_value = (torch.empty(shape, dtype=dtype, device=key.device) for _ in range(2))
    for samples, maps, part in parts:
        _differentiate(
            part, grad[samples], *statistics[:, samples], grad_query[samples], (grad_value[maps], grad_key[maps]),
            accumulate=accumulate and samples.start > 0,
        )  # fmt: skip
    return grad_query, grad_key.to(key.dtype).view(key.shape), grad_value.to(value.dtype).view(value.shape)


def _differentiate(
    part: _Samples,
    grad_output: Tensor,
    lse: Tensor,
    rstd: Tensor,
    grad_query: Tensor,
    grads: tuple[Tensor, Tensor],
    *,
    accumulate: bool,
) -> None:
    maps, tokens, _ = part.key.shape
    channels, rows, columns = sizes = part.sizes
    half_rows = part.half_key.new_empty((maps, tokens, rows))
    left = part.key.new_empty((2, maps, tokens, rows))  # dO and q, of which dV and dK are products
    unit, shift, grad_unit, delta, slope, offset = lse.new_empty((6, *lse.shape))
    part.pack(part.query, left[1], half_rows, unit, shift)
    # The gradient of a scaled loss can be so large that dP overflows float16.
    half_grad = torch.empty_like(half_rows) if part.key.dtype == torch.float16 else None
    part.pack(grad_output, left[0], half_grad, grad_unit)

    buffers = part.key.new_empty((2, maps, rows, columns))
    logits = buffers[0].view(half_rows.dtype)
    _product(half_rows.mT, part.half_key, logits)
    _product((left[0] if half_grad is None else half_grad).mT, part.value, buffers[1])
    width = _width(columns, GRADIENT_COLUMNS)
    block_r, tiles = GRADIENT_TILE // width, triton.cdiv(columns, width)
    sums = lse.new_empty((3, tiles, *lse.shape))
    grid = triton.cdiv(rows, block_r), tiles, maps
    entries = (
        unit, None if half_grad is None else grad_unit, rstd, lse,
        part.column_mask, part.row_key, part.column_key, part.threshold, part.keep_scale,
    )  # fmt: skip
    row_kernels.row_sums_kernel[grid](
        logits, buffers[1], *entries, sums, *sizes, BLOCK_R=block_r, BLOCK_L=width, num_warps=GRADIENT_WARPS
    )
    row_kernels.norm_gradient_kernel[rows // channels, maps](
        sums, shift, rstd, part.count, delta, slope, offset, tokens, channels, tiles,
        BLOCK_C=triton.next_power_of_2(channels),
    )  # fmt: skip
    row_kernels.gradient_kernel[grid](
        logits, buffers[1], *buffers, *entries, delta, slope, offset, sums[0], *sizes,
        BLOCK_R=block_r, BLOCK_L=width, num_warps=GRADIENT_WARPS,
    )  # fmt: skip
    for a, b, out in zip(left, buffers, grads, strict=True):
        _product(a, b, out, accumulate=accumulate)
    parts = _pieces_product(part.key, buffers[1])
    row_kernels.finish_kernel[triton.cdiv(rows, 128), triton.cdiv(tokens, 16), maps](
        parts, sums[0], None, rstd, None, None, offset, part.count, part.mean, grad_query, tokens, channels, rows,
        len(parts), tiles, part.keep_scale, BLOCK_R=128, BLOCK_N=16,
    )  # fmt: skip
