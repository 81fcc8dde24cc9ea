"""Upsampling + cross-entropy, and upsampling + argmax, of a batch of pseudo labels."""

import torch
from torch.nn import functional as F

from allspark_fast.kernels.upsample_argmax import upsample_argmax
from allspark_fast.kernels.upsample_cross_entropy import upsample_cross_entropy
from bench.harness import Case

# Batch, classes, crop in pixels.
SIZES = {
    "pascal": (2, 21, 513),
    "cityscapes": (2, 19, 801),
    "coco": (4, 81, 513),
    "vit14": (2, 21, 518),
    "binary": (2, 2, 513),
    "camvid": (2, 11, 513),
    "stuff": (2, 171, 513),
    "crop257": (2, 21, 257),
    "tiny": (2, 5, 65),
}


def cases(size: str) -> list[Case]:
    """Both operators on logits at a quarter of the crop."""
    batch, classes, crop = SIZES[size]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    side = -(-crop // 4)
    # Classes last in memory, as our head returns them.
    logits = torch.randn(batch, side, side, classes, device=device).permute(0, 3, 1, 2).requires_grad_()
    target = torch.randint(classes, (batch, crop, crop), device=device)

    def upsampled() -> torch.Tensor:
        return F.interpolate(logits, (crop, crop), mode="bilinear", align_corners=False)

    name = f"{size}: B={batch} K={classes} {side} -> {crop} pixels"
    return [
        Case(
            op="upsample_cross_entropy",
            size=name,
            variants={
                "naive": lambda: F.cross_entropy(upsampled(), target),
                "ours": lambda: upsample_cross_entropy(logits, target),
            },
            inputs=(logits,),
        ),
        Case(
            op="upsample_argmax",
            size=name,
            variants={
                "naive": lambda: upsampled().detach().softmax(1).max(1).values,
                "ours": lambda: upsample_argmax(logits, (crop, crop))[1],
            },
        ),
    ]
