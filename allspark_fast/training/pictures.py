"""The pictures of a run: curves, and panels of unlabeled crops and of validation images."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from allspark_fast.data.info import DatasetInfo
from allspark_fast.data.loader import EvalSample
from allspark_fast.files import write_atomically
from allspark_fast.inference.pictures import comparison, draw_panel, label_map, to_image
from allspark_fast.text import drawable
from allspark_fast.training.log import MetricsLog, Record
from allspark_fast.weights.spec import ModelSpec

logger = logging.getLogger(__name__)

# What the metrics are called in the curves, by panel; and those that are a number for each class.
_CURVES = {
    "cross-entropy": {"loss_labeled": "labeled", "loss_unlabeled": "unlabeled"},
    "validation": {"miou": "mIoU"},
    "pseudo labels": {"pseudo_label_accuracy": "accuracy", "pseudo_label_coverage": "coverage"},
}
_BY_CLASS = {
    "iou": "IoU by class",
    "pseudo_label_class_coverage": "coverage of pseudo labels by class",
    "memory_received": "channels into the memory by class",
}
_STEPS_NAMED = 5


def draw_pictures(
    log: MetricsLog,
    crops: tuple[Tensor, Mapping[str, Tensor]],
    validation: Sequence[tuple[str, EvalSample, Tensor]],
    spec: ModelSpec,
) -> None:
    """Draw curves.png, predictions.png and validation.png of a run, which goes on if they cannot be drawn.

    They show unlabeled crops (B, 3, H, W) with labels (B, H, W) by the title of their column; and of some validation
    images name, sample and prediction (H, W). TensorBoard shows the panels too.
    """
    try:
        draw_curves(log.path.parent, log.records, spec.info)
        images, labels = crops
        predictions = [
            ("", {"image": to_image(image, spec)} | {x: label_map(labels[x][i], spec.info) for x in labels})
            for i, image in enumerate(images)
        ]
        compared = [(name, comparison(sample, x, spec)) for name, sample, x in validation]
        for name, rows in {"predictions": predictions, "validation": compared}.items():
            path = log.path.with_name(f"{name}.png")
            draw_panel(path, rows, spec.info)
            log.add_picture(path)
    except Exception as error:
        logger.warning("the pictures of step %d were not drawn: %r", log.records[-1]["step"], error)


def draw_curves(folder: Path, records: Sequence[Record], info: DatasetInfo) -> None:
    """Write curves.png: losses, mIoU and its best step, pseudo labels; and IoU, coverage and memory by class."""
    from matplotlib.figure import Figure  # noqa: PLC0415 slow to import

    figure = Figure(figsize=(14, 7.5), layout="constrained")
    above, below = figure.subplots(2, 3)
    for axes, (title, names) in zip(above, _CURVES.items(), strict=True):
        axes.set(title=title, xlabel="step")
        for name, label in names.items():
            if points := [(record["step"], record[name]) for record in records if name in record]:
                marker = "." if len(points) < 20 else ""
                axes.plot(*zip(*points, strict=True), label=label, linewidth=1.5, marker=marker)
                if name == "miou":
                    best, miou = max(points, key=lambda point: np.nan_to_num(point[1]))
                    axes.plot(best, miou, "*", markersize=14, label=f"best: {100 * miou:.1f} at step {best}")
        axes.set_ylim(0, None if title == "cross-entropy" else 1)
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend(frameon=False)
    for axes, (name, title) in zip(below, _BY_CLASS.items(), strict=True):
        found = [(record["step"], record[name]) for record in records if name in record]
        if found:
            steps, rows = zip(*found, strict=True)
            values, greatest = np.array(rows, float), 1.0 if name != "memory_received" else None
            if name == "memory_received":  # counted from the start of the run: the shares since the evaluation before
                counts = np.diff(values, axis=0, prepend=0)
                values = counts / counts.sum(1, keepdims=True).clip(min=1)
            shown = axes.imshow(values.T, aspect="auto", interpolation="nearest", vmin=0, vmax=greatest)
            axes.set(title=title, xlabel="step", facecolor="lightgray")  # of NaN
            figure.colorbar(shown, ax=axes)
            named = range(0, len(steps), -(-len(steps) // _STEPS_NAMED))
            axes.set_xticks(list(named), [str(steps[i]) for i in named])
            # Names are no formulas, whatever dollars they hold.
            size = min(8, 210 / len(info.classes))
            axes.set_yticks(range(len(info.classes)), drawable(info.classes), fontsize=size, parse_math=False)
        else:
            axes.remove()
    write_atomically(folder / "curves.png", lambda temporary: figure.savefig(temporary, dpi=100))
