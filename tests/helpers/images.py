import json
from collections.abc import Sequence
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


def write_folder(root: Path, count: int, labeled: int = 99, classes: int = 3, names: Sequence[str] = ()) -> list[Entry]:
    """Write images/NN.png and labels/NN.png of 50 x 40 pixels of noise, and the names of classes into meta.json.

    So many images have a label, which holds the classes 0..classes-1.
    """
    rng = np.random.default_rng(0)
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    if names:
        (root / "meta.json").write_text(json.dumps({"classes": names}))
    files = [f"{index:02d}.png" for index in range(count)]
    for i, file in enumerate(files):
        write_image(root / "images" / file, rng.integers(0, 256, (40, 50, 3), np.uint8))
        if i < labeled:
            write_image(root / "labels" / file, rng.integers(0, classes, (40, 50), np.uint8))
    return [Entry(f"images/{file}", f"labels/{file}" if i < labeled else None) for i, file in enumerate(files)]
