import json
from pathlib import Path

import pytest
import torch

from allspark_fast.errors import InputError
from allspark_fast.model import build_segmentor
from allspark_fast.model.mit import MIT_CONFIGS
from allspark_fast.weights.files import load_weights, save_weights
from allspark_fast.weights.spec import infer_spec, load_model
from tests.helpers.public_code import public_checkpoint
from tests.helpers.runs import differences


def test_there_and_back_is_bit_equal(tmp_path, command):
    source, ours, target = public_checkpoint(tmp_path / "a.pth"), tmp_path / "b.safetensors", tmp_path / "c.pth"
    assert "21 of pascal: background, aeroplane" in command("convert", source, ours)
    command("convert", ours, target)
    before, after = (torch.load(path, weights_only=False)["model"] for path in (source, target))
    assert list(before) == list(after)
    assert [x.dtype for x in before.values()] == [x.dtype for x in after.values()]
    assert differences(before, after) == []


@pytest.mark.parametrize(
    ("classes", "crop", "num_heads", "mode", "dataset"),
    [(21, 65, 2, "whole", "pascal"), (19, 97, 1, "sliding", "cityscapes"), (5, 65, 4, "whole", "a")],
)
def test_everything_is_read_off_the_shapes(tmp_path, classes, crop, num_heads, mode, dataset):
    model, spec = load_model(public_checkpoint(tmp_path / "a.pth", classes, crop, num_heads=num_heads), infer=True)
    assert (spec.backbone, spec.embedding_dim, spec.num_heads, spec.crop) == ("mit_tiny", 16, num_heads, crop)
    assert (spec.mode, spec.info.name, len(spec.info.classes)) == (mode, dataset, classes)
    assert model.decoder.allspark.attn.kv_queue.shape == (classes, 128, (crop // 32 + 1) ** 2)
    assert not model.training
    plain = build_segmentor("mit_tiny", classes, (crop, crop), allspark=None, embedding_dim=16).eval()
    save_weights(plain, tmp_path / "plain.safetensors")
    again, spec = load_model(tmp_path / "plain.safetensors", infer=True)
    assert not spec.allspark
    assert torch.equal(plain(images := torch.randn(1, 3, 70, 90)), again(images))


@pytest.mark.parametrize("name", MIT_CONFIGS)
def test_every_encoder_is_told_apart(name):
    with torch.device("meta"):
        state = build_segmentor(name, 3, (65, 65), embedding_dim=8).state_dict()
    assert infer_spec(state, Path("a.pth")).backbone == name


def test_classes_of_ones_own(tmp_path, command):
    source, ours = public_checkpoint(tmp_path / "a.pth", classes=3), tmp_path / "a.safetensors"
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps({"classes": ["x", "y", "z"], "palette": [[1, 2, 3], [4, 5, 6], [7, 8, 9]]}))
    command("convert", source, ours, "--classes", meta)
    _, spec = load_model(ours)
    assert spec.info.classes == ("x", "y", "z")
    assert spec.info.palette[:3] == ((1, 2, 3), (4, 5, 6), (7, 8, 9))
    _, renamed = load_model(ours, classes=str(meta))
    assert renamed == spec


def test_what_is_no_model_of_ours_is_refused(tmp_path):
    model, path = build_segmentor("mit_tiny", 3, (65, 65), embedding_dim=16), tmp_path / "a.pth"
    lacking = {name: x for name, x in model.state_dict().items() if not name.startswith("backbone.block3.")}
    tall = build_segmentor("mit_tiny", 3, (65, 97), embedding_dim=16).state_dict()
    for state, message in (
        (lacking, r"no Mix Transformer.*depths \(1, 1, 0, 1\)"),
        (tall, "its memory has 12 tokens, expected a square"),
    ):
        torch.save(state, path)
        with pytest.raises(InputError, match=rf"a\.pth: {message}"):
            load_model(path, infer=True)


def test_the_encoder_of_a_hugging_face_segformer(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs Hugging Face transformers")
    sizes = MIT_CONFIGS["mit_tiny"]
    config = transformers.SegformerConfig(
        hidden_sizes=list(sizes.embed_dims),
        depths=list(sizes.depths),
        num_attention_heads=list(sizes.num_heads),
        sr_ratios=list(sizes.sr_ratios),
    )
    theirs = transformers.SegformerForSemanticSegmentation(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = build_segmentor("mit_tiny", 5, (65, 65), embedding_dim=8).eval()
    report = load_weights(ours, tmp_path / "model.safetensors")
    assert all(name.startswith("decode_head.") for name in report.dropped)
    assert all(name.startswith("decoder.") for name in report.fresh)
    images = torch.randn(2, 3, 65, 97)
    with torch.no_grad():
        expected = theirs(images, output_hidden_states=True).hidden_states
        for feature, x in zip(ours.backbone(images), expected, strict=True):
            torch.testing.assert_close(feature, x, rtol=1e-3, atol=1e-3)  # theirs has other eps in some LayerNorms
