r"""Instance norm of a similarity map, without the map.

Softmax ignores a shift, so softmax(InstanceNorm(S)) = softmax(rstd · S) with one number rstd = (var(S) + eps)^-1/2 for
each map. S[d, l] = q_d · k_l is bilinear; with means q̄, k̄ over channels and covariances (N x N)
Cq = E[(q - q̄)(q - q̄)ᵀ], Ck = E[(k - k̄)(k - k̄)ᵀ] its variance is

    var(S) = <Cq + q̄q̄ᵀ, Ck> + k̄ᵀ Cq k̄

which costs O(N² (D + L)) instead of the O(N D L) and the D x L map of the definition.
"""

from typing import Any

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of ``dtype`` are summed: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.custom_op("allspark_fast::gram", mutates_args=())
def gram(x: Tensor) -> Tensor:
    """Gram matrices x xᵀ, (B, H, N, C) -> (B, H, N, N) in the accumulation dtype.

    A registered op because autograd would save x twice and multiply twice for this product.
    """
    with torch.autocast(x.device.type, enabled=False):
        if x.is_cuda and x.dtype in (torch.float16, torch.bfloat16):
            # Products of half precision are exact in float32, where tensor cores sum them.
            maps = x.flatten(0, 1)
            return torch.bmm(maps, maps.mT, out_dtype=torch.float32).unflatten(0, x.shape[:2])
        x = x.to(accumulation_dtype(x.dtype))
        return x @ x.mT


@gram.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-2]), dtype=accumulation_dtype(x.dtype))


def _save_input(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gram_backward(ctx: Any, grad: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    return (grad + grad.mT).to(x.dtype) @ x


gram.register_autograd(_gram_backward, setup_context=_save_input)


def center(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | int]:
    """Subtract the mean over channels.

    Args:
        x: (..., N, C).
        mask: bool (C,) or None; channels that are False are left out of the mean and become zero.

    Returns:
        the centered x in x's dtype, its mean (..., N, 1) in the accumulation dtype, and the number of channels
        that count (at least 1; a tensor of shape () if there is a mask, so that nothing waits for the device).
    """
    dtype = accumulation_dtype(x.dtype)
    if mask is None:
        mean = x.mean(-1, keepdim=True, dtype=dtype)
        return (x - mean).to(x.dtype), mean, x.shape[-1]
    count = mask.sum().clamp(min=1)
    mean = x.masked_fill(~mask, 0).sum(-1, keepdim=True, dtype=dtype) / count
    return (x - mean).to(x.dtype).masked_fill(~mask, 0), mean, count


def similarity_rstd(query: Tensor, key: Tensor, mask: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Reciprocal standard deviation of every similarity map S = queryᵀ key.

    Args:
        query: (B, H, N, Cq).
        key: (B or 1, H, N, L).
        mask: bool (L,) or None; columns of S that count.
        eps: added to the variance.

    Returns:
        rstd (B, H, 1, 1) in the accumulation dtype, differentiable, and the centered key: it gives the same softmax
        as ``key``, is what the Gram matrix keeps for backward, and rounds better in half precision.
    """
    centered_query, query_mean, query_count = center(query)
    centered_key, key_mean, key_count = center(key, mask)
    query_covariance = gram(centered_query) / query_count
    key_covariance = gram(centered_key) / key_count
    second_moment = query_covariance + query_mean @ query_mean.mT
    variance = (second_moment * key_covariance).sum((-2, -1), keepdim=True)
    variance = variance + key_mean.mT @ query_covariance @ key_mean
    # Both terms are sums of squares, but the first is formed from products that can cancel below zero.
    return torch.rsqrt(variance.clamp_min(0) + eps), centered_key
