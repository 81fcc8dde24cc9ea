"""Segmentation metrics: of pixels, from a confusion matrix on the device; of outlines; as a table and plain values."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from allspark_fast.data.info import IGNORE_INDEX, DatasetInfo
from allspark_fast.distributed import all_reduce_sum
from allspark_fast.kernels.arguments import check_count
from allspark_fast.text import columns, one_line, padded

# Part of an image's diagonal.
_NEAR = 0.0075


@dataclass(frozen=True)
class Scores:
    """Scores of a set of images, in [0, 1].

    Attributes:
        by_class: (K,) float64 each: ``iou``; ``dice``, the F1 score of pixels; ``accuracy``, the share of the true
            pixels that are right; 0 for a class that has no such pixels. With ``boundary_f1`` if that was measured.
        present: (K,) bool, whether a class occurs in a label.
        mean_iou: mean over all K classes, as the reference implementation reports it.
        mean_iou_present: mean over the classes that occur in a label.
        pixel_accuracy: share of all pixels that are right.
        confusion: (K, K) int64 pixels; rows are true classes, columns predicted ones.
    """

    by_class: Mapping[str, Tensor]
    present: Tensor
    mean_iou: float
    mean_iou_present: float
    pixel_accuracy: float
    confusion: Tensor


class ConfusionMatrix:
    """Counts of pixels by true and predicted class out of K, without synchronizing with the device."""

    def __init__(self, num_classes: int, *, device: torch.device | str = "cpu") -> None:
        check_count("num_classes", num_classes)
        self.num_classes = num_classes
        # One bin more takes the ignored pixels.
        self._counts = torch.zeros(num_classes**2 + 1, dtype=torch.int64, device=device)

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Count the pixels of integer classes in [0, K), of any one shape; a target of 255 is ignored.

        Raises:
            TypeError, ValueError: one of them is floating point, or the shapes differ.
            RuntimeError: a class that counts is outside [0, K); on a GPU a device assertion, which ends the process.
        """
        if prediction.is_floating_point() or target.is_floating_point():
            raise TypeError(f"expected integer classes, got {prediction.dtype} and {target.dtype}")
        if prediction.shape != target.shape:
            raise ValueError(
                f"prediction is {tuple(prediction.shape)}, target {tuple(target.shape)}, expected one shape"
            )
        counted = target != IGNORE_INDEX
        least, most = torch.minimum(prediction, target), torch.maximum(prediction, target)
        torch._assert_async(
            (~counted | ((least >= 0) & (most < self.num_classes))).all(),
            f"prediction or target holds a class outside [0, {self.num_classes})",
        )
        bins = target.long() * self.num_classes + prediction.long()
        bins = bins.where(counted, self.num_classes**2).flatten()
        self._counts.scatter_add_(0, bins, torch.ones_like(bins))

    def compute(self) -> Scores:
        """Return the scores of all that all ranks have counted; each must call this."""
        matrix = all_reduce_sum(self._counts)[:-1].view(self.num_classes, self.num_classes)
        hits, true, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
        parts = {"iou": (hits, true + predicted - hits), "dice": (2 * hits, true + predicted), "accuracy": (hits, true)}
        by_class = {name: part / whole.clamp(min=1).double() for name, (part, whole) in parts.items()}
        iou, present = by_class["iou"], true > 0
        pixels, classes = (x.sum().clamp(min=1) for x in (true, present))
        means = (iou.mean(), iou[present].sum() / classes, hits.sum() / pixels)
        mean, mean_present, right = (x.item() for x in means)
        return Scores(by_class, present, mean, mean_present, right, matrix)


def score_image(prediction: Tensor, target: Tensor, num_classes: int) -> Scores:
    """Score the labels of one image, also by ``boundary_f1``."""
    confusion = ConfusionMatrix(num_classes, device=prediction.device)
    confusion.update(prediction, target)
    scores = confusion.compute()
    by_class = {**scores.by_class, "boundary_f1": boundary_f1(prediction, target, num_classes)}
    return replace(scores, by_class=by_class)


def boundary_f1(prediction: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """Score the outlines of classes in [0, K), 255 ignored, of (H, W) by the boundary F1 of Csurka et al., BMVC 2013.

    Precision is the share of the outline of a class in the prediction that is near its outline in the label, recall the
    converse: at most 0.75 % of the image's diagonal away, here in rows and in columns. Their harmonic mean is the
    score. The outline of a class are its pixels beside those of another.

    Returns:
        (K,) float64; NaN for classes without an outline in either.
    """
    prediction = prediction.where(target != IGNORE_INDEX, IGNORE_INDEX)
    radius = max(round(_NEAR * math.hypot(*target.shape)), 1)
    scores = torch.full((num_classes,), math.nan, dtype=torch.float64)
    borders = [find_borders(x) for x in (prediction, target)]
    for label in torch.cat([prediction[borders[0]], target[borders[1]]]).unique().tolist():
        outlines = [border & (x == label) for border, x in zip(borders, (prediction, target), strict=True)]
        near = [outline & dilate(other, radius) for outline, other in zip(outlines, outlines[::-1], strict=True)]
        *hits, predicted, true = torch.stack([x.sum() for x in (*near, *outlines)]).tolist()
        precision, recall = hits[0] / max(predicted, 1), hits[1] / max(true, 1)
        scores[label] = 2 * precision * recall / max(precision + recall, 1e-9)
    return scores


def find_borders(labels: Tensor) -> Tensor:
    """Mark the pixels of labels (H, W) with another class above, below, left or right of them; 255 is none."""
    borders = torch.zeros_like(labels, dtype=torch.bool)
    for x, marked in ((labels, borders), (labels.T, borders.T)):
        differ = (x[1:] != x[:-1]) & (x[1:] != IGNORE_INDEX) & (x[:-1] != IGNORE_INDEX)
        marked[1:] |= differ
        marked[:-1] |= differ
    return borders


def dilate(mask: Tensor, radius: int) -> Tensor:
    """Mark what is at most so many rows and columns away from what is marked (H, W)."""
    for _ in range(2):
        grown = mask.clone()
        for step in range(1, radius + 1):
            grown[step:] |= mask[:-step]
            grown[:-step] |= mask[step:]
        mask = grown.T
    return mask


def score_table(scores: Scores, info: DatasetInfo) -> str:
    """Return a table of the scores of every class and the means, in percent; classes that no label holds are marked."""
    values, present = torch.stack([x.cpu() for x in scores.by_class.values()], 1), scores.present.cpu()
    notes = ("" if x else "  (in no label)" for x in present)
    rows = [*zip(map(one_line, info.classes), values.tolist(), notes, strict=True)]
    rows.append(("mean", values.nanmean(0).tolist(), ""))
    if not present.all():
        rows.append(("present", values[present].nanmean(0).tolist(), ""))
    width = max(columns(name) for name, _, _ in rows)
    lines = [" " * width + "".join(f"{name:>13}" for name in scores.by_class)]
    for name, row, note in rows:
        lines.append(padded(name, width) + "".join(f"{100 * x:13.1f}" for x in row) + note)
    return "\n".join([*lines, f"pixel accuracy {100 * scores.pixel_accuracy:.1f}"])


def score_record(scores: Scores, info: DatasetInfo) -> dict[str, Any]:
    """Return all scores as plain values, for JSON; lists are in the order of the classes, None for NaN."""
    means = {"miou": scores.mean_iou, "miou_present": scores.mean_iou_present, "pixel_accuracy": scores.pixel_accuracy}
    by_class = {name: [None if math.isnan(x) else x for x in each.tolist()] for name, each in scores.by_class.items()}
    counts = {"present": scores.present.tolist(), "confusion": scores.confusion.tolist()}
    return {**means, "classes": list(info.classes), **by_class, **counts}
