"""Segmentation metrics from one confusion matrix, kept on the device; scores as a table and as plain values."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from allspark_fast.data.info import IGNORE_INDEX, DatasetInfo
from allspark_fast.distributed import all_reduce_sum
from allspark_fast.kernels.arguments import check_count
from allspark_fast.text import columns, one_line, padded


@dataclass(frozen=True)
class Scores:
    """IoU of a set of images.

    Attributes:
        iou: (K,) float64, in [0, 1]; 0 for a class that occurs neither in a label nor in a prediction.
        present: (K,) bool, whether a class occurs in a label.
        mean_iou: mean over all K classes, as the reference implementation reports it.
        mean_iou_present: mean over the classes that occur in a label.
        confusion: (K, K) int64 pixels; rows are true classes, columns predicted ones.
    """

    iou: Tensor
    present: Tensor
    mean_iou: float
    mean_iou_present: float
    confusion: Tensor


class ConfusionMatrix:
    """Counts of pixels by true and predicted class, without synchronizing with the device.

    Args:
        num_classes: number of classes K, at least 1.
        device: where predictions are.
    """

    def __init__(self, num_classes: int, *, device: torch.device | str = "cpu") -> None:
        check_count("num_classes", num_classes)
        self.num_classes = num_classes
        # One bin more takes the ignored pixels.
        self._counts = torch.zeros(num_classes**2 + 1, dtype=torch.int64, device=device)

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Count the pixels of ``prediction`` and ``target``.

        Args:
            prediction: integer classes in [0, K), any shape.
            target: of the same shape, integer classes in [0, K), or 255, which is ignored.

        Raises:
            TypeError: one of them is floating point.
            ValueError: the shapes differ.
            RuntimeError: a class that counts is outside [0, K). On a GPU this is a device assertion, which ends the
                process: checking on the host would synchronize.
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
        intersection, true_pixels = matrix.diagonal(), matrix.sum(1)
        iou = intersection / (matrix.sum(0) + true_pixels - intersection).clamp(min=1).double()
        present = true_pixels > 0
        mean_present = iou[present].mean().item() if present.any() else 0.0
        return Scores(iou, present, iou.mean().item(), mean_present, matrix)


def score_table(scores: Scores, info: DatasetInfo) -> str:
    """Return a table of the IoU of every class and the means, in percent; classes that no label holds are marked."""
    rows = [
        (one_line(name), iou, "" if present else "  (in no label)")
        for name, iou, present in zip(info.classes, scores.iou.tolist(), scores.present.tolist(), strict=True)
    ]
    rows.append(("mIoU", scores.mean_iou, ""))
    if not scores.present.all():
        rows.append(("present", scores.mean_iou_present, ""))
    width = max(columns(name) for name, _, _ in rows)
    return "\n".join(f"{padded(name, width)}  {100 * iou:5.1f}{note}" for name, iou, note in rows)


def score_record(scores: Scores, info: DatasetInfo) -> dict[str, Any]:
    """Return all scores as plain values, for JSON; lists are in the order of the classes."""
    return {
        "miou": scores.mean_iou,
        "miou_present": scores.mean_iou_present,
        "classes": list(info.classes),
        "iou": scores.iou.tolist(),
        "present": scores.present.tolist(),
        "confusion": scores.confusion.tolist(),
    }
