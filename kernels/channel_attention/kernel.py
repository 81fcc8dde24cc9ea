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
from allspark_fast.kernels.channel_attention.dropout import drop_threshold
from allspark_fast.kernels.channel_attention.inputs import Inputs

# As many samples are computed at a time as fit in: forward keeps one map of their rows, backward two.
WORKSPACE_BYTES = 256 * 2**20
# Products over L have small results. They are made in pieces of about so many columns, to occupy all processors.
PIECE_COLUMNS = 4096
# Columns that a program reads at a time where it has a row to itself, and of a tile; narrow maps have fewer.
ROW_COLUMNS, TILE_COLUMNS, MIN_COLUMNS = 4096, 1024, 512
TILE_ENTRIES = 8192
WARPS = 8


class _Samples:
    """Some samples, and their keys as the products take them; row_kernels.py says what the tensors are."""

    def __init__(self, inputs: Inputs, which: slice) -> None:
        first, inputs = which.start, inputs.samples(which)
        batch, heads, self.tokens, channels = inputs.query.shape
        self.query = inputs.query.contiguous()
        self.key, self.value = (x.flatten(0, 1).contiguous() for x in (inputs.key, inputs.value))
        self.maps, _, columns = self.key.shape
        rows = batch * heads * channels // self.maps
        self.sizes = channels, rows, columns
        column_mask = None if inputs.column_mask is None else inputs.column_mask.contiguous()
        self.half_key = torch.empty_like(self.key, dtype=_half(self.key.dtype))
        self.key_unit = self.key.new_empty(self.maps, dtype=torch.float32)
        self.mean, peak, self.count = self.key_unit.new_empty((3, self.maps, self.tokens))
        row_kernels.key_statistics_kernel[(self.maps * self.tokens,)](
            self.key, column_mask, self.mean, peak, self.count, columns,
            BLOCK_L=_width(columns, ROW_COLUMNS), num_warps=WARPS,
        )  # fmt: skip
        row_kernels.half_key_kernel[triton.cdiv(self.tokens, 16), triton.cdiv(columns, 512), self.maps](
            self.key, column_mask, self.mean, peak, self.half_key, self.key_unit, self.tokens, columns,
            BLOCK_N=16, BLOCK_L=512, num_warps=WARPS,
        )  # fmt: skip
        self.mask = column_mask, inputs.seed, first * heads * channels, drop_threshold(inputs.dropout_p)
        self.keep_scale = 1 / (1 - inputs.dropout_p)
        width = _width(columns, TILE_COLUMNS)
        self.tile = {"BLOCK_R": TILE_ENTRIES // width, "BLOCK_L": width, "num_warps": WARPS}
        # One program for a tile, for a sample's rows of a map, and for a tile of results (B, H, N, C).
        self.tiles_grid = triton.cdiv(rows, self.tile["BLOCK_R"]), triton.cdiv(columns, width), self.maps
        self.samples_grid = rows // channels, self.maps
        self.results_grid = triton.cdiv(rows, 128), triton.cdiv(self.tokens, 16), self.maps

    def half_rows(self, x: Tensor, unit: Tensor, shift: Tensor | None = None) -> Tensor:
        """Return rows of the query, or of a gradient, which has no shift, in half precision; fill unit and shift."""
        channels, rows, _ = self.sizes
        mean, value_peak = self.mean, None
        if shift is None:
            mean, value_peak = None, torch.linalg.vector_norm(self.value, math.inf, (1, 2), dtype=torch.float32)
        half_rows = self.half_key.new_empty((self.maps, self.tokens, rows))
        # Sums of N products of numbers below 2 and 2 · range_factor stay within float16.
        range_factor = 2**13 / triton.next_power_of_2(self.tokens)
        row_kernels.half_rows_kernel[triton.cdiv(rows, 32), self.maps](
            x, mean, self.key_unit, value_peak, half_rows, unit, shift, self.tokens, channels, rows, range_factor,
            BLOCK_R=32, BLOCK_N=64,
        )  # fmt: skip
        return half_rows

    def rows(self, x: Tensor) -> Tensor:
        """Pack x (B, H, N, C) into (maps, N, R)."""
        x = x.reshape(-1, self.maps, *x.shape[2:])
        return x.permute(1, 2, 0, 3).reshape(self.maps, self.tokens, -1)


def _half(dtype: torch.dtype) -> torch.dtype:
    """What S is made of and stored in: bfloat16 has too few digits; over powers of two its numbers fit float16."""
    return torch.float32 if dtype == torch.float32 else torch.float16


def _width(columns: int, most: int) -> int:
    return min(most, max(MIN_COLUMNS, triton.next_power_of_2(columns)))


def _parts(inputs: Inputs, buffers: int) -> list[slice]:
    """Samples to compute at a time: as many as fit into the workspace with so many maps each, at least one."""
    batch, heads, _, channels = inputs.query.shape
    step = max(1, WORKSPACE_BYTES // (buffers * heads * channels * inputs.key.shape[3] * inputs.key.itemsize))
    return [slice(start, min(start + step, batch)) for start in range(0, batch, step)]


def _product(a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool = False) -> Tensor:
    """Set ``out`` to a b, batched, or add that to it; sums are float32, whatever the dtype of ``out``."""
    if a.device.type == "cpu":  # whose products of half precision are slow, and have no other dtype for the result
        a, b = a.float(), b.float()
    if a.dtype == out.dtype:
        return torch.baddbmm(out, a, b, beta=int(accumulate), out=out)
    if a.device.type == "cpu":
        return out.copy_(a @ b)
    if accumulate:
        return torch.baddbmm(out, a, b, out_dtype=out.dtype, out=out)
    return torch.bmm(a, b, out_dtype=out.dtype, out=out)


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


def forward(inputs: Inputs, eps: float) -> tuple[Tensor, Tensor]:
    """As ``chunked.forward``, for float16, bfloat16 and float32."""
    query = inputs.query
    output = query.new_empty(query.shape)
    statistics = query.new_empty((2, *query[:, :, 0].shape), dtype=torch.float32)
    for which in _parts(inputs, buffers=1):
        _attend(_Samples(inputs, which), eps, output[which], *statistics[:, which])
    return output, statistics


def _attend(samples: _Samples, eps: float, output: Tensor, lse: Tensor, rstd: Tensor) -> None:
    """Fill output, lse and rstd."""
    channels, rows, columns = samples.sizes
    unit, shift, maximum, squares = lse.new_empty((4, *lse.shape))
    half_rows = samples.half_rows(samples.query, unit, shift)
    probability = samples.key.new_empty((samples.maps, rows, columns))
    logits = _product(half_rows.mT, samples.half_key, probability.view(half_rows.dtype))
    row_kernels.row_statistics_kernel[rows, samples.maps](
        logits, samples.mask[0], maximum, squares, *samples.sizes,
        BLOCK_L=_width(columns, ROW_COLUMNS), num_warps=WARPS,
    )  # fmt: skip
    row_kernels.rstd_kernel[samples.samples_grid](
        squares, unit, shift, samples.count, rstd, samples.tokens, channels, eps,
        BLOCK_C=triton.next_power_of_2(channels),
    )  # fmt: skip
    sums = lse.new_empty((samples.tiles_grid[1], *lse.shape))
    row_kernels.softmax_kernel[samples.tiles_grid](
        probability, logits, unit, rstd, maximum, sums, *samples.mask, *samples.sizes, **samples.tile
    )
    parts = _pieces_product(samples.value, probability)
    row_kernels.finish_kernel[samples.results_grid](
        parts, sums, unit, rstd, maximum, lse, None, None, None, output, samples.tokens, channels, rows, len(parts),
        len(sums), samples.keep_scale, BLOCK_R=128, BLOCK_N=16,
    )  # fmt: skip


def backward(grad: Tensor, statistics: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """As ``chunked.backward``, for float16, bfloat16 and float32."""
    query, key, value, *_ = inputs
    parts, shared = _parts(inputs, buffers=2), key.shape[0] == 1
    # What several parts add to shared keys is rounded once.
    dtype = torch.float32 if shared and len(parts) > 1 else key.dtype
    grad_query = query.new_empty(query.shape)
    grad_key, grad_value = (key.new_empty(key.shape, dtype=dtype) for _ in range(2))
    for which in parts:
        own = slice(None) if shared else which
        grads = grad_query[which], grad_key[own].flatten(0, 1), grad_value[own].flatten(0, 1)
        samples, accumulate = _Samples(inputs, which), shared and which.start > 0
        _differentiate(samples, grad[which].contiguous(), *statistics[:, which], grads, accumulate=accumulate)
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


def _differentiate(
    samples: _Samples, grad_output: Tensor, lse: Tensor, rstd: Tensor, grads: tuple[Tensor, ...], *, accumulate: bool
) -> None:
    """Fill the gradients of query, key and value, or add to the last two."""
    grad_query, grad_key, grad_value = grads
    channels, rows, columns = samples.sizes
    unit, shift, delta, slope, offset = lse.new_empty((5, *lse.shape))
    half_rows = samples.half_rows(samples.query, unit, shift)
    query, grad = samples.rows(samples.query), samples.rows(grad_output)
    half_grad, grad_unit = grad, None
    if grad.dtype == torch.float16:  # the gradient of a scaled loss can be so large that dP overflows
        grad_unit = torch.empty_like(unit)
        half_grad = samples.half_rows(grad_output, grad_unit)
    probability, grad_logits = samples.key.new_empty((2, samples.maps, rows, columns))
    logits = _product(half_rows.mT, samples.half_key, probability.view(half_rows.dtype))
    _product(half_grad.mT, samples.value, grad_logits)

    sums = lse.new_empty((4, samples.tiles_grid[1], *lse.shape))
    tensors = grad_logits, probability, logits, unit, grad_unit, rstd, lse
    rest = sums, *samples.mask, samples.keep_scale, *samples.sizes
    row_kernels.gradient_kernel[samples.tiles_grid](*tensors, None, None, None, *rest, **samples.tile)
    row_kernels.norm_gradient_kernel[samples.samples_grid](
        sums, shift, rstd, samples.count, delta, slope, offset, samples.tokens, channels, sums.shape[1],
        BLOCK_C=triton.next_power_of_2(channels),
    )  # fmt: skip
    row_kernels.gradient_kernel[samples.tiles_grid](*tensors, delta, slope, offset, *rest, **samples.tile)
    _product(grad, probability, grad_value, accumulate=accumulate)
    _product(query, grad_logits, grad_key, accumulate=accumulate)
    parts = _pieces_product(samples.key, grad_logits)
    row_kernels.finish_kernel[samples.results_grid](
        parts, sums[0], None, rstd, None, None, offset, samples.count, samples.mean, grad_query, samples.tokens,
        channels, rows, len(parts), sums.shape[1], samples.keep_scale, BLOCK_R=128, BLOCK_N=16,
    )  # fmt: skip
