"""The seven kinds of object in the procedural scenes: outline, colours and normals, each in closed form.

A shape is drawn in its own coordinates: x to the right and y down, both within -1..1, the ground at y = 1. It
draws the same random values at any resolution, so a scene looks the same at any size. The proportions and
ranges of colour were chosen by eye. Factors are Python floats or float32: a float64 would slow everything
down.
"""

import colorsys
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]


class Surface(NamedTuple):
    """What a shape shows to the camera, on a window of h x w pixels.

    Attributes:
        inside: (h, w) distance to the outline in shape units, positive inside.
        albedo: (3, h, w) or (3, 1, 1), RGB in 0..1.
        normal: (3, h, w) unit normals: right, down, towards the camera.
        gloss: Strength of the highlight.
    """

    inside: Array
    albedo: Array
    normal: Array
    gloss: float


def rgb(hue: float, saturation: float, value: float) -> Array:
    """Colour of shape (3, 1, 1) from hue, saturation and value, all in 0..1 (the hue wraps)."""
    return np.array(colorsys.hsv_to_rgb(hue % 1.0, saturation, value), np.float32).reshape(3, 1, 1)


def polygon(x: Array, y: Array, corners: Sequence[tuple[float, float]]) -> Array:
    """Distance to the outline of a convex polygon, positive inside; corners clockwise on the screen."""
    inside = np.full(np.broadcast_shapes(x.shape, y.shape), 9.0, np.float32)
    for (x0, y0), (x1, y1) in zip(corners, [*corners[1:], corners[0]], strict=True):
        length = math.hypot(x1 - x0, y1 - y0)
        edge = (x - x0) * ((y0 - y1) / length) + (y - y0) * ((x1 - x0) / length)
        np.minimum(inside, edge, out=inside)
    return inside


def _root(value: Array) -> Array:
    return np.sqrt(np.maximum(value, 0.0))


def _stack(x: Array, y: Array, z: Array) -> Array:
    return np.stack(np.broadcast_arrays(x, y, z))


def _constant(x: float, y: float, z: float) -> Array:
    """A vector of shape (3, 1, 1)."""
    return np.array([x, y, z], np.float32).reshape(3, 1, 1)


def _directions(rng: Generator, count: int) -> Array:
    """(count, 3) unit vectors, uniform on the sphere."""
    vectors = rng.normal(size=(count, 3))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def _frame(rng: Generator) -> Array:
    """(3, 3) three orthogonal unit vectors of random orientation, as rows."""
    first, helper = _directions(rng, 2)
    second = np.cross(first, helper)
    second /= np.linalg.norm(second)
    return np.stack([first, second, np.cross(first, second)])


def ball(x: Array, y: Array, grain: Array, rng: Generator) -> Surface:
    """A sphere with beach ball panels, bands or dots."""
    first = rgb(rng.random(), rng.uniform(0.55, 0.95), rng.uniform(0.65, 0.95))
    second = rgb(rng.random(), rng.uniform(0.0, 0.5), rng.uniform(0.8, 1.0))
    pattern, count = int(rng.integers(3)), int(rng.integers(2, 5))
    frame, dots = _frame(rng), _directions(rng, 14)
    radius = np.sqrt(x * x + y * y)
    normal = _stack(x, y, _root(1.0 - radius * radius))
    turned = np.tensordot(frame, normal, 1)
    if pattern == 0:
        mark = np.sin(np.arctan2(turned[1], turned[0]) * count) > 0
    elif pattern == 1:
        mark = np.sin(turned[2] * (3 * count)) > 0.2
    else:
        mark = np.tensordot(dots, turned, 1).max(axis=0) > 0.95
    return Surface(1.0 - radius, np.where(mark, first, second), normal, 0.55)


def can(x: Array, y: Array, grain: Array, rng: Generator) -> Surface:
    """A tin can: a ribbed metal cylinder with a lid and a printed label."""
    half, tilt = rng.uniform(0.5, 0.66), rng.uniform(0.16, 0.26)
    metal = rgb(rng.uniform(0.05, 0.65), 0.08, rng.uniform(0.6, 0.8))
    paper = rgb(rng.random(), rng.uniform(0.5, 0.9), rng.uniform(0.5, 0.9))
    ink = rgb(rng.random(), rng.uniform(0.0, 0.4), rng.uniform(0.75, 1.0))
    shift, letters = rng.uniform(-0.4, 0.4), rng.uniform(7, 12)
    # Horizontal circles of the can show as ellipses of half height `rise`.
    rise = tilt * half
    top, bottom = rise - 1.0, 1.0 - rise
    across = x / half
    depth = _root(1.0 - across * across)
    along = (y - rise * depth - top) / (bottom - top)
    from_middle = np.abs(along - 0.5)
    angle = np.arcsin(np.clip(across, -1.0, 1.0)) + shift
    printed = (np.sin(angle * letters) > 0) & (from_middle < 0.14)
    ribs = 1.0 + 0.12 * np.sin(along * 60.0)
    body = np.where(from_middle < 0.34, np.where(printed, ink, paper), metal * ribs)
    reach = ((y - top) / rise) ** 2 + across * across
    lid = metal * np.where(reach > 0.72, np.float32(1.15), np.float32(0.8))
    side = _stack(across, np.zeros_like(y), depth)
    inside = np.minimum(half - np.abs(x), np.minimum(bottom + rise * depth - y, y - (top - rise * depth)))
    albedo, normal = (np.where(reach < 1.0, a, b) for a, b in ((lid, body), (_constant(0.0, -0.85, 0.53), side)))
    return Surface(inside, albedo, normal, 0.7)


def cone(x: Array, y: Array, grain: Array, rng: Generator) -> Surface:
    """A traffic cone: a cone with two stripes on a flat foot."""
    hue = float(rng.choice([0.03, 0.06, 0.1, 0.6, 0.36])) + rng.uniform(-0.02, 0.02)
    color, stripe = rgb(hue, 0.9, rng.uniform(0.8, 1.0)), rgb(rng.random(), rng.uniform(0.0, 0.12), 0.95)
    half, first, width = rng.uniform(0.5, 0.62), rng.uniform(0.3, 0.4), rng.uniform(0.12, 0.2)
    height = (y + 1.0) / 1.82
    radius = np.maximum(half * (0.1 + 0.9 * height), 0.02)
    across = x / radius
    bulge = 0.13 * _root(1.0 - across * across)
    body = np.minimum((1.0 - np.abs(across)) * radius, np.minimum(y + 1.0, 0.74 + bulge - y))
    foot = 0.15 * (1.0 - np.sqrt((x / (half + 0.22)) ** 2 + ((y - 0.82) / 0.18) ** 2))
    from_first = height - bulge * 0.55 - first
    striped = (np.abs(from_first) < width / 2) | (np.abs(from_first - 0.32) < width / 2)
    albedo = np.where(body > 0, np.where(striped, stripe, color), color * 0.55)
    side = _stack(across * 0.95, np.full_like(y, -0.3), _root(0.91 - (across * 0.95) ** 2))
    normal = np.where(body > 0, side, _constant(0.0, -0.8, 0.6))
    return Surface(np.maximum(body, foot), albedo, normal, 0.25)


def ring(x: Array, y: Array, grain: Array, rng: Generator) -> Surface:
    """A doughnut: a tilted torus of dough under glaze with sprinkles."""
    squash, thick = rng.uniform(0.62, 0.85), rng.uniform(0.3, 0.38)
    dough = rgb(rng.uniform(0.07, 0.1), 0.55, rng.uniform(0.65, 0.8))
    glaze_hue = float(rng.choice([0.92, 0.06, 0.02, 0.13, 0.55, 0.75]))
    glaze = rgb(glaze_hue, rng.uniform(0.3, 0.75), rng.uniform(0.4, 0.98))
    hue, phase = rng.random(), rng.uniform(0, 6.28)
    upright = (y - (1.0 - squash)) / squash
    radius = np.maximum(np.sqrt(x * x + upright * upright), 1e-3)
    angle = np.arctan2(upright, x)
    across = (radius - (1.0 - thick)) / thick
    lift = _root(1.0 - across * across)
    glazed = lift + 0.12 * np.sin(angle * 5 + phase) - 0.35 * upright > 0.42
    sprinkled = np.sin(angle * 19 + phase) * np.sin(across * 7 + 3 * np.sin(angle * 5)) > 0.6
    sprinkle = np.where(np.sin(angle * 9) > 0, rgb(hue, 0.5, 1.0), rgb(hue + 0.4, 0.3, 1.0))
    albedo = np.where(glazed, np.where(sprinkled, sprinkle, glaze), dough * (1.0 + 0.25 * grain))
    normal = _stack(x / radius * across, upright / radius * across * 0.9 - 0.2 * lift, lift)
    return Surface(thick * squash * (1.0 - np.abs(across)), albedo, normal, 0.3)


def stone(x: Array, y: Array, grain: Array, rng: Generator) -> Surface:
    """A boulder: an angular outline, flat facets and a speckled grain."""
    turns = (np.arange(9) + rng.uniform(-0.35, 0.35, 9)) * (2 * math.pi / 9)
    reaches, half = rng.uniform(0.82, 1.0, 9), rng.uniform(0.6, 0.9)
    color = rgb(rng.uniform(0.02, 0.62), rng.uniform(0.03, 0.25), rng.uniform(0.4, 0.7))
    facets = _directions(rng, 13) * np.float32(1.6) + np.array([0.0, 0.0, 1.0], np.float32)
    facets /= np.linalg.norm(facets, axis=1, keepdims=True)
    outline = zip(reaches.tolist(), turns.tolist(), strict=True)
    corners = [(reach * math.cos(turn), 1.0 - half + half * reach * math.sin(turn)) for reach, turn in outline]
    flat = (y - (1.0 - half)) / half
    dome = _stack(x, flat, _root(1.0 - x * x - flat * flat))
    facet = np.tensordot(facets, dome, 1).argmax(axis=0)
    tone = 1.0 + 0.5 * grain + 0.12 * np.sin(facet.astype(np.float32) * 2.4)
    return Surface(polygon(x, y, corners), color * tone, np.moveaxis(facets[facet], -1, 0), 0.05)


class _Box(NamedTuple):
    """A box on the ground, seen from a corner and from above.

    Attributes:
        inside: (h, w) distance to the outline, positive inside.
        u: (h, w) coordinate on the visible face, -1..1 across.
        v: (h, w) the same upwards, or to the back on the lid.
        normal: (3, h, w) normal of the visible face.
    """

    inside: Array
    u: Array
    v: Array
    normal: Array


def _project_box(x: Array, y: Array, yaw: float, pitch: float, side: float) -> _Box:
    """Projects a box of half side `side`, turned by `yaw`; `pitch` is the sine of the camera's height angle."""
    lift = math.sqrt(1.0 - pitch * pitch)
    # The half sides towards the two visible faces, on the screen.
    ux, uy = side * math.cos(yaw), side * math.sin(yaw) * pitch
    vx, vy = -side * math.sin(yaw), side * math.cos(yaw) * pitch
    center = 1.0 - (uy + vy)
    height = min(1.3 * side * lift, 2.0 - 2 * (uy + vy))
    ground = [(ux - vx, center + uy - vy), (ux + vx, center + uy + vy), (vx - ux, center + vy - uy)]
    lid = [(px, py - height) for px, py in (ground[2], (-ux - vx, center - uy - vy), ground[0])]
    lid_y, area = y - (center - height), ux * vy - vx * uy
    lid_u, lid_v = (x * vy - lid_y * vx) / area, (lid_y * ux - x * uy) / area
    is_left, is_side = x < ux + vx, (lid_u > 1) | (lid_v > 1)
    side_u = np.where(is_left, (x - vx) / ux, (x - ux) / vx)
    edge_y = np.where(is_left, vy + side_u * uy, uy + side_u * vy)
    side_v = 2.0 * (center + edge_y - y) / height - 1.0
    normals = np.array([[0.0, -lift, pitch], [vx, vy, 0.0], [ux, uy, 0.0]], np.float32)
    normals[1:, :2] /= side
    normals[1:, 2] = math.cos(yaw) * lift, math.sin(yaw) * lift
    face = np.where(is_side, np.where(is_left, 1, 2), 0)
    return _Box(
        polygon(x, y, ground + lid),
        np.where(is_side, side_u, lid_u),
        np.where(is_side, side_v, lid_v),
        np.moveaxis(normals[face], -1, 0),
    )


def crate(x: Array, y: Array, grain: Array, rng: Generator) -> Surface:
    """A wooden box, sometimes painted: planks with a frame around each side."""
    box = _project_box(x, y, rng.uniform(0.3, 1.27), rng.uniform(0.35, 0.5), rng.uniform(0.6, 0.68))
    wood, paint = (
        rgb(rng.uniform(0.05, 0.12), rng.uniform(0.3, 0.7), rng.uniform(0.45, 0.8)),
        rgb(rng.random(), 0.5, 0.7),
    )
    cover = 0.6 if rng.random() < 0.3 else 0.0
    planks, tone = int(rng.integers(3, 6)), rng.uniform(0.0, 6.28)
    is_frame = np.maximum(np.abs(box.u), np.abs(box.v)) > 0.78
    plank = (box.u + 1.0) * (planks / 2)
    is_gap = np.abs(plank - np.rint(plank)) < 0.06
    board = 1.0 + 0.1 * np.sin(np.floor(plank) * 2.7 + tone)
    board += 0.09 * np.sin(box.v * 3 + plank * 19 + 5 * grain)
    shade = np.where(is_frame, 1.12 + 0.15 * grain, np.where(is_gap, 0.4, board))
    return Surface(box.inside, ((1 - cover) * wood + cover * paint) * shade, box.normal, 0.05)


class _Leaves(NamedTuple):
    """A fan of leaves: distance to the outline, brightness, and how far the leaf leans to the right, all (h, w)."""

    inside: Array
    brightness: Array
    lean: Array


def _draw_leaves(x: Array, y: Array, rng: Generator) -> _Leaves:
    """Spreads pointed leaves from the origin, in random order from dark (behind) to bright (in front)."""
    count, width = 11, rng.uniform(0.13, 0.2)
    turns = rng.permutation(np.linspace(-1.9, 1.9, count)) + rng.uniform(-0.15, 0.15, count)
    lengths = rng.uniform(0.75, 1.25, count) * (1.0 - 0.12 * np.abs(turns))
    depths = np.linspace(0.55, 1.0, count).tolist()
    inside = np.full(np.broadcast_shapes(x.shape, y.shape), -1.0, np.float32)
    brightness, lean = np.zeros_like(inside), np.zeros_like(inside)
    for turn, length, depth in zip(turns.tolist(), lengths.tolist(), depths, strict=True):
        along = (x * math.sin(turn) - y * math.cos(turn)) / length
        across = x * math.cos(turn) + y * math.sin(turn)
        leaf = width * (1.1 * np.sin(np.clip(along, 0.0, 1.0) * math.pi) - 0.1) - np.abs(across)
        is_here = leaf > np.minimum(inside, 0.0)
        rib = np.float32(0.5) * (np.abs(across) < 0.02)
        inside = np.maximum(inside, leaf)
        brightness = np.where(is_here, depth + 0.2 * along - rib, brightness)
        lean = np.where(is_here, across * (0.6 * math.cos(turn) / width), lean)
    return _Leaves(inside, brightness, lean)


def plant(x: Array, y: Array, grain: Array, rng: Generator) -> Surface:
    """A pot plant: pointed leaves that spread from a clay pot."""
    leaves = _draw_leaves(x, y - np.float32(0.35), rng)
    green = rgb(rng.uniform(0.2, 0.42), rng.uniform(0.45, 0.8), rng.uniform(0.5, 0.8))
    clay = rgb(rng.uniform(0.02, 0.09), rng.uniform(0.3, 0.7), rng.uniform(0.5, 0.75))
    pot = polygon(x, y, [(-0.42, 0.35), (0.42, 0.35), (0.3, 1.0), (-0.3, 1.0)])
    is_pot = pot > leaves.inside
    rim = np.where(y < 0.5, np.float32(1.15), np.float32(1.0))
    albedo = np.where(is_pot, clay * rim, green * (leaves.brightness + 0.2 * grain))
    side = np.clip(x / 0.42, -1.0, 1.0)
    pot_normal = _stack(side, np.zeros_like(y), _root(1.0 - side * side))
    leaf_normal = _stack(leaves.lean, np.full_like(y, -0.45), np.full_like(y, 0.8))
    return Surface(np.maximum(leaves.inside, pot), albedo, np.where(is_pot, pot_normal, leaf_normal), 0.1)


# In the order of the classes, after the background.
SHAPES: dict[str, Callable[[Array, Array, Array, Generator], Surface]] = {
    "ball": ball,
    "crate": crate,
    "can": can,
    "cone": cone,
    "ring": ring,
    "plant": plant,
    "stone": stone,
}
