"""Checks of every operator on a device against float64 on the CPU: for machines that nobody has tried yet."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from allspark_fast.kernels.channel_attention import channel_attention
from allspark_fast.kernels.depthwise_gelu import depthwise_gelu
from allspark_fast.kernels.semantic_memory import semantic_memory_enqueue
from allspark_fast.kernels.triton_support import set_kernels
from allspark_fast.kernels.upsample_argmax import upsample_argmax
from allspark_fast.kernels.upsample_cross_entropy import upsample_cross_entropy

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}


class Result(NamedTuple):
    """The outcome of an operator in one dtype."""

    op: str
    dtype: str
    error: float  # max|a - b| / max|b|, the largest of outputs and gradients; NaN if the operator raised
    failure: str  # empty if it passed


def check_kernels(device: torch.device) -> list[Result]:
    """Run every operator forward and backward, by its Triton kernels where ``device`` runs them, else by plain torch.

    No kernel computes in float64, so what they are compared with is plain torch.
    """
    previous = set_kernels("triton")
    try:
        return [_check(name, device, dtype) for name in CASES for dtype in TOLERANCE]
    finally:
        set_kernels(previous)


def _check(name: str, device: torch.device, dtype: torch.dtype) -> Result:
    error, failure = float("nan"), ""
    try:
        pairs = zip(
            _run(name, dtype, device, dtype), _run(name, dtype, torch.device("cpu"), torch.float64), strict=True
        )
        errors = [(x.cpu() - y).abs().max() / y.abs().max() for x, y in pairs]
        error = torch.stack(errors).max().item()  # unlike the built-in max, this keeps a NaN
        if not error <= TOLERANCE[dtype]:
            failure = f"wrong by {error:.1e}, at most {TOLERANCE[dtype]:.0e} is allowed"
    except Exception as problem:  # whatever a compiler or a driver raises
        failure = f"{type(problem).__name__}: {str(problem).strip().partition(chr(10))[0]}"
    return Result(name, str(dtype).removeprefix("torch."), error, failure)


def _run(name: str, rounded: torch.dtype, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Return the outputs and, of a differentiable one, the gradients, weighted by numbers that all dtypes hold."""
    operator, shapes, options = CASES[name]
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(shape, generator=generator).to(rounded).to(device, dtype).requires_grad_() for shape in shapes
    ]
    output = operator(*inputs, **{key: x.to(device) if isinstance(x, Tensor) else x for key, x in options.items()})
    if isinstance(output, tuple):
        return list(output)
    weight = torch.arange(output.numel(), device=device).remainder(7).sub(3).view(output.shape)
    grads = torch.autograd.grad(output, inputs, weight.to(output.dtype)) if output.requires_grad else ()
    return [output, *grads]


def _enqueue(features: Tensor, channel_class: Tensor) -> tuple[Tensor, Tensor]:
    queue, queue_ptr = features.new_zeros(5, 16, 289), torch.arange(5, device=features.device)
    semantic_memory_enqueue(queue, queue_ptr, features, channel_class)
    return queue, queue_ptr


_CLASSES = torch.arange(2 * 64).view(2, 64) % 7 - 1  # more than a class has room for, and channels of no class
# By name: the operator, shapes of its inputs, and options. Labels must be equal: no two classes are equally likely.
CASES: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]], dict[str, Any]]] = {
    "channel_attention": (
        channel_attention,
        [(2, 1, 289, 32), (1, 1, 289, 96), (1, 1, 289, 96)],
        {"group_mask": torch.tensor([True, False, True]), "dropout_p": 0.1, "seed": torch.tensor(1)},
    ),
    "upsample_cross_entropy": (
        partial(upsample_cross_entropy, ignore_index=21, reduction="none"),
        [(2, 21, 5, 13)],
        {"target": torch.arange(2 * 17 * 49).view(2, 17, 49) % 22},
    ),
    "upsample_argmax": (upsample_argmax, [(2, 21, 5, 13)], {"size": (17, 49)}),
    "depthwise_gelu": (depthwise_gelu, [(2, 19 * 11, 80), (80, 1, 3, 3), (80,)], {"size": (19, 11)}),
    "semantic_memory_enqueue": (_enqueue, [(2, 289, 64)], {"channel_class": _CLASSES}),
}
