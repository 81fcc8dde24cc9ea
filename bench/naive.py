"""The official way to compute, written plainly: what the benchmarks compare with."""

from torch import Tensor
from torch.nn import functional as F


def naive_channel_attention(query: Tensor, key: Tensor, value: Tensor, *, dropout_p: float = 0.0) -> Tensor:
    """Channel attention with every map materialised and shared keys repeated for each sample.

    Args:
        query: (B, H, N, Cq).
        key: (B or 1, H, N, L).
        value: (B or 1, H, N, L).
        dropout_p: dropout of the map, drawn from torch's generator.

    Returns:
        (B, H, N, Cq).
    """
    batch = query.shape[0]
    if key.shape[0] != batch:
        key, value = key.repeat(batch, 1, 1, 1), value.repeat(batch, 1, 1, 1)
    similarity = F.instance_norm(query.mT @ key)
    attention = F.dropout(similarity.softmax(-1), dropout_p)
    return (attention @ value.mT).mT
