"""Folders for the Hugging Face Hub; nothing is downloaded."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from allspark_fast.weights.spec import ModelSpec, load_model, model_card, save_model

hub = pytest.importorskip("allspark_fast.weights.hub", reason="needs huggingface_hub", exc_type=ImportError)


def test_round_trip_through_a_folder(tmp_path: Path, tiny_spec: ModelSpec) -> None:
    source = hub.PretrainedSegmentor(tiny_spec.build(), tiny_spec).eval()
    source.save_pretrained(tmp_path / "model")
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert json.loads((tmp_path / "model" / "config.json").read_text())["classes"] == ["apple", "pear", "plum"]
    model = hub.PretrainedSegmentor.from_pretrained(tmp_path / "model")
    plain, spec = load_model(tmp_path / "model")
    assert model.spec == spec == tiny_spec
    assert not model.training
    images = torch.randn(1, 3, 64, 80)
    assert torch.equal(model(images), source(images))
    assert torch.equal(plain(images), source(images))


def test_a_name_is_downloaded(tmp_path: Path, tiny_spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tiny_spec.build(), tiny_spec, tmp_path / "model")

    def download(name: str, file: str, **options: object) -> str:
        assert (name, options["revision"]) == ("owner/name", "v1")
        return str(tmp_path / "model" / file)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    options = {"model_id": "owner/name", "revision": "v1", "cache_dir": None, "force_download": False}
    model = hub.PretrainedSegmentor._from_pretrained(**options, local_files_only=True, token=None)
    assert model.spec == tiny_spec


def test_the_code_of_the_card_runs(tmp_path: Path, tiny_spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.PretrainedSegmentor(tiny_spec.build(), tiny_spec).save_pretrained(tmp_path / "OWNER" / "NAME")
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (80, 70)).save("photo.jpg")
    card = (tmp_path / "OWNER" / "NAME" / "README.md").read_text()
    assert card == model_card(tiny_spec)
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["labels"].shape == (70, 80)
    assert "NVIDIA Source Code License" in " ".join(card.split())
