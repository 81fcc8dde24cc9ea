"""Evaluation by the reference implementation's protocols: whole images, or sliding windows."""

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TypeVar, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from allspark_fast.config import EvalMode
from allspark_fast.data.loader import EvalSample
from allspark_fast.inference.metrics import ConfusionMatrix, Scores
from allspark_fast.kernels.arguments import check_choice
from allspark_fast.kernels.upsample_argmax import upsample_argmax
from allspark_fast.model import Segmentor

Item = TypeVar("Item")
# Images that wait for others of their size, at most, in batches.
_WAITING = 4


@torch.no_grad()
def evaluate(
    model: Segmentor,
    samples: Iterable[EvalSample],
    num_classes: int,
    *,
    mode: EvalMode = "whole",
    crop: int = 513,
    device: torch.device | str = "cpu",
    batch_size: int = 4,
    amp: bool = False,
    each: Callable[[int, EvalSample, Tensor], object] | None = None,
) -> Scores:
    """Score a model on whole images with labels, as ``predict_labels`` labels them; it is in eval mode afterwards.

    With several processes the samples are a part for each rank, all must call, and the scores are of all together. They
    change with ``batch_size``, of images of equal size, by rounding only; ``amp`` is bfloat16 autocast, on a GPU.
    ``each`` is called with the place in ``samples`` of every image, the sample, and its predicted labels (H, W).
    """
    model.eval()
    device = torch.device(device)
    confusion = ConfusionMatrix(num_classes, device=device)
    # One context around all batches, which casts the weights once.
    with torch.autocast(device.type, torch.bfloat16, enabled=amp and device.type == "cuda"):
        for batch in batches_of_equal_size(enumerate(samples), batch_size, lambda item: item[1].image.shape):
            images = torch.cat([sample.image.to(device, non_blocking=True) for _, sample in batch])
            target = torch.cat([sample.label.to(device, non_blocking=True) for _, sample in batch])
            labels, _ = predict_labels(model, images, mode=mode, crop=crop)
            confusion.update(labels, target)
            if each is not None:
                for (index, sample), predicted in zip(batch, labels, strict=True):
                    each(index, sample, predicted)
    return confusion.compute()


def batches_of_equal_size(
    items: Iterable[Item], batch_size: int, size: Callable[[Item], Hashable]
) -> Iterator[list[Item]]:
    """Yield every item once, up to ``batch_size`` of equal size; few wait for others, so order changes little."""
    waiting: dict[Hashable, list[Item]] = {}
    for item in items:
        key = size(item)
        waiting.setdefault(key, []).append(item)
        if len(waiting[key]) == batch_size:
            yield waiting.pop(key)
        elif sum(map(len, waiting.values())) == _WAITING * batch_size:
            yield waiting.pop(next(iter(waiting)))  # the one that has waited longest
    yield from waiting.values()


@torch.no_grad()
def predict_labels(
    model: Segmentor, images: Tensor, *, mode: EvalMode = "whole", crop: int = 513
) -> tuple[Tensor, Tensor]:
    """Label images, each of which is treated alone.

    Args:
        model: in eval mode.
        images: (B, 3, H, W) of any size, normalized; smaller ones than ``model.min_size`` are padded.
        mode: ``whole``; or ``sliding``: windows that start every two thirds of the crop and end at the border, whose
            softmax is summed. The memory it takes grows with the width of the images, not with their height.
        crop: side of the windows in pixels.

    Returns:
        labels (B, H, W) int64, and their probability (B, H, W), the mean over windows.

    Raises:
        ValueError: the mode is unknown, the crop smaller than ``model.min_size``, or the images do not fit the model.
    """
    check_choice("mode", mode, get_args(EvalMode))
    height, width = images.shape[2:]
    missing_height, missing_width = (max(model.min_size - side, 0) for side in (height, width))
    if missing_height or missing_width:
        padded = F.pad(images, (0, missing_width, 0, missing_height), mode="replicate")
        labels, confidence = predict_labels(model, padded, mode=mode, crop=crop)
        return labels[:, :height, :width], confidence[:, :height, :width]
    if mode == "whole":
        return upsample_argmax(model(images, kv_source="image"), (height, width))
    labels, confidence = (torch.cat(bands, 1) for bands in zip(*_sliding_bands(model, images, crop), strict=True))
    return labels, confidence


def _sliding_bands(model: Segmentor, images: Tensor, crop: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield labels and confidence of bands of rows, from the top down, as soon as all their windows are summed."""
    if crop < model.min_size:
        raise ValueError(f"crop is {crop}, expected windows of at least {model.min_size} pixels a side")
    height, width = images.shape[2:]
    windows = list(_windows(height, crop, model.min_size))
    unfinished: Tensor | None = None
    for rows, stop in zip(windows, [*(window.start for window in windows[1:]), height], strict=True):
        total: Tensor | None = None
        for columns in _windows(width, crop, model.min_size):
            window = images[:, :, rows, columns]
            logits = model(window, kv_source="image").float()
            if total is None:
                total = logits.new_zeros((*logits.shape[:2], window.shape[2], width))
                if unfinished is not None:
                    total[:, :, : unfinished.shape[2]] = unfinished
                    unfinished = None
            upsampled = F.interpolate(logits, window.shape[2:], mode="bilinear", align_corners=False)
            total[..., columns] += upsampled.softmax(1)
        assert total is not None
        finished = total[:, :, : stop - rows.start]
        unfinished = total[:, :, stop - rows.start :].clone()  # a view would keep the rest
        top, labels = finished.max(1)
        confidence = top / finished.sum(1)
        del total, finished  # the next row of windows has its own
        yield labels, confidence


def _windows(length: int, crop: int, smallest: int) -> Iterator[slice]:
    """Yield windows every two thirds of the crop; the border cuts them, to no less than ``smallest`` pixels."""
    for start in range(0, length, int(crop * 2 / 3)):
        yield slice(max(min(start, length - smallest), 0), min(start + crop, length))
