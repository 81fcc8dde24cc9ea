"""Upsampling + cross-entropy, and upsampling + argmax, of a batch of pseudo labels."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
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
    """Return both operators on logits at a quarter of the crop."""
    batch, classes, crop = SIZES[size]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    side = -(-crop // 4)
    # Classes last in memory, as our head returns them.
    logits = torch.randn(batch, side, side, classes, device=device).permute(0, 3, 1, 2).requires_grad_()
    target = torch.randint(classes, (batch, crop, crop), device=device)
    pixels = batch * crop * crop
    interpolation = 6.0 * pixels * classes  # three of two numbers each

    def case(op: str, naive: Callable[[Tensor], Tensor], ours: Callable[[Tensor], Tensor], **counts: Any) -> Case:
        functions = {"naive": naive, "naive, compiled": torch.compile(naive), "chunked": ours, "triton": ours}
        return Case(
            op=op,
            size=f"{size}: B={batch} K={classes} {side} -> {crop} pixels",
            variants={name: functools.partial(function, logits) for name, function in functions.items()},
            **counts,
        )

    def upsampled(logits: Tensor) -> Tensor:
        return F.interpolate(logits, (crop, crop), mode="bilinear", align_corners=False)

    return [
        case(
            "upsample_cross_entropy",
            lambda logits: F.cross_entropy(upsampled(logits), target),
            lambda logits: upsample_cross_entropy(logits, target),
            inputs=(logits,),
            flops=(interpolation, interpolation),
            moved=3.0 * logits.nbytes + 2.0 * target.nbytes,  # backward reads both again and writes a gradient
        ),
        case(
            "upsample_argmax",
            lambda logits: upsampled(logits).detach().softmax(1).max(1).values,
            lambda logits: upsample_argmax(logits, (crop, crop))[1],
            flops=(interpolation, 0.0),
            moved=logits.nbytes + 12.0 * pixels,  # labels and confidence
        ),
    ]
