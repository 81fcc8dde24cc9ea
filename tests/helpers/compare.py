"""Outputs and gradients of operators, and how far they are from others."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Of results in a dtype, relative to the largest of float64.
TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def output_and_grads(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the output, and the gradients of all inputs, weighted by numbers that all dtypes hold."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = function(*leaves)
    weight = torch.arange(output.numel(), device=output.device).remainder(7).sub(3).view(output.shape)
    return [output, *torch.autograd.grad(output, leaves, weight.to(output.dtype))]


def assert_close(actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float | None = None) -> None:
    """Check max|a - b| <= tolerance · max|b| for every pair, where both are numbers; NaN must be in the same places."""
    for x, y in zip(actual, expected, strict=True):
        assert x.shape == y.shape
        assert torch.equal(x.isnan(), y.isnan())
        error = (x.double() - y.double()).nan_to_num().abs().max() if x.numel() else 0.0
        bound = TOLERANCE[x.dtype] if tolerance is None else tolerance
        scale = y.double().nan_to_num().abs().max().item() if x.numel() else 0.0
        assert error <= bound * scale, f"{x.dtype} {tuple(x.shape)} is off by {error:.1e}, the largest is {scale:.1e}"


def strided(x: Tensor) -> list[Tensor]:
    """Return the numbers of ``x`` in other strides: transposed, and with gaps."""
    return [x.mT.contiguous().mT, torch.stack([x, x + 9], -1)[..., 0]]
