"""The pictures of a run: curves, and predictions beside pseudo labels and truth."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from allspark_fast.data.info import DatasetInfo
from allspark_fast.files import write_atomically
from allspark_fast.text import drawable
from allspark_fast.training.log import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

_IGNORED_COLOR = (255, 255, 255)
# More names than this would overlap.
_NAMED_CLASSES = 30


def draw_curves(folder: Path, records: Sequence[Record], info: DatasetInfo) -> None:
    """Write curves.png: losses, mIoU on the validation set, pseudo labels, and what the Semantic Memory received."""
    from matplotlib.figure import Figure  # noqa: PLC0415 slow to import

    received = [record for record in records if "memory_received" in record]
    figure = Figure(figsize=(10, 7.2), layout="constrained")
    (losses, scores), (pseudo_labels, memory) = figure.subplots(2, 2)
    _plot(losses, records, {"loss_labeled": "labeled", "loss_unlabeled": "unlabeled"}, "cross-entropy")
    _plot(scores, records, {"miou": "mIoU"}, "validation")
    names = {"pseudo_label_accuracy": "accuracy", "pseudo_label_coverage": "coverage"}
    _plot(pseudo_labels, records, names, "pseudo labels")
    for axes in (scores, pseudo_labels):
        axes.set_ylim(0, 1)
    if received:
        figure.colorbar(_plot_memory(memory, received, info), ax=memory)
    else:
        memory.set_axis_off()
    write_atomically(folder / "curves.png", lambda temporary: figure.savefig(temporary, dpi=120))


def _plot_memory(axes: "Axes", records: Sequence[Record], info: DatasetInfo) -> "AxesImage":
    """Draw a column for each evaluation: the share of the channels since the one before that each class received."""
    totals = np.array([record["memory_received"] for record in records], dtype=float)
    counts = np.diff(totals, axis=0, prepend=0)
    part = counts / counts.sum(1, keepdims=True).clip(min=1)
    image = axes.imshow(part.T, aspect="auto", interpolation="nearest", vmin=0)
    shown = range(0, len(records), -(-len(records) // 6))
    classes = len(info.classes)
    axes.set_xticks(shown, [f"{records[i]['step']}\n{records[i]['memory_filled']}/{classes}" for i in shown])
    if classes <= _NAMED_CLASSES:
        axes.set_yticks(range(classes), drawable(info.classes), fontsize=7)
    axes.set(title="channels into the memory, by class", xlabel="step, and classes filled so far")
    return image


def _plot(axes: "Axes", records: Sequence[Record], names: dict[str, str], title: str) -> None:
    for name, label in names.items():
        points = [(record["step"], record[name]) for record in records if name in record]
        if points:
            marker = "." if len(points) == 1 else ""  # a line of one point would not show
            axes.plot(*zip(*points, strict=True), label=label, linewidth=1.5, marker=marker)
    axes.set(title=title, xlabel="step")
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend(frameon=False)


def draw_predictions(
    path: Path,
    images: Tensor,
    labels: dict[str, Tensor],
    info: DatasetInfo,
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    """Write a picture with a row for each image, and a column for the image and for each kind of label.

    Args:
        path: of the picture.
        images: (B, 3, H, W), normalized.
        labels: by column title, (B, H, W).
        info: colors and names of the classes.
        mean: that was subtracted from the images.
        std: by which they were divided.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 slow to import
    from matplotlib.patches import Patch  # noqa: PLC0415

    pixels = images.cpu().numpy().transpose(0, 2, 3, 1) * np.asarray(std) + np.asarray(mean)
    palette = np.array(info.palette, dtype=np.uint8)
    palette[info.ignore_index] = _IGNORED_COLOR
    columns = {"image": np.rint(255 * np.nan_to_num(pixels).clip(0, 1)).astype(np.uint8)}
    columns |= {name: palette[x.cpu().numpy()] for name, x in labels.items()}
    rows, height, width = pixels.shape[:3]
    gap = 1 + width // 32
    # One picture: a grid of axes takes a second to lay out.
    framed = [np.pad(x, ((0, 0), (0, gap), (0, gap), (0, 0)), constant_values=255) for x in columns.values()]
    mosaic = np.concatenate([np.concatenate(list(column)) for column in framed], axis=1)[:-gap, :-gap]
    figure = Figure(figsize=(2.4 * len(columns), 2.4 * rows * height / width + 0.6), layout="constrained")
    axes = figure.subplots()
    axes.imshow(mosaic, interpolation="nearest")
    axes.set_xticks([(width + gap) * column + width / 2 for column in range(len(columns))], list(columns))
    axes.tick_params(length=0, labelsize=12, labeltop=True, labelbottom=False)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    patches = [
        Patch(facecolor="#" + bytes(color).hex(), edgecolor="grey", label=name)
        for name, color in zip(drawable(info.classes), info.palette, strict=False)
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=min(len(patches), 8), fontsize=8, frameon=False)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110, bbox_inches="tight"))
