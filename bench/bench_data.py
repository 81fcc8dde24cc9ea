"""What a loading process delivers, against what a training step on a GPU takes."""

import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from allspark_fast.data.datasets import Entry, SegmentationDataset
from allspark_fast.data.seeding import make_generator
from allspark_fast.data.transforms import CropTransform
from bench.harness import Record, table

# CamVid's photographs at VOC's usual size, or as they are.
SIZES = {"voc": (500, 375), "camvid": (480, 360)}
DEFAULT = ["voc"] if "ALLSPARK_DATA_DIR" in os.environ else []
_IMAGES, _CROP, _BATCH = 32, 513, 8
# An estimate of the step to be fed: 8 + 8 images of 513 pixels on an H100.
_STEP_SECONDS = 0.015
_COLUMNS = {
    "images": ("variant", 1.0),
    "read ms": ("read_seconds", 1e3),
    "transform ms": ("transform_seconds", 1e3),
    "images/s per worker": ("images_per_s", 1.0),
    f"workers for {_STEP_SECONDS * 1e3:.0f} ms": ("workers", 1.0),
}


class _Costs(NamedTuple):
    """CPU seconds for one image."""

    read: float
    transform: float


def measure(size: str, repeats: int) -> Iterator[tuple[list[Record], str]]:
    """Time reading and transforming in one thread, as in a worker, in CPU seconds: other work does not disturb them.

    Args:
        size: a name in ``SIZES``.
        repeats: passes over the images; the figures are medians of these.

    Yields:
        records of labeled images, unlabeled images and their mean, with their table.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    with tempfile.TemporaryDirectory() as folder:
        dataset = _resized_camvid(Path(folder), SIZES[size])
        transforms = [CropTransform(_CROP, photometric=photometric) for photometric in (True, False)]
        labeled = _costs(dataset.__getitem__, transforms[0], repeats)
        unlabeled = _costs(lambda index: (dataset.image(index), None), transforms[1], repeats)
    torch.set_num_threads(threads)
    both = _Costs(*(statistics.mean(pair) for pair in zip(labeled, unlabeled, strict=True)))
    named = {"labeled": labeled, "unlabeled": unlabeled, "both": both}
    records = [_record(size, name, costs) for name, costs in named.items()]
    yield records, table(records, _COLUMNS)


def _resized_camvid(folder: Path, size: tuple[int, int]) -> SegmentationDataset:
    root = Path(os.environ["ALLSPARK_DATA_DIR"]) / "camvid"
    entries = []
    for image in sorted((root / "images").iterdir())[:_IMAGES]:
        entry = Entry(f"{image.stem}.jpg", f"{image.stem}.png")
        Image.open(image).resize(size, Image.Resampling.BICUBIC).save(folder / entry.image, quality=90)
        label = Image.open(root / "labels" / f"{image.stem}.png")
        label.resize(size, Image.Resampling.NEAREST).save(folder / f"{image.stem}.png")
        entries.append(entry)
    return SegmentationDataset(folder, entries)


def _costs(
    read: Callable[[int], tuple[Image.Image, Image.Image | None]], transform: CropTransform, repeats: int
) -> _Costs:
    passes = []
    for repeat in range(repeats):
        start = time.process_time()
        samples = [read(index) for index in range(_IMAGES)]
        middle = time.process_time()
        for index, sample in enumerate(samples):
            transform(*sample, make_generator(repeat, index))
        passes.append((middle - start, time.process_time() - middle))
    return _Costs(*(statistics.median(part) / _IMAGES for part in zip(*passes, strict=True)))


def _record(size: str, name: str, costs: _Costs) -> Record:
    return {
        "op": "data",
        "size": f"{size}: {SIZES[size][0]}x{SIZES[size][1]} to {_CROP} pixels, B={_BATCH}+{_BATCH}",
        "variant": name,
        "read_seconds": costs.read,
        "transform_seconds": costs.transform,
        "images_per_s": 1 / sum(costs),
        "workers": math.ceil(2 * _BATCH / _STEP_SECONDS * sum(costs)),
    }
