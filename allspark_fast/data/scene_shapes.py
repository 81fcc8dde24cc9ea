"""The seven kinds of object in the procedural scenes: outline, colours and normals, each in closed form.

A shape is drawn in its own coordinates: x to the right and y down, both within -1..1, with the ground at y =
1. It draws a fixed number of random values whatever the resolution, so a scene looks the same at any size.
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


def _rotation(rng: Generator) -> Array:
    """A random rotation, uniform over directions of its axis frame (a random unit quaternion)."""
    w, x, y, z = (quaternion := rng.normal(size=4)) / np.linalg.norm(quaternion)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ],
        np.float32,
    )


def ball(x: Array, y: Array, grain: Array, rng: Generator) -> Surface:
    """A sphere with beach ball panels, bands or dots."""
    radius = np.sqrt(x * x + y * y)
    normal = _stack(x, y, _root(1.0 - radius * radius))
    first = rgb(rng.random(), rng.uniform(0.55, 0.95), rng.uniform(0.65, 0.95))
    second = rgb(rng.random(), rng.uniform(0.0, 0.5), rng.uniform(0.8, 1.0))
    pattern, count, rotation, spots = (
        int(rng.integers(3)),
        int(rng.integers(2, 5)),
        _rotation(rng),
        rng.normal(size=(14, 3)),
    )
    turned = np.tensordot(rotation, normal, 1)
    if pattern == 0:
        mark = np.sin(np.arctan2(turned[1], turned[0]) * count) > 0
    elif pattern == 1:
        mark = np.sin(turned[2] * (3 * count)) > 0.2
    else:
        spots = (spots / np.linalg.norm(spots, axis=1, keepdims=True)).astype(np.float32)
        mark = np.tensordot(spots, turned, 1).max(axis=0) > 0.95
    return Surface(1.0 - radius, np.where(mark, first, second), normal, 0.55)


def can(x: Array, y: Array, grain: Array, rng: Generator) -> Surface:
    """A tin can: a metal cylinder with a lid and a printed label."""
    half, tilt = rng.uniform(0.5, 0.66), rng.uniform(0.16, 0.26)
    metal = rgb(rng.uniform(0.05, 0.65), 0.08, rng.uniform(0.6, 0.8))
    paper = rgb(rng.random(), rng.uniform(0.5, 0.9), rng.uniform(0.5, 0.9))
    print_color = rgb(rng.random(), rng.uniform(0.0, 0.4), rng.uniform(0.75, 1.0))
    shift, letters = rng.uniform(-0.4, 0.4), rng.uniform(7, 12)
    across = x / half
    bulge = tilt * half * _root(1.0 - across * across)
    top = -1.0 + tilt * half
    lid = ((y - top) / (tilt * half)) ** 2 + across * across < 1.0
    along = (y - bulge - top) / (2.0 - 2 * tilt * half)
    angle = np.arcsin(np.clip(across, -1.0, 1.0)) + shift
    text = (np.sin(angle * letters) > 0) & (np.abs(along - 0.5) < 0.14)
    body = np.where(np.abs(along - 0.5) < 0.34, np.where(text, print_color, paper), metal)
    ribs = 1.0 + 0.12 * np.sin(along * 60.0) * (np.abs(along - 0.5) >= 0.34)
    rim = ((y - top) / (tilt * half)) ** 2 + across * across > 0.72
    albedo = np.where(lid, metal * np.where(rim, np.float32(1.15), np.float32(0.8)), body * ribs)
    side = _stack(across, np.zeros_like(y), _root(1.0 - across * across))
    normal = np.where(lid, np.array([0.0, -0.85, 0.53], np.float32).reshape(3, 1, 1), side)
    inside = np.minimum(half - np.abs(x), np.minimum(1.0 - tilt * half + bulge - y, y - (top - bulge)))
    return Surface(inside, albedo, normal, 0.7)


def cone(x: Array, y: Array, grain: Array, rng: Generator) -> Surface:
    """A traffic cone: a striped cone on a flat foot."""
    color = rgb(float(rng.choice([0.03, 0.06, 0.1, 0.6, 0.36])) + rng.uniform(-0.02, 0.02), 0.9, rng.uniform(0.8, 1.0))
    stripe = rgb(rng.random(), rng.uniform(0.0, 0.12), 0.95)
    half, first, width = rng.uniform(0.5, 0.62), rng.uniform(0.3, 0.4), rng.uniform(0.12, 0.2)
    foot_half = half + 0.22
    height = (y + 1.0) / 1.82
    across = x / np.maximum(half * (0.1 + 0.9 * height), 0.02)
    bulge = 0.13 * _root(1.0 - across * across)
    body = np.minimum((1.0 - np.abs(across)) * half * (0.1 + 0.9 * height), np.minimum(y + 1.0, 0.74 + bulge - y))
    foot = 0.15 * (1.0 - np.sqrt((x / foot_half) ** 2 + ((y - 0.82) / 0.18) ** 2))
    at = height - bulge * 0.55
    striped = (np.abs(at - first) < width / 2) | (np.abs(at - first - 0.32) < width / 2)
    albedo = np.where(body > 0, np.where(striped, stripe, color), color * 0.55)
    side = _stack(across * 0.95, np.full_like(y, -0.3), _root(0.91 - (across * 0.95) ** 2))
    normal = np.where(body > 0, side, np.array([0.0, -0.8, 0.6], np.float32).reshape(3, 1, 1))
    return Surface(np.maximum(body, foot), albedo, normal, 0.25)


def ring(x: Array, y: Array, grain: Array, rng: Generator) -> Surface:
    """A doughnut: a tilted torus of dough under glaze with sprinkles."""
    squash, thick = rng.uniform(0.62, 0.85), rng.uniform(0.3, 0.38)
    dough = rgb(rng.uniform(0.07, 0.1), 0.55, rng.uniform(0.65, 0.8))
    glaze = rgb(float(rng.choice([0.92, 0.06, 0.02, 0.13, 0.55, 0.75])), rng.uniform(0.3, 0.75), rng.uniform(0.4, 0.98))
    sprinkle_hue, phase = rng.random(), rng.uniform(0, 6.28)
    major = 1.0 - thick
    upright = (y - (1.0 - squash)) / squash
    radius = np.maximum(np.sqrt(x * x + upright * upright), 1e-3)
    across = (radius - major) / thick
    lift = _root(1.0 - across * across)
    angle = np.arctan2(upright, x)
    glazed = lift + 0.12 * np.sin(angle * 5 + phase) - 0.35 * upright > 0.42
    cells = np.sin(angle * 19 + phase) * np.sin(across * 7 + 3 * np.sin(angle * 5))
    sprinkles = np.where(np.sin(angle * 9) > 0, rgb(sprinkle_hue, 0.5, 1.0), rgb(sprinkle_hue + 0.4, 0.3, 1.0))
    albedo = np.where(glazed, np.where(cells > 0.6, sprinkles, glaze), dough * (1.0 + 0.25 * grain))
    normal = _stack(x / radius * across, upright / radius * across * 0.9 - 0.2 * lift, lift)
    return Surface(thick * squash * (1.0 - np.abs(across)), albedo, normal, 0.3)


def stone(x: Array, y: Array, grain: Array, rng: Generator) -> Surface:
    """A boulder: a convex outline with flat facets and a speckled grain."""
    turns = (np.arange(9) + rng.uniform(-0.35, 0.35, 9)) * (2 * math.pi / 9)
    reach = rng.uniform(0.82, 1.0, 9)
    height = rng.uniform(0.6, 0.9)
    facets = rng.normal(size=(13, 3)) * (1.0, 0.9, 0.5) + (0.0, 0.0, 0.6)
    color = rgb(rng.uniform(0.02, 0.62), rng.uniform(0.03, 0.25), rng.uniform(0.4, 0.7))
    corners = [
        (r * math.cos(t), 1.0 - height + height * r * math.sin(t))
        for r, t in zip(reach.tolist(), turns.tolist(), strict=True)
    ]
    inside = polygon(x, y, corners)
    flat = (y - (1.0 - height)) / height
    facets = (facets / np.linalg.norm(facets, axis=1, keepdims=True)).astype(np.float32)
    dome = _stack(x, flat, _root(1.0 - x * x - flat * flat))
    facet = np.tensordot(facets, dome, 1).argmax(axis=0)
    normal = np.moveaxis(facets[facet], -1, 0)
    speckle = 1.0 + 0.5 * grain + 0.12 * np.sin(facet.astype(np.float32) * 2.4)
    return Surface(inside, color * speckle, normal, 0.05)


def crate(x: Array, y: Array, grain: Array, rng: Generator) -> Surface:
    """A wooden box seen from a corner: planks, a frame around each side, grain along the planks."""
    yaw, pitch, side = rng.uniform(0.3, 1.27), rng.uniform(0.35, 0.5), rng.uniform(0.6, 0.68)
    wood = rgb(rng.uniform(0.05, 0.12), rng.uniform(0.3, 0.7), rng.uniform(0.45, 0.8))
    paint = rgb(rng.random(), 0.5, 0.7)
    if rng.random() < 0.3:
        wood = 0.4 * wood + 0.6 * paint
    planks, tone = int(rng.integers(3, 6)), rng.uniform(0.0, 6.28)
    lift = math.sqrt(1.0 - pitch * pitch)
    ux, uy = side * math.cos(yaw), side * math.sin(yaw) * pitch
    vx, vy = -side * math.sin(yaw), side * math.cos(yaw) * pitch
    drop = 1.0 - (uy + vy)
    high = min(1.3 * side * lift, 2.0 - 2 * (uy + vy))
    corners = [(ux - vx, drop + uy - vy), (ux + vx, drop + uy + vy), (vx - ux, drop + vy - uy)]
    corners += [
        (vx - ux, drop + vy - uy - high),
        (-ux - vx, drop - uy - vy - high),
        (ux - vx, drop + uy - vy - high),
    ]
    # Coordinates on the lid, -1..1 along u and v; its front edges are at 1.
    top_y, area = y - (drop - high), ux * vy - vx * uy
    top_u, top_v = (x * vy - top_y * vx) / area, (top_y * ux - x * uy) / area
    left = x < ux + vx
    on_side = (top_u > 1) | (top_v > 1)
    along = np.where(left, (x - vx) / ux, (x - ux) / vx)
    edge_y = np.where(left, vy + along * uy, uy + along * vy)
    a = np.where(on_side, along, top_u)
    b = np.where(on_side, 2.0 * (drop + edge_y - y) / high - 1.0, top_v)
    frame = np.maximum(np.abs(a), np.abs(b)) > 0.78
    plank = (a + 1.0) * (planks / 2)
    gap = (np.abs(plank - np.rint(plank)) < 0.06) & ~frame
    board = 1.0 + 0.1 * np.sin(np.floor(plank) * 2.7 + tone) + 0.09 * np.sin(b * 3 + plank * 19 + 5 * grain)
    albedo = wood * np.where(frame, 1.12 + 0.15 * grain, np.where(gap, 0.4, board))
    faces = np.array(
        [
            [0.0, -lift, pitch],
            [vx / side, vy, math.cos(yaw) * lift],
            [ux / side, uy, math.sin(yaw) * lift],
        ],
        np.float32,
    )
    face = np.where(on_side, np.where(left, 1, 2), 0)
    return Surface(polygon(x, y, corners), albedo, np.moveaxis(faces[face], -1, 0), 0.05)


def plant(x: Array, y: Array, grain: Array, rng: Generator) -> Surface:
    """A pot plant: pointed leaves that spread from a clay pot."""
    count = 11
    turns = np.linspace(-1.9, 1.9, count) + rng.uniform(-0.15, 0.15, count)
    lengths = rng.uniform(0.75, 1.25, count) * (1.0 - 0.12 * np.abs(turns))
    order, shades = rng.permutation(count), np.linspace(0.55, 1.0, count).tolist()
    width, hue = rng.uniform(0.13, 0.2), rng.uniform(0.2, 0.42)
    clay = rgb(rng.uniform(0.02, 0.09), rng.uniform(0.3, 0.7), rng.uniform(0.5, 0.75))
    pot = polygon(x, y, [(-0.42, 0.35), (0.42, 0.35), (0.3, 1.0), (-0.3, 1.0)])
    inside, light, tilt = np.full(pot.shape, -1.0, np.float32), np.zeros_like(pot), np.zeros_like(pot)
    for turn, length, shade in zip(turns[order].tolist(), lengths[order].tolist(), shades, strict=True):
        sine, cosine = math.sin(turn), math.cos(turn)
        along = (x * sine - (y - 0.35) * cosine) / length
        across = x * cosine + (y - 0.35) * sine
        leaf = width * (1.1 * np.sin(np.clip(along, 0.0, 1.0) * math.pi) - 0.1) - np.abs(across)
        here = leaf > np.minimum(inside, 0.0)
        inside = np.maximum(inside, leaf)
        light = np.where(here, shade + 0.2 * along - np.float32(0.5) * (np.abs(across) < 0.02), light)
        tilt = np.where(here, across * (2.5 * cosine / width) * 0.25, tilt)
    leaves = rgb(hue, rng.uniform(0.45, 0.8), rng.uniform(0.5, 0.8)) * (light + 0.2 * grain)
    potted = pot > inside
    side = np.clip(x / 0.42, -1.0, 1.0)
    albedo = np.where(potted, clay * np.where(y < 0.5, np.float32(1.15), np.float32(1.0)), leaves)
    normal = _stack(
        np.where(potted, side, tilt),
        np.where(potted, 0.0, -0.45),
        np.where(potted, _root(1 - side * side), 0.8),
    )
    return Surface(np.maximum(inside, pot), albedo, normal.astype(np.float32), 0.1)


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
