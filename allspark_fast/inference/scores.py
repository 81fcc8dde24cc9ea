"""Scores for people: a table, and plain values for JSON."""

from typing import Any

from allspark_fast.data.info import DatasetInfo
from allspark_fast.inference.metrics import Scores
from allspark_fast.text import columns, one_line, padded


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
