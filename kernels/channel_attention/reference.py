"""Channel attention as written in the paper, with every map materialised: the oracle of the other forms."""

import torch
from torch import Tensor

from allspark_fast.kernels.channel_attention.dropout import hash_keys, keep_mask


def _instance_norm(similarity: Tensor, mask: Tensor, eps: float) -> Tensor:
    """Normalise each map (rows, L) by its mean and variance over the unmasked columns."""
    count = (mask.sum() * similarity.shape[-2]).clamp(min=1)
    mean = similarity.masked_fill(~mask, 0).sum((-2, -1), keepdim=True) / count
    deviation = (similarity - mean).masked_fill(~mask, 0)
    variance = deviation.square().sum((-2, -1), keepdim=True) / count
    return deviation * torch.rsqrt(variance + eps)


def channel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    column_mask: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """softmax(InstanceNorm(queryᵀ key)) valueᵀ (AllSpark, "Channel-wise Cross-attention"), tokens first.

    Args:
        query: (B, H, N, Cq).
        key: (B or 1, H, N, L).
        value: (B or 1, H, N, L).
        column_mask: bool (L,) or None; False columns leave softmax and norm.
        eps: of the norm.
        dropout_p: dropout of the attention map.
        seed: int64 (), needed if ``dropout_p`` > 0.

    Returns:
        (B, H, N, Cq) in the query's dtype; zeros if every column is masked. Half precision is computed in float32.
    """
    dtype = query.dtype
    if dtype in (torch.float16, torch.bfloat16):
        query, key, value = query.float(), key.float(), value.float()
    if column_mask is None:
        column_mask = torch.ones(key.shape[-1], dtype=torch.bool, device=key.device)
    similarity = _instance_norm(query.mT @ key, column_mask, eps)
    attention = similarity.masked_fill(~column_mask, -torch.inf).softmax(-1)
    attention = attention.masked_fill(~column_mask, 0)  # a row with every column masked: NaN -> 0
    if dropout_p > 0:
        assert seed is not None
        batch, heads, rows, columns = attention.shape
        keep = keep_mask(*hash_keys(seed, batch, heads, rows, columns), dropout_p)
        attention = attention * keep / (1 - dropout_p)
    return (attention @ value.mT).mT.to(dtype)
