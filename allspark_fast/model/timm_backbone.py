"""Encoders of timm, by name."""

import importlib
import inspect
from types import MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from allspark_fast.errors import InputError, MissingPackageError
from allspark_fast.model.batch_norm import FiniteBatchNorm
from allspark_fast.model.common import Backbone, map_size
from allspark_fast.text import nearest


class TimmBackbone(Backbone):
    """An encoder of timm, with random weights and timm's parameter names below ``features.model``.

    A pyramid (EfficientNet, Swin, ConvNeXt, PVT) gives its last four maps. A plain transformer (DINOv2), whose maps all
    have one stride, gives the maps after each quarter of its blocks, without the final norm.

    Raises:
        InputError: timm has no such model, or it has fewer than four maps, or takes only images of one size.
        MissingPackageError: timm is not installed.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        try:
            timm = importlib.import_module("timm")  # optional, and slow to import
        except ImportError as error:
            raise MissingPackageError("backbones timm/... need timm: pip install 'allspark-fast[timm]'") from error
        self.features = timm.create_model(name, **_options(timm, name))
        _replace_layers(self.features, timm.layers)
        self.channels = tuple(self.features.feature_info.channels())
        self.stride = max(self.features.feature_info.reduction())
        self.min_size = self.stride

    def forward(self, images: Tensor) -> list[Tensor]:
        """Encode images (B, 3, H, W), upsampled to the next multiples of ``stride`` so that all maps cover them."""
        # The layout that convolutions on a CPU and tensor cores read.
        images = images.contiguous(memory_format=torch.channels_last)
        size = tuple(side * self.stride for side in self.deepest_size(map_size(images)))
        # Also where the size fits already: without a branch, one exported graph serves all sizes.
        return self.features(F.interpolate(images, size, mode="bilinear", align_corners=False))


def _same_conv(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Compute TensorFlow's "same" convolution of maps whose sides are multiples of its stride."""
    # timm pads by each map's size, which torch.export cannot solve. Images are resized to multiples of all strides.
    padding: list[int] = []
    for kernel, stride, dilation in zip(conv.kernel_size, conv.stride, conv.dilation, strict=True):
        total = max((kernel - 1) * dilation + 1 - stride, 0)
        padding = [total // 2, total - total // 2, *padding]  # F.pad begins with the last axis
    return F.conv2d(F.pad(x, padding), conv.weight, conv.bias, conv.stride, 0, conv.dilation, conv.groups)


class _FiniteBatchNormAct(FiniteBatchNorm):
    """FiniteBatchNorm followed by dropout and an activation, under timm's names."""

    def __init__(self, norm: Any) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum)
        self.drop, self.act = norm.drop, norm.act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


def _replace_layers(features: nn.Module, layers: ModuleType) -> None:
    """Replace convolutions with size-dependent padding, and every BatchNorm; names and tensors stay."""
    for name, module in list(features.named_modules()):
        if type(module) is layers.Conv2dSame:
            module.forward = MethodType(_same_conv, module)
            continue
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d):
            replacement: nn.Module = FiniteBatchNorm(module.num_features, module.eps, module.momentum)
        elif type(module) is layers.BatchNormAct2d:
            replacement = _FiniteBatchNormAct(module)
        elif isinstance(module, _BatchNorm):
            raise InputError(f"{name}, a {type(module).__name__}, cannot be synchronized: take another backbone")
        else:
            continue
        replacement.load_state_dict(module.state_dict(keep_vars=True), assign=True)
        features.set_submodule(name, replacement)


def _options(timm: ModuleType, name: str) -> dict[str, Any]:
    """Return arguments of ``timm.create_model`` for four maps of images of any size, tried on the meta device."""
    if not timm.is_model(name):
        raise InputError(f"timm has no model {name!r}{nearest(name, timm.list_models())}; timm.list_models() lists all")
    with torch.device("meta"):
        model = timm.create_model(name)
        strides = [feature["reduction"] for feature in getattr(model, "feature_info", [])]
        depth = len(strides)
        if depth < 4:
            raise InputError(f"timm/{name} gives {depth} feature maps, but four are needed: take another backbone")
        plain = min(strides) == max(strides)
        quarters = [depth * quarter // 4 - 1 for quarter in range(1, 5)]
        options = {
            "features_only": True,
            # Unlike timm's other extractors it keeps the model's parameter names, and (B, C, h, w) is its layout.
            "feature_cls": "getter",
            "out_indices": quarters if plain else list(range(depth - 4, depth)),
        }
        parameters = inspect.signature(type(model)).parameters
        # They lift the fixed image size of plain transformers, and of Swin in older versions of timm.
        any_size = {"dynamic_img_size": True, "strict_img_size": False}
        options |= {option: value for option, value in any_size.items() if option in parameters}
        try:
            timm.create_model(name, **options).eval()(torch.empty(1, 3, 5 * max(strides), 6 * max(strides)))
        except Exception as error:  # what a model raises for such sizes is its own affair
            raise InputError(
                f"timm/{name} does not take images of any size ({error!r}): take another backbone"
            ) from error
    return options
