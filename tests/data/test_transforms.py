import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from torchvision.transforms.v2 import functional as tvf

from allspark_fast.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    CropTransform,
    apply_geometry,
    draw_geometry,
    jitter_colors,
)

BILINEAR, NEAREST = Image.Resampling.BILINEAR, Image.Resampling.NEAREST
SIDES = st.integers(1, 120)
COLOR = (200, 120, 70)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def flat(*color: int) -> Image.Image:
    return Image.new("RGB", (4, 4), color)


def halves(size: tuple[int, int], left: int, right: int) -> Image.Image:
    """Two grays side by side."""
    image = Image.new("RGB", size, (left,) * 3)
    image.paste((right,) * 3, (size[0] // 2, 0, *size))
    return image


def draws(size, crop_size, scale_range, count):
    source = generator()
    return [draw_geometry(size, crop_size, scale_range, source) for _ in range(count)]


def jittered(image: Image.Image, count: int) -> list[Image.Image]:
    source = generator()
    return [jitter_colors(image, source) for _ in range(count)]


def colors(image: Image.Image, count: int) -> list[tuple[int, int, int]]:
    return [result.getpixel((0, 0)) for result in jittered(image, count)]


def assert_uniform(values: list[int], low: int, high: int) -> None:
    """Every value of low..high occurs, each within five standard deviations of its share."""
    expected = len(values) / (high - low + 1)
    counts = np.bincount(values, minlength=high + 1)
    assert (min(values), max(values)) == (low, high)
    assert np.abs(counts[low:] - expected).max() < 5 * expected**0.5


def assert_share(hits: int, count: int, low: float, high: float) -> None:
    """The share of hits lies in low..high, within five standard deviations."""
    margins = [5 * (share * (1 - share) / count) ** 0.5 for share in (low, high)]
    assert low - margins[0] < hits / count < high + margins[1]


def test_long_side_is_uniform_with_both_ends():
    assert_uniform([g.scaled[0] for g in draws((9, 5), (4, 4), (0.5, 2.0), 3000)], 4, 18)


@pytest.mark.parametrize(("size", "long_axis"), [((90, 41), 0), ((41, 90), 1), ((60, 60), 0)])
def test_short_side_follows_rounded_half_up(size, long_axis):
    for geometry in draws(size, (8, 8), (0.5, 2.0), 200):
        long_side, short_side = geometry.scaled[long_axis], geometry.scaled[1 - long_axis]
        assert short_side == int(size[1 - long_axis] * long_side / size[long_axis] + 0.5)


def test_crop_is_uniform_over_the_resized_image():
    geometries = draws((20, 14), (5, 8), (1.0, 1.0), 3000)
    assert_uniform([g.offset[0] for g in geometries], 0, 12)
    assert_uniform([g.offset[1] for g in geometries], 0, 9)
    assert_share(sum(g.flip for g in geometries), 3000, 0.5, 0.5)
    assert {g.offset for g in draws((20, 14), (30, 30), (1.0, 1.0), 50)} == {(0, 0)}  # smaller than the crop


@settings(max_examples=150, deadline=None)
@given(SIDES, SIDES, SIDES, SIDES, st.integers(0, 10**6))
def test_crop_equals_the_crop_of_the_whole_resized_image(width, height, crop_height, crop_width, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    image = Image.fromarray(pixels)
    geometry = draw_geometry(image.size, (crop_height, crop_width), (0.5, 2.0), generator(seed))
    (scaled_width, scaled_height), (x, y), flip = geometry
    assert 0 <= x <= max(scaled_width - crop_width, 0)
    assert 0 <= y <= max(scaled_height - crop_height, 0)
    part = np.asarray(image.resize(geometry.scaled, BILINEAR))[y : y + crop_height, x : x + crop_width]
    expected = np.zeros((crop_height, crop_width, 3), int)
    expected[: part.shape[0], : part.shape[1]] = part
    found = np.asarray(apply_geometry(image, geometry, (crop_height, crop_width), BILINEAR, 0))
    assert np.abs(found - (expected[:, ::-1] if flip else expected)).max() <= 2


@settings(max_examples=60, deadline=None)
@given(st.integers(20, 200), st.integers(20, 200), st.integers(0, 10**6), st.booleans())
def test_image_and_label_agree(width, height, seed, vertical):
    # Both hold the coordinate of each pixel, along one axis.
    coordinate = np.indices((height, width))[0 if vertical else 1].astype(np.uint8)
    image = Image.fromarray(np.repeat(coordinate[..., None], 3, axis=2))
    transform = CropTransform((70, 50), photometric=False, mean=(0, 0, 0), std=(1, 1, 1))
    sample = transform(image, Image.fromarray(coordinate), generator(seed))
    assert sample.image.shape == (3, 70, 50)
    assert sample.label.shape == sample.valid.shape == (70, 50)
    assert (sample.image.dtype, sample.label.dtype) == (torch.float32, torch.int64)
    difference = (sample.image[0] * 255 - sample.label)[sample.valid]
    assert difference.abs().max() <= 1.5


@pytest.mark.parametrize("seed", range(6))
def test_padding(seed):
    transform = CropTransform(64, photometric=False)
    image, label = Image.new("RGB", (30, 20), COLOR), Image.new("L", (30, 20), 7)
    geometry = draw_geometry((30, 20), (64, 64), (0.5, 2.0), generator(seed))
    sample = transform(image, label, generator(seed))
    black = -torch.tensor(IMAGENET_MEAN) / torch.tensor(IMAGENET_STD)
    padded = sample.image.permute(1, 2, 0)[~sample.valid]
    torch.testing.assert_close(padded, black.expand_as(padded))
    assert (sample.label[~sample.valid] == 255).all()
    assert (sample.label[sample.valid] == 7).all()
    # Padding is on the right and at the bottom, before the flip.
    valid = sample.valid.flip(1) if geometry.flip else sample.valid
    assert valid[: geometry.scaled[1], : geometry.scaled[0]].all()
    assert valid.sum() == geometry.scaled[0] * geometry.scaled[1]


def test_unlabeled_crops_keep_their_colors_and_ignore_every_pixel():
    transform = CropTransform(8, photometric=False, mean=(0, 0, 0), std=(1, 1, 1))
    for seed in range(30):
        sample = transform(Image.new("RGB", (16, 16), COLOR), None, generator(seed))
        shown = (sample.image * 255).round().permute(1, 2, 0)[sample.valid]
        assert {tuple(color) for color in shown.tolist()} == {COLOR}
        assert sample.label.dtype == torch.int64
        assert (sample.label == 255).all()


def test_probabilities_of_photometric_changes():
    results = colors(flat(*COLOR), 2000)  # blur does nothing on a single color
    assert_share(sum(result == COLOR for result in results), 2000, 0.2 * 0.8, 0.2 * 0.8)
    assert_share(sum(len(set(result)) == 1 for result in results), 2000, 0.2, 0.2)  # gray
    # Jitter keeps two colors. Radii from 0.1 to about 0.25 of 2 are too small to change an 8-bit pixel.
    blurred = sum(len(result.getcolors()) > 2 for result in jittered(halves((8, 4), 0, 255), 1000))
    assert_share(blurred, 1000, 0.5 * 0.85, 0.5)


def test_blur_radius(monkeypatch):
    radii = []
    gaussian_blur = ImageFilter.GaussianBlur
    monkeypatch.setattr(ImageFilter, "GaussianBlur", lambda radius: (radii.append(radius), gaussian_blur(radius))[1])
    jittered(flat(1, 2, 3), 1500)
    assert 0.1 <= min(radii) < 0.12
    assert 1.98 < max(radii) <= 2.0
    assert abs(np.mean(radii) - 1.05) < 0.1


def test_colors_change_in_every_order(monkeypatch):
    calls = []
    for name in ("brightness", "contrast", "saturation", "hue"):
        monkeypatch.setattr(tvf, f"adjust_{name}", lambda image, amount, name=name: (calls.append(name), image)[1])
    jittered(flat(1, 2, 3), 600)
    assert len({tuple(calls[first : first + 4]) for first in range(0, len(calls), 4)}) == 24


def brightness() -> list[float]:
    """On an even gray, contrast, saturation and hue do nothing."""
    return [color[0] / 100 for color in colors(flat(100, 100, 100), 1500)]


def contrast() -> list[float]:
    """Two grays, so far apart that blur does not reach the corners: their mean shows the brightness."""
    corners = [(x.getpixel((0, 0))[0], x.getpixel((31, 0))[0]) for x in jittered(halves((32, 2), 108, 148), 1500)]
    return [(high - low) / (high + low) * 256 / 40 for low, high in corners]


def saturation() -> list[float]:
    """On a single color, contrast works like saturation: the product of both counts."""
    found = colors(flat(130, 110, 110), 2000)
    return [(max(x) - min(x)) / (max(x) + min(x)) * 12 for x in found if max(x) > min(x)]


def hue() -> list[float]:
    found = [x.convert("HSV").getpixel((0, 0)) for x in jittered(flat(110, 50, 50), 800)]
    return [((hue + 128) % 256 - 128) / 256 for hue, saturation, _ in found if saturation > 40]


@pytest.mark.parametrize(
    ("measure", "least", "greatest"),
    [
        (brightness, (0.5, 0.54), (1.46, 1.5)),
        (contrast, (0.42, 0.54), (1.46, 1.58)),  # rounding to 8 bits adds to it
        (saturation, (0.15, 0.4), (1.85, 2.6)),
        (hue, (-0.275, -0.205), (0.205, 0.275)),
    ],
)
def test_ranges_of_photometric_changes(measure, least, greatest):
    factors = measure()
    assert least[0] <= min(factors) <= least[1]
    assert greatest[0] <= max(factors) <= greatest[1]


def test_all_randomness_comes_from_the_generator():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
    transform = CropTransform(32, photometric=True)
    states = torch.get_rng_state(), random.getstate()
    first = transform(image, None, generator(5))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    torch.manual_seed(123)
    assert torch.equal(first.image, transform(image, None, generator(5)).image)
    assert not torch.equal(first.image, transform(image, None, generator(6)).image)
