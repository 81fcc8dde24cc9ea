"""Procedural scenes: the data set that needs no download.

Every scene is a room with five to nine lit, textured objects that overlap, cast shadows and vary in size,
colour and pattern, among flat clutter that resembles them. Labels are exact. A scene is a function of (seed,
index).
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from allspark_fast.data.datasets import Entry
from allspark_fast.data.info import DatasetInfo, hex_palette
from allspark_fast.data.scene_room import fractal_noise, render_room
from allspark_fast.data.scene_shapes import SHAPES, Array, Surface

SCENES = DatasetInfo(
    "scenes",
    ("background", *SHAPES),
    hex_palette("202430 e6475b c98a3c 7f9fd1 f58b2a d67bd0 4fae5a 9b9b8e"),
)

_KEPT_BYTES = 64 * 2**20


class _Placement(NamedTuple):
    """Where an object stands: all in fractions of the picture's sides, `half` of the shorter one."""

    shape: str
    x: float
    ground: float
    half: float


def _place_objects(rng: Generator, horizon: float) -> list[_Placement]:
    """Draws five to nine objects of mixed kinds, the farthest first."""
    count = int(rng.integers(5, 10))
    names = list(SHAPES)
    kinds = [*rng.permutation(len(names)), *rng.integers(len(names), size=2)][:count]
    near = sorted(rng.uniform(0.08, 1.0, count).tolist())
    columns = rng.permutation(count).tolist()
    return [
        _Placement(
            names[kind],
            (column + rng.uniform(0.1, 0.9)) / count,
            horizon + (1.0 - horizon) * depth,
            (0.075 + 0.115 * depth) * rng.uniform(0.85, 1.35),
        )
        for kind, depth, column in zip(kinds, near, columns, strict=True)
    ]


def _draw_light(rng: Generator) -> Array:
    """(3,) unit vector towards the light: from above, from the left or the right, in front of the wall."""
    light = np.array([rng.uniform(-0.8, 0.8), -rng.uniform(0.5, 0.9), rng.uniform(0.4, 0.8)], np.float32)
    return light / np.linalg.norm(light)


def _window(
    size: tuple[int, int], place: _Placement, reach_x: float, reach_y: float
) -> tuple[slice, slice, Array, Array]:
    """Rows and columns around an object, and the coordinates x (1, w) and y (h, 1) in its own units."""
    height, width = size
    unit = place.half * min(size)
    center_x, center_y = place.x * width, place.ground * height - unit
    rows = slice(max(int(center_y - reach_y * unit), 0), min(math.ceil(center_y + reach_y * unit), height))
    columns = slice(max(int(center_x - reach_x * unit), 0), min(math.ceil(center_x + reach_x * unit), width))
    x = (np.arange(columns.start, columns.stop, dtype=np.float32) + np.float32(0.5 - center_x)) / np.float32(unit)
    y = (np.arange(rows.start, rows.stop, dtype=np.float32) + np.float32(0.5 - center_y)) / np.float32(unit)
    return rows, columns, x[None], y[:, None]


def _cast_shadow(canvas: Array, place: _Placement, light: Array) -> None:
    """Darkens the ground at the foot of an object, away from the light."""
    rows, columns, x, y = _window((canvas.shape[1], canvas.shape[2]), place, 2.6, 1.9)
    lean = -float(light[0])
    contact = (x / 0.8) ** 2 + ((y - 0.95) / 0.22) ** 2
    cast = ((x - 0.75 * lean) / (0.8 + 0.6 * abs(lean))) ** 2 + ((y - 0.9) / 0.3) ** 2
    shade = 0.35 / (1.0 + contact * contact) + 0.4 / (1.0 + cast * cast)
    canvas[:, rows, columns] *= 1.0 - shade


def _shade(surface: Surface, light: Array) -> Array:
    """(3, h, w) colours under the light: ambient from above, diffuse, and a highlight (Blinn-Phong)."""
    halfway = light + np.array([0.0, 0.0, 1.0], np.float32)
    halfway /= np.linalg.norm(halfway)
    diffuse = np.maximum(np.tensordot(light, surface.normal, 1), 0.0)
    highlight = np.maximum(np.tensordot(halfway, surface.normal, 1), 0.0)
    for _ in range(5):  # to the power of 32
        highlight = highlight * highlight
    ambient = 0.36 - 0.12 * surface.normal[1]
    return surface.albedo * (ambient + 0.8 * diffuse) + surface.gloss * highlight


def _draw_object(
    canvas: Array, label: NDArray[np.uint8], place: _Placement, grain: Array, light: Array, rng: Generator
) -> None:
    _cast_shadow(canvas, place, light)
    rows, columns, x, y = _window(label.shape, place, 1.08, 1.08)
    surface = SHAPES[place.shape](x, y, grain[rows, columns], rng)
    coverage = np.clip(surface.inside * (place.half * min(label.shape)) + 0.5, 0.0, 1.0)
    under = canvas[:, rows, columns]
    under += coverage * (_shade(surface, light) - under)
    label[rows, columns][coverage > 0.5] = SCENES.classes.index(place.shape)


def _develop(canvas: Array, rng: Generator) -> NDArray[np.uint8]:
    """Exposure, tint, darker corners and sensor noise; returns (H, W, 3) uint8."""
    exposure, warmth, noise = rng.uniform(0.85, 1.25), rng.uniform(-0.08, 0.08), rng.uniform(0.01, 0.035)
    canvas *= (exposure * np.array([1 + warmth, 1, 1 - warmth])).astype(np.float32).reshape(3, 1, 1)
    y, x = (np.linspace(-1, 1, length, dtype=np.float32) ** 2 for length in canvas.shape[1:])
    canvas *= 1.0 - 0.14 * (y[:, None] + x)
    canvas += (rng.random(canvas.shape, np.float32) - 0.5) * (2 * noise)
    return np.rint(np.clip(canvas, 0.0, 1.0) * 255.0).astype(np.uint8).transpose(1, 2, 0)


def render_scene(seed: int, index: int, size: int | tuple[int, int]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Renders one scene.

    The composition does not depend on `size`. On one machine the result is the same bit for bit; elsewhere
    the last bit of sin and its like may round a few pixels differently.

    Args:
        seed: Seed of the data set, not negative.
        index: Number of the scene, not negative.
        size: Side in pixels, or (height, width).

    Returns:
        Image (H, W, 3) uint8 and label (H, W) uint8 with the classes of `SCENES`; no pixel is ignored.
    """
    height, width = (size, size) if isinstance(size, int) else size
    rng = np.random.default_rng([seed, index])
    grain = fractal_noise(rng, (height, width))
    canvas, horizon = render_room(rng, (height, width), grain)
    light = _draw_light(rng)
    label = np.zeros((height, width), np.uint8)
    for place in _place_objects(rng, horizon):
        _draw_object(canvas, label, place, grain, light, rng)
    return _develop(canvas, rng), label


class ScenesDataset(Dataset[tuple[Image.Image, Image.Image]]):
    """Scenes first, first + 1, ... of a seed, in place of a data set on disk.

    Each process keeps up to 64 MiB of the scenes that it has rendered.

    Args:
        indices: Numbers of the scenes. Parts of one data set are disjoint ranges of one seed.
        size: Side in pixels, or (height, width).
        seed: Seed of the data set.
    """

    def __init__(self, indices: Sequence[int], size: int | tuple[int, int], seed: int):
        self.indices = indices
        self.size = size
        self.seed = seed
        self.entries = [Entry(f"scene {index}", f"label of scene {index}") for index in indices]
        height, width = (size, size) if isinstance(size, int) else size
        self._render = lru_cache(_KEPT_BYTES // (4 * height * width))(render_scene)

    def __len__(self) -> int:
        return len(self.indices)

    def image(self, index: int) -> Image.Image:
        """Renders the image alone: a PIL image of mode RGB."""
        return self[index][0]

    def __getitem__(self, index: int) -> tuple[Image.Image, Image.Image]:
        """Renders one scene: an RGB image and its label (mode L)."""
        image, label = self._render(self.seed, self.indices[index], self.size)
        return Image.fromarray(image), Image.fromarray(label)
