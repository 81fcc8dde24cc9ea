"""Feature maps as tokens: (B, C, h, w) in channels-last memory and (B, h·w, C) are two views of the same numbers."""

from torch import Tensor, nn
from torch.nn import functional as F


def to_tokens(feature_map: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h·w, C); no copy if the map is channels-last."""
    return feature_map.flatten(2).transpose(1, 2)


def to_map(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, h·w, C) -> (B, C, h, w) in channels-last memory, without a copy."""
    return tokens.transpose(1, 2).unflatten(2, size)


def pointwise(conv: nn.Conv2d, tokens: Tensor) -> Tensor:
    """A 1x1 convolution of (B, N, C) tokens, as the matrix product it is."""
    return F.linear(tokens, conv.weight.flatten(1), conv.bias)
