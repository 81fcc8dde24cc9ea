"""Encoders of other makers, by their names in timm."""

import difflib
import inspect
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from allspark_fast.model.batch_norm import FiniteBatchNorm1d, FiniteBatchNorm2d

# What constructors call it: those of plain transformers, and those of Swin (in older versions of timm only so).
_ANY_SIZE = {"dynamic_img_size": True, "strict_img_size": False}


class TimmBackbone(nn.Module):
    """An encoder of timm, with random weights and timm's parameter names below ``features.model``.

    Of a pyramid (EfficientNet, Swin, ConvNeXt, PVT) it gives the last four maps; of a plain transformer (DINOv2), whose
    maps all have one stride, those after each quarter of its blocks, without the final norm.

    Args:
        name: as ``timm.list_models()`` has it.

    Attributes:
        name: of the model in timm.
        channels: of the four maps, finest first.
        stride: pixels of an image that become one of the deepest map.
        min_size: side of the smallest images in pixels that are not enlarged.

    Raises:
        ImportError: timm is not installed.
        ValueError: timm has no such model, or it has fewer than four maps, or takes only images of one size.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        timm = _import_timm()
        self.name = name
        self.features = timm.create_model(name, **_options(timm, name))
        _pad_statically(self.features, timm.layers.Conv2dSame)
        _normalize_finitely(self.features, timm.layers.BatchNormAct2d)
        self.channels = tuple(self.features.feature_info.channels())
        self.stride = max(self.features.feature_info.reduction())
        self.min_size = self.stride

    def forward(self, images: Tensor) -> list[Tensor]:
        """Encode images.

        Args:
            images: (B, 3, H, W); enlarged to the next multiples of ``stride`` if they are none, so that all maps
                cover just the image.

        Returns:
            four maps (B, channels[i], h_i, w_i), finest first.
        """
        # Channels innermost, as convolutions on a CPU and tensor cores read them; docs/performance.md has figures.
        images = images.contiguous(memory_format=torch.channels_last)
        height, width = self.deepest_size(images.shape[2:])
        # Without a branch for images that need it not: one graph for all sizes.
        images = F.interpolate(
            images, (height * self.stride, width * self.stride), mode="bilinear", align_corners=False
        )
        return self.features(images)

    def deepest_size(self, image_size: Sequence[int]) -> tuple[int, int]:
        """(h, w) of the deepest map for images of ``image_size`` = (H, W) pixels."""
        # Exported graphs have no math.ceil, and ONNX would round -(-x // y) the other way.
        height, width = (side + self.stride - 1 for side in image_size)
        return height // self.stride, width // self.stride


class _EvenConv2d(nn.Conv2d):
    """TensorFlow's "same" convolution of maps whose sides its stride divides: what it pads depends on no size."""

    def forward(self, x: Tensor) -> Tensor:
        padding: list[int] = []
        for kernel, stride, dilation in zip(self.kernel_size, self.stride, self.dilation, strict=True):
            total = max((kernel - 1) * dilation + 1 - stride, 0)
            padding = [total // 2, total - total // 2, *padding]  # F.pad begins with the last axis
        return super().forward(F.pad(x, padding))


def _pad_statically(features: nn.Module, same_convolution: type[nn.Module]) -> None:
    """Give convolutions that work out their padding from each map's size a constant one.

    Images are enlarged to multiples of all strides, so both are the same; but sizes that depend on sizes through every
    layer grow to expressions that torch.export does not come to the end of.
    """
    for module in features.modules():
        if type(module) is same_convolution:
            module.__class__ = _EvenConv2d


class _FiniteBatchNormAct2d(FiniteBatchNorm2d):
    """timm's BatchNorm with an activation behind it."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


def _normalize_finitely(features: nn.Module, with_activation: type[_BatchNorm]) -> None:
    """Give every BatchNorm the statistics of all ranks, of which the running ones skip what is not finite."""
    kinds: dict[type[_BatchNorm], type[_BatchNorm]] = {
        nn.BatchNorm1d: FiniteBatchNorm1d,
        nn.BatchNorm2d: FiniteBatchNorm2d,
        with_activation: _FiniteBatchNormAct2d,
    }
    for name, module in features.named_modules():
        if isinstance(module, _BatchNorm):
            kind = type(module)
            if kind not in kinds:
                raise ValueError(f"{name} is a {kind.__name__}, which is not synchronised: take another backbone")
            module.__class__ = kinds[kind]


def _import_timm() -> ModuleType:
    try:
        import timm  # noqa: PLC0415 optional, and slow to import
    except ImportError as error:
        raise ImportError("backbones timm/... need timm: pip install 'allspark-fast[timm]'") from error
    return timm


def _options(timm: ModuleType, name: str) -> dict[str, Any]:
    """Arguments of ``timm.create_model`` for four maps of images of any size, tried on tensors without memory."""
    if not timm.is_model(name):
        similar = difflib.get_close_matches(name, timm.list_models(), n=5, cutoff=0.5)
        hint = f"did you mean {', '.join(similar)}?" if similar else "timm.list_models() lists all"
        raise ValueError(f"timm has no model {name!r}: {hint}")
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
        strides = [feature["reduction"] for feature in getattr(model, "feature_info", [])]
        depth = len(strides)
        if depth < 4:
            raise ValueError(f"timm/{name} gives {depth} feature maps, but four are needed: take another backbone")
        plain = min(strides) == max(strides)
        quarters = [depth * quarter // 4 - 1 for quarter in range(1, 5)]
        options = {
            "pretrained": False,
            "features_only": True,
            # Unlike timm's other extractors it keeps the model's parameter names, and (B, C, h, w) is its layout.
            "feature_cls": "getter",
            "out_indices": quarters if plain else list(range(depth - 4, depth)),
        }
        parameters = inspect.signature(type(model)).parameters
        options |= {option: value for option, value in _ANY_SIZE.items() if option in parameters}
        try:
            timm.create_model(name, **options).eval()(torch.empty(1, 3, 5 * max(strides), 6 * max(strides)))
        except Exception as error:
            raise ValueError(
                f"timm/{name} does not take images of any size ({error}): take another backbone"
            ) from error
    return options
