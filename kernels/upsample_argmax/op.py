"""Public function and registration of upsampling + argmax."""

import torch
from torch import Tensor

from allspark_fast.kernels.arguments import FLOATING, check_not_empty, check_size, check_tensor
from allspark_fast.kernels.triton_support import implementation
from allspark_fast.kernels.upsample_argmax import chunked


def upsample_argmax(logits: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Label every pixel by logits that are first upsampled bilinearly (align_corners=False).

    Args:
        logits: (B, K, h, w), any float dtype and strides; half precision is computed in float32.
        size: (H, W) of the labels, in pixels.

    Returns:
        labels (B, H, W) int64, the first maximum over K, and confidence (B, H, W), the softmax probability of the
        label; float32 (float64 for float64 logits). No gradient flows. Pixels with a NaN have the first NaN's class
        and a NaN confidence.

    Raises:
        TypeError: ``logits`` is not a float tensor, or ``size`` not a pair of integers.
        ValueError: a shape or size is wrong.
    """
    check_tensor("logits", logits, "(B, K, h, w)", FLOATING)
    check_not_empty("logits", logits, {"K": 1, "h": 2, "w": 3})
    check_size("size", size)
    return _upsample_argmax(logits.detach(), list(size))


@torch.library.custom_op("allspark_fast::upsample_argmax", mutates_args=())
def _upsample_argmax(logits: Tensor, size: list[int]) -> tuple[Tensor, Tensor]:
    with torch.cuda.device_of(logits):
        return implementation(chunked, logits).upsample_argmax(logits, (size[0], size[1]))


@_upsample_argmax.register_fake
def _(logits: Tensor, size: list[int]) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], *size)
    confidence = logits.new_empty(shape, dtype=torch.promote_types(logits.dtype, torch.float32))
    return logits.new_empty(shape, dtype=torch.int64), confidence
