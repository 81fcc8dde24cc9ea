"""The rooms of the procedural scenes: wall, floor, and flat clutter that looks like objects but is not."""

from functools import lru_cache

import numpy as np
from numpy.random import Generator

from allspark_fast.data.scene_shapes import Array, polygon, rgb


@lru_cache(maxsize=64)
def _interpolation(length: int, cells: int) -> Array:
    """(length, cells + 1) weights that interpolate lattice values smoothly along one axis."""
    position = (np.arange(length) + 0.5) * (cells / length)
    low = position.astype(int)
    part = position - low
    part = part * part * (3.0 - 2.0 * part)
    weights = np.zeros((length, cells + 1), np.float32)
    weights[np.arange(length), low] = 1.0 - part
    weights[np.arange(length), low + 1] = part
    return weights


def value_noise(rng: Generator, size: tuple[int, int], cells: int) -> Array:
    """(H, W) smooth noise in -1..1 with `cells` bumps per side, the same field at any resolution."""
    lattice = rng.uniform(-1.0, 1.0, (cells + 1, cells + 1)).astype(np.float32)
    return _interpolation(size[0], cells) @ lattice @ _interpolation(size[1], cells).T


def fractal_noise(rng: Generator, size: tuple[int, int]) -> Array:
    """(H, W) noise in -1..1 with detail at four scales."""
    octaves = zip((6, 14, 33, 70), (0.35, 0.3, 0.2, 0.15), strict=True)
    return sum((value_noise(rng, size, cells) * share for cells, share in octaves), np.zeros(size, np.float32))


def _wall(x: Array, y: Array, grain: Array, rng: Generator) -> Array:
    """Plaster, striped paper or bricks, in a muted colour."""
    base = rgb(rng.random(), rng.uniform(0.05, 0.4), rng.uniform(0.45, 0.85))
    pattern, count = int(rng.integers(3)), int(rng.integers(5, 12))
    if pattern == 0:
        return base * (1.0 + 0.18 * grain)
    if pattern == 1:
        return base * (1.0 + np.float32(0.1) * (np.sin(x * (6.28 * count)) > 0.3) + 0.05 * grain)
    row = y * (2.4 * count)
    column = x * count + 0.5 * (np.floor(row) % 2)
    joint = (row % 1.0 < 0.14) | (column % 1.0 < 0.07)
    tone = 0.12 * np.sin(np.floor(row) * 5.1 + np.floor(column) * 3.3)
    return base * np.where(joint, 1.2, 0.95 + tone + 0.15 * grain)


def _floor(x: Array, depth: Array, grain: Array, rng: Generator) -> Array:
    """Boards, tiles or carpet in perspective; `depth` is 1 at the camera and grows towards the wall."""
    base = rgb(float(rng.choice([0.05, 0.08, 0.1, rng.random()])), rng.uniform(0.1, 0.55), rng.uniform(0.35, 0.75))
    pattern, count, shift = int(rng.integers(3)), rng.uniform(3.0, 6.0), rng.uniform(0.0, 6.28)
    across, away = (x - 0.5) * depth * count, depth * count
    if pattern == 0:
        board = np.floor(across)
        joint = (across - board < 0.06) | ((away * 0.4 + np.sin(board * 7.0) * 2) % 1.0 < 0.025)
        return base * np.where(joint, 0.65, 1.0 + 0.12 * np.sin(board * 4.3 + shift) + 0.18 * grain)
    if pattern == 1:
        odd = (np.floor(across) + np.floor(away)) % 2
        return base * (0.85 + 0.3 * odd + 0.1 * grain)
    return base * (1.0 + 0.3 * grain + 0.06 * np.sin(across * 9 + shift) * np.sin(away * 9))


def _picture(canvas: Array, x: Array, y: Array, horizon: float, rng: Generator) -> None:
    """Hangs a framed picture with a disc in it on the wall: round, like a ball, but flat."""
    left, top = rng.uniform(0.02, 0.8), rng.uniform(0.02, 0.4) * horizon
    width, height = rng.uniform(0.1, 0.22), rng.uniform(0.35, 0.55) * horizon
    frame, paper, disc = (rgb(rng.random(), rng.uniform(0.1, 0.8), rng.uniform(0.25, 0.95)) for _ in range(3))
    inside = np.minimum(np.minimum(x - left, left + width - x), np.minimum(y - top, top + height - y))
    radius = np.hypot(x - (left + width / 2), y - (top + height * rng.uniform(0.4, 0.7)))
    motif = np.where(radius < rng.uniform(0.2, 0.4) * min(width, height), disc, paper)
    np.copyto(canvas, np.where(inside > 0.012, motif, frame), where=inside > 0)


def _rug(canvas: Array, x: Array, y: Array, horizon: float, rng: Generator) -> None:
    """Lays a flat round or square rug with rings or stripes on the floor."""
    center_x, center_y = rng.uniform(0.1, 0.9), horizon + (1.0 - horizon) * rng.uniform(0.25, 0.95)
    radius = rng.uniform(0.1, 0.28) * (0.4 + center_y - horizon)
    first, second = (rgb(rng.random(), rng.uniform(0.2, 0.8), rng.uniform(0.3, 0.9)) for _ in range(2))
    dx, dy = (x - center_x) / radius, (y - center_y) / (radius * 0.42)
    is_round, rings = rng.random() < 0.6, int(rng.integers(2, 6))
    reach = np.sqrt(dx * dx + dy * dy) if is_round else np.maximum(np.abs(dx), np.abs(dy))
    np.copyto(canvas, np.where(np.sin(reach * (3.14 * rings)) > 0, first, second), where=reach < 1.0)


def _sunlight(canvas: Array, x: Array, y: Array, rng: Generator) -> None:
    """Brightens a slanted patch, as if the sun came in through a window."""
    left, top, width, slant = (
        rng.uniform(0, 0.7),
        rng.uniform(0, 0.5),
        rng.uniform(0.15, 0.35),
        rng.uniform(-0.3, 0.3),
    )
    corners = [(left, top), (left + width, top), (left + width + slant, top + 0.5), (left + slant, top + 0.5)]
    inside = polygon(x, y, corners)
    bar = np.abs(x - slant * (y - top) * 2 - left - width / 2) < 0.012
    canvas *= 1.0 + 0.3 * (np.clip(inside * 25.0, 0.0, 1.0) * ~bar)


def render_room(rng: Generator, size: tuple[int, int], grain: Array) -> tuple[Array, float]:
    """Draws an empty room.

    Args:
        rng: Source of randomness.
        size: (H, W) in pixels.
        grain: (H, W) noise in -1..1 for the materials.

    Returns:
        (3, H, W) RGB in 0..1 or slightly above, and the height of the floor's far edge in 0..1 from the top.
    """
    y = ((np.arange(size[0], dtype=np.float32) + 0.5) / size[0])[:, None]
    x = ((np.arange(size[1], dtype=np.float32) + 0.5) / size[1])[None]
    horizon = rng.uniform(0.26, 0.42)
    depth = 1.3 / (np.maximum(y - horizon, 0.0) / (1.0 - horizon) + 0.3)
    wall, floor = _wall(x, y, grain, rng), _floor(x, depth, grain, rng)
    canvas = np.where(y < horizon, wall, floor).astype(np.float32)
    for _ in range(rng.integers(0, 3)):
        _picture(canvas, x, y, horizon, rng)
    for _ in range(rng.integers(0, 3)):
        _rug(canvas, x, y, horizon, rng)
    if rng.random() < 0.5:
        _sunlight(canvas, x, y, rng)
    # Corners between wall and floor get less light.
    canvas *= 1.0 - 0.25 / (1.0 + (np.abs(y - horizon) * 18.0) ** 2)
    return canvas, horizon
