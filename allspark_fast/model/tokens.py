"""Feature maps as tokens: a channels-last map (B, C, h, w) and its tokens (B, h·w, C) share one memory layout."""

from torch import Tensor


def to_tokens(feature_map: Tensor) -> Tensor:
    """Return the tokens (B, h·w, C) of a map (B, C, h, w); a view if the map is channels-last."""
    return feature_map.flatten(2).transpose(1, 2)


def to_map(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """Return tokens (B, h·w, C) as a channels-last map (B, C, h, w), which is a view."""
    return tokens.transpose(1, 2).unflatten(2, size)


def map_size(feature_map: Tensor) -> tuple[int, int]:
    """Return (h, w) of a map (B, C, h, w)."""
    return feature_map.shape[2], feature_map.shape[3]
