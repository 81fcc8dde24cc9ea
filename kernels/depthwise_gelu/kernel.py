"""Depthwise 3x3 convolution + GELU in Triton: each kernel reads and writes the tokens once.

    _depthwise_gelu_kernel            the output; or, transposed, the gradient of the tokens
    _depthwise_gelu_backward_kernel   the gradient of the convolved map, which is recomputed, and partial sums of those
                                      of weight and bias, one for each program

A program has a tile of columns and channels and walks down the map. It loads each token three times, as left neighbor,
center and right neighbor, of which only the first load misses the cache; rows above and below stay in registers. Every
address is written by one program, and partial sums are added in a fixed order, so results are deterministic.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows, columns and channels of a program's tile, computed row by row. Hidden channels of Mix-FFNs are multiples
# of 64; no target of tests/kernels/test_compile_targets.py spills registers at this size.
_TILE = {"BLOCK_Y": 16, "BLOCK_X": 8, "BLOCK_C": 64}


@triton.jit
def _tile(h, w, C, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return where a program's image begins, its first row, the row after its last, columns and channels."""
    # Blocks of channels and of columns share the first axis, which alone may be long.
    blocks = tl.cdiv(C, BLOCK_C)
    i_c, i_x = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    first = tl.program_id(1).to(tl.int64) * BLOCK_Y
    o_x = i_x * BLOCK_X + tl.arange(0, BLOCK_X)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    return tl.program_id(2).to(tl.int64) * h * w * C, first, tl.minimum(first + BLOCK_Y, h), o_x, o_c


@triton.jit
def _load_weights(weight, row, o_c, C, TRANSPOSED: tl.constexpr):
    """Return a row of the window, left to right, each [1, BC]; of the window turned around if transposed."""
    first, step = (8 - 3 * row, -1) if TRANSPOSED else (3 * row, 1)
    p_weight = weight + (o_c.to(tl.int64) * 9 + first)[None, :]
    m_c = (o_c < C)[None, :]
    b_0 = tl.load(p_weight, mask=m_c, other=0.0).to(tl.float32)
    b_1 = tl.load(p_weight + step, mask=m_c, other=0.0).to(tl.float32)
    return b_0, b_1, tl.load(p_weight + 2 * step, mask=m_c, other=0.0).to(tl.float32)


@triton.jit
def _load_row(image, y, end, o_x, o_c, w, C):
    """Return the left neighbors of the tokens of a row, these, and the right ones, [BX, BC]; 0 outside [0, end)."""
    p_row = image + y * w * C + (o_x.to(tl.int64)[:, None] * C + o_c[None, :])
    m_row = ((o_x < w) & (y >= 0) & (y < end))[:, None] & (o_c < C)[None, :]
    b_left = tl.load(p_row - C, mask=m_row & (o_x > 0)[:, None], other=0.0)
    b_here = tl.load(p_row, mask=m_row, other=0.0)
    b_right = tl.load(p_row + C, mask=m_row & (o_x < w - 1)[:, None], other=0.0)
    return b_left.to(tl.float32), b_here.to(tl.float32), b_right.to(tl.float32)


@triton.jit
def _weigh(b_sum, row, weights):
    """Add to a sum what a row of tokens gives under a row of the window."""
    return b_sum + row[0] * weights[0] + row[1] * weights[1] + row[2] * weights[2]


@triton.jit
def _add_products(sums, b_grad, row):
    """Add to the gradients of a row of the window."""
    return sums[0] + b_grad * row[0], sums[1] + b_grad * row[1], sums[2] + b_grad * row[2]


@triton.jit
def _normal_tail(b_x):
    """Return the tail of the normal distribution beyond |x|, erfc(|x| / √2) / 2; its logarithm is nearly a parabola.

    The polynomial is a weighted minimax fit on [0, 6.5], beyond which the tail is below 1e-10. The error of GELU
    is 2.5e-7 at most, that of torch in float32 3.7e-7; erf takes three times as many instructions.
    """
    b_a = tl.abs(b_x)
    b_log2 = -2.33494893e-6 * b_a + 3.37378151e-5
    b_log2 = b_log2 * b_a - 1.61293836e-4
    b_log2 = b_log2 * b_a - 1.91703541e-4
    b_log2 = b_log2 * b_a + 7.12686498e-3
    b_log2 = b_log2 * b_a - 5.25336117e-2
    b_log2 = b_log2 * b_a - 4.59198296e-1
    b_log2 = b_log2 * b_a - 1.151106
    return tl.exp2(b_log2 * b_a - 1.0)


@triton.jit
def _gelu(b_x):
    return tl.maximum(b_x, 0.0) - tl.abs(b_x) * _normal_tail(b_x)


@triton.jit
def _gelu_derivative(b_x):
    b_tail = _normal_tail(b_x)
    # The density is exp(-x² / 2) / √(2π).
    b_density = 0.3989422804014327 * tl.exp2(-0.7213475204444817 * b_x * b_x)
    return tl.where(b_x < 0.0, b_tail, 1.0 - b_tail) + b_x * b_density


@triton.jit
def _depthwise_gelu_kernel(
    tokens, weight, bias, result, h, w, C,
    TRANSPOSED: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Tokens and result (B, h·w, C), weight (C, 3, 3), bias (C,); transposed without bias and GELU."""
    o_image, first, last, o_x, o_c = _tile(h, w, C, BLOCK_Y, BLOCK_X, BLOCK_C)
    image, end = tokens + o_image, tl.minimum(last + 1, h)
    above = _load_weights(weight, 0, o_c, C, TRANSPOSED)
    level = _load_weights(weight, 1, o_c, C, TRANSPOSED)
    below = _load_weights(weight, 2, o_c, C, TRANSPOSED)
    b_bias = tl.zeros([BLOCK_X, BLOCK_C], tl.float32)
    if not TRANSPOSED:
        b_bias += tl.load(bias + o_c, mask=o_c < C, other=0.0).to(tl.float32)[None, :]
    p_result = result + o_image + (o_x.to(tl.int64)[:, None] * C + o_c[None, :])
    m_result = (o_x < w)[:, None] & (o_c < C)[None, :]
    # A row of tokens contributes to three rows of the result; the sums of two are in flight.
    b_sum = _weigh(b_bias, _load_row(image, first - 1, end, o_x, o_c, w, C), above)
    row = _load_row(image, first, end, o_x, o_c, w, C)
    b_sum, b_next = _weigh(b_sum, row, level), _weigh(b_bias, row, above)
    row = _load_row(image, first + 1, end, o_x, o_c, w, C)
    for y in range(first, last):
        following = _load_row(image, y + 2, end, o_x, o_c, w, C)  # overlaps with the arithmetic on this row
        b_sum = _weigh(b_sum, row, below)
        if not TRANSPOSED:
            b_sum = _gelu(b_sum)
        tl.store(p_result + y * w * C, b_sum.to(result.dtype.element_ty), mask=m_result)
        b_sum, b_next = _weigh(b_next, row, level), _weigh(b_bias, row, above)
        row = following


@triton.jit
def _depthwise_gelu_backward_kernel(
    tokens, grad, weight, bias, grad_convolved, parts, h, w, C,
    BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Parts (programs of a channel, 10 · C) float32 are gradients, laid out as weight (C, 3, 3), then bias (C,)."""
    o_image, first, last, o_x, o_c = _tile(h, w, C, BLOCK_Y, BLOCK_X, BLOCK_C)
    image, end = tokens + o_image, tl.minimum(last + 1, h)
    w_above = _load_weights(weight, 0, o_c, C, False)
    w_level = _load_weights(weight, 1, o_c, C, False)
    w_below = _load_weights(weight, 2, o_c, C, False)
    b_zero = tl.zeros([BLOCK_X, BLOCK_C], tl.float32)
    b_bias = b_zero + tl.load(bias + o_c, mask=o_c < C, other=0.0).to(tl.float32)[None, :]
    b_sum, zeros = b_zero, (b_zero, b_zero, b_zero)
    g_above, g_level, g_below = zeros, zeros, zeros
    o_image += o_x.to(tl.int64)[:, None] * C + o_c[None, :]
    m_image = (o_x < w)[:, None] & (o_c < C)[None, :]
    above = _load_row(image, first - 1, end, o_x, o_c, w, C)
    level = _load_row(image, first, end, o_x, o_c, w, C)
    below = _load_row(image, first + 1, end, o_x, o_c, w, C)
    b_grad = tl.load(grad + first * w * C + o_image, mask=m_image, other=0.0).to(tl.float32)
    for y in range(first, last):
        # Both overlap with the arithmetic on this row.
        following = _load_row(image, y + 2, end, o_x, o_c, w, C)
        b_following = tl.load(grad + (y + 1) * w * C + o_image, mask=m_image & (y + 1 < last), other=0.0)
        b_x = _weigh(_weigh(_weigh(b_bias, above, w_above), level, w_level), below, w_below)
        b_grad *= _gelu_derivative(b_x)
        tl.store(grad_convolved + y * w * C + o_image, b_grad.to(grad_convolved.dtype.element_ty), mask=m_image)
        b_sum += b_grad
        g_above = _add_products(g_above, b_grad, above)
        g_level = _add_products(g_level, b_grad, level)
        g_below = _add_products(g_below, b_grad, below)
        above, level, below, b_grad = level, below, following, b_following.to(tl.float32)
    i_yx = (tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * tl.cdiv(w, BLOCK_X)
    p_parts = parts + (i_yx + tl.program_id(0) // tl.cdiv(C, BLOCK_C)) * 10 * C
    for i in tl.static_range(3):
        tl.store(p_parts + o_c * 9 + i, tl.sum(g_above[i], 0), mask=o_c < C)
        tl.store(p_parts + o_c * 9 + 3 + i, tl.sum(g_level[i], 0), mask=o_c < C)
        tl.store(p_parts + o_c * 9 + 6 + i, tl.sum(g_below[i], 0), mask=o_c < C)
    tl.store(p_parts + 9 * C + o_c, tl.sum(b_sum, 0), mask=o_c < C)


def forward(tokens: Tensor, weight: Tensor, bias: Tensor, size: tuple[int, int]) -> Tensor:
    """Compute ``reference.forward`` for float16, bfloat16 and float32, with the weights in any of them."""
    return _convolved(tokens.contiguous(), weight.contiguous(), bias.contiguous(), size)


def backward(
    grad: Tensor, tokens: Tensor, weight: Tensor, bias: Tensor, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Compute ``reference.backward`` for float16, bfloat16 and float32, with the weights in any of them."""
    channels = tokens.shape[2]
    grad_convolved = torch.empty(tokens.shape, dtype=tokens.dtype, device=tokens.device)
    grid = _grid(tokens, size)
    blocks = grid[2] * grid[1] * triton.cdiv(size[1], _TILE["BLOCK_X"])
    parts = torch.empty((blocks, 10 * channels), dtype=torch.float32, device=tokens.device)
    inputs = [x.contiguous() for x in (tokens, grad, weight, bias)]
    _depthwise_gelu_backward_kernel[grid](*inputs, grad_convolved, parts, *size, channels, **_TILE)
    grad_parameters = parts.sum(0).to(torch.promote_types(weight.dtype, bias.dtype))
    return _convolved(grad_convolved, weight.contiguous(), None, size), grad_parameters


def _convolved(tokens: Tensor, weight: Tensor, bias: Tensor | None, size: tuple[int, int]) -> Tensor:
    """Convolve, with bias and GELU; or, without a bias, transposed."""
    result = torch.empty_like(tokens)
    sizes = *size, tokens.shape[2], bias is None
    _depthwise_gelu_kernel[_grid(tokens, size)](tokens, weight, bias, result, *sizes, **_TILE)
    return result


def _grid(tokens: Tensor, size: tuple[int, int]) -> tuple[int, int, int]:
    tiles = triton.cdiv(tokens.shape[2], _TILE["BLOCK_C"]) * triton.cdiv(size[1], _TILE["BLOCK_X"])
    return tiles, triton.cdiv(size[0], _TILE["BLOCK_Y"]), tokens.shape[0]
