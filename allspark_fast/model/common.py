"""What the parts of the model share: the encoders' base class, feature maps as tokens, activation checkpointing.

A channels-last map (B, C, h, w) and its tokens (B, h·w, C) share one memory layout.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from allspark_fast.model.batch_norm import FiniteBatchNorm


class Backbone(nn.Module):
    """An encoder: maps images (B, 3, H, W) to four feature maps, finest first.

    Attributes:
        name: as ``build_segmentor`` takes it; empty for an encoder of your own.
        channels: channels of the four maps.
        stride: stride of the deepest map, in pixels.
        min_size: smallest height and width of an image, in pixels, that the encoder takes.
    """

    name: str = ""
    channels: tuple[int, ...]
    stride: int
    min_size: int = 1

    def deepest_size(self, image_size: Sequence[int]) -> tuple[int, int]:
        """Return (h, w) of the deepest map for images of ``image_size`` = (H, W) pixels, both rounded up."""
        # torch.export cannot trace math.ceil, and ONNX would round -(-x // y) toward zero.
        height, width = (side + self.stride - 1 for side in image_size)
        return height // self.stride, width // self.stride


class Named(nn.Module):
    """Layers under the names that they have in the state_dict, such as ``linear_c1.proj``."""

    proj: nn.Linear
    conv: nn.Conv2d
    bn: FiniteBatchNorm
    dwconv: nn.Conv2d

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


def to_tokens(feature_map: Tensor) -> Tensor:
    """Return the tokens (B, h·w, C) of a map (B, C, h, w); a view if the map is channels-last."""
    return feature_map.flatten(2).transpose(1, 2)


def to_map(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """Return tokens (B, h·w, C) as a channels-last map (B, C, h, w), which is a view."""
    return tokens.transpose(1, 2).unflatten(2, size)


def map_size(feature_map: Tensor) -> tuple[int, int]:
    """Return (h, w) of a map (B, C, h, w)."""
    return feature_map.shape[2], feature_map.shape[3]


def to_autocast(x: Tensor) -> Tensor:
    """Cast to the dtype of autocast if that is on: once, where each layer that reads ``x`` would cast it."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def checkpointed(function: Callable[..., Any], *arguments: object) -> Any:
    """Return ``function(*arguments)``, computed again in backward; it must draw no random numbers."""
    if not torch.is_grad_enabled():  # checkpoint has a cost even without gradients
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
