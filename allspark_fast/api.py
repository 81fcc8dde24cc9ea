"""The package from Python: train a recipe, and load what a run made."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from allspark_fast.config import Config, from_plain, prefer_given_lengths, require_setting
from allspark_fast.device import DeviceName
from allspark_fast.inference.predict import Predictor
from allspark_fast.recipes import find_recipe
from allspark_fast.training.trainer import train as train_in_folder
from allspark_fast.weights.spec import load_model


class Run(NamedTuple):
    """What ``train`` returns.

    Attributes:
        folder: the run folder; ``load`` reads it.
        finished: whether all steps were taken, rather than stopped by a signal.
    """

    folder: Path
    finished: bool


def train(recipe: str = "scenes", **settings: Any) -> Run:
    """Train a recipe, or resume its run, as ``python -m allspark_fast train`` does.

    Args:
        recipe: a name in ``allspark_fast.recipes.RECIPES``.
        settings: what differs from the recipe: fields of ``allspark_fast.config`` after the name of their group, such
            as ``data_root="my_data"``, ``train_epochs=4`` or ``run_output_dir="runs/mine"``.

    Raises:
        InputError: there is no such recipe or setting, a value is wrong, or something is wrong with the data.
        RunError: training had begun and cannot go on.
        OSError: something cannot be written.
    """
    plain = json.loads(find_recipe(recipe).to_json())
    given = [name.replace("_", ".", 1) for name in settings]
    for name, value in settings.items():
        group, _, field = name.partition("_")
        require_setting(f"{group}.{field}")
        plain[group][field] = json.loads(json.dumps(value, default=str))
    config = prefer_given_lengths(from_plain(Config, plain, "config"), given)
    folder = config.run.output_dir or Path("runs") / recipe
    return Run(folder, train_in_folder(config, folder))


def load(path: str | Path, *, device: DeviceName = "auto") -> Predictor:
    """Load a trained model, ready to label images: ``load("runs/scenes").predict("photo.jpg")``.

    Args:
        path: a run folder, or a file such as its best.safetensors.
        device: where to compute; ``auto`` takes a GPU if there is one.

    Raises:
        InputError: the device is not there, or the file holds no model.
        OSError: the file cannot be read.
    """
    model, spec = load_model(path)
    return Predictor(model, spec, device=device)
