import numpy as np
import pytest
from PIL import Image

from allspark_fast.data import scenes
from allspark_fast.data.scenes import SCENES, ScenesDataset, render_scene


@pytest.fixture(scope="module")
def rendered():
    return [render_scene(0, index, (64, 64)) for index in range(60)]


def test_classes_keep_their_order():
    assert SCENES.classes == ("background", "ball", "crate", "can", "cone", "ring", "plant", "stone")


def test_a_scene_is_a_function_of_seed_and_index():
    image, label = render_scene(3, 8, (40, 70))
    assert (image.shape, image.dtype) == ((40, 70, 3), np.uint8)
    assert (label.shape, label.dtype) == ((40, 70), np.uint8)
    again, label_again = render_scene(3, 8, (40, 70))
    np.testing.assert_array_equal(image, again)
    np.testing.assert_array_equal(label, label_again)
    for other in ((3, 9), (4, 8), (8, 3)):
        assert (render_scene(*other, (40, 70))[1] != label).mean() > 0.05


def test_every_class_occurs_often(rendered):
    counts = np.array([np.bincount(label.ravel(), minlength=8) for _, label in rendered])
    assert counts.shape[1] == 8  # nothing beyond the named classes
    assert ((counts > 20).mean(axis=0) > 0.3).all()
    share = counts.sum(axis=0) / counts.sum()
    assert 0.5 < share[0] < 0.85
    assert share[1:].min() > 0.01


def test_the_composition_does_not_depend_on_the_size():
    for index in range(8):
        small, large = render_scene(1, index, (64, 64)), render_scene(1, index, (192, 192))
        assert (large[1][1::3, 1::3] == small[1]).mean() > 0.97
        shrunk = np.asarray(Image.fromarray(large[0]).resize((64, 64), Image.Resampling.BOX)).astype(float)
        other = render_scene(1, index + 1, (64, 64))[0]
        difference = np.abs(shrunk - small[0]).mean()
        assert difference < min(12, 0.5 * np.abs(shrunk - other).mean())


@pytest.mark.parametrize("name", SCENES.classes[1:])
def test_objects_fit_their_window(name):
    # They are drawn on -1.08..1.08.
    axis, rng = np.linspace(-1.08, 1.08, 90, dtype=np.float32), np.random.default_rng(0)
    for _ in range(30):
        inside, depth, albedo, _ = getattr(scenes, name)(axis, axis[:, None], np.zeros((90, 90), np.float32), rng)
        assert max(inside[[0, -1]].max(), inside[:, [0, -1]].max()) < 0
        assert 0.15 < (inside > 0).mean() < 0.9
        assert {part.dtype for part in (inside, depth, albedo)} == {np.dtype(np.float32)}


def test_dataset_takes_the_place_of_files():
    labeled, unlabeled = ScenesDataset(range(4), 48, seed=0), ScenesDataset(range(4, 10), 48, seed=0)
    assert len({entry.image for entry in (*labeled.entries, *unlabeled.entries)}) == 10
    for part, expected in zip(unlabeled[2], render_scene(0, 6, (48, 48)), strict=True):
        np.testing.assert_array_equal(np.asarray(part), expected)
    assert unlabeled.image(2) == unlabeled[2][0]
