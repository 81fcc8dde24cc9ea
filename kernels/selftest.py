"""Checks of every operator on a device against float64 on the CPU: for machines that nobody has tried yet."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from allspark_fast.kernels.channel_attention import channel_attention
from allspark_fast.kernels.depthwise_gelu import depthwise_gelu
from allspark_fast.kernels.semantic_memory import channel_semantic_grouping, semantic_memory_enqueue
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


def passed(results: Sequence[Result]) -> bool:
    """Return whether nothing failed."""
    return not any(result.failure for result in results)


def results_table(results: Sequence[Result]) -> str:
    """Return a table with a row for each result."""
    return "\n".join(f"{x.op:27}{x.dtype:10}{x.error:<9.1e}{x.failure or 'ok'}" for x in results)


def _check(name: str, device: torch.device, dtype: torch.dtype) -> Result:
    operator, shapes, options = CASES[name]
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    error, failure = float("nan"), ""
    try:
        on_device = {key: x.to(device) if isinstance(x, Tensor) else x for key, x in options.items()}
        actual = _outputs_and_grads(operator, [x.to(device) for x in inputs], on_device)
        expected = _outputs_and_grads(operator, [x.double() for x in inputs], options)
        errors = [(x.cpu() - y).abs().max() / y.abs().max() for x, y in zip(actual, expected, strict=True)]
        error = torch.stack(errors).max().item()  # unlike the built-in max, this keeps a NaN
        if not error <= TOLERANCE[dtype]:
            failure = f"wrong by {error:.1e}, at most {TOLERANCE[dtype]:.0e} is allowed"
    except Exception as problem:  # whatever a compiler or a driver raises
        failure = f"{type(problem).__name__}: {str(problem).strip().partition(chr(10))[0]}"
    return Result(name, str(dtype).removeprefix("torch."), error, failure)


def _outputs_and_grads(call: Callable[..., Any], inputs: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    """Return the outputs and, of a differentiable one, the gradients, weighted by numbers that all dtypes hold."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = call(*leaves, **options)
    if isinstance(output, tuple):
        return list(output)
    weight = torch.arange(output.numel(), device=output.device).remainder(7).sub(3).view(output.shape)
    grads = torch.autograd.grad(output, leaves, weight.to(output.dtype)) if output.requires_grad else ()
    return [output, *grads]


def _enqueue(features: Tensor, channel_class: Tensor) -> tuple[Tensor, Tensor]:
    queue, queue_ptr = features.new_zeros(5, 16, 289), torch.arange(5, device=features.device)
    semantic_memory_enqueue(queue, queue_ptr, features, channel_class)
    return queue, queue_ptr


_MASK = torch.tensor([True, False, True])
_TARGET = torch.arange(2 * 17 * 49).view(2, 17, 49) % 22
_CLASSES = torch.arange(2 * 64).view(2, 64) % 7 - 1  # more than a class has room for, and channels of no class
# By name: the operator, shapes of its inputs, and options. No two classes are equally likely or similar to rounding, so
# labels must be equal.
CASES: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]], dict[str, Any]]] = {
    "channel_attention": (
        channel_attention,
        [(2, 1, 289, 32), (1, 1, 289, 96), (1, 1, 289, 96)],
        {"group_mask": _MASK, "dropout_p": 0.1, "seed": torch.tensor(1)},
    ),
    "upsample_cross_entropy": (
        partial(upsample_cross_entropy, reduction="none"),
        [(2, 21, 5, 13)],
        {"target": _TARGET, "ignore_index": 21},
    ),
    "upsample_argmax": (upsample_argmax, [(2, 21, 5, 13)], {"size": (17, 49)}),
    "depthwise_gelu": (depthwise_gelu, [(2, 19 * 11, 80), (80, 1, 3, 3), (80,)], {"size": (19, 11)}),
    "channel_semantic_grouping": (channel_semantic_grouping, [(2, 289, 64), (2, 21, 289)], {}),
    "semantic_memory_enqueue": (_enqueue, [(2, 289, 64)], {"channel_class": _CLASSES}),
}
