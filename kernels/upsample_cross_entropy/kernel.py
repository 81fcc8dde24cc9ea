"""Upsampling with cross-entropy or argmax in Triton: one pass over the classes of every pixel, and a gather backward.

    _cross_entropy_kernel            pixels of an output row: loss and log-sum-exp, by an online softmax
    _cross_entropy_backward_kernel   cells of a source row: sums over the output pixels that they contribute to
    _argmax_kernel                   pixels of an output row: label and its probability, by an online softmax

Backward computes the softmax of a pixel from its log-sum-exp. Every address is written by one program, so results are
deterministic. Resizing is bilinear with align_corners=False.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Larger tiles spill registers: addresses take 64 bits.
_PIXELS = 64
_CELLS = 32
_CLASSES = 8


@triton.jit
def _linear_taps(o_x, source, target):
    """Return the source positions before and after output position ``o_x`` (int64), and the weight of the latter."""
    b_position = tl.maximum((2 * o_x + 1) * source - target, 0)
    b_before = b_position // (2 * target)
    b_weight = (b_position % (2 * target)).to(tl.float32) / (2.0 * target)
    return b_before, tl.minimum(b_before + 1, source - 1), b_weight


@triton.jit
def _load_upsampled(logits, i_b, i_y, o_x, o_k, m_xk, sizes, strides):
    """Return upsampled logits [BX, BK] of output row ``i_y``, in float32; 0 where masked.

    Sizes are (K, h, w, H, W), strides those of the logits (B, K, h, w).
    """
    _, h, w, H, W = sizes
    stride_b, stride_k, stride_h, stride_w = strides
    y_before, y_after, b_fy = _linear_taps(i_y, h, H)
    x_before, x_after, b_fx = _linear_taps(o_x, w, W)
    p_classes = logits + i_b * stride_b + o_k[None, :].to(tl.int64) * stride_k
    p_before, p_after = p_classes + x_before[:, None] * stride_w, p_classes + x_after[:, None] * stride_w
    b_before = _load_between(p_before, y_before * stride_h, y_after * stride_h, b_fy, m_xk)
    b_after = _load_between(p_after, y_before * stride_h, y_after * stride_h, b_fy, m_xk)
    return b_before * (1.0 - b_fx)[:, None] + b_after * b_fx[:, None]


@triton.jit
def _load_between(pointers, before, after, weight, mask):
    """Load from two source rows and interpolate between them, in float32; 0 where masked."""
    b_before = tl.load(pointers + before, mask=mask, other=0.0).to(tl.float32)
    b_after = tl.load(pointers + after, mask=mask, other=0.0).to(tl.float32)
    return b_before * (1.0 - weight) + b_after * weight


@triton.jit
def _first_output(i, source, target):
    """Return the first output position that lies after source position ``i - 1``, or ``target`` (int64)."""
    # (2x + 1) * source - target > 2 * target * (i - 1)
    b_numerator = (2 * i - 1) * target - source
    return tl.minimum(tl.where(b_numerator < 0, 0, b_numerator // (2 * source) + 1), target)


@triton.jit
def _cross_entropy_kernel(
    logits, target, loss, lse, ignore_index, sizes, strides, BLOCK_X: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Logits (B, K, h, w) of any strides, target, loss and lse (B, H, W); sizes are (K, h, w, H, W)."""
    K, _, _, H, W = sizes
    i_x, i_y, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    o_x = (i_x * BLOCK_X + tl.arange(0, BLOCK_X)).to(tl.int64)
    m_x = o_x < W
    o_pixel = (i_b * H + i_y) * W + o_x
    b_target = tl.load(target + o_pixel, mask=m_x, other=0)
    b_maximum = tl.full([BLOCK_X], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_X], tl.float32)
    b_logit = tl.zeros([BLOCK_X], tl.float32)  # of the target
    for k in range(0, K, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        m_xk = m_x[:, None] & (o_k < K)[None, :]
        b_logits = _load_upsampled(logits, i_b, i_y, o_x, o_k, m_xk, sizes, strides)  # [BX, BK]
        b_logit += tl.sum(tl.where(o_k[None, :] == b_target[:, None], b_logits, 0.0), 1)
        b_logits = tl.where(m_xk, b_logits, float("-inf"))
        b_new = tl.maximum(b_maximum, tl.max(b_logits, 1))
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_sum = b_sum * tl.exp(b_maximum - b_shift) + tl.sum(tl.exp(b_logits - b_shift[:, None]), 1)
        b_maximum = b_new
    b_lse = b_maximum + tl.log(b_sum)
    m_ignored = b_target == ignore_index
    # A kernel cannot raise: a target that is no class gives NaN, also in the gradient.
    b_lse = tl.where(m_ignored | ((b_target >= 0) & (b_target < K)), b_lse, float("nan"))
    tl.store(lse + o_pixel, b_lse, mask=m_x)
    tl.store(loss + o_pixel, tl.where(m_ignored, 0.0, b_lse - b_logit), mask=m_x)


@triton.jit(do_not_specialize=["reach"])
def _cross_entropy_backward_kernel(
    logits, grad, target, lse, grad_logits, ignore_index, sizes, reach, strides, grad_strides,
    BLOCK_X: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """As above; grad (B, H, W) is that of the loss, and a cell contributes to ``reach`` output columns at most."""
    K, h, w, H, W = sizes
    stride_b, stride_k, stride_h, stride_w = strides
    # Blocks of classes and of cells share the first axis, which alone may be long.
    blocks = tl.cdiv(w, BLOCK_X)
    i_x, i_k = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    i_y, i_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    o_x = (i_x * BLOCK_X + tl.arange(0, BLOCK_X)).to(tl.int64)
    o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
    m_x = o_x < w
    m_xk = m_x[:, None] & (o_k < K)[None, :]
    p_classes = logits + i_b * stride_b + o_k[None, :].to(tl.int64) * stride_k
    p_left = p_classes + tl.maximum(o_x - 1, 0)[:, None] * stride_w
    p_here = p_classes + o_x[:, None] * stride_w
    p_right = p_classes + tl.minimum(o_x + 1, w - 1)[:, None] * stride_w
    o_first, o_last = _first_output(o_x, w, W), _first_output(o_x + 2, w, W)
    # Distance of the first pixel from the cell to the left, in units of 1 / 2W; the next pixels are 2w apart.
    b_first = ((2 * o_first + 1) * w - W - (o_x - 1) * 2 * W).to(tl.int32)
    o_first, o_last = o_first.to(tl.int32), o_last.to(tl.int32)
    b_least = tl.where(o_x == 0, 2 * W, 0)
    b_grad_logits = tl.zeros([BLOCK_X, BLOCK_K], tl.float32)
    for y in range(_first_output(i_y, h, H), _first_output(i_y + 2, h, H)):
        y_before, y_after, b_fy = _linear_taps(y, h, H)
        # At the border both are this row.
        b_wy = tl.where(y_before == i_y, 1.0 - b_fy, 0.0) + tl.where(y_after == i_y, b_fy, 0.0)
        b_left = _load_between(p_left, y_before * stride_h, y_after * stride_h, b_fy, m_xk)
        b_here = _load_between(p_here, y_before * stride_h, y_after * stride_h, b_fy, m_xk)
        b_right = _load_between(p_right, y_before * stride_h, y_after * stride_h, b_fy, m_xk)
        for i in range(reach):
            b_x = o_first + i
            m_pixel = m_x & (b_x < o_last)
            o_pixel = (i_b * H + y) * W + b_x
            b_target = tl.load(target + o_pixel, mask=m_pixel, other=0)
            b_lse = tl.load(lse + o_pixel, mask=m_pixel, other=0.0)
            b_grad = tl.load(grad + o_pixel, mask=m_pixel, other=0.0)
            b_behind = tl.maximum(b_first + 2 * w * i, b_least)
            m_right = b_behind >= 2 * W
            b_fx = tl.where(m_right, b_behind - 2 * W, b_behind).to(tl.float32) / (2.0 * W)
            b_wx = tl.where(m_right, tl.where(o_x < w - 1, 1.0 - b_fx, 1.0), b_fx)
            b_logits = tl.where(m_right[:, None], b_here, b_left) * (1.0 - b_fx)[:, None]
            b_logits += tl.where(m_right[:, None], b_right, b_here) * b_fx[:, None]
            b_softmax = tl.exp(b_logits - b_lse[:, None])
            b_onehot = (o_k[None, :] == b_target[:, None]).to(tl.float32)
            m_pixel &= b_target != ignore_index
            b_weight = tl.where(m_pixel, b_grad * b_wx * b_wy, 0.0)
            b_grad_logits += tl.where(m_pixel[:, None], (b_softmax - b_onehot) * b_weight[:, None], 0.0)
    stride_b, stride_k, stride_h, stride_w = grad_strides
    p_grad = grad_logits + i_b * stride_b + o_k[None, :].to(tl.int64) * stride_k
    p_grad += i_y * stride_h + o_x[:, None] * stride_w
    tl.store(p_grad, b_grad_logits.to(grad_logits.dtype.element_ty), mask=m_xk)


@triton.jit
def _argmax_kernel(logits, labels, confidence, sizes, strides, BLOCK_X: tl.constexpr, BLOCK_K: tl.constexpr):
    """Logits (B, K, h, w) of any strides, labels and confidence (B, H, W); sizes are (K, h, w, H, W)."""
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
        b_logits = _load_upsampled(logits, i_b, i_y, o_x, o_k, m_xk, sizes, strides)  # [BX, BK]
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


def forward(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Compute ``chunked.forward`` for float16, bfloat16 and float32; a target that is no class gives NaN."""
    loss = torch.empty(target.shape, dtype=torch.float32, device=logits.device)
    lse = torch.empty_like(loss)
    if logits.shape[0]:
        grid = triton.cdiv(target.shape[2], _PIXELS), target.shape[1], logits.shape[0]
        tensors = logits, target.contiguous(), loss, lse
        sizes = *logits.shape[1:], *target.shape[1:]
        _cross_entropy_kernel[grid](*tensors, ignore_index, sizes, logits.stride(), BLOCK_X=_PIXELS, BLOCK_K=_CLASSES)
    return loss, lse


def backward(grad: Tensor, logits: Tensor, target: Tensor, lse: Tensor, ignore_index: int) -> Tensor:
    """Compute ``chunked.backward`` for float16, bfloat16 and float32."""
    batch, classes, height, width = logits.shape
    grad_logits = torch.empty_like(logits)
    if batch:
        grid = triton.cdiv(width, _CELLS) * triton.cdiv(classes, _CLASSES), height, batch
        tensors = logits, grad.contiguous(), target.contiguous(), lse, grad_logits
        sizes, reach = (classes, height, width, *target.shape[1:]), 2 * target.shape[2] // width + 1
        scalars = ignore_index, sizes, reach, logits.stride(), grad_logits.stride()
        _cross_entropy_backward_kernel[grid](*tensors, *scalars, BLOCK_X=_CELLS, BLOCK_K=_CLASSES)
    return grad_logits


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
