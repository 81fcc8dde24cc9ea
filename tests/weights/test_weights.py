"""Loading and saving weights; those of Hugging Face are in test_convert.py, those of timm in tests/model."""

import copy
import hashlib
import pickle
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from allspark_fast.errors import InputError
from allspark_fast.model import AllSparkOptions
from allspark_fast.weights.files import load_weights, read_weights, save_weights
from allspark_fast.weights.spec import load_model
from tests.helpers.malicious import Malicious
from tests.helpers.models import tiny_segmentor
from tests.helpers.public_code import save_public_checkpoint
from tests.helpers.runs import differences


@pytest.mark.parametrize(
    ("save", "suffix"), [(save_public_checkpoint, ".pth"), (save_weights, ".pth"), (save_weights, ".safetensors")]
)
def test_round_trip_is_bit_equal(tmp_path, save, suffix):
    source, target = tiny_segmentor(), tiny_segmentor()
    save(source, tmp_path / f"a{suffix}")
    report = load_weights(target, tmp_path / f"a{suffix}")
    assert report.dropped == report.fresh == ()
    assert differences(source.state_dict(), target.state_dict()) == []
    # The memory keeps the layout that makes its projection a key matrix.
    assert target.decoder.allspark.attn.kv_queue.stride() == source.decoder.allspark.attn.kv_queue.stride()
    # Others may read the file.
    (tmp_path / "plain").write_text("")
    assert (tmp_path / f"a{suffix}").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_layout_of_the_public_code(tmp_path):
    """It has no place for what says which classes of the memory are empty, so all of them count as filled."""
    source, target = (tiny_segmentor(allspark=AllSparkOptions(memory_init="empty")) for _ in range(2))
    save_weights(source, tmp_path / "a.pth")
    saved = torch.load(tmp_path / "a.pth", weights_only=True)["model"]
    assert {f"module.{x}" for x in source.state_dict()} - set(saved) == {"module.decoder.allspark.attn.queue_filled"}
    load_weights(target, tmp_path / "a.pth")
    assert target.decoder.allspark.attn.queue_filled.all()


@pytest.mark.parametrize(
    ("source", "part", "kept"),
    [
        (lambda: tiny_segmentor(classes=5), "kv_queue is", "backbone.norm1.weight"),
        (lambda: tiny_segmentor(crop=(96, 96)), "kv_queue is", "decoder.decoder.linear_pred.weight"),
        (lambda: tiny_segmentor(allspark=None), r"allspark\.\S+ is absent", "decoder.decoder.linear_pred.weight"),
    ],
)
def test_what_does_not_fit_is_named_and_reset_on_request(tmp_path, source, part, kept):
    saved, target = source(), tiny_segmentor()
    before = copy.deepcopy(target.state_dict())
    save_weights(saved, tmp_path / "a.pth")
    with pytest.raises(InputError, match=rf"{part}.*--model.reset True"):
        load_weights(target, tmp_path / "a.pth")
    assert differences(before, target.state_dict()) == []
    report = load_weights(target, tmp_path / "a.pth", reset=True)
    assert torch.equal(target.state_dict()[kept], saved.state_dict()[kept])
    for name in report.fresh:
        assert torch.equal(target.state_dict()[name], before[name])
    with pytest.raises(InputError, match=r"another model.*linear_"):  # even with reset
        load_weights(tiny_segmentor(embedding_dim=32), tmp_path / "a.pth", reset=True)
    # Pointers are reset with the channels they point into.
    assert ("decoder.allspark.attn.kv_queue" in report.fresh) == ("decoder.allspark.attn.queue_ptr" in report.fresh)


@pytest.mark.parametrize(
    ("backbone", "repo", "name"),
    [
        ("mit_b0", "nvidia/mit-b0", "pytorch_model.bin"),
        ("timm/test_vit", "timm/test_vit.r160_in1k", "model.safetensors"),
    ],
)
def test_imagenet_comes_from_the_hub_or_its_cache(backbone, repo, name, tmp_path, monkeypatch, caplog):
    """With a classifier, which is dropped."""
    pytest.importorskip("huggingface_hub", reason="needs the extra timm")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    source, target = tiny_segmentor(backbone), tiny_segmentor(backbone)
    url = re.escape(f"https://huggingface.co/{repo}/resolve/main/{name}")
    with pytest.raises(InputError, match=rf"cannot be fetched .*: get {name} from {url}, .* --model.weights {name}"):
        load_weights(target, "imagenet")
    cache = tmp_path / f"models--{repo.replace('/', '--')}"
    path = cache / "snapshots/abc" / name
    for folder in (path.parent, cache / "refs"):
        folder.mkdir(parents=True)
    (cache / "refs/main").write_text("abc")
    state = {re.sub(r"features\.model\.", "", name): x for name, x in source.backbone.state_dict().items()}
    state |= {"head.weight": torch.zeros(1000, 128), "head.bias": torch.zeros(1000)}
    (save_file if path.suffix == ".safetensors" else torch.save)(state, path)
    load_weights(tiny_segmentor(backbone), path)  # as the message says
    caplog.set_level("INFO")
    before = copy.deepcopy(target.decoder.state_dict())
    report = load_weights(target, "imagenet")
    assert {name.rpartition(".head.")[2] for name in report.dropped} == {"weight", "bias"}
    assert all(name.startswith("decoder.") for name in report.fresh)
    assert differences(source.backbone.state_dict(), target.backbone.state_dict()) == []
    assert differences(before, target.decoder.state_dict()) == []
    assert f"imagenet is {path}, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}" in caplog.text


def test_another_order_of_the_classes_is_matched_by_name(weights, tiny_spec, caplog):
    caplog.set_level("INFO")
    known, target, images = load_model(weights)[0], tiny_spec.build().eval(), torch.rand(1, 3, 64, 64)
    load_weights(target, weights, info=tiny_spec.info)
    assert not caplog.text
    load_weights(target, weights, info=replace(tiny_spec.info, classes=("plum", "apple", "pear")))
    assert "another order, and are matched by name" in caplog.text
    save_weights(known, weights.with_name("a.pth"))
    load_weights(tiny_spec.build(), weights.with_name("a.pth"), info=tiny_spec.info)
    assert "a.pth does not name its classes: they count as those of the data, in the same order" in caplog.text
    torch.testing.assert_close(target(images), known(images)[:, [2, 0, 1]])
    queue, expected = (model.decoder.allspark.attn.kv_queue for model in (target, known))
    assert torch.equal(queue, expected[[2, 0, 1]])


@pytest.mark.parametrize("classes", [("apple", "pear", "fig"), ("apple", "pear")])
def test_other_classes_are_refused_or_start_afresh(weights, tiny_spec, classes, caplog):
    info = replace(tiny_spec.info, classes=classes)
    target = replace(tiny_spec, info=info).build()
    before = target.decoder.decoder.linear_pred.bias.clone()
    with pytest.raises(InputError, match=rf"are apple, pear, plum, but .* {classes[-1]}: .* --model.reset True"):
        load_weights(target, weights, info=info)
    caplog.set_level("INFO")
    fresh = load_weights(target, weights, info=info, reset=True).fresh
    assert {"decoder.decoder.linear_pred.bias", "decoder.allspark.attn.queue_ptr"} <= {*fresh}
    assert torch.equal(target.decoder.decoder.linear_pred.bias, before)
    assert "start afresh, because its classes are others" in caplog.text


HALF = [f"encoder.{name}.weight" for name in ("patch_embeddings.0.proj", "block.0.0.attention.self.key")]
BAD_FILES = {
    "malicious": lambda path: torch.save({"model": Malicious()}, path),
    "truncated": lambda path: save_weights(tiny_segmentor(), path) or path.write_bytes(path.read_bytes()[:1000]),
    "empty": lambda path: path.write_bytes(b""),
    "pickle": lambda path: path.write_bytes(pickle.dumps([1, 2], protocol=2)),
    "no weights": lambda path: torch.save({"epoch": 3}, path),
    "a name that is no text": lambda path: torch.save({0: torch.ones(2)}, path),
    "no tensor": lambda path: torch.save({"model": {"a": [1.0]}}, path),
    "nothing": lambda path: torch.save({}, path),
    "half a model": lambda path: torch.save(dict.fromkeys(HALF, torch.ones(2)), path),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files_are_refused_by_name(tmp_path, monkeypatch, kind, suffix):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"bad{suffix}"
    BAD_FILES[kind](path)
    with pytest.raises(ValueError, match=re.escape(f"bad{suffix}")):
        read_weights(path)
    assert not (tmp_path / "pwned").exists()
