"""Bilinear resizing in Triton, with align_corners=False."""

import triton
import triton.language as tl


@triton.jit
def linear_taps(o_x, source, target):
    """Return the source positions before and after output position ``o_x`` (int64), and the weight of the latter."""
    b_position = tl.maximum((2 * o_x + 1) * source - target, 0)
    b_before = b_position // (2 * target)
    b_weight = (b_position % (2 * target)).to(tl.float32) / (2.0 * target)
    return b_before, tl.minimum(b_before + 1, source - 1), b_weight


@triton.jit
def load_upsampled(logits, i_b, i_y, o_x, o_k, m_xk, sizes, strides):
    """Return upsampled logits [BX, BK] of output row ``i_y``, in float32; 0 where masked.

    Sizes are (K, h, w, H, W), strides those of the logits (B, K, h, w).
    """
    _, h, w, H, W = sizes
    stride_b, stride_k, stride_h, stride_w = strides
    y_before, y_after, b_fy = linear_taps(i_y, h, H)
    x_before, x_after, b_fx = linear_taps(o_x, w, W)
    p_classes = logits + i_b * stride_b + o_k[None, :].to(tl.int64) * stride_k
    p_before, p_after = p_classes + x_before[:, None] * stride_w, p_classes + x_after[:, None] * stride_w
    b_before = load_between(p_before, y_before * stride_h, y_after * stride_h, b_fy, m_xk)
    b_after = load_between(p_after, y_before * stride_h, y_after * stride_h, b_fy, m_xk)
    return b_before * (1.0 - b_fx)[:, None] + b_after * b_fx[:, None]


@triton.jit
def load_between(pointers, before, after, weight, mask):
    """Load from two source rows and interpolate between them, in float32; 0 where masked."""
    b_before = tl.load(pointers + before, mask=mask, other=0.0).to(tl.float32)
    b_after = tl.load(pointers + after, mask=mask, other=0.0).to(tl.float32)
    return b_before * (1.0 - weight) + b_after * weight


@triton.jit
def first_output(i, source, target):
    """Return the first output position that lies after source position ``i - 1``, or ``target`` (int64)."""
    # (2x + 1) * source - target > 2 * target * (i - 1)
    b_numerator = (2 * i - 1) * target - source
    return tl.minimum(tl.where(b_numerator < 0, 0, b_numerator // (2 * source) + 1), target)
