"""Draw a data set of two classes: small bright objects on textured ground, beside bright streaks that are none.

python examples/two_classes.py FOLDER

FOLDER gets 504 images of 128 pixels with masks, meta.json, and the lists train.txt (308), val.txt (96) and test.txt
(100). docs/results.md compares methods on it.
"""

import json
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 128
Y, X = np.mgrid[:SIDE, :SIDE].astype(np.float32)


def draw(index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return image (128, 128, 3) and mask (128, 128) of a number."""
    rng = np.random.default_rng([7, index])
    ground = sum(weight * texture(rng, cells) for cells, weight in ((4, 0.35), (12, 0.25), (40, 0.25), (SIDE, 0.15)))
    image = (0.15 + 0.55 * ground)[..., None] * rng.uniform(0.6, 1, 3) * rng.uniform(0.6, 1.15)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    for _ in range(rng.integers(0, 4)):  # streaks
        along, across = rotated(rng, rng.uniform(0, SIDE, 2))
        line = np.clip(1.5 - abs(across) / 1.2, 0, 1) * (abs(along) < rng.uniform(10, 40))
        image += (line * rng.uniform(0.2, 0.45))[..., None] * rng.uniform(0.7, 1, 3)
    for _ in range(rng.integers(1, 7)):  # objects: ellipses
        along, across = rotated(rng, rng.uniform(4, SIDE - 4, 2))
        radius, flatness = rng.uniform(3, 8), rng.uniform(0.55, 1)
        distance = np.hypot(along / radius, across / (radius * flatness))
        inside = np.clip((1.1 - distance) * radius / 1.5, 0, 1)[..., None]
        color = rng.uniform(0.45, 0.95) * rng.uniform(0.75, 1, 3)
        image = image * (1 - inside) + inside * color * (0.75 + 0.25 * texture(rng, 30))[..., None]
        mask[distance < 1] = 1
    image += rng.normal(0, 0.03, image.shape)
    return np.uint8(255 * np.clip(image, 0, 1)), mask


def texture(rng: np.random.Generator, cells: int) -> NDArray[np.float32]:
    """Smooth noise in [0, 1], about so many cells a side."""
    noise = Image.fromarray(rng.random((cells, cells)).astype(np.float32))
    return np.asarray(noise.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def rotated(rng: np.random.Generator, center: NDArray[np.float64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Coordinates along and across a random direction, from a center."""
    angle, x, y = rng.uniform(0, np.pi), X - center[0], Y - center[1]
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


def main(folder: Path) -> None:
    """Write the data set."""
    lines = []
    for index in range(504):
        pictures = dict(zip(("images", "labels"), draw(index), strict=True))
        for kind, picture in pictures.items():
            (folder / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(folder / kind / f"{index:03}.png")
        lines.append(" ".join(f"{kind}/{index:03}.png" for kind in pictures) + "\n")
    (folder / "meta.json").write_text(json.dumps({"classes": ["ground", "object"]}))
    for name, part in {"test": lines[:100], "val": lines[100:196], "train": lines[196:]}.items():
        (folder / f"{name}.txt").write_text("".join(part))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
