"""Channel attention as written in the paper, with every map materialized: the oracle of the other forms."""

import torch
from torch import Tensor

from allspark_fast.kernels.channel_attention.dropout import hash_keys, keep_mask
from allspark_fast.kernels.channel_attention.inputs import Inputs


def channel_attention(inputs: Inputs, eps: float) -> Tensor:
    """Return softmax(InstanceNorm(queryᵀ key)) valueᵀ (AllSpark, "Channel-wise Cross-attention"), (B, H, N, Cq).

    Half precision is computed in float32. If every column is masked, all is zero.
    """
    query, key, value = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in inputs[:3])
    mask = inputs.column_mask
    if mask is None:
        mask = torch.ones(key.shape[-1], dtype=torch.bool, device=key.device)
    similarity = _instance_norm(query.mT @ key, mask, eps)
    attention = similarity.masked_fill(~mask, -torch.inf).softmax(-1)
    attention = attention.masked_fill(~mask, 0)  # a row with every column masked: NaN -> 0
    if inputs.seed is not None:
        keep = keep_mask(*hash_keys(inputs.seed, *attention.shape), inputs.dropout_p)
        attention = attention * keep / (1 - inputs.dropout_p)
    return (attention @ value.mT).mT.to(inputs.query.dtype)


def _instance_norm(similarity: Tensor, mask: Tensor, eps: float) -> Tensor:
    """Normalize each map (rows, L) by its mean and variance over the unmasked columns."""
    count = (mask.sum() * similarity.shape[-2]).clamp(min=1)
    mean = similarity.masked_fill(~mask, 0).sum((-2, -1), keepdim=True) / count
    deviation = (similarity - mean).masked_fill(~mask, 0)
    variance = deviation.square().sum((-2, -1), keepdim=True) / count
    return deviation * torch.rsqrt(variance + eps)
