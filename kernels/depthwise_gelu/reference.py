"""Depthwise 3x3 convolution, then GELU, by torch's operations on the tokens as a channels-last map.

The oracle of the Triton kernels, and what runs where they do not.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def forward(tokens: Tensor, weight: Tensor, bias: Tensor, size: tuple[int, int]) -> Tensor:
    """Map tokens (B, h·w, C), weight (C, 1, 3, 3), bias (C,) to (B, h·w, C), contiguous, in tokens' dtype."""
    return F.gelu(_convolved(tokens, weight, bias, size)).flatten(2).mT.contiguous()


def backward(
    grad: Tensor, tokens: Tensor, weight: Tensor, bias: Tensor, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return the gradient of tokens, and (10 · C,) those of weight and bias; the convolved map is recomputed."""
    grad_convolved = torch.ops.aten.gelu_backward(_to_map(grad, size), _convolved(tokens, weight, bias, size))
    operands, channels = (grad_convolved, _to_map(tokens, size), weight.to(tokens.dtype)), tokens.shape[2]
    window = [1, 1], [1, 1], [1, 1]  # stride, padding, dilation
    options = [channels], *window, False, [0, 0], channels, [True, True, True]
    grad_map, grad_weight, grad_bias = torch.ops.aten.convolution_backward(*operands, *options)
    grad_parameters = torch.cat([grad_weight.flatten(), grad_bias])
    return grad_map.flatten(2).mT.contiguous(), grad_parameters.to(torch.promote_types(weight.dtype, bias.dtype))


def _convolved(tokens: Tensor, weight: Tensor, bias: Tensor, size: tuple[int, int]) -> Tensor:
    weight, bias = weight.to(tokens.dtype), bias.to(tokens.dtype)
    return F.conv2d(_to_map(tokens, size), weight, bias, padding=1, groups=tokens.shape[2])


def _to_map(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    return tokens.mT.unflatten(2, size)
