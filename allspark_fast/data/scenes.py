"""Procedural scenes: a dataset that needs no download.

A scene is a room with five to nine lit, textured objects that overlap and cast shadows, among flat clutter that
resembles them. It is a function of (seed, index), and looks the same at any size. Constants were chosen by eye.
"""

import colorsys
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

from allspark_fast.data.datasets import Entry
from allspark_fast.data.info import DatasetInfo, hex_palette

Array = NDArray[Any]  # mostly float32: a single float64 array would slow down all that follow
# An object that stands on y = 1 and reaches from -1 to 1, seen on h x w pixels: distance to its outline, positive
# inside (h, w); depth, towards the camera (h, w); albedo (3, h, w); strength of the highlight.
Surface = tuple[Array, Array, Array, float]


def _color(rng: Generator, low: Sequence[float], high: Sequence[float]) -> Array:
    """Draw hue, saturation and value between two colors; return RGB of shape (3, 1, 1)."""
    return np.array(colorsys.hsv_to_rgb(*map(rng.uniform, low, high)), np.float32).reshape(3, 1, 1)


def _noise(rng: Generator, size: tuple[int, int], cells: int) -> Array:
    """Draw smooth (H, W) noise in -1..1 with ``cells`` bumps a side."""
    lattice = Image.fromarray(rng.uniform(-1.0, 1.0, (cells, cells)).astype(np.float32))
    return np.asarray(lattice.resize(size[::-1], Image.Resampling.BILINEAR))


def _bulge(across: Array) -> Array:
    """Return the depth of a round body at -1..1 across it."""
    return np.sqrt(np.maximum(1.0 - across * across, 0.0))


def _polyhedron(x: Array, y: Array, normals: Array, half: Array) -> tuple[Array, Array]:
    """Return outline distance and visible points (3, h, w) of {p: |normals p| <= half}; the normals face the camera."""
    nx, ny, nz = normals.T[:, :, None, None]
    reach, slope = half[:, None, None] / nz, (nx * x + ny * y) / nz
    depth = (reach - slope).min(axis=0)
    return 0.3 * (depth + (reach + slope).min(axis=0)), np.stack(np.broadcast_arrays(x, y, depth))


def _frustum(x: Array, y: Array, top: float, bottom: float, rim: float) -> tuple[Array, Array, Array, Array]:
    """Return outline distance, depth, height (0 at the rim, 1 on the ground) and lid of a round body."""
    tilt = 0.22  # half height of a level circle of radius 1, as the camera sees it
    length = 1.0 - tilt * (bottom + top) - rim
    radius = top + (bottom - top) * np.clip((y - rim) / length, 0.0, 1.0)
    bulge, level = _bulge(x / radius), y - rim - tilt * top
    height = (level - tilt * radius * bulge) / length
    inside = np.minimum(radius - np.abs(x), np.minimum(length * (1.0 - height), level + tilt * top * bulge))
    lid = (x / top) ** 2 + (level / (tilt * top)) ** 2 < 1
    return inside, np.where(lid, 1.6 * y, radius * bulge), height, lid


def ball(x: Array, y: Array, grain: Array, rng: Generator) -> Surface:
    """Draw a sphere with beach ball panels or bands."""
    first, second = _color(rng, (0, 0.5, 0.65), (1, 0.9, 0.95)), _color(rng, (0, 0, 0.8), (1, 0.5, 1))
    turn, count = np.linalg.qr(rng.normal(size=(3, 3)))[0].astype(np.float32), int(rng.integers(2, 5))
    radius = np.sqrt(x * x + y * y)
    depth = _bulge(radius)
    u, v, w = np.tensordot(turn, np.stack(np.broadcast_arrays(x, y, depth)), 1)
    mark = np.sin(3 * count * w) if count == 3 else np.sin(count * np.arctan2(v, u))
    return 1.0 - radius, depth, np.where(mark > 0.1, first, second), 0.55


def crate(x: Array, y: Array, grain: Array, rng: Generator) -> Surface:
    """Draw a wooden box, sometimes painted: boards with a frame around each side."""
    color = _color(rng, (0.05, 0.3, 0.45), (0.12 if rng.random() < 0.7 else 1.0, 0.7, 0.8))
    yaw, pitch, boards = rng.uniform(0.3, 1.27), rng.uniform(0.35, 0.5), rng.uniform(1.5, 3.0)
    sin, cos, lift = np.sin(yaw), np.cos(yaw), np.sqrt(1.0 - pitch * pitch)
    normals = np.array([[0, -lift, pitch], [-sin, cos * pitch, cos * lift], [cos, sin * pitch, sin * lift]], np.float32)
    half = rng.uniform(0.6, 0.66) * np.array([0.75, 1.0, 1.0], np.float32)
    inside, points = _polyhedron(x, y - 1.0 + half @ np.abs(normals[:, 1]), normals, half)
    sides = np.tensordot(normals / half[:, None], points, 1)
    board = boards * (sides[1] + sides[2])
    tone = np.where(board % 1.0 < 0.1, np.float32(0.4), 1.0 + 0.1 * np.sin(np.floor(board) * 2.7) + 0.2 * grain)
    framed = np.sort(np.abs(sides), axis=0)[1] > 0.78
    return inside, points[2], color * np.where(framed, 1.15 + 0.15 * grain, tone), 0.05


def can(x: Array, y: Array, grain: Array, rng: Generator) -> Surface:
    """Draw a tin can: a ribbed metal cylinder with a lid and a printed label."""
    metal, paper = _color(rng, (0, 0.05, 0.6), (1, 0.1, 0.8)), _color(rng, (0, 0.5, 0.5), (1, 0.9, 0.9))
    ink, half, letters = _color(rng, (0, 0, 0.75), (1, 0.4, 1)), rng.uniform(0.5, 0.66), rng.uniform(9, 16)
    inside, depth, height, lid = _frustum(x, y, half, half, -1.0)
    middle = np.abs(height - 0.5)
    label = np.where((middle < 0.14) & (np.sin(x * letters) > 0), ink, paper)
    side = np.where(middle < 0.34, label, metal * (1.0 + 0.12 * np.sin(height * 60.0)))
    return inside, depth, np.where(lid, 0.85 * metal, side), 0.7


def cone(x: Array, y: Array, grain: Array, rng: Generator) -> Surface:
    """Draw a traffic cone with two stripes, on a flat foot."""
    color, stripe = _color(rng, (0, 0.9, 0.8), (1, 0.9, 1)), _color(rng, (0, 0, 0.95), (1, 0.12, 0.95))
    half, first, width = rng.uniform(0.5, 0.62), rng.uniform(0.3, 0.4), rng.uniform(0.06, 0.1)
    body, depth, height, _ = _frustum(x, y + 0.06, 0.04, half, -0.95)
    foot, foot_depth, _, _ = _frustum(x, y, half + 0.22, half + 0.22, 0.55)
    striped = (np.abs(np.abs(height - first - 0.16) - 0.16) < width) & (body > 0)
    return np.maximum(body, foot), np.where(body > 0, depth, foot_depth), np.where(striped, stripe, color), 0.25


def ring(x: Array, y: Array, grain: Array, rng: Generator) -> Surface:
    """Draw a doughnut: a tilted torus of dough under glaze with sprinkles."""
    glaze, sprinkle = _color(rng, (0, 0.3, 0.4), (1, 0.75, 1)), _color(rng, (0, 0.3, 1), (1, 0.6, 1))
    dough = _color(rng, (0.07, 0.5, 0.65), (0.1, 0.6, 0.8)) * (1.0 + 0.25 * grain)
    squash, thick, phase = rng.uniform(0.62, 0.85), rng.uniform(0.3, 0.38), rng.uniform(0, 6.28)
    upright = (y - (1.0 - squash)) / squash
    angle, across = np.arctan2(upright, x), (np.sqrt(x * x + upright * upright) - (1.0 - thick)) / thick
    depth = _bulge(across)
    glazed = depth + 0.12 * np.sin(angle * 5 + phase) - 0.35 * upright > 0.42
    sprinkled = np.sin(angle * 19 + phase) * np.sin(across * 7 + 3 * np.sin(angle * 5)) > 0.6
    albedo = np.where(glazed, np.where(sprinkled, sprinkle, glaze), dough)
    return thick * squash * (1.0 - np.abs(across)), thick * depth + 0.2 * y, albedo, 0.3


def plant(x: Array, y: Array, grain: Array, rng: Generator) -> Surface:
    """Draw a pot plant: pointed leaves, the dark ones behind, that spread from a clay pot."""
    green, clay = _color(rng, (0.2, 0.45, 0.5), (0.42, 0.8, 0.8)), _color(rng, (0.02, 0.3, 0.5), (0.09, 0.7, 0.75))
    turns = np.linspace(-1.9, 1.9, 11) + rng.uniform(-0.15, 0.15, 11)
    leaves = np.array([turns, rng.uniform(0.75, 1.25, 11), 0.5 + 0.05 * rng.permutation(11)], np.float32)
    turns, lengths, tones = leaves[:, :, None, None]
    along = (x * np.sin(turns) - (y - 0.35) * np.cos(turns)) / (lengths * (1.0 - 0.12 * np.abs(turns)))
    across, width = x * np.cos(turns) + (y - 0.35) * np.sin(turns), rng.uniform(0.13, 0.2)
    inside = width * (1.1 * np.sin(np.clip(along, 0.0, 1.0) * 3.14) - 0.1) - np.abs(across)
    top = ((inside > 0) * tones).argmax(axis=0, keepdims=True)
    inside, (pot, depth, _, _) = inside.max(axis=0), _frustum(x, y, 0.42, 0.3, 0.3)
    lean = 0.5 * y - np.take_along_axis(across, top, 0)[0] ** 2 / width
    tone = tones[top[0], 0, 0] + 0.2 * np.take_along_axis(along, top, 0)[0] + 0.2 * grain
    albedo = np.where(pot > inside, clay, green * tone)
    return np.maximum(inside, pot), np.where(pot > inside, depth, lean), albedo, 0.1


def stone(x: Array, y: Array, grain: Array, rng: Generator) -> Surface:
    """Draw a boulder with a speckled grain and flat facets, whose normals lie on a jittered spiral."""
    color, height = _color(rng, (0.02, 0.03, 0.45), (0.62, 0.25, 0.75)), rng.uniform(0.65, 0.9)
    nz, turn = np.linspace(0.95, 0.3, 9), 2.4 * np.arange(9) + rng.uniform(-0.3, 0.3, 9) + rng.uniform(0, 6.28)
    normals = np.stack([np.cos(turn) * _bulge(nz), np.sin(turn) * _bulge(nz), nz], axis=1).astype(np.float32)
    inside, points = _polyhedron(x, (y - 1.0) / height + 1.0, normals, rng.uniform(0.65, 0.8, 9).astype(np.float32))
    return inside, points[2] + 0.03 * grain, color * (1.0 + 0.5 * grain), 0.05


_SHAPES = (ball, crate, can, cone, ring, plant, stone)
SCENES = DatasetInfo(
    "scenes",
    ("background", *(shape.__name__ for shape in _SHAPES)),
    hex_palette("202430 e6475b c98a3c 7f9fd1 f58b2a d67bd0 4fae5a 9b9b8e"),
)


def _room(size: tuple[int, int], horizon: float, grain: Array, rng: Generator) -> Array:
    """Draw wall and floor, plain, tiled or of bricks, with pictures and rugs; they meet at y = ``horizon`` in 0..1."""
    y, x = ((np.arange(length, dtype=np.float32) + 0.5) / length for length in size)
    y, is_wall = y[:, None], y[:, None] < horizon
    depth = 1.3 / (np.maximum(y - horizon, 0.0) / (1.0 - horizon) + 0.3)
    repeats = np.where(is_wall, np.float32(rng.uniform(4, 10)), depth * rng.uniform(3, 6))
    relief = np.where(is_wall, *rng.integers(2, size=2).astype(np.float32))
    row = 2.0 * repeats * np.where(is_wall, y, np.float32(1.0))
    column = (x - 0.5) * repeats + float(rng.choice([0.0, 0.5])) * (np.floor(row) % 2)
    blocks = 0.12 * np.sin(np.floor(row) * 5.1 + np.floor(column) * 3.3)
    blocks = np.where((row % 1.0 < 0.14) | (column % 1.0 < 0.07), np.float32(-0.3), blocks)
    wall, floor = _color(rng, (0, 0.05, 0.45), (1, 0.4, 0.85)), _color(rng, (0, 0.1, 0.35), (1, 0.5, 0.75))
    canvas = np.where(is_wall, wall, floor) * (1.0 + 0.2 * grain + relief * blocks)
    for _ in range(rng.integers(4)):
        first, second = (_color(rng, (0, 0.1, 0.25), (1, 0.8, 0.95)) for _ in range(2))
        center_y, center_x, half_y, half_x = rng.uniform((0, 0, 0.05, 0.05), (1, 1, 0.13, 0.13)).tolist()
        on_wall = center_y < horizon
        u, v = (x - center_x) / half_x, (y - center_y) / (half_y if on_wall else 0.5 * half_x)
        square, circle = np.maximum(np.abs(u), np.abs(v)), np.sqrt(u * u + v * v)
        outline, motif = ((square, circle)[i] for i in rng.integers(2, size=2))
        rings = np.where(np.sin(motif * rng.uniform(3, 15)) > 0, first, second)
        np.copyto(canvas, rings, where=(outline < 1) & (is_wall == on_wall))
    return canvas * (1.0 - 0.25 / (1.0 + (18.0 * (y - horizon)) ** 2))  # the corner gets less light


def _draw(canvas: Array, label: Array, shape: int, place: Array, grain: Array, light: Array, rng: Generator) -> None:
    """Draw an object with its shadow; ``place`` is its y, x and unit in pixels, ``light`` points towards the light."""
    y, x = ((np.arange(length, dtype=np.float32) + 0.5) / place[2] for length in label.shape)
    y, x = y - place[0] / place[2], x - place[1] / place[2]
    rows, columns = slice(*y.searchsorted((0.1, 2.0))), slice(*x.searchsorted((-2.6, 2.6)))
    distance = ((x[columns] + 0.5 * light[0]) / 0.9) ** 2 + ((y[rows, None] - 0.92) / 0.26) ** 2
    canvas[:, rows, columns] *= 1.0 - 0.6 / (1.0 + distance * distance)
    rows, columns = (slice(*axis.searchsorted((-1.08, 1.08))) for axis in (y, x))
    inside, depth, albedo, gloss = _SHAPES[shape](x[columns], y[rows, None], grain[rows, columns], rng)
    down, right = np.gradient(depth, 1.0 / place[2])
    normal = np.stack([-right, -down, np.ones_like(depth)])
    normal /= np.sqrt((normal * normal).sum(axis=0))
    # Ambient light from above, diffuse light, and a highlight.
    diffuse = np.maximum(np.tensordot(light, normal, 1), 0.0)
    color = albedo * (0.36 - 0.12 * normal[1] + 0.8 * diffuse) + gloss * np.exp(24.0 * (diffuse - 1.0))
    canvas[:, rows, columns] += np.clip(inside * place[2] + 0.5, 0.0, 1.0) * (color - canvas[:, rows, columns])
    label[rows, columns][inside > 0] = shape + 1


def render_scene(seed: int, index: int, size: tuple[int, int]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Render a scene of ``size`` (H, W) pixels: image (H, W, 3) and label (H, W), both uint8, with classes of SCENES.

    On one machine the result is the same bit for bit; elsewhere rounding may differ.
    """
    rng = np.random.default_rng([seed, index])
    grain, horizon = 0.6 * _noise(rng, size, 10) + 0.4 * _noise(rng, size, 50), rng.uniform(0.26, 0.42)
    canvas, label = _room(size, horizon, grain, rng), np.zeros(size, np.uint8)
    light = np.array([rng.uniform(-0.6, 0.6), -0.6, 0.7], np.float32)
    light /= np.linalg.norm(light)
    shapes = [*rng.permutation(7).tolist(), *rng.integers(7, size=2).tolist()][: rng.integers(5, 10)]
    depths, columns = np.sort(rng.uniform(0.08, 1.0, len(shapes))).tolist(), rng.permutation(len(shapes)).tolist()
    for shape, depth, column in zip(shapes, depths, columns, strict=True):
        unit = (0.075 + 0.115 * depth) * rng.uniform(0.85, 1.35) * min(size)
        x = (column + rng.uniform(0.1, 0.9)) / len(shapes) * size[1]
        place = np.array([(horizon + (1.0 - horizon) * depth) * size[0] - unit, x, unit], np.float32)
        _draw(canvas, label, shape, place, grain, light, rng)
    canvas *= rng.uniform(0.85, 1.25) * rng.uniform(0.92, 1.08, (3, 1, 1)).astype(np.float32)  # exposure and tint
    canvas += rng.uniform(0.01, 0.035) * (2.0 * rng.random(canvas.shape, np.float32) - 1.0)
    return np.rint(np.clip(canvas, 0.0, 1.0) * 255.0).astype(np.uint8).transpose(1, 2, 0), label


class ScenesDataset:
    """Rendered scenes in place of images on disk; each process keeps up to 64 MiB of those it has rendered.

    Args:
        indices: numbers of the scenes, not negative; the parts of one dataset are disjoint ranges.
        size: side in pixels.
        seed: seed of the dataset, not negative.
    """

    def __init__(self, indices: Sequence[int], size: int, seed: int):
        self.entries = [Entry(f"scene {index}", f"label of scene {index}") for index in indices]
        self._indices, self._size, self._seed = indices, size, seed
        self._render = lru_cache(2**24 // size**2)(render_scene)  # 64 MiB

    def image(self, index: int) -> Image.Image:
        """Render the image alone, of mode RGB."""
        return self[index][0]

    def __getitem__(self, index: int) -> tuple[Image.Image, Image.Image]:
        """Render one scene: an RGB image and its label (mode L)."""
        image, label = self._render(self._seed, self._indices[index], (self._size, self._size))
        return Image.fromarray(image), Image.fromarray(label)
