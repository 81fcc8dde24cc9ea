"""Image files for tests."""

from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from allspark_fast.data.datasets import Entry


def write_image(path: Path, values: np.ndarray, mode: str | None = None, **options: object) -> Path:
    """Save pixels, converted to a mode of Pillow if one is given."""
    image = Image.fromarray(values)
    (image if mode is None else image.convert(mode)).save(path, **options)
    return path


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[ExifTags.Base.Orientation] = orientation
    return block


def write_folder(root: Path, count: int, classes: int = 3) -> list[Entry]:
    """Write images/NN.png and labels/NN.png of 50 x 40 pixels of noise; labels hold the classes 0..classes-1."""
    rng = np.random.default_rng(0)
    for folder in ("images", "labels"):
        (root / folder).mkdir(exist_ok=True)
    entries = [Entry(f"images/{index:02d}.png", f"labels/{index:02d}.png") for index in range(count)]
    for image, label in ((entry.image, entry.label) for entry in entries):
        write_image(root / image, rng.integers(0, 256, (40, 50, 3), np.uint8))
        write_image(root / str(label), rng.integers(0, classes, (40, 50), np.uint8))
    return entries
