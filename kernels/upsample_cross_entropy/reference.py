"""Upsample, then cross-entropy, with logits of the full resolution in memory."""

from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate


def forward(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Return the cross-entropy of every pixel.

    Args:
        logits: (B, K, h, w).
        target: (B, H, W) int64.
        ignore_index: target of pixels that do not count.

    Returns:
        (B, H, W) in the dtype of the logits; 0 where ignored.
    """
    full = interpolate(logits, target.shape[1:], mode="bilinear", align_corners=False)
    return cross_entropy(full, target, ignore_index=ignore_index, reduction="none")
