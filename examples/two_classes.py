"""Draw a data set of two classes: small bright objects on textured ground, among others of another color.

python examples/two_classes.py FOLDER

The light of every image has its own color, so a few labels do not show what an object looks like in all of them. FOLDER
gets 900 images of 128 pixels with masks, meta.json, and the lists train.txt (300), val.txt (200) and test.txt (400).
docs/results.md compares methods on it.
"""

import json
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 128
Y, X = np.mgrid[:SIDE, :SIDE].astype(np.float32)
# Red, green and blue of other things and of objects, in white light.
COLORS = np.array([(0.55, 0.8, 0.4), (0.85, 0.5, 0.4)])


def draw(index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return image (128, 128, 3) and mask (128, 128) of a number."""
    rng = np.random.default_rng([7, index])
    shares = rng.dirichlet([1, 1, 1, 1])
    ground = sum(share * texture(rng, cells) for share, cells in zip(shares, (4, 12, 40, SIDE), strict=True))
    low, high = np.sort(rng.uniform(0.2, 0.8, 2))
    image = (low + (high - low) * ground)[..., None] * rng.uniform(0.85, 1, 3)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    for kind in rng.permutation(np.repeat([0, 1], rng.integers(1, 5, 2))):
        along, across = rotated(rng)
        radius, flatness = rng.uniform(6, 12), rng.uniform(0.6, 1)
        distance = np.hypot(along / radius, across / (radius * flatness))
        inside = np.clip((1.1 - distance) * radius / 1.5, 0, 1)[..., None]
        color = COLORS[kind] + rng.uniform(-0.12, 0.12, 3)
        image = image * (1 - inside) + inside * color * (0.7 + 0.3 * texture(rng, 30))[..., None]
        mask[distance < 1] = kind
    image = image * rng.uniform(0.15, 1, 3) + rng.normal(0, 0.03, image.shape)
    return np.uint8(255 * np.clip(image, 0, 1)), mask


def texture(rng: np.random.Generator, cells: int) -> NDArray[np.float32]:
    """Smooth noise in [0, 1], about so many cells a side."""
    noise = Image.fromarray(rng.random((cells, cells)).astype(np.float32))
    return np.asarray(noise.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def rotated(rng: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Coordinates along and across a random direction, from a random center."""
    angle, x, y = rng.uniform(0, np.pi), X - rng.uniform(0, SIDE), Y - rng.uniform(0, SIDE)
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


def main(folder: Path) -> None:
    """Write the data set."""
    lines = []
    for index in range(900):
        pictures = dict(zip(("images", "labels"), draw(index), strict=True))
        for kind, picture in pictures.items():
            (folder / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(folder / kind / f"{index:03}.png")
        lines.append(" ".join(f"{kind}/{index:03}.png" for kind in pictures) + "\n")
    (folder / "meta.json").write_text(json.dumps({"classes": ["ground", "object"]}))
    for name, part in {"train": lines[:300], "val": lines[300:500], "test": lines[500:]}.items():
        (folder / f"{name}.txt").write_text("".join(part))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
