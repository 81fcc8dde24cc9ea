"""What a run leaves for people: metrics.jsonl, TensorBoard events, tables and pictures."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from allspark_fast.checkpoint import write_atomically
from allspark_fast.data.info import DatasetInfo
from allspark_fast.metrics import Scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Record = dict[str, Any]
_IGNORED_COLOR = (255, 255, 255)


class MetricsLog:
    """metrics.jsonl and TensorBoard events of a run, cut back to the step from which it goes on.

    Args:
        folder: the run folder.
        step: steps taken before; later records, of steps that will be taken again, are removed.
    """

    def __init__(self, folder: Path, step: int) -> None:
        # Here, because these imports take a second that a library user need not spend.
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415

        self.path = folder / "metrics.jsonl"
        self.records = [record for record in read_metrics(folder) if record["step"] <= step]
        lines = "".join(f"{json.dumps(record)}\n" for record in self.records)
        write_atomically(self.path, lambda temporary: temporary.write_text(lines, encoding="utf-8"))
        self._events = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, record: Record) -> None:
        """Append one record, which holds its ``step``."""
        self.records.append(record)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(record)}\n")
        step = record["step"]
        for name, value in record.items():
            if isinstance(value, int | float) and name != "step":
                self._events.add_scalar(name, value, step)
        self._events.flush()

    def close(self) -> None:
        """Close the TensorBoard file."""
        self._events.close()


def read_metrics(folder: Path) -> list[Record]:
    """Records of metrics.jsonl; a last line that a crash cut off is left out."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def score_table(scores: Scores, info: DatasetInfo) -> str:
    """IoU of every class in percent and the means; classes that no label holds are marked."""
    width = max(map(len, info.classes))
    lines = [
        f"{name:<{width}}  {100 * iou:5.1f}" + ("" if present else "  (in no label)")
        for name, iou, present in zip(info.classes, scores.iou.tolist(), scores.present.tolist(), strict=True)
    ]
    lines.append(f"{'mIoU':<{width}}  {100 * scores.mean_iou:5.1f}")
    if not scores.present.all():
        lines.append(f"{'present':<{width}}  {100 * scores.mean_iou_present:5.1f}")
    return "\n".join(lines)


def draw_curves(folder: Path, records: Sequence[Record]) -> None:
    """Write curves.png: losses, and mIoU on the validation set."""
    from matplotlib.figure import Figure  # noqa: PLC0415 slow to import

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    losses, scores = figure.subplots(1, 2)
    _plot(losses, records, {"loss_labeled": "labeled", "loss_unlabeled": "unlabeled"}, "cross-entropy")
    _plot(scores, records, {"miou": "mIoU", "pseudo_label_accuracy": "pseudo-label accuracy"}, "validation")
    scores.set_ylim(0, 1)
    write_atomically(folder / "curves.png", lambda temporary: figure.savefig(temporary, dpi=120))


def _plot(axes: "Axes", records: Sequence[Record], names: dict[str, str], title: str) -> None:
    for name, label in names.items():
        points = [(record["step"], record[name]) for record in records if name in record]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, linewidth=1.5)
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
    """Write a picture: a row for each image, a column for the image and for each kind of label.

    Args:
        path: of the picture.
        images: (B, 3, H, W), normalised.
        labels: by column title, (B, H, W).
        info: colours and names of the classes.
        mean: that was subtracted from the images.
        std: that they were divided by.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 slow to import
    from matplotlib.patches import Patch  # noqa: PLC0415

    pixels = images.cpu().numpy().transpose(0, 2, 3, 1) * np.asarray(std) + np.asarray(mean)
    palette = np.array(info.palette, dtype=np.uint8)
    palette[info.ignore_index] = _IGNORED_COLOR
    columns = {"image": pixels.clip(0, 1), **{name: palette[x.cpu().numpy()] for name, x in labels.items()}}
    rows = len(images)
    figure = Figure(figsize=(2.4 * len(columns), 2.4 * rows + 0.6), layout="constrained")
    grid = figure.subplots(rows, len(columns), squeeze=False)
    for column, (name, pictures) in enumerate(columns.items()):
        grid[0][column].set_title(name)
        for row, picture in enumerate(pictures):
            grid[row][column].imshow(picture, interpolation="nearest")
            grid[row][column].set_axis_off()
    patches = [
        Patch(facecolor="#" + bytes(color).hex(), edgecolor="grey", label=name)
        for name, color in zip(info.classes, info.palette, strict=False)
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=min(len(patches), 8), fontsize=8, frameon=False)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110))
