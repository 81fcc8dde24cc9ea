"""Channel attention by library products of whole rows, with Triton kernels between them.

With N = 289 to 1369 features in a dot product, storing an entry of the similarity map costs less than making it again.
So the matrix library makes all products, and row_kernels.py does what lies between. The norm and the gradient of
softmax need only sums over rows, which are there at once; docs/kernels.md has the derivation and the costs.

    forward     S = qᵀk                row statistics, rstd, softmax    O = v Pᵀ
    backward    S = qᵀk, dP = dOᵀv     row sums, dS                     dV = dO P, dK = q dS, dQ = k dSᵀ
"""

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
# Columns that a program reads at a time where it has whole rows; rows and columns of a tile where it has not.
ROW_COLUMNS, TILE_ROWS, TILE_COLUMNS, WARPS = 4096, 8, 512, 8


class _Samples:
    """The similarity maps of some samples; row_kernels.py says what the tensors are."""

    def __init__(self, inputs: Inputs, which: slice) -> None:
        query = self.query = inputs.query[which].contiguous()
        batch, heads, self.tokens, channels = query.shape
        own = slice(None) if inputs.key.shape[0] == 1 else which
        self.key, self.value = (x[own].flatten(0, 1).contiguous() for x in (inputs.key, inputs.value))
        self.maps, _, columns = self.key.shape
        rows = batch * heads * channels // self.maps
        self.sizes = channels, rows, columns
        self.mask = inputs.column_mask, inputs.seed, which.start * heads * channels, drop_threshold(inputs.dropout_p)
        self.keep_scale = 1 / (1 - inputs.dropout_p)
        # S is made of and stored in float16: bfloat16 has too few digits.
        dtype = torch.float32 if query.dtype == torch.float32 else torch.float16
        self.half_key = torch.empty_like(self.key, dtype=dtype)
        self.half_rows = self.half_key.new_empty((self.maps, self.tokens, rows))
        key_unit, self.mean, self.count = query.new_empty((3, self.maps, self.tokens), dtype=torch.float32)
        self.unit, self.shift = query.new_empty((2, batch, heads, channels), dtype=torch.float32)
        row_kernels.half_key_kernel[(self.maps * self.tokens,)](
            self.key, inputs.column_mask, self.half_key, key_unit, self.mean, self.count, columns,
            BLOCK_L=ROW_COLUMNS, num_warps=WARPS,
        )  # fmt: skip
        # Sums of N products of numbers below 2 and 2 · range_factor stay within float16.
        range_factor = 2**13 / triton.next_power_of_2(self.tokens)
        row_kernels.half_rows_kernel[triton.cdiv(rows, 8), self.maps](
            query, key_unit, self.mean, self.half_rows, self.unit, self.shift, self.tokens, channels, rows,
            range_factor, BLOCK_R=8, BLOCK_N=triton.next_power_of_2(self.tokens), num_warps=WARPS,
        )  # fmt: skip


def _parts(inputs: Inputs, buffers: int) -> list[slice]:
    """Samples to compute at a time: as many as fit into the workspace with so many maps each, at least one."""
    batch, heads, _, channels = inputs.query.shape
    step = max(1, WORKSPACE_BYTES // (buffers * heads * channels * inputs.key.shape[3] * inputs.key.itemsize))
    return [slice(start, min(start + step, batch)) for start in range(0, batch, step)]


def _pack_rows(x: Tensor, maps: int) -> Tensor:
    """(B, H, N, C) -> (maps, N, R): samples that share their keys are rows of one map, whose keys are read once."""
    samples = x.reshape(-1, maps, *x.shape[2:])
    return samples.permute(1, 2, 0, 3).reshape(maps, x.shape[2], -1)


def _product(a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool = False) -> Tensor:
    """Set ``out`` to a b, batched, or add that to it; sums are float32, whatever the dtype of ``out``."""
    if a.device.type == "cpu":  # whose products of half precision are slow, and have no other dtype for the result
        product = a.float() @ b.float()
        return out.copy_(out + product if accumulate else product)
    if a.dtype == out.dtype:
        return torch.baddbmm(out, a, b, beta=int(accumulate), out=out)
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
        _attend(_Samples(inputs, which), eps, output[which], statistics[:, which])
    return output, statistics


def _attend(samples: _Samples, eps: float, output: Tensor, statistics: Tensor) -> None:
    """Fill output and statistics."""
    lse, rstd = statistics
    maps, tokens, (channels, rows, columns) = samples.maps, samples.tokens, samples.sizes
    probability = samples.key.new_empty((maps, rows, columns))
    logits = _product(samples.half_rows.mT, samples.half_key, probability.view(samples.half_key.dtype))
    maximum, squares = lse.new_empty((2, *lse.shape))
    row_kernels.row_statistics_kernel[rows, maps](
        logits, samples.unit, samples.count, maximum, squares, tokens, *samples.sizes,
        BLOCK_L=ROW_COLUMNS, num_warps=WARPS,
    )  # fmt: skip
    variance = squares.mean(-1, keepdim=True) + samples.shift.var(-1, correction=0, keepdim=True)
    torch.rsqrt((variance + eps).expand_as(rstd), out=rstd)
    scale = samples.unit * rstd
    tiles = triton.cdiv(columns, TILE_COLUMNS)
    sums = lse.new_empty((tiles, *lse.shape))
    row_kernels.softmax_kernel[triton.cdiv(rows, TILE_ROWS), tiles, maps](
        probability, logits, scale, maximum, sums, *samples.mask, *samples.sizes,
        BLOCK_R=TILE_ROWS, BLOCK_L=TILE_COLUMNS, num_warps=WARPS,
    )  # fmt: skip
    parts = _pieces_product(samples.value, probability)
    row_kernels.finish_kernel[triton.cdiv(rows, 128), triton.cdiv(tokens, 16), maps](
        parts, sums.sum(0), scale, maximum, lse, None, None, None, None, output, tokens, channels, rows, len(parts),
        samples.keep_scale, BLOCK_R=128, BLOCK_N=16,
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
        accumulate = shared and which.start > 0
        _differentiate(_Samples(inputs, which), grad[which], statistics[:, which], grads, accumulate=accumulate)
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


def _differentiate(
    samples: _Samples, grad_output: Tensor, statistics: Tensor, grads: tuple[Tensor, ...], *, accumulate: bool
) -> None:
    """Fill the gradients of query, key and value, or add to the last two."""
    (lse, rstd), (grad_query, grad_key, grad_value) = statistics, grads
    maps, tokens, (channels, rows, columns) = samples.maps, samples.tokens, samples.sizes
    probability, grad_logits = samples.key.new_empty((2, maps, rows, columns))
    logits = _product(samples.half_rows.mT, samples.half_key, probability.view(samples.half_key.dtype))
    grad_output = _pack_rows(grad_output, maps)
    grad_unit, half_grad = None, grad_output
    if grad_output.dtype == torch.float16:  # the gradient of a scaled loss can be so large that dP overflows
        peak, value_peak = (x.abs().amax().float() for x in (grad_output, samples.value))
        grad_unit = (peak * (value_peak * tokens).clamp_min(1) / 2**15).clamp_min(1e-30)
        half_grad = (grad_output.float() / grad_unit).half()
    _product(half_grad.mT, samples.value, grad_logits)

    tiles = triton.cdiv(columns, TILE_COLUMNS)
    sums = lse.new_empty((4, tiles, *lse.shape))
    entries = grad_logits, probability, logits, samples.unit * rstd, grad_unit, rstd, lse, *samples.mask
    entries = *entries, samples.keep_scale, *samples.sizes, sums
    launch = row_kernels.gradient_kernel[triton.cdiv(rows, TILE_ROWS), tiles, maps]
    tile = {"BLOCK_R": TILE_ROWS, "BLOCK_L": TILE_COLUMNS, "num_warps": WARPS}
    launch(*entries, None, None, None, **tile)
    grad_sum, total, grad_dot, dot = sums.sum(1)
    # P sums to 1 but for rounding. Over its very sum, rows of dS sum to zero even where one key gets nearly all.
    delta = grad_sum / total.clamp_(min=torch.finfo(total.dtype).tiny)  # 0 / 0 where all columns are masked
    slope = torch.addcmul(grad_dot, delta, dot, value=-1).mean(-1, keepdim=True).expand_as(delta) / samples.count[0, 0]
    offset = slope * rstd * (samples.shift - samples.shift.mean(-1, keepdim=True))
    launch(*entries, delta, slope, offset, **tile)
    _product(grad_output, probability, grad_value, accumulate=accumulate)
    _product(_pack_rows(samples.query, maps), grad_logits, grad_key, accumulate=accumulate)
    parts, sums = _pieces_product(samples.key, grad_logits), sums[0].sum(0)
    row_kernels.finish_kernel[triton.cdiv(rows, 128), triton.cdiv(tokens, 16), maps](
        parts, sums, None, None, None, rstd, offset, samples.count, samples.mean, grad_query, tokens, channels, rows,
        len(parts), samples.keep_scale, BLOCK_R=128, BLOCK_N=16,
    )  # fmt: skip
