"""Upsample, then argmax, with logits of the full resolution in memory."""

from torch import Tensor
from torch.nn.functional import interpolate


def upsample_argmax(logits: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return labels (B, H, W) int64 and their softmax probability (B, H, W) for logits (B, K, h, w)."""
    full = interpolate(logits, size, mode="bilinear", align_corners=False)
    top, labels = full.max(1)
    return labels, (top - full.logsumexp(1)).exp()
