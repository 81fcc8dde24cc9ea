"""Loading and saving weights, also those of the public code, Hugging Face and torch.save."""

import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from allspark_fast.errors import InputError
from allspark_fast.model import AllSpark, Decoder, MiTConfig, MixTransformer, SegFormerHead, Segmentor
from allspark_fast.model.options import AllSparkOptions
from allspark_fast.weights.files import load_weights, read_state_dict, save_weights
from tests.helpers.malicious import Malicious
from tests.helpers.public_code import save_public_checkpoint

TINY = MiTConfig(embed_dims=(8, 16, 24, 32), depths=(1, 1, 1, 1), num_heads=(1, 2, 3, 4))


def tiny(classes: int = 3, tokens: int = 4, *, allspark: bool = True) -> Segmentor:
    bottleneck = AllSpark(32, classes, tokens) if allspark else None
    return Segmentor(MixTransformer(TINY), Decoder(SegFormerHead(TINY.embed_dims, classes, 16), bottleneck))


def assert_same(a: Segmentor, b: Segmentor) -> None:
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


def test_a_public_checkpoint_loads(tmp_path: Path) -> None:
    source, target = tiny(), tiny()
    report = load_weights(target, save_public_checkpoint(source, tmp_path / "best.pth"))
    assert report.dropped == report.fresh == ()
    assert_same(source, target)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_round_trip_is_bit_equal(tmp_path: Path, suffix: str) -> None:
    source, target = tiny(), tiny()
    save_weights(source, tmp_path / f"a{suffix}")
    load_weights(target, tmp_path / f"a{suffix}")
    assert_same(source, target)
    # The memory keeps the layout that makes its projection a key matrix.
    assert target.decoder.allspark.attn.kv_queue.stride() == source.decoder.allspark.attn.kv_queue.stride()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_others_may_read_what_is_saved(tmp_path: Path, suffix: str) -> None:
    save_weights(tiny(), tmp_path / f"a{suffix}")
    (tmp_path / "plain").write_text("")
    assert (tmp_path / f"a{suffix}").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_saved_pth_has_the_names_of_the_public_code(tmp_path: Path) -> None:
    save_weights(tiny(), tmp_path / "a.pth")
    names = set(torch.load(tmp_path / "a.pth", weights_only=True)["model"])
    assert "module.decoder.allspark.attn.kv_queue" in names
    assert "module.backbone.block1.0.attn.kv.weight" in names
    assert "module.decoder.decoder.linear_fuse.bn.running_mean" in names
    assert not any("queue_filled" in name for name in names)


def test_unknown_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\.safetensors or \.pth"):
        save_weights(tiny(), tmp_path / "a.bin")


def test_imagenet_encoder_drops_its_classifier(tmp_path: Path) -> None:
    source, target = tiny(), tiny()
    head = {"head.weight": torch.zeros(1000, 32), "head.bias": torch.zeros(1000)}
    torch.save({**source.backbone.state_dict(), **head}, tmp_path / "mit.pth")
    decoder_before = {name: x.clone() for name, x in target.decoder.state_dict().items()}
    report = load_weights(target, tmp_path / "mit.pth")
    assert report.dropped == ("backbone.head.weight", "backbone.head.bias")
    assert all(name.startswith("decoder.") for name in report.fresh)
    assert torch.equal(target.backbone.norm4.weight, source.backbone.norm4.weight)
    assert torch.equal(target.backbone.block2[0].attn.kv.weight, source.backbone.block2[0].attn.kv.weight)
    assert all(torch.equal(x, decoder_before[name]) for name, x in target.decoder.state_dict().items())


@pytest.mark.parametrize(
    ("source", "part", "kept"),
    [
        (lambda: tiny(classes=5), "classifier", "backbone.norm1.weight"),
        (lambda: tiny(tokens=9), "Semantic Memory", "decoder.decoder.linear_pred.weight"),
        (lambda: tiny(allspark=False), "AllSpark bottleneck", "decoder.decoder.linear_pred.weight"),
    ],
)
def test_what_does_not_fit_is_named_and_reset_on_request(
    tmp_path: Path, source: Callable[[], Segmentor], part: str, kept: str
) -> None:
    saved, target = source(), tiny()
    before = {name: x.clone() for name, x in target.state_dict().items()}
    save_weights(saved, tmp_path / "a.pth")
    with pytest.raises(InputError, match=rf"{part}.*--model.reset True"):
        load_weights(target, tmp_path / "a.pth")
    assert all(torch.equal(x, before[name]) for name, x in target.state_dict().items())
    report = load_weights(target, tmp_path / "a.pth", reset=True)
    assert torch.equal(target.state_dict()[kept], saved.state_dict()[kept])
    for name in report.fresh:
        assert torch.equal(target.state_dict()[name], before[name])
    # Pointers are reset with the channels they point into.
    assert ("decoder.allspark.attn.kv_queue" in report.fresh) == ("decoder.allspark.attn.queue_ptr" in report.fresh)


def test_another_architecture_is_refused_even_with_reset(tmp_path: Path) -> None:
    wide = Segmentor(MixTransformer(TINY), Decoder(SegFormerHead(TINY.embed_dims, 3, 32), AllSpark(32, 3, 4)))
    save_weights(wide, tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"another model.*linear_"):
        load_weights(tiny(), tmp_path / "a.pth", reset=True)


def test_a_public_checkpoint_fills_an_empty_memory(tmp_path: Path) -> None:
    save_public_checkpoint(tiny(), tmp_path / "best.pth")
    target = Segmentor(
        MixTransformer(TINY),
        Decoder(SegFormerHead(TINY.embed_dims, 3, 16), AllSpark(32, 3, 4, AllSparkOptions(memory_init="empty"))),
    )
    assert not target.decoder.allspark.attn.queue_filled.any()
    load_weights(target, tmp_path / "best.pth")
    assert target.decoder.allspark.attn.queue_filled.all()


def write_malicious(path: Path) -> None:
    torch.save({"model": Malicious()}, path)


def write_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps([1, 2], protocol=2))


def write_truncated(path: Path) -> None:
    save_weights(tiny(), path)
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "write",
    [
        write_malicious,
        write_truncated,
        lambda path: path.write_bytes(b""),
        write_pickle,
        lambda path: torch.save({"epoch": 3}, path),
    ],
    ids=["malicious", "truncated", "empty", "pickle", "no weights"],
)
def test_bad_files_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None], suffix: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"bad{suffix}"
    write(path)
    with pytest.raises(ValueError, match=re.escape(f"bad{suffix}")):
        read_state_dict(path)
    assert not (tmp_path / "pwned").exists()


def test_a_photograph_is_no_reason_to_allow_more(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.jpg")
    with pytest.raises(ValueError, match=r"photo\.jpg cannot be read.* does not begin like a file of torch\.save"):
        read_state_dict(tmp_path / "photo.jpg")


def test_missing_file() -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        read_state_dict("nowhere.pth")


def test_hugging_face_encoder_gives_the_same_features(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs Hugging Face transformers")
    config = transformers.SegformerConfig(
        hidden_sizes=list(TINY.embed_dims),
        depths=list(TINY.depths),
        num_attention_heads=list(TINY.num_heads),
        sr_ratios=list(TINY.sr_ratios),
        mlp_ratios=[TINY.mlp_ratio] * 4,
        decoder_hidden_size=16,
    )
    theirs = transformers.SegformerForSemanticSegmentation(config).eval()
    theirs.save_pretrained(tmp_path)
    model = tiny().eval()
    report = load_weights(model, tmp_path / "model.safetensors")
    assert all(name.startswith("decode_head.") for name in report.dropped)
    images = torch.randn(2, 3, 65, 97)
    with torch.no_grad():
        expected = theirs.segformer(images, output_hidden_states=True).hidden_states
        for ours, feature in zip(model.backbone(images), expected, strict=True):
            torch.testing.assert_close(ours, feature, rtol=1e-3, atol=1e-3)
