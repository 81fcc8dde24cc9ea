"""Evaluation by the official protocols: whole images, or sliding windows."""

from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from allspark_fast.data.loader import EvalSample
from allspark_fast.inference.metrics import ConfusionMatrix, Scores
from allspark_fast.kernels.arguments import check_choice
from allspark_fast.kernels.bilinear import UpsampledBands
from allspark_fast.kernels.upsample_argmax import upsample_argmax
from allspark_fast.model import Segmentor

# A MiT needs so many pixels a side: smaller images are padded.
MIN_SIDE = 29
# Windows cut by the border keep at least so many.
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
        samples: whole images with labels. With several processes these are a part for each rank, and all must call.
        num_classes: number of classes K.
        mode: ``whole`` (Pascal, COCO) or ``sliding`` (Cityscapes).
        crop: side of the windows in pixels.
        device: where to compute.

    Returns:
        IoU of all pixels of all ranks together.
    """
    model.eval()
    confusion = ConfusionMatrix(num_classes, device=device)
    for sample in samples:
        labels, _ = predict_labels(model, sample.image.to(device), mode=mode, crop=crop)
        confusion.update(labels, sample.label.to(device))
    confusion.add_ranks()
    return confusion.compute()


@torch.no_grad()
def predict_labels(
    model: Segmentor, images: Tensor, *, mode: Literal["whole", "sliding"] = "whole", crop: int = 513
) -> tuple[Tensor, Tensor]:
    """Label images, each of which is treated alone.

    Args:
        model: in eval mode.
        images: (B, 3, H, W) of any size, normalised.
        mode: ``whole``; or ``sliding``: windows that start every two thirds of the crop and end at the border, whose
            softmax is summed. The memory it takes grows with the width of the images, not with their height.
        crop: side of the windows in pixels.

    Returns:
        labels (B, H, W) int64, and their probability (B, H, W), the mean over windows.

    Raises:
        ValueError: the mode is unknown, windows would be smaller than 32 pixels, or the images do not fit the model.
    """
    check_choice("mode", mode, ("whole", "sliding"))
    height, width = images.shape[2:]
    if min(height, width) < MIN_SIDE:
        missing = (0, max(MIN_SIDE - width, 0), 0, max(MIN_SIDE - height, 0))
        labels, confidence = predict_labels(model, F.pad(images, missing, mode="replicate"), mode=mode, crop=crop)
        return labels[:, :height, :width], confidence[:, :height, :width]
    if mode == "whole":
        return upsample_argmax(model(images, kv_source="image"), (height, width))
    labels, confidence = (torch.cat(bands, 1) for bands in zip(*_sliding_bands(model, images, crop), strict=True))
    return labels, confidence


def _sliding_bands(model: Segmentor, images: Tensor, crop: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Labels and confidence of bands of rows, from the top down, as soon as all their windows are summed."""
    if crop < MIN_WINDOW:
        raise ValueError(f"crop is {crop}, expected windows of at least {MIN_WINDOW} pixels a side")
    height, width = images.shape[2:]
    windows = list(_windows(height, crop))
    unfinished: Tensor | None = None
    for rows, stop in zip(windows, [*(window.start for window in windows[1:]), height], strict=True):
        total: Tensor | None = None
        for columns in _windows(width, crop):
            window = images[:, :, rows, columns]
            logits = model(window, kv_source="image").float()
            if total is None:
                total = logits.new_zeros((*logits.shape[:2], window.shape[2], width))
                if unfinished is not None:
                    total[:, :, : unfinished.shape[2]] = unfinished
                    unfinished = None
            _add_softmax(total[..., columns], logits)
        assert total is not None
        finished = total[:, :, : stop - rows.start]
        unfinished = total[:, :, stop - rows.start :].clone()  # a view would keep the rest
        top, labels = finished.max(1)
        confidence = top / finished.sum(1)
        del total, finished  # the next row of windows has its own
        yield labels, confidence


def _add_softmax(total: Tensor, logits: Tensor) -> None:
    """Add the softmax of logits upsampled to the size of ``total``; on a CPU in bands that stay in its cache."""
    if total.is_cuda:
        total += F.interpolate(logits, total.shape[2:], mode="bilinear", align_corners=False).softmax(1)
        return
    bands = UpsampledBands(logits, (total.shape[2], total.shape[3]))
    for image, image_total in zip(bands.images(), total, strict=True):
        for rows in bands:
            band = bands.upsample_for_reduction(image, rows).softmax(bands.class_axis)
            image_total[:, rows] += band.movedim(bands.class_axis, 0)


def _windows(length: int, crop: int) -> Iterator[slice]:
    for start in range(0, length, int(crop * 2 / 3)):
        yield slice(max(min(start, length - MIN_WINDOW), 0), min(start + crop, length))
