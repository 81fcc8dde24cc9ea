"""The log of a run: metrics.jsonl and TensorBoard events."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from allspark_fast.files import write_atomically

Record = dict[str, Any]


class MetricsLog:
    """metrics.jsonl and TensorBoard events of a run folder, cut back to the step from which it resumes.

    Args:
        folder: the run folder.
        step: steps taken before; records of later ones are removed.
        evaluated: whether the last of them is evaluated; otherwise a record of its evaluation is removed too.
    """

    def __init__(self, folder: Path, step: int, *, evaluated: bool = True) -> None:
        # Here, because these imports take a second that a library user need not spend.
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415

        self.path = folder / "metrics.jsonl"
        earlier = [record for record in read_metrics(folder) if record["step"] <= step]
        self.records = [x for x in earlier if evaluated or x["step"] < step or "miou" not in x]
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
            elif isinstance(value, list):  # a number for each class
                for index, x in enumerate(value):
                    if x is not None:
                        self._events.add_scalar(f"{name}/{index}", x, step)
        self._events.flush()

    def add_picture(self, path: Path, step: int) -> None:
        """Show a picture of the run folder in TensorBoard too, under its name."""
        pixels = np.asarray(Image.open(path).convert("RGB"))
        self._events.add_image(path.stem, pixels, step, dataformats="HWC")

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
