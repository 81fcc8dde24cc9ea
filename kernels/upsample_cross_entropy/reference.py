"""Upsample, then cross-entropy or argmax, with logits of the full resolution in memory."""

from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate


def forward(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Return the cross-entropy of every pixel (B, H, W), 0 where ignored, for logits (B, K, h, w)."""
    full = interpolate(logits, target.shape[1:], mode="bilinear", align_corners=False)
    return cross_entropy(full, target, ignore_index=ignore_index, reduction="none")


def upsample_argmax(logits: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return labels (B, H, W) int64 and their softmax probability (B, H, W) for logits (B, K, h, w)."""
    full = interpolate(logits, size, mode="bilinear", align_corners=False)
    top, labels = full.max(1)
    return labels, (top - full.logsumexp(1)).exp()
