"""Evaluation by the official protocols: whole images, or sliding windows."""

from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from allspark_fast.data.loader import EvalSample
from allspark_fast.kernels.upsample_argmax import upsample_argmax
from allspark_fast.metrics import ConfusionMatrix, Scores
from allspark_fast.model import Segmentor

# Windows cut by the border keep at least so many pixels a side: a MiT needs 29.
MIN_WINDOW = 32


@torch.no_grad()
def evaluate(
    model: Segmentor,
    samples: Iterable[EvalSample],
    num_classes: int,
    *,
    mode: Literal["whole", "sliding"] = "whole",
    crop: int = 513,
    device: torch.device | str = "cpu",
) -> Scores:
    """Score a model; it is in eval mode afterwards.

    Args:
        model: what to score.
        samples: whole images with labels.
        num_classes: number of classes K.
        mode: ``whole`` (Pascal, COCO) or ``sliding`` (Cityscapes).
        crop: side of the windows in pixels.
        device: where to compute.

    Returns:
        IoU of all pixels together.
    """
    model.eval()
    confusion = ConfusionMatrix(num_classes, device=device)
    for sample in samples:
        confusion.update(predict_labels(model, sample.image.to(device), mode=mode, crop=crop), sample.label.to(device))
    return confusion.compute()


@torch.no_grad()
def predict_labels(
    model: Segmentor, images: Tensor, *, mode: Literal["whole", "sliding"] = "whole", crop: int = 513
) -> Tensor:
    """Labels (B, H, W) int64 of images (B, 3, H, W), none of which depends on the others."""
    if mode == "whole":
        return upsample_argmax(model(images, attend="image"), (images.shape[2], images.shape[3]))[0]
    return _sliding_probability(model, images, crop).argmax(1)


def _sliding_probability(model: Segmentor, images: Tensor, crop: int) -> Tensor:
    """Sums (B, K, H, W) of the softmax of windows that start every two thirds of the crop and end at the border."""
    total: Tensor | None = None
    for rows in _windows(images.shape[2], crop):
        for columns in _windows(images.shape[3], crop):
            window = images[:, :, rows, columns]
            logits = model(window, attend="image")
            probability = F.interpolate(logits, window.shape[2:], mode="bilinear", align_corners=False).softmax(1)
            if total is None:
                total = probability.new_zeros((images.shape[0], logits.shape[1], *images.shape[2:]))
            total[:, :, rows, columns] += probability
    assert total is not None
    return total


def _windows(length: int, crop: int) -> Iterator[slice]:
    for start in range(0, length, int(crop * 2 / 3)):
        yield slice(max(min(start, length - MIN_WINDOW), 0), min(start + crop, length))
