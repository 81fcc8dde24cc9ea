import itertools
from collections import defaultdict

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
    PRESETS,
    CropTransform,
    apply_geometry,
    change_colors,
    draw_box,
    draw_classes,
    draw_geometry,
)

BILINEAR = Image.Resampling.BILINEAR
SIDES = st.integers(1, 120)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draws(size, crop_size, scale_range, count):
    source = generator()
    return [draw_geometry(size, crop_size, scale_range, source) for _ in range(count)]


def assert_uniform(values: list[int], low: int, high: int) -> None:
    """Every value of low..high occurs, each within five standard deviations of its share."""
    expected = len(values) / (high - low + 1)
    counts = np.bincount(values, minlength=high + 1)
    assert (min(values), max(values)) == (low, high)
    assert np.abs(counts[low:] - expected).max() < 5 * expected**0.5


def assert_share(hits: int, count: int, share: float) -> None:
    """The share of hits is right, within five standard deviations."""
    assert abs(hits / count - share) <= 5 * (share * (1 - share) / count) ** 0.5


@pytest.mark.parametrize(("size", "long_axis"), [((90, 41), 0), ((41, 90), 1), ((60, 60), 0)])
def test_short_side_follows_rounded_half_up(size, long_axis):
    for geometry in draws(size, 8, (0.5, 2.0), 200):
        long_side, short_side = geometry.scaled[long_axis], geometry.scaled[1 - long_axis]
        assert short_side == int(size[1 - long_axis] * long_side / size[long_axis] + 0.5)


def test_long_side_and_place_of_the_crop_are_uniform_with_both_ends():
    assert_uniform([g.scaled[0] for g in draws((9, 5), 4, (0.5, 2.0), 3000)], 4, 18)
    geometries = draws((20, 14), 8, (1.0, 1.0), 3000)
    assert_uniform([g.offset[0] for g in geometries], 0, 12)
    assert_uniform([g.offset[1] for g in geometries], 0, 6)
    assert {g.offset for g in draws((20, 14), 30, (1.0, 1.0), 50)} == {(0, 0)}  # smaller than the crop


@settings(max_examples=150, deadline=None)
@given(SIDES, SIDES, SIDES, st.sampled_from(list(PRESETS)), st.integers(0, 10**6))
def test_crop_equals_the_crop_of_the_whole_resized_image(width, height, crop, preset, seed):
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))
    geometry = draw_geometry(image.size, crop, (0.5, 2.0), generator(seed), PRESETS[preset])
    (scaled_width, scaled_height), (x, y), flip, turns = geometry
    assert 0 <= x <= max(scaled_width - crop, 0)
    assert 0 <= y <= max(scaled_height - crop, 0)
    part = np.asarray(image.resize(geometry.scaled, BILINEAR))[y : y + crop, x : x + crop]
    expected = np.zeros((crop, crop, 3), int)
    expected[: part.shape[0], : part.shape[1]] = part
    found = np.asarray(apply_geometry(image, geometry, crop, BILINEAR, 0))
    assert np.abs(found - np.rot90(expected[:, ::-1] if flip else expected, turns)).max() <= 2


@settings(max_examples=60, deadline=None)
@given(st.integers(20, 200), st.integers(20, 200), st.sampled_from(list(PRESETS)), st.integers(0, 10**6), st.booleans())
def test_image_label_and_valid_pixels_agree(width, height, preset, seed, vertical):
    # Both hold the coordinate of each pixel, along one axis.
    coordinate = np.indices((height, width))[0 if vertical else 1].astype(np.uint8)
    image = Image.fromarray(np.repeat(coordinate[..., None], 3, axis=2))
    transform = CropTransform(60, photometric=False, augment=preset)
    sample = transform(image, Image.fromarray(coordinate), generator(seed))
    assert sample.image.shape == (3, 60, 60)
    assert sample.label.shape == sample.valid.shape == (60, 60)
    assert (sample.image.dtype, sample.label.dtype) == (torch.float32, torch.uint8)
    assert torch.equal(sample.valid, sample.label != 255)
    mean, std = (torch.tensor(x)[:, None, None] for x in (IMAGENET_MEAN, IMAGENET_STD))
    difference = (sample.image * std + mean) * 255 - sample.label.where(sample.valid, 0)  # padding is black
    assert difference.abs().max() <= 1.5


def test_flips_and_turns_of_presets():
    for name, share, turns in (("photo", 0.5, 1), ("microscopy", 0.5, 4), ("aerial", 0.5, 4), ("none", 0, 1)):
        source = generator()
        drawn = [draw_geometry((9, 9), 9, (1, 1), source, PRESETS[name]) for _ in range(2000)]
        assert_uniform([x.turns for x in drawn], 0, turns - 1)
        assert_share(sum(x.flip for x in drawn), 2000, share)


PHOTO = {"brightness": (0.5, 1.5), "contrast": (0.5, 1.5), "saturation": (0.5, 1.5), "hue": (-0.25, 0.25)}
ADJUSTMENTS = [f"adjust_{name}" for name in (*PHOTO, "gamma")]


@pytest.fixture
def changes(monkeypatch):
    """Names and amounts of the photometric changes, in the order of the calls."""
    found = []

    def note(owner, name):
        change = getattr(owner, name)

        def noted(*arguments, **options):
            found.append((name, arguments[-1]))
            return change(*arguments, **options)

        monkeypatch.setattr(owner, name, noted)

    for name in (*ADJUSTMENTS, "rgb_to_grayscale"):
        note(tvf, name)
    note(ImageFilter, "GaussianBlur")
    return found


@pytest.mark.parametrize("preset", PRESETS)
def test_distribution_of_photometric_changes(preset, changes):
    """Adjustments in 0.8 of all crops and in any order, gray and blur as often as said; amounts fill their ranges.

    Each change is made to what the one before has left.
    """
    source, count, orders, amounts = generator(), 3000, set(), defaultdict(list)
    steps, gray, blur = PRESETS[preset][:3]
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8))
    for _ in range(count):
        changes.clear()
        found, expected = change_colors(noise, PRESETS[preset], source), noise
        made = tuple(changes)
        orders.add(tuple(name for name, _ in made if name in ADJUSTMENTS))
        for name, amount in made:
            amounts[name].append(amount)
            if name == "GaussianBlur":
                expected = expected.filter(ImageFilter.GaussianBlur(amount))
            else:
                expected = getattr(tvf, name)(expected, 3 if name == "rgb_to_grayscale" else amount)
        assert found == expected
    ranges = {f"adjust_{name}": bounds for name, *bounds in steps} | ({"GaussianBlur": (0.1, 2.0)} if blur else {})
    assert orders == {(), *itertools.permutations(f"adjust_{name}" for name, *_ in steps)}
    shares = {"rgb_to_grayscale": gray, "GaussianBlur": blur, **{f"adjust_{name}": 0.8 for name, *_ in steps}}
    for name, share in shares.items():
        assert_share(len(amounts[name]), count, share)
    for name, (low, high) in ranges.items():
        margin, values = 0.02 * (high - low), amounts[name]
        assert low <= min(values) < low + margin
        assert high - margin < max(values) <= high
        assert abs(np.mean(values) - (low + high) / 2) < margin


def test_photo_is_that_of_the_paper():
    assert PRESETS["photo"] == (tuple((name, *bounds) for name, bounds in PHOTO.items()), 0.2, 0.5, True, False)


def test_boxes_of_cutmix():
    source = generator()
    boxes = [draw_box(50, 0.5, source) for _ in range(2000)]
    drawn = [box for box in boxes if box.any()]
    assert_share(len(drawn), 2000, 0.5)
    areas = torch.stack([box.float().mean() for box in drawn])
    assert 0.015 < areas.min() < 0.03
    assert 0.37 < areas.max() < 0.42
    for box in drawn[:50]:
        rows, columns = box.any(1), box.any(0)
        assert torch.equal(box, rows[:, None] & columns)
        assert all(int(side.sum()) == np.ptp(side.nonzero().numpy()) + 1 for side in (rows, columns))
    assert torch.stack(drawn).any(0).all()


def test_half_of_the_classes_are_pasted():
    label = torch.tensor([[0, 0, 3], [7, 9, 255]])
    source = generator()
    masks = [draw_classes(label, 0.5, source) for _ in range(1000)]
    drawn = [mask for mask in masks if mask.any()]
    assert_share(len(drawn), 1000, 0.5)
    assert {len(label[mask].unique()) for mask in drawn} == {2}
    for index in (0, 3, 7, 9):
        of_class = label == index
        chosen = [mask[of_class].all().item() for mask in drawn]
        assert chosen == [mask[of_class].any().item() for mask in drawn]
        assert_share(sum(chosen), len(chosen), 0.5)
    assert not torch.stack(masks)[:, 1, 2].any()
    assert not draw_classes(torch.zeros(3, 3, dtype=torch.uint8), 1.0, source).any()  # half of one class


def test_the_other_view_is_the_same_crop():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))
    plain = {"photometric": False, "mean": (0, 0, 0), "std": (1, 1, 1)}
    both = CropTransform(32, strong=True, **plain)(image, None, generator(1))
    source = generator(1)
    crop = apply_geometry(image, draw_geometry(image.size, 32, (0.5, 2.0), source), 32, BILINEAR, 0)
    expected = tvf.to_dtype(tvf.pil_to_tensor(change_colors(crop, PRESETS["photo"], source)), torch.float32, scale=True)
    assert torch.equal(both.strong, expected)
    assert torch.equal(both.image, tvf.to_dtype(tvf.pil_to_tensor(crop), torch.float32, scale=True))
    assert both.mixed is None
