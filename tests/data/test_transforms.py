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
    Geometry,
    apply_geometry,
    draw_geometry,
    jitter_colors,
    normalize_image,
)

BILINEAR, NEAREST = Image.Resampling.BILINEAR, Image.Resampling.NEAREST
SIDES = st.integers(1, 120)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def flat(*color: int) -> Image.Image:
    return Image.new("RGB", (4, 4), color)


def draws(size, crop_size, scale_range, count):
    source = generator()
    return [draw_geometry(size, crop_size, scale_range, source) for _ in range(count)]


def assert_uniform(values: list[int], low: int, high: int) -> None:
    """Every value of low..high occurs, each within five standard deviations of its share."""
    expected = len(values) / (high - low + 1)
    counts = np.bincount(values, minlength=high + 1)
    assert min(values) == low
    assert max(values) == high
    assert np.abs(counts[low:] - expected).max() < 5 * expected**0.5


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


def test_crop_of_a_smaller_image_starts_at_its_corner():
    assert {g.offset for g in draws((20, 14), (30, 30), (1.0, 1.0), 50)} == {(0, 0)}


def test_half_are_flipped():
    flips = sum(g.flip for g in draws((9, 9), (4, 4), (0.5, 2.0), 2000))
    assert abs(flips - 1000) < 5 * 500**0.5


@settings(max_examples=150, deadline=None)
@given(SIDES, SIDES, SIDES, SIDES, st.integers(0, 10**6))
def test_geometry_stays_inside(width, height, crop_height, crop_width, seed):
    (scaled_width, scaled_height), (x, y), _ = draw_geometry(
        (width, height), (crop_height, crop_width), (0.5, 2.0), generator(seed)
    )
    assert scaled_width >= 1
    assert scaled_height >= 1
    assert 0 <= x <= max(scaled_width - crop_width, 0)
    assert 0 <= y <= max(scaled_height - crop_height, 0)


@settings(max_examples=150, deadline=None)
@given(SIDES, SIDES, SIDES, SIDES, st.integers(0, 10**6))
def test_crop_equals_the_crop_of_the_whole_resized_image(width, height, crop_height, crop_width, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    image = Image.fromarray(pixels)
    geometry = draw_geometry(image.size, (crop_height, crop_width), (0.5, 2.0), generator(seed))
    whole = np.asarray(image.resize(geometry.scaled, BILINEAR)).astype(int)
    x, y = geometry.offset
    part = whole[y : y + crop_height, x : x + crop_width]
    expected = np.zeros((crop_height, crop_width, 3), int)
    expected[: part.shape[0], : part.shape[1]] = part
    found = np.asarray(apply_geometry(image, geometry, (crop_height, crop_width), BILINEAR, 0))
    assert np.abs(found - (expected[:, ::-1] if geometry.flip else expected)).max() <= 2


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
    image, label = Image.new("RGB", (30, 20), (200, 90, 10)), Image.new("L", (30, 20), 7)
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


def test_flip_moves_the_padding_too():
    geometry = Geometry((2, 1), (0, 0), True)
    crop = apply_geometry(Image.new("L", (2, 1), 9), geometry, (2, 4), NEAREST, 255)
    np.testing.assert_array_equal(np.asarray(crop), [[255, 255, 9, 9], [255, 255, 255, 255]])


def test_no_label_gives_only_ignored_pixels():
    sample = CropTransform(16, photometric=False)(flat(1, 2, 3), None, generator())
    assert sample.label.dtype == torch.int64
    assert (sample.label == 255).all()


def test_probabilities_of_colour_changes():
    count, color = 2000, (200, 120, 70)
    source = generator()
    # On a single colour blur does nothing.
    results = [jitter_colors(flat(*color), source).getpixel((0, 0)) for _ in range(count)]
    untouched = sum(result == color for result in results)
    grey = sum(len(set(result)) == 1 for result in results)
    assert abs(untouched / count - 0.2 * 0.8) < 5 * (0.16 * 0.84 / count) ** 0.5
    assert abs(grey / count - 0.2) < 5 * (0.2 * 0.8 / count) ** 0.5


def test_half_are_blurred():
    step = Image.new("RGB", (8, 4))
    step.paste((255, 255, 255), (4, 0, 8, 4))
    source, count = generator(), 1000
    # Changes of colour keep two colours. Radii from 0.1 to about 0.25 of 2 are too small to change an 8-bit pixel.
    blurred = sum(len(jitter_colors(step, source).getcolors()) > 2 for _ in range(count))
    assert 0.5 * 0.85 - 5 * (0.25 / count) ** 0.5 < blurred / count < 0.5 + 5 * (0.25 / count) ** 0.5


def test_blur_radius(monkeypatch):
    radii = []
    gaussian_blur = ImageFilter.GaussianBlur
    monkeypatch.setattr(ImageFilter, "GaussianBlur", lambda radius: (radii.append(radius), gaussian_blur(radius))[1])
    source = generator()
    for _ in range(1500):
        jitter_colors(flat(1, 2, 3), source)
    assert 0.1 <= min(radii) < 0.12
    assert 1.98 < max(radii) <= 2.0
    assert abs(np.mean(radii) - 1.05) < 0.1


def test_colours_change_in_every_order(monkeypatch):
    calls = []
    for name in ("brightness", "contrast", "saturation", "hue"):
        monkeypatch.setattr(tvf, f"adjust_{name}", lambda image, amount, name=name: (calls.append(name), image)[1])
    source = generator()
    for _ in range(600):
        jitter_colors(flat(1, 2, 3), source)
    assert len({tuple(calls[first : first + 4]) for first in range(0, len(calls), 4)}) == 24


def test_brightness_range():
    source = generator()
    # On an even grey, contrast, saturation and hue do nothing.
    levels = [jitter_colors(flat(100, 100, 100), source).getpixel((0, 0))[0] for _ in range(1500)]
    assert 50 <= min(levels) < 54
    assert 146 < max(levels) <= 150


def test_contrast_range():
    # Two greys, so far apart that blur does not reach the corners: the mean shows the brightness.
    image = Image.new("RGB", (32, 2), (108,) * 3)
    image.paste((148,) * 3, (16, 0, 32, 2))
    source = generator()
    factors = []
    for _ in range(1500):
        result = jitter_colors(image, source)
        low, high = result.getpixel((0, 0))[0], result.getpixel((31, 0))[0]
        factors.append((high - low) / (high + low) * 256 / 40)
    assert 0.42 < min(factors) < 0.54
    assert 1.46 < max(factors) < 1.58  # rounding to 8 bits adds to it


def test_saturation_range():
    # On a single colour, contrast works like saturation: both move it away from grey by 0.5 to 1.5.
    source = generator()
    factors = []
    for _ in range(2000):
        color = jitter_colors(flat(130, 110, 110), source).getpixel((0, 0))
        factors.append((max(color) - min(color)) / (max(color) + min(color)) * 12)
    factors = [factor for factor in factors if factor > 0]
    assert 0.15 < min(factors) < 0.4
    assert 1.85 < max(factors) < 2.6


def test_hue_range():
    source = generator()
    hues = []
    for _ in range(800):
        hue, saturation, _ = jitter_colors(flat(110, 50, 50), source).convert("HSV").getpixel((0, 0))
        if saturation > 40:
            hues.append((hue + 128) % 256 - 128)
    assert -70 <= min(hues) < -52
    assert 52 < max(hues) <= 70


def test_unlabeled_crops_keep_their_colours():
    transform = CropTransform(8, photometric=False, mean=(0, 0, 0), std=(1, 1, 1))
    for seed in range(30):
        sample = transform(Image.new("RGB", (16, 16), (200, 120, 70)), None, generator(seed))
        colors = (sample.image * 255).round().permute(1, 2, 0)[sample.valid]
        assert {tuple(color) for color in colors.tolist()} == {(200, 120, 70)}


def test_normalisation():
    image = normalize_image(flat(255, 0, 51), (0.5, 0.5, 0.0), (0.5, 0.5, 2.0))
    torch.testing.assert_close(image[:, 0, 0], torch.tensor([1.0, -1.0, 0.1]))


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
