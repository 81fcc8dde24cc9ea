import numpy as np
import pytest
from PIL import Image

import allspark_fast
from allspark_fast.errors import InputError

TINY = {"data_scenes": (3, 4, 1), "data_crop": 64, "data_workers": 0, "train_epochs": 1, "train_batch_size": 2}


def test_a_run_is_trained_loaded_and_labels_files_images_and_arrays(tmp_path):
    run = allspark_fast.train("scenes", **TINY, run_output_dir=tmp_path / "run")
    assert run == (tmp_path / "run", True)
    image = Image.effect_noise((40, 30), 50)
    image.save(tmp_path / "photo.png")
    predictor = allspark_fast.load(run.folder, device="cpu")
    labels, confidence = predictor.predict(tmp_path / "photo.png")
    assert labels.shape == confidence.shape == (30, 40)
    for same in (image, np.asarray(image), np.asarray(image.convert("RGB"))):
        np.testing.assert_array_equal(predictor.predict(same).labels, labels)
    with pytest.raises(TypeError, match="expected uint8"):
        predictor.predict(np.zeros((30, 40, 3)))


def test_settings_that_do_not_exist_are_refused():
    with pytest.raises(InputError, match=r"no setting colour.; names are group.field"):
        allspark_fast.train(colour=3)
    with pytest.raises(InputError, match=r"config.train.epochs is '3', expected int"):
        allspark_fast.train(train_epochs="3")


def test_other_names_are_refused():
    assert set(allspark_fast.__all__) <= set(dir(allspark_fast))
    with pytest.raises(AttributeError, match="its names are AllSpark"):
        allspark_fast.predict  # noqa: B018
