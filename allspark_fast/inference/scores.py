"""Scores for people: a table, plain values for JSON, a picture of the confusion matrix."""

from pathlib import Path
from typing import Any

import numpy as np

from allspark_fast.data.info import DatasetInfo
from allspark_fast.files import write_atomically
from allspark_fast.inference.metrics import Scores


def score_table(scores: Scores, info: DatasetInfo) -> str:
    """Return a table of the IoU of every class and the means, in percent; classes that no label holds are marked."""
    width = max(map(len, info.classes))
    lines = [
        f"{name:<{width}}  {100 * iou:5.1f}" + ("" if present else "  (in no label)")
        for name, iou, present in zip(info.classes, scores.iou.tolist(), scores.present.tolist(), strict=True)
    ]
    lines.append(f"{'mIoU':<{width}}  {100 * scores.mean_iou:5.1f}")
    if not scores.present.all():
        lines.append(f"{'present':<{width}}  {100 * scores.mean_iou_present:5.1f}")
    return "\n".join(lines)


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


def draw_confusion(path: Path, scores: Scores, info: DatasetInfo) -> None:
    """Write a picture of the confusion matrix: of the pixels of each true class (row), the fraction with each label."""
    from matplotlib.figure import Figure  # noqa: PLC0415 slow to import

    counts = scores.confusion.cpu().double()
    fraction = (counts / counts.sum(1, keepdim=True).clamp(min=1)).numpy()
    classes = len(info.classes)
    side = 2.5 + 0.3 * classes
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(fraction, cmap="viridis", vmin=0, vmax=1)
    axes.set_xticks(range(classes), info.classes, rotation=90)
    axes.set_yticks(range(classes), info.classes)
    axes.set(xlabel="predicted", ylabel="true", title="percent of the true class")
    for (row, column), value in np.ndenumerate(fraction):
        if round(100 * value):
            color = "white" if value < 0.6 else "black"
            axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=color)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110, bbox_inches="tight"))
