"""Public function and registration of the depthwise convolution + GELU."""

from typing import Any

import torch
from torch import Tensor

from allspark_fast.kernels.arguments import FLOATING, check_size, check_tensor
from allspark_fast.kernels.depthwise_gelu import reference
from allspark_fast.kernels.triton_support import implementation


def depthwise_gelu(tokens: Tensor, weight: Tensor, bias: Tensor, size: tuple[int, int]) -> Tensor:
    """Apply a depthwise 3x3 convolution and GELU to tokens: the inside of a Mix-FFN (SegFormer eq. 3).

    Every channel of the map is convolved separately, padded with zeros; GELU is the exact one, by erf. Only the
    arguments are saved for backward.

    Args:
        tokens: (B, h·w, C), row by row, any float dtype and strides.
        weight: (C, 1, 3, 3), any float dtype, as ``torch.nn.Conv2d(C, C, 3, padding=1, groups=C)`` has it.
        bias: (C,), any float dtype.
        size: (h, w) of the map, in tokens.

    Returns:
        (B, h·w, C), contiguous, of tokens' dtype. The Triton kernels compute in float32 with unrounded weights and
        round once; torch's operations, elsewhere, compute in tokens' dtype.

    Raises:
        TypeError: an argument is not a float tensor, or ``size`` not a pair of integers.
        ValueError: a shape does not match the others, or the devices differ.
    """
    check_size("size", size)
    sizes = {"h·w": size[0] * size[1]}
    check_tensor("tokens", tokens, "(B, h·w, C)", FLOATING, sizes=sizes)
    check_tensor("weight", weight, "(C, 1, 3, 3)", FLOATING, tokens, sizes)
    check_tensor("bias", bias, "(C,)", FLOATING, tokens, sizes)
    return _depthwise_gelu(tokens, weight, bias, list(size))


@torch.library.custom_op("allspark_fast::depthwise_gelu", mutates_args=())
def _depthwise_gelu(tokens: Tensor, weight: Tensor, bias: Tensor, size: list[int]) -> Tensor:
    if not tokens.numel():  # convolutions and launches refuse empty tensors
        return tokens.new_empty(tokens.shape)
    with torch.autocast(tokens.device.type, enabled=False), torch.cuda.device_of(tokens):
        return implementation(reference, tokens).forward(tokens, weight, bias, (size[0], size[1]))


@_depthwise_gelu.register_fake
def _(tokens: Tensor, weight: Tensor, bias: Tensor, size: list[int]) -> Tensor:
    return tokens.new_empty(tokens.shape)


@torch.library.custom_op("allspark_fast::depthwise_gelu_backward", mutates_args=())
def _depthwise_gelu_backward(
    grad: Tensor, tokens: Tensor, weight: Tensor, bias: Tensor, size: list[int]
) -> tuple[Tensor, Tensor]:
    """Return the gradients of tokens, and of weight and bias as one tensor (10 · C,): see ``_backward``."""
    if not tokens.numel():
        return _fake_backward(grad, tokens, weight, bias, size)
    with torch.autocast(tokens.device.type, enabled=False), torch.cuda.device_of(tokens):
        return implementation(reference, tokens).backward(grad, tokens, weight, bias, (size[0], size[1]))


@_depthwise_gelu_backward.register_fake
def _fake_backward(
    grad: Tensor, tokens: Tensor, weight: Tensor, bias: Tensor, size: list[int]
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(weight.dtype, bias.dtype)
    return tokens.new_zeros(tokens.shape), weight.new_zeros(10 * len(bias), dtype=dtype)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, weight, bias, ctx.size = inputs
    ctx.save_for_backward(tokens, weight, bias)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    tokens, weight, bias = ctx.saved_tensors
    grad_tokens, grad_parameters = _depthwise_gelu_backward(grad, tokens, weight, bias, ctx.size)
    # Views, which operators must not return: a copy of each would be a launch.
    grad_weight, grad_bias = grad_parameters.split([weight.numel(), bias.numel()])
    return grad_tokens, grad_weight.view(weight.shape).to(weight.dtype), grad_bias.to(bias.dtype), None


_depthwise_gelu.register_autograd(_backward, setup_context=_save_for_backward)
