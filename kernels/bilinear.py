"""Bilinear resizing with align_corners=False: its weights, as indices and as matrices."""

import torch
from torch import Tensor
from torch.nn.functional import interpolate


def linear_taps(source: int, target: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return what torch.nn.functional.interpolate takes from ``source`` positions for each of ``target`` positions.

    Args:
        source: number of source positions.
        target: number of output positions.
        like: a tensor with the device and dtype of the weights.

    Returns:
        index (target, 2) int64 of the source positions before and after, and their weights (target, 2). Positions are
        fractions of integers, so that only the weights are rounded.
    """
    # In units of 1 / (2 * target): (x + 1/2) * source / target - 1/2.
    position = (2 * torch.arange(target, device=like.device) + 1) * source - target
    position.clamp_(min=0)
    before = position // (2 * target)
    weight = (position % (2 * target)).to(like.dtype) / (2 * target)
    return torch.stack([before, (before + 1).clamp_(max=source - 1)], 1), torch.stack([1 - weight, weight], 1)


def linear_matrix(source: int, target: int, like: Tensor) -> Tensor:
    """Return the dense matrix (target, source) of the resize; arguments as in ``linear_taps``."""
    identity = torch.eye(source, dtype=like.dtype, device=like.device)
    return interpolate(identity[None], target, mode="linear", align_corners=False)[0].mT


def resize_matrices(source: tuple[int, int], target: tuple[int, int], like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the matrices of rows and columns that resize a map (h, w) to (H, W), the same one if both are square."""
    rows = linear_matrix(source[0], target[0], like)
    square = source[0] == source[1] and target[0] == target[1]
    return rows, rows if square else linear_matrix(source[1], target[1], like)
