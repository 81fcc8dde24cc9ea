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

_ALIGNMENT = 8


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of ``dtype`` are summed: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _pad_tokens(tokens: int) -> int:
    """The number of tokens, filled up with zeros, whose rows are whole multiples of 16 bytes in half precision.

    For others cuBLAS has slow kernels only.
    """
    return -(-tokens // _ALIGNMENT) * _ALIGNMENT


def _center_padded(x: Tensor, mean: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Centered x (B, H, N, C), and zeros for the tokens that pad it."""
    tokens = x.shape[2]
    padded = x.new_empty((*x.shape[:2], _pad_tokens(tokens), x.shape[3]), dtype=dtype)
    padded[:, :, tokens:] = 0
    centered = torch.sub(x, mean, out=padded[:, :, :tokens])
    if mask is not None:
        centered.masked_fill_(~mask, 0)
    return padded


def _count(x: Tensor, mask: Tensor | None) -> Tensor | int:
    """The channels that count, at least 1; a tensor if there is a mask, so that nothing waits for the device."""
    return x.shape[-1] if mask is None else mask.sum().clamp(min=1)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """The product of two (B, H, ., .) in the accumulation dtype."""
    if a.is_cuda and a.dtype in (torch.float16, torch.bfloat16):
        # Products of half precision are exact in float32, where tensor cores sum them.
        return torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=torch.float32).unflatten(0, a.shape[:2])
    dtype = accumulation_dtype(a.dtype)
    return a.to(dtype) @ b.to(dtype)


@torch.library.custom_op("allspark_fast::covariance", mutates_args=())
def covariance(x: Tensor, mask: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Covariance of tokens over channels, and their mean.

    A registered op, because autograd would keep the centered x and multiply twice for its product with itself.

    Args:
        x: (B, H, N, C).
        mask: bool (C,) or None; channels that are False do not count.
        dtype: that the centered x is rounded to for the product.

    Returns:
        (B, H, N, N) and (B, H, N, 1), in the accumulation dtype.
    """
    with torch.autocast(x.device.type, enabled=False):
        kept = x if mask is None else x.masked_fill(~mask, 0)
        count = _count(x, mask)
        mean = kept.sum(-1, keepdim=True, dtype=accumulation_dtype(x.dtype)) / count
        centered = _center_padded(x, mean, mask, dtype)
        tokens = x.shape[2]
        return _product(centered, centered.mT)[..., :tokens, :tokens] / count, mean


@covariance.register_fake
def _(x: Tensor, mask: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    accumulated = accumulation_dtype(x.dtype)
    return (
        x.new_empty((*x.shape[:-1], x.shape[-2]), dtype=accumulated),
        x.new_empty((*x.shape[:-1], 1), dtype=accumulated),
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, mask, ctx.dtype = inputs
    ctx.save_for_backward(x, mask, output[1])


def _covariance_backward(ctx: Any, grad: Tensor, grad_mean: Tensor) -> tuple[Tensor, None, None]:
    x, mask, mean = ctx.saved_tensors
    count = _count(x, mask)
    centered = _center_padded(x, mean, mask, ctx.dtype)
    tokens = x.shape[2]
    grad_product = grad.new_zeros((*grad.shape[:3], centered.shape[2]), dtype=ctx.dtype)
    grad_product[..., :tokens] = (grad + grad.mT) / count
    # The channels of the centered x sum to zero, so what its mean would take from this product is zero.
    grad_centered = _product(grad_product, centered)
    grad_x = grad_centered if grad_centered.dtype == x.dtype else torch.empty_like(x)
    torch.add(grad_centered, grad_mean / count, out=grad_x)
    if mask is not None:
        grad_x.masked_fill_(~mask, 0)
    return grad_x, None, None


covariance.register_autograd(_covariance_backward, setup_context=_save_for_backward)


def similarity_rstd(query: Tensor, key: Tensor, mask: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Reciprocal standard deviation of every similarity map S = queryᵀ key.

    Args:
        query: (B, H, N, Cq) in the accumulation dtype.
        key: (B or 1, H, N, L); in its dtype numbers are multiplied.
        mask: bool (L,) or None; columns of S that count.
        eps: added to the variance.

    Returns:
        rstd (B, H, 1, 1), differentiable, and the key's mean (B or 1, H, N, 1), in the accumulation dtype.
    """
    query_covariance, query_mean = covariance(query, None, key.dtype)
    key_covariance, key_mean = covariance(key, mask, key.dtype)
    second_moment = query_covariance + query_mean @ query_mean.mT
    variance = (second_moment * key_covariance).sum((-2, -1), keepdim=True)
    variance = variance + key_mean.mT @ query_covariance @ key_mean
    # Both terms are sums of squares, but the first is formed from products that can cancel below zero.
    return torch.rsqrt(variance.clamp_min(0) + eps), key_mean
