"""What a run leaves for people: metrics.jsonl, TensorBoard events, curves and panels, summaries at start and end."""

import json
import logging
import sys
import textwrap
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from allspark_fast.config import Config, Schedule
from allspark_fast.data.datasets import Sources
from allspark_fast.data.info import DatasetInfo
from allspark_fast.data.loader import EvalSample
from allspark_fast.files import write_atomically, write_text
from allspark_fast.inference.pictures import comparison, draw_panel, label_map, to_image
from allspark_fast.text import drawable, one_line, property_table
from allspark_fast.weights.spec import ModelSpec

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

Record = dict[str, Any]
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


class MetricsLog:
    """metrics.jsonl and TensorBoard events of a run folder, cut back to the step from which it resumes.

    Records of later steps are removed, and that of the step's evaluation unless it is ``evaluated``.
    """

    def __init__(self, folder: Path, step: int, *, evaluated: bool = True) -> None:
        # Here, because these imports take a second that a library user need not spend.
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415

        self.path = folder / "metrics.jsonl"
        earlier = [record for record in read_metrics(folder) if record["step"] <= step]
        self.records = [x for x in earlier if evaluated or x["step"] < step or "miou" not in x]
        write_text(self.path, "".join(f"{json.dumps(record)}\n" for record in self.records))
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
    """Read the records of metrics.jsonl, without a last line that a crash cut off."""
    path = folder / "metrics.jsonl"
    records: list[Record] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def draw_pictures(
    log: MetricsLog,
    crops: tuple[Tensor, Mapping[str, Tensor]],
    validation: Sequence[tuple[str, EvalSample, Tensor]],
    spec: ModelSpec,
) -> None:
    """Draw curves.png, predictions.png and validation.png of a run, which goes on if they cannot be drawn.

    They show unlabeled crops (B, 3, H, W) with labels (B, H, W) by the title of their column; and of some validation
    images name, sample and prediction (H, W).
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
            draw_panel(log.path.with_name(f"{name}.png"), rows, spec.info)
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


def start_summary(
    config: Config, sources: Sources, schedule: Schedule, model: nn.Module, folder: Path, *, step: int
) -> str:
    """Return a table of what a run is about to do from a step on, in lines of 80 columns where names are short."""
    data, train = config.data, config.train
    info, *lists = sources
    device = next(model.parameters()).device
    counts = zip(map(len, (x.entries for x in lists)), ("labeled", "unlabeled", "validation images"), strict=True)
    is_supervised, on_gpu = train.method == "supervised", device.type == "cuda"
    phases = {
        "pseudo labels": schedule.total if is_supervised else schedule.pseudo_from,
        "the memory": schedule.memory_from if train.method == "allspark" else schedule.total,
    }
    begin = (f"{name} from {start}" for name, start in phases.items() if start < schedule.total)
    parameters = sum(x.numel() for x in model.parameters()) / 1e6
    name = torch.cuda.get_device_name(device) if on_gpu else f"CPU, threads: {torch.get_num_threads()}"
    return property_table(
        {
            "method": train.method,
            "data": f"{data.dataset}: " + ", ".join(f"{count} {name}" for count, name in counts),
            "classes": textwrap.shorten(
                f"{len(info.classes)}: {', '.join(map(one_line, info.classes))}", 66, placeholder=" ..."
            ),
            "model": f"{config.model.backbone}, {parameters:.1f} M parameters, "
            f"from {config.model.weights or 'random weights'}",
            "step": f"{train.batch_size} labeled{'' if is_supervised else f' + {train.batch_size} unlabeled'} crops of "
            f"{data.crop}x{data.crop}, {train.optimizer}, lr {train.lr:g}",
            "schedule": ", ".join([f"steps {step + 1} to {schedule.total}", *begin]),
            "scored": f"after every {schedule.evaluate_every} and the last",
            "device": f"{name}, {'bfloat16 autocast' if train.amp and on_gpu else 'float32'}",
            "folder": f"{folder}; live: tensorboard --logdir {folder}",
            "stop": "Ctrl-C, which saves; the same command goes on",
        }
    )


def end_summary(folder: Path, best: tuple[float, int], last: tuple[float, int], *, steps: int, seconds: float) -> str:
    """Return a table of the best and the last mIoU and their steps, what the last steps took, and what to type next."""
    command = f"python -m allspark_fast {{}} {folder}"
    return property_table(
        {
            "best": f"mIoU {100 * best[0]:.1f} of step {best[1]} (best.safetensors)",
            "last": f"mIoU {100 * last[0]:.1f} of step {last[1]} (last.safetensors)",
            "took": f"{timedelta(seconds=round(seconds))} for {steps} steps{_peak_memory()}",
            "folder": f"{folder}: look at validation.png, predictions.png, curves.png",
            "next": f"{command.format('evaluate')}\n{command.format('predict')} IMAGE_OR_FOLDER",
        }
    )


def _peak_memory() -> str:
    if torch.cuda.is_initialized():
        return f", at most {torch.cuda.max_memory_allocated() / 1e9:.1f} GB of GPU memory"
    if resource is None:
        return ""
    unit = 1 if sys.platform == "darwin" else 1024
    return f", at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.1f} GB of memory"
