"""Upsampling + argmax in Triton: one pass over the classes of every output pixel, by an online softmax."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from allspark_fast.kernels.bilinear_triton import load_upsampled

_PIXELS = 64
_CLASSES = 8


@triton.jit
def _argmax_kernel(
    logits,  # (B, K, h, w)
    labels,  # (B, H, W) int64
    confidence,  # (B, H, W) float32
    sizes,  # K, h, w, H, W
    strides,  # of the logits
    BLOCK_X: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    K, _, _, H, W = sizes
    i_x, i_y, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    o_x = (i_x * BLOCK_X + tl.arange(0, BLOCK_X)).to(tl.int64)
    m_x = o_x < W
    b_top = tl.full([BLOCK_X], float("-inf"), tl.float32)
    b_label = tl.zeros([BLOCK_X], tl.int32)
    b_nan = tl.zeros([BLOCK_X], tl.int32) + K  # the first class that is NaN
    b_sum = tl.zeros([BLOCK_X], tl.float32)
    for k in range(0, K, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        m_xk = m_x[:, None] & (o_k < K)[None, :]
        b_logits = load_upsampled(logits, i_b, i_y, o_x, o_k, m_xk, sizes, strides)  # [BX, BK]
        m_number = b_logits <= float("inf")  # false for NaN
        b_nan = tl.minimum(b_nan, tl.min(tl.where(m_number, K, o_k[None, :]), 1))
        b_logits = tl.where(m_xk & m_number, b_logits, float("-inf"))
        b_maximum = tl.max(b_logits, 1)
        b_first = tl.min(tl.where(b_logits == b_maximum[:, None], o_k[None, :], K), 1)
        b_label = tl.where(b_maximum > b_top, b_first, b_label)
        b_maximum = tl.maximum(b_maximum, b_top)
        b_shift = tl.where(b_maximum == float("-inf"), 0.0, b_maximum)
        b_sum = b_sum * tl.exp(b_top - b_shift) + tl.sum(tl.exp(b_logits - b_shift[:, None]), 1)
        b_top = b_maximum
    o_pixel = (i_b * H + i_y) * W + o_x
    m_nan = b_nan < K
    tl.store(labels + o_pixel, tl.where(m_nan, b_nan, b_label).to(tl.int64), mask=m_x)
    tl.store(confidence + o_pixel, tl.where(m_nan | (b_sum == 0.0), float("nan"), 1.0 / b_sum), mask=m_x)


def upsample_argmax(logits: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Compute ``reference.upsample_argmax`` for float16, bfloat16 and float32."""
    batch = logits.shape[0]
    labels = torch.empty((batch, *size), dtype=torch.int64, device=logits.device)
    confidence = torch.empty(labels.shape, dtype=torch.float32, device=logits.device)
    if batch:
        _argmax_kernel[triton.cdiv(size[1], _PIXELS), size[0], batch](
            logits, labels, confidence, (*logits.shape[1:], *size), logits.stride(), BLOCK_X=_PIXELS, BLOCK_K=_CLASSES
        )
    return labels, confidence
