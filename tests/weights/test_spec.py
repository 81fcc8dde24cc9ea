import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from allspark_fast.cli import export
from allspark_fast.errors import InputError
from allspark_fast.training.trainer import Trainer
from allspark_fast.weights.files import load_weights, save_weights
from allspark_fast.weights.spec import load_model, save_model
from tests.helpers.runs import changed, differences, tiny_config


def test_weights_of_part_of_the_model_are_refused(tmp_path, tiny_spec):
    model = tiny_spec.build()
    model.decoder = torch.nn.Identity()
    save_model(model, tiny_spec, tmp_path / "part.safetensors")
    with pytest.raises(InputError, match=r"part\.safetensors lacks weights.*decoder"):
        load_model(tmp_path / "part.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "of another version of allspark-fast.*version is 2, expected 1"),
        ({"allspark": "no"}, "model.allspark is 'no', expected bool"),
        ({"crop": True}, "model.crop is True, expected int"),
        ({"backbone": "mit_b9"}, "no such model: backbone must be one of"),
        ({"mode": "tiled"}, "model.mode is tiled, expected one of whole, sliding"),
        ({"mean": [1, 2]}, r"model.mean is \[1, 2\], expected a list of 3"),
        ({"color": 1}, r"fields \['color'\] are missing or unknown"),
    ],
)
def test_damage_is_named(change, message, tmp_path, tiny_spec):
    text = json.dumps(json.loads(tiny_spec.to_json()) | change)
    save_weights(tiny_spec.build(), tmp_path / "odd.safetensors", text)
    with pytest.raises(InputError, match=rf"odd\.safetensors: .*{message}"):
        load_model(tmp_path / "odd.safetensors")


def test_another_suffix_is_refused_before_anything_is_written(tmp_path, tiny_spec):
    with pytest.raises(InputError, match=r"model\.bin: weights are saved as \.safetensors or \.pth"):
        save_model(tiny_spec.build(), tiny_spec, str(tmp_path / "model.bin"))
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("train", [{}, {"method": "semi", "ema": 0.9}, {"method": "supervised"}])
def test_a_checkpoint_of_a_run_is_its_model_for_every_command(tmp_path, command, monkeypatch, train):
    monkeypatch.setattr(export, "export_model", lambda model, spec, path: path.write_text(spec.to_json()) * 0)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (70, 60)).save("photo.png")
    config = changed(tiny_config(), train={"epochs": 1, **train}, data={"mean": (0.4, 0.5, 0.6)})
    Trainer(config, Path("run")).run()
    printed, models = [], []
    for weights in (Path("run"), max(Path("run/checkpoints").iterdir())):
        commands = ("convert", "a.safetensors"), ("export", "a.onnx"), ("predict", "photo.png")
        told = [command(name, weights, word, "--overwrite") for name, word in commands]
        printed.append([command("evaluate", weights), *told])
        models.append(load_model(weights))
    assert printed[0] == printed[1]
    (best, expected), (model, spec) = models  # of the last step, the only one that was evaluated
    assert spec == expected
    assert spec.mean == (0.4, 0.5, 0.6)
    assert differences(model.state_dict(), best.state_dict()) == []


def test_a_checkpoint_of_an_earlier_version_is_not_taken_for_weights_of_others(tmp_path, tiny_spec):
    state = {"format": "allspark_fast checkpoint 2", "model": tiny_spec.build().state_dict(), "ema": None}
    torch.save(state, tmp_path / "step.pt")
    for infer in (False, True):
        with pytest.raises(InputError, match=r"step\.pt: damaged description of the model, or of another version"):
            load_model(tmp_path / "step.pt", infer=infer)
    load_weights(tiny_spec.build(), tmp_path / "step.pt")
