"""Scores for people: a table, and plain values for JSON."""

from typing import Any

from allspark_fast.data.info import DatasetInfo
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
