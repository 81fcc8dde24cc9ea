import numpy as np

from allspark_fast.data.scenes import SCENES, render_scene


def test_a_scene_is_a_function_of_seed_and_index():
    image, label = render_scene(3, 8, (40, 70))
    assert [(x.shape, x.dtype) for x in (image, label)] == [((40, 70, 3), np.uint8), ((40, 70), np.uint8)]
    assert all(map(np.array_equal, (image, label), render_scene(3, 8, (40, 70))))
    for other in ((3, 9), (4, 8), (8, 3)):
        assert (render_scene(*other, (40, 70))[1] != label).mean() > 0.05


def test_every_class_occurs_often():
    assert SCENES.classes == ("background", "ball", "crate", "can", "cone", "ring", "plant", "stone")
    labels = [render_scene(0, index, (64, 64))[1] for index in range(60)]
    counts = np.array([np.bincount(label.ravel(), minlength=8) for label in labels])
    assert counts.shape[1] == 8  # nothing beyond the named classes
    assert ((counts > 20).mean(axis=0) > 0.3).all()
    share = counts.sum(axis=0) / counts.sum()
    assert 0.5 < share[0] < 0.85
    assert share[1:].min() > 0.01
