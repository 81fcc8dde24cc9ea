"""Depthwise 3x3 convolution + GELU in Triton: each kernel reads and writes the tokens once.

    _depthwise_gelu_kernel            the output
    _depthwise_gelu_backward_kernel   the gradient of the convolved map, which is recomputed, and partial sums of those
                                      of weight and bias, one for each program
    _depthwise_transposed_kernel      the gradient of the tokens, from that of the convolved map

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
# Gradients of nine weights and of the bias.
_PARTS = 10


@triton.jit
def _place(h, w, C, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return what a program computes: its image, first row, the row after its last, columns and channels."""
    # Blocks of channels and of columns share the first axis, which alone may be long.
    blocks = tl.cdiv(C, BLOCK_C)
    i_c, i_x = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    first = tl.program_id(1).to(tl.int64) * BLOCK_Y
    o_x = i_x * BLOCK_X + tl.arange(0, BLOCK_X)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    return tl.program_id(2).to(tl.int64), first, tl.minimum(first + BLOCK_Y, h), o_x, o_c


@triton.jit
def _load_weights(weight, row, o_c, C):
    """Return a row of the window, left to right, each [BC]."""
    p_weight = weight + o_c.to(tl.int64) * 9 + 3 * row
    m_c = o_c < C
    b_0 = tl.load(p_weight, mask=m_c, other=0.0).to(tl.float32)
    b_1 = tl.load(p_weight + 1, mask=m_c, other=0.0).to(tl.float32)
    b_2 = tl.load(p_weight + 2, mask=m_c, other=0.0).to(tl.float32)
    return b_0, b_1, b_2


@triton.jit
def _load_row(p_image, y, end, o_x, o_c, w, C):
    """Return the left neighbors of the tokens of a row, these, and the right ones, [BX, BC]; 0 outside [0, end)."""
    p_row = p_image + y * w * C + (o_x.to(tl.int64)[:, None] * C + o_c[None, :])
    m_row = ((o_x < w) & (y >= 0) & (y < end))[:, None] & (o_c < C)[None, :]
    b_left = tl.load(p_row - C, mask=m_row & (o_x > 0)[:, None], other=0.0)
    b_here = tl.load(p_row, mask=m_row, other=0.0)
    b_right = tl.load(p_row + C, mask=m_row & (o_x < w - 1)[:, None], other=0.0)
    return b_left, b_here, b_right


@triton.jit
def _to_float(b_left, b_here, b_right):
    return b_left.to(tl.float32), b_here.to(tl.float32), b_right.to(tl.float32)


@triton.jit
def _weigh(b_sum, b_left, b_here, b_right, b_w0, b_w1, b_w2):
    """Add to a sum what a row of tokens gives under a row of the window."""
    b_sum += b_left * b_w0[None, :]
    b_sum += b_here * b_w1[None, :]
    return b_sum + b_right * b_w2[None, :]


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
def _convolve(
    tokens,
    weight,
    bias,
    result,
    h,
    w,
    C,
    TRANSPOSED: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Convolve, with bias and GELU; or transposed, without."""
    i_b, first, last, o_x, o_c = _place(h, w, C, BLOCK_Y, BLOCK_X, BLOCK_C)
    b_bias = tl.zeros([BLOCK_X, BLOCK_C], tl.float32)
    if TRANSPOSED:
        b_w22, b_w21, b_w20 = _load_weights(weight, 0, o_c, C)
        b_w12, b_w11, b_w10 = _load_weights(weight, 1, o_c, C)
        b_w02, b_w01, b_w00 = _load_weights(weight, 2, o_c, C)
    else:
        b_w00, b_w01, b_w02 = _load_weights(weight, 0, o_c, C)
        b_w10, b_w11, b_w12 = _load_weights(weight, 1, o_c, C)
        b_w20, b_w21, b_w22 = _load_weights(weight, 2, o_c, C)
        b_bias += tl.load(bias + o_c, mask=o_c < C, other=0.0).to(tl.float32)[None, :]
    p_image = tokens + i_b * h * w * C
    p_result = result + i_b * h * w * C + (o_x.to(tl.int64)[:, None] * C + o_c[None, :])
    m_result = (o_x < w)[:, None] & (o_c < C)[None, :]
    # A row of tokens contributes to three rows of the result; the sums of two are in flight.
    end = tl.minimum(last + 1, h)
    b_left, b_here, b_right = _load_row(p_image, first - 1, end, o_x, o_c, w, C)
    b_0, b_1, b_2 = _to_float(b_left, b_here, b_right)
    b_sum = _weigh(b_bias, b_0, b_1, b_2, b_w00, b_w01, b_w02)
    b_left, b_here, b_right = _load_row(p_image, first, end, o_x, o_c, w, C)
    b_0, b_1, b_2 = _to_float(b_left, b_here, b_right)
    b_sum = _weigh(b_sum, b_0, b_1, b_2, b_w10, b_w11, b_w12)
    b_next = _weigh(b_bias, b_0, b_1, b_2, b_w00, b_w01, b_w02)
    b_left, b_here, b_right = _load_row(p_image, first + 1, end, o_x, o_c, w, C)
    for y in range(first, last):
        b_0, b_1, b_2 = _to_float(b_left, b_here, b_right)
        # Prefetch: the load overlaps with the arithmetic on this row.
        b_left, b_here, b_right = _load_row(p_image, y + 2, end, o_x, o_c, w, C)
        b_sum = _weigh(b_sum, b_0, b_1, b_2, b_w20, b_w21, b_w22)
        if not TRANSPOSED:
            b_sum = _gelu(b_sum)
        tl.store(p_result + y * w * C, b_sum.to(result.dtype.element_ty), mask=m_result)
        b_sum = _weigh(b_next, b_0, b_1, b_2, b_w10, b_w11, b_w12)
        b_next = _weigh(b_bias, b_0, b_1, b_2, b_w00, b_w01, b_w02)


@triton.jit
def _depthwise_gelu_kernel(
    tokens,  # (B, h·w, C)
    weight,  # (C, 3, 3)
    bias,  # (C,)
    output,  # (B, h·w, C)
    h,
    w,
    C,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    _convolve(tokens, weight, bias, output, h, w, C, False, BLOCK_Y, BLOCK_X, BLOCK_C)


@triton.jit
def _depthwise_transposed_kernel(
    grad_convolved,  # (B, h·w, C)
    weight,  # (C, 3, 3)
    grad_tokens,  # (B, h·w, C)
    h,
    w,
    C,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    _convolve(grad_convolved, weight, None, grad_tokens, h, w, C, True, BLOCK_Y, BLOCK_X, BLOCK_C)


@triton.jit
def _store_sums(p_parts, b_0, b_1, b_2, m_c, C):
    """Store sums over columns, for a row of the window."""
    tl.store(p_parts, tl.sum(b_0, 0), mask=m_c)
    tl.store(p_parts + C, tl.sum(b_1, 0), mask=m_c)
    tl.store(p_parts + 2 * C, tl.sum(b_2, 0), mask=m_c)


@triton.jit
def _depthwise_gelu_backward_kernel(
    tokens,  # (B, h·w, C)
    grad,  # (B, h·w, C)
    weight,  # (C, 3, 3)
    bias,  # (C,)
    grad_convolved,  # (B, h·w, C)
    parts,  # (programs of a channel, 10, C) float32: gradients of the nine weights and of the bias
    h,
    w,
    C,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    i_b, first, last, o_x, o_c = _place(h, w, C, BLOCK_Y, BLOCK_X, BLOCK_C)
    b_w00, b_w01, b_w02 = _load_weights(weight, 0, o_c, C)
    b_w10, b_w11, b_w12 = _load_weights(weight, 1, o_c, C)
    b_w20, b_w21, b_w22 = _load_weights(weight, 2, o_c, C)
    b_zero = tl.zeros([BLOCK_X, BLOCK_C], tl.float32)
    b_bias = b_zero + tl.load(bias + o_c, mask=o_c < C, other=0.0).to(tl.float32)[None, :]
    b_g00, b_g01, b_g02, b_g10, b_g11, b_g12 = b_zero, b_zero, b_zero, b_zero, b_zero, b_zero
    b_g20, b_g21, b_g22, b_g = b_zero, b_zero, b_zero, b_zero
    p_image = tokens + i_b * h * w * C
    o_image = i_b * h * w * C + (o_x.to(tl.int64)[:, None] * C + o_c[None, :])
    m_image = (o_x < w)[:, None] & (o_c < C)[None, :]
    # All tokens under the window, as rows above, here and below.
    end = tl.minimum(last + 1, h)
    b_left, b_here, b_right = _load_row(p_image, first - 1, end, o_x, o_c, w, C)
    b_00, b_01, b_02 = _to_float(b_left, b_here, b_right)
    b_left, b_here, b_right = _load_row(p_image, first, end, o_x, o_c, w, C)
    b_10, b_11, b_12 = _to_float(b_left, b_here, b_right)
    b_left, b_here, b_right = _load_row(p_image, first + 1, end, o_x, o_c, w, C)
    b_grad = tl.load(grad + first * w * C + o_image, mask=m_image, other=0.0)
    for y in range(first, last):
        b_20, b_21, b_22 = _to_float(b_left, b_here, b_right)
        b_d = b_grad.to(tl.float32)
        # Prefetch: the loads overlap with the arithmetic on this row.
        b_left, b_here, b_right = _load_row(p_image, y + 2, end, o_x, o_c, w, C)
        b_grad = tl.load(grad + (y + 1) * w * C + o_image, mask=m_image & (y + 1 < last), other=0.0)
        b_x = _weigh(b_bias, b_00, b_01, b_02, b_w00, b_w01, b_w02)
        b_x = _weigh(b_x, b_10, b_11, b_12, b_w10, b_w11, b_w12)
        b_x = _weigh(b_x, b_20, b_21, b_22, b_w20, b_w21, b_w22)
        b_d *= _gelu_derivative(b_x)
        tl.store(grad_convolved + y * w * C + o_image, b_d.to(grad_convolved.dtype.element_ty), mask=m_image)
        b_g += b_d
        b_g00 += b_d * b_00
        b_g01 += b_d * b_01
        b_g02 += b_d * b_02
        b_g10 += b_d * b_10
        b_g11 += b_d * b_11
        b_g12 += b_d * b_12
        b_g20 += b_d * b_20
        b_g21 += b_d * b_21
        b_g22 += b_d * b_22
        b_00, b_01, b_02 = b_10, b_11, b_12
        b_10, b_11, b_12 = b_20, b_21, b_22
    i_yx = (i_b * tl.num_programs(1) + tl.program_id(1)) * tl.cdiv(w, BLOCK_X) + tl.program_id(0) // tl.cdiv(C, BLOCK_C)
    p_parts = parts + i_yx * 10 * C + o_c
    m_c = o_c < C
    _store_sums(p_parts, b_g00, b_g01, b_g02, m_c, C)
    _store_sums(p_parts + 3 * C, b_g10, b_g11, b_g12, m_c, C)
    _store_sums(p_parts + 6 * C, b_g20, b_g21, b_g22, m_c, C)
    tl.store(p_parts + 9 * C, tl.sum(b_g, 0), mask=m_c)


def forward(tokens: Tensor, weight: Tensor, bias: Tensor, size: tuple[int, int]) -> Tensor:
    """Compute ``reference.forward`` for float16, bfloat16 and float32, with the weights in any of them."""
    output = torch.empty(tokens.shape, dtype=tokens.dtype, device=tokens.device)
    if output.numel():
        _depthwise_gelu_kernel[_grid(output, size)](
            tokens.contiguous(), weight.contiguous(), bias.contiguous(), output, *size, output.shape[2], **_TILE
        )
    return output


def backward(
    grad: Tensor, tokens: Tensor, weight: Tensor, bias: Tensor, size: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``reference.backward`` for float16, bfloat16 and float32, with the weights in any of them."""
    channels = tokens.shape[2]
    grad_convolved = torch.empty(tokens.shape, dtype=tokens.dtype, device=tokens.device)
    grad_tokens = torch.empty_like(grad_convolved)
    if not grad_tokens.numel():
        return grad_tokens, torch.zeros_like(weight), torch.zeros_like(bias)
    grid = _grid(tokens, size)
    blocks = grid[2] * grid[1] * triton.cdiv(size[1], _TILE["BLOCK_X"])
    parts = torch.empty((blocks, _PARTS, channels), dtype=torch.float32, device=tokens.device)
    weight = weight.contiguous()
    _depthwise_gelu_backward_kernel[grid](
        tokens.contiguous(),
        grad.contiguous(),
        weight,
        bias.contiguous(),
        grad_convolved,
        parts,
        *size,
        channels,
        **_TILE,
    )
    _depthwise_transposed_kernel[grid](grad_convolved, weight, grad_tokens, *size, channels, **_TILE)
    sums = parts.sum(0)
    grad_weight = sums[:-1].mT.contiguous().view(weight.shape).to(weight.dtype)
    return grad_tokens, grad_weight, sums[-1].to(bias.dtype, copy=True)


def _grid(tokens: Tensor, size: tuple[int, int]) -> tuple[int, int, int]:
    tiles = triton.cdiv(tokens.shape[2], _TILE["BLOCK_C"]) * triton.cdiv(size[1], _TILE["BLOCK_X"])
    return tiles, triton.cdiv(size[0], _TILE["BLOCK_Y"]), tokens.shape[0]
