"""The log of a run: metrics.jsonl, TensorBoard events, and what it says at its start and end."""

import json
import sys
import textwrap
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from allspark_fast.config import Config, Schedule
from allspark_fast.data.datasets import Sources
from allspark_fast.files import write_text
from allspark_fast.text import one_line, property_table

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

Record = dict[str, Any]


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
        lines = "".join(f"{json.dumps(record)}\n" for record in self.records)
        write_text(self.path, lines)
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
            elif isinstance(value, list):  # a number for each class
                for index, x in enumerate(value):
                    if x is not None:
                        self._events.add_scalar(f"{name}/{index}", x, step)
        self._events.flush()

    def add_picture(self, path: Path) -> None:
        """Show a picture of the run folder in TensorBoard too, under its name, at the step of the last record."""
        pixels = np.asarray(Image.open(path).convert("RGB"))
        self._events.add_image(path.stem, pixels, self.records[-1]["step"], dataformats="HWC")

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
