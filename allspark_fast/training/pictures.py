"""The pictures of a run: curves, and predictions beside pseudo labels and truth."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torchvision.utils import make_grid  # type: ignore[import-untyped]

from allspark_fast.data.info import IGNORE_INDEX, DatasetInfo
from allspark_fast.files import write_atomically
from allspark_fast.text import drawable
from allspark_fast.training.log import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What the metrics are called in the curves, by panel.
_CURVES = {
    "cross-entropy": {"loss_labeled": "labeled", "loss_unlabeled": "unlabeled"},
    "validation": {"miou": "mIoU"},
    "pseudo labels": {"pseudo_label_accuracy": "accuracy", "pseudo_label_coverage": "coverage"},
}


def draw_curves(folder: Path, records: Sequence[Record], info: DatasetInfo) -> None:
    """Write curves.png: losses, mIoU on the validation set, pseudo labels, and what the Semantic Memory received."""
    from matplotlib.figure import Figure  # noqa: PLC0415 slow to import

    figure = Figure(figsize=(10, 7.2), layout="constrained")
    for place, (title, names) in enumerate(_CURVES.items(), 1):
        axes = figure.add_subplot(2, 2, place, title=title, xlabel="step")
        for name, label in names.items():
            points = [(record["step"], record[name]) for record in records if name in record]
            if points:
                marker = "." if len(points) == 1 else ""  # a line of one point would not show
                axes.plot(*zip(*points, strict=True), label=label, linewidth=1.5, marker=marker)
        axes.set_ylim(0, None if title == "cross-entropy" else 1)
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend(frameon=False)
    if received := [record["memory_received"] for record in records if "memory_received" in record]:
        _draw_memory(figure, np.array(received, dtype=float), info)
    write_atomically(folder / "curves.png", lambda temporary: figure.savefig(temporary, dpi=120))


def _draw_memory(figure: "Figure", totals: np.ndarray, info: DatasetInfo) -> None:
    """Draw a column for each evaluation: the share of the channels since the one before that each class received."""
    counts = np.diff(totals, axis=0, prepend=0)
    part = counts / counts.sum(1, keepdims=True).clip(min=1)
    axes = figure.add_subplot(2, 2, 4, title="channels into the memory, by class", xlabel="evaluation")
    figure.colorbar(axes.imshow(part.T, aspect="auto", interpolation="nearest", vmin=0), ax=axes)
    axes.set_yticks(range(len(info.classes)), drawable(info.classes), fontsize=min(7, 210 / len(info.classes)))


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
        images: (B, 3, H, W), normalized by ``mean`` and ``std``.
        labels: (B, H, W) each, by the title of their column.
        info: colors and names of the classes.
        mean: of each color channel.
        std: of each color channel.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 slow to import
    from matplotlib.patches import Patch  # noqa: PLC0415

    palette = torch.tensor(info.palette) / 255
    palette[IGNORE_INDEX] = 1
    pixels = images.cpu() * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    columns = [pixels.nan_to_num().clamp(0, 1), *(palette[x.cpu()].permute(0, 3, 1, 2) for x in labels.values())]
    rows, _, height, width = pixels.shape
    gap = 1 + width // 32
    # One picture: a grid of axes takes a second to lay out.
    mosaic = make_grid(torch.stack(columns, 1).flatten(0, 1), nrow=len(columns), padding=gap, pad_value=1)
    figure = Figure(figsize=(2.4 * len(columns), 2.4 * rows * height / width + 0.6), layout="constrained")
    axes = figure.subplots()
    axes.imshow(mosaic.permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set_xticks([(width + gap) * (column + 0.5) for column in range(len(columns))], ["image", *labels])
    axes.tick_params(length=0, labelsize=12, labeltop=True, labelbottom=False)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    patches = [
        Patch(facecolor="#" + bytes(color).hex(), edgecolor="grey", label=name)
        for name, color in zip(drawable(info.classes), info.palette, strict=False)
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=min(len(patches), 8), fontsize=8, frameon=False)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110, bbox_inches="tight"))
