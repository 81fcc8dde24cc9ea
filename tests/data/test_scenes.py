import numpy as np
import pytest
import torch
from PIL import Image

from allspark_fast.data.loader import SemiLoader
from allspark_fast.data.scene_room import fractal_noise
from allspark_fast.data.scene_shapes import SHAPES
from allspark_fast.data.scenes import SCENES, ScenesDataset, render_scene
from allspark_fast.data.transforms import CropTransform


@pytest.fixture(scope="module")
def scenes():
    return [render_scene(0, index, 64) for index in range(60)]


def test_shapes_and_dtypes():
    image, label = render_scene(0, 0, (40, 70))
    assert (image.shape, image.dtype) == ((40, 70, 3), np.uint8)
    assert (label.shape, label.dtype) == ((40, 70), np.uint8)


def test_a_scene_is_a_function_of_seed_and_index():
    image, label = render_scene(3, 8, 64)
    again, label_again = render_scene(3, 8, 64)
    np.testing.assert_array_equal(image, again)
    np.testing.assert_array_equal(label, label_again)
    for other in ((3, 9), (4, 8), (8, 3)):
        assert (render_scene(*other, 64)[1] != label).mean() > 0.05


def test_every_class_occurs_often(scenes):
    classes = len(SCENES.classes)
    counts = np.array([np.bincount(label.ravel(), minlength=classes) for _, label in scenes])
    assert counts.shape[1] == classes  # nothing beyond the named classes
    assert ((counts > 20).mean(axis=0) > 0.3).all()
    share = counts.sum(axis=0) / counts.sum()
    assert 0.5 < share[0] < 0.85
    assert share[1:].min() > 0.01


def test_colours_alone_do_not_give_the_class_away(scenes):
    # Nearest mean colour, fitted on the scenes it is tested on.
    pixels = np.concatenate([image.reshape(-1, 3) for image, _ in scenes]).astype(float)
    labels = np.concatenate([label.ravel() for _, label in scenes])
    means = np.array([pixels[labels == index].mean(axis=0) for index in range(len(SCENES.classes))])
    nearest = ((pixels[:, None] - means) ** 2).sum(axis=2).argmin(axis=1)
    recall = [(nearest[labels == index] == index).mean() for index in range(len(SCENES.classes))]
    assert np.mean(recall) < 0.35


def test_the_composition_does_not_depend_on_the_size():
    for index in range(8):
        small, large = render_scene(1, index, 64), render_scene(1, index, 192)
        assert (large[1][1::3, 1::3] == small[1]).mean() > 0.97
        shrunk = np.asarray(Image.fromarray(large[0]).resize((64, 64), Image.Resampling.BOX)).astype(float)
        other = render_scene(1, index + 1, 64)[0]
        difference = np.abs(shrunk - small[0]).mean()
        assert difference < 12
        assert difference < 0.5 * np.abs(shrunk - other).mean()


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_fit_their_window(name):
    # scenes.py draws objects on -1.08..1.08.
    axis = np.linspace(-1.08, 1.08, 90, dtype=np.float32)
    rng = np.random.default_rng(0)
    grain = fractal_noise(rng, (90, 90))
    for _ in range(30):
        surface = SHAPES[name](axis[None], axis[:, None], grain, rng)
        rim = np.concatenate([surface.inside[[0, -1]].ravel(), surface.inside[:, [0, -1]].ravel()])
        assert rim.max() < 0
        assert 0.15 < (surface.inside > 0).mean() < 0.9
        norms = np.linalg.norm(surface.normal, axis=0)[surface.inside > 0]
        assert 0.6 < norms.min() <= norms.max() < 1.3
        assert {part.dtype for part in surface[:3]} == {np.dtype(np.float32)}


def test_dataset_takes_the_place_of_files():
    labeled, unlabeled = ScenesDataset(range(4), 48, seed=0), ScenesDataset(range(4, 10), 48, seed=0)
    assert (len(labeled), len(unlabeled.entries)) == (4, 6)
    image, label = unlabeled[2]
    np.testing.assert_array_equal(np.asarray(image), render_scene(0, 6, 48)[0])
    np.testing.assert_array_equal(np.asarray(label), render_scene(0, 6, 48)[1])
    transform = CropTransform(32, photometric=False)
    loader = SemiLoader(labeled, unlabeled, transform, transform, batch_size=2, seed=0, hidden_labels=True)
    batch = next(loader.iterate(0, 1))
    assert batch.image.shape == (2, 3, 32, 32)
    assert torch.isin(batch.unlabeled_label, torch.tensor([*range(len(SCENES.classes)), 255])).all()


def test_names_are_unique():
    names = [entry.image for part in (range(5), range(5, 9)) for entry in ScenesDataset(part, 32, 0).entries]
    assert len(set(names)) == 9
