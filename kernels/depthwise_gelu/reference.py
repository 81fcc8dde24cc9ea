"""Depthwise 3x3 convolution, then GELU, by torch's operations on the tokens as a channels-last map.

The oracle of the Triton kernels, and what runs where they do not.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def forward(tokens: Tensor, weight: Tensor, bias: Tensor, size: tuple[int, int]) -> Tensor:
    """Map tokens (B, h·w, C), weight (C, 1, 3, 3), bias (C,) to (B, h·w, C), contiguous, in tokens' dtype."""
    if tokens.numel() == 0:  # convolutions refuse empty tensors
        return tokens.new_empty(tokens.shape)
    return _to_tokens(F.gelu(_convolved(tokens, weight, bias, size)))


def backward(
    grad: Tensor, tokens: Tensor, weight: Tensor, bias: Tensor, size: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of tokens, weight and bias, contiguous, in their dtypes; the convolved map is recomputed."""
    if tokens.numel() == 0:
        return tokens.new_empty(tokens.shape), weight.new_zeros(weight.shape), bias.new_zeros(bias.shape)
    channels = tokens.shape[2]
    grad_map, token_map = _to_map(grad, size), _to_map(tokens, size)
    grad_convolved = torch.ops.aten.gelu_backward(grad_map, _convolved(tokens, weight, bias, size))
    grad_map, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad_convolved,
        token_map,
        weight.to(tokens.dtype),
        [channels],
        stride=[1, 1],
        padding=[1, 1],
        dilation=[1, 1],
        transposed=False,
        output_padding=[0, 0],
        groups=channels,
        output_mask=[True, True, True],
    )
    return _to_tokens(grad_map), grad_weight.to(weight.dtype).contiguous(), grad_bias.to(bias.dtype)


def _convolved(tokens: Tensor, weight: Tensor, bias: Tensor, size: tuple[int, int]) -> Tensor:
    weight, bias = weight.to(tokens.dtype), bias.to(tokens.dtype)
    return F.conv2d(_to_map(tokens, size), weight, bias, padding=1, groups=tokens.shape[2])


def _to_map(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    return tokens.mT.unflatten(2, size)


def _to_tokens(feature_map: Tensor) -> Tensor:
    return feature_map.flatten(2).mT.contiguous()
