"""Evaluation by the reference implementation's protocols: whole images, or sliding windows; and what is said of it."""

import csv
import io
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from allspark_fast.config import Config, EvalMode
from allspark_fast.data.datasets import ImageSource
from allspark_fast.data.info import IGNORE_INDEX, DatasetInfo, match_classes
from allspark_fast.data.loader import EvalSample, evaluation_loader
from allspark_fast.device import choose_device
from allspark_fast.files import write_text
from allspark_fast.inference.metrics import ConfusionMatrix, Scores, score_image
from allspark_fast.inference.pictures import Row, comparison, draw_panel
from allspark_fast.kernels.arguments import check_choice
from allspark_fast.kernels.upsample_argmax import upsample_argmax
from allspark_fast.model import Segmentor
from allspark_fast.text import progress
from allspark_fast.weights.spec import ModelSpec

Item = TypeVar("Item")
Each = Callable[[int, EvalSample, Tensor], object]
# Images that wait for others of their size, at most, in batches.
_WAITING = 4
# Means of an image over its classes or, of the accuracy, over its pixels.
_MEANS = ("iou", "dice", "accuracy", "boundary_f1")
_WORST = 6


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
    each: Each | None = None,
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


def evaluate_images(
    model: Segmentor, spec: ModelSpec, info: DatasetInfo, images: ImageSource, config: Config, each: Each | None = None
) -> Scores:
    """Score what ``load_model`` returned on what ``open_val`` returned; labels are matched to its classes by name.

    How images are loaded and evaluated, and where, are settings of the configuration; ``each`` is that of ``evaluate``.
    Raises InputError if the names of the classes differ.
    """
    device, order = choose_device(config.run.device), match_classes(spec.info.classes, info)
    indices = torch.tensor([*order, *[IGNORE_INDEX] * (256 - len(order))])  # by value of a label
    workers, pin_memory = config.eval.workers, device.type == "cuda"
    loader = evaluation_loader(images, mean=spec.mean, std=spec.std, num_workers=workers, pin_memory=pin_memory)
    bar = progress(loader, total=len(images.entries), unit="image")
    return evaluate(
        model.to(device),
        (sample._replace(label=indices[sample.label.long()]) for sample in bar),
        len(spec.info.classes),
        mode=config.eval.mode,
        crop=spec.crop,
        device=device,
        batch_size=config.eval.batch_size,
        amp=config.train.amp,
        each=each,
    )


class Report:
    """Scores of images of these names, in their order, and pictures of those of the lowest mIoU."""

    def __init__(self, names: Sequence[str], spec: ModelSpec) -> None:
        self._names, self._spec = names, spec
        self._boundary: list[Tensor] = []
        self._rows: list[tuple[Any, ...]] = []
        self._worst: list[tuple[float, Row]] = []

    def note(self, index: int, sample: EvalSample, labels: Tensor) -> None:
        """Score an image; arguments as ``evaluate`` calls ``each`` with."""
        name, classes = self._names[index], self._spec.info.classes
        scores = score_image(labels, sample.label[0].to(labels.device), len(classes))
        by_class = {score: x.cpu().where(scores.present.cpu(), math.nan) for score, x in scores.by_class.items()}
        means = {score: x.nanmean().item() for score, x in by_class.items()} | {"accuracy": scores.pixel_accuracy}
        self._boundary.append(scores.by_class["boundary_f1"])
        self._rows.append((name, *(means[score] for score in _MEANS), *by_class["iou"].tolist()))
        if means["iou"] < (self._worst[-1][0] if len(self._worst) == _WORST else math.inf):
            row = f"{name}: mIoU {100 * means['iou']:.1f}", comparison(sample, labels, self._spec)
            self._worst = sorted([*self._worst, (means["iou"], row)], key=lambda image: image[0])[:_WORST]

    def complete(self, scores: Scores) -> Scores:
        """Return scores of all images together with ``boundary_f1`` of each class, its mean over images."""
        return replace(scores, by_class={**scores.by_class, "boundary_f1": torch.stack(self._boundary).nanmean(0)})

    def write(self, folder: Path, scores: Scores) -> None:
        """Write classes.csv, of what ``complete`` returned, images.csv and worst.png into a folder."""
        columns = {**scores.by_class, "pixels": scores.confusion.sum(1)}
        rows = zip(self._spec.info.classes, *(values.tolist() for values in columns.values()), strict=True)
        _write_csv(folder / "classes.csv", ("class", *columns), rows)
        iou = (f"iou {name}" for name in self._spec.info.classes)
        _write_csv(folder / "images.csv", ("image", *_MEANS, *iou), sorted(self._rows))
        if self._worst:
            draw_panel(folder / "worst.png", [row for _, row in self._worst], self._spec.info)


def _write_csv(path: Path, header: Iterable[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table of text and numbers; NaN is empty."""
    text = io.StringIO(newline="")
    cells = ([f"{x:.4f}".replace("nan", "") if isinstance(x, float) else x for x in row] for row in rows)
    csv.writer(text).writerows([header, *cells])
    write_text(path, text.getvalue())


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
    total: Tensor | None = None  # of rows that are not finished
    for rows, stop in zip(windows, [*(window.start for window in windows[1:]), height], strict=True):
        for columns in _windows(width, crop, model.min_size):
            window = images[:, :, rows, columns]
            logits = model(window, kv_source="image").float()
            if total is None:
                total = logits.new_zeros((*logits.shape[:2], 0, width))
            if missing := window.shape[2] - total.shape[2]:
                total = F.pad(total, (0, 0, 0, missing))
            upsampled = F.interpolate(logits, window.shape[2:], mode="bilinear", align_corners=False)
            total[..., columns] += upsampled.softmax(1)
        assert total is not None
        finished, total = total[:, :, : stop - rows.start], total[:, :, stop - rows.start :].clone()  # a view keeps all
        top, labels = finished.max(1)
        confidence = top / finished.sum(1)
        del finished  # before the next row of windows
        yield labels, confidence


def _windows(length: int, crop: int, smallest: int) -> Iterator[slice]:
    """Yield windows every two thirds of the crop; the border cuts them, to no less than ``smallest`` pixels."""
    for start in range(0, length, int(crop * 2 / 3)):
        yield slice(max(min(start, length - smallest), 0), min(start + crop, length))
