"""The official way to compute, written plainly: what the benchmarks compare with."""

import torch
from torch import Tensor
from torch.nn import functional as F


def naive_channel_attention(query: Tensor, key: Tensor, value: Tensor, *, dropout_p: float = 0.0) -> Tensor:
    """Channel attention with every map materialised; shared keys and values are views, as einops.repeat returns.

    Args:
        query: (B, H, N, Cq).
        key: (B or 1, H, N, L).
        value: (B or 1, H, N, L).
        dropout_p: dropout of the map, drawn from torch's generator.

    Returns:
        (B, H, N, Cq).
    """
    similarity = F.instance_norm(query.mT @ key)
    attention = F.dropout(similarity.softmax(-1), dropout_p)
    return (attention @ value.mT).mT


@torch.no_grad()
def naive_grouping(features: Tensor, class_map: Tensor) -> Tensor:
    """Classes (B, C) of channels, both sides of the cosine similarity normalised; shapes as the operator's."""
    return (F.normalize(class_map, dim=-1) @ F.normalize(features, dim=1)).argmax(1)


@torch.no_grad()
def naive_enqueue(queue: Tensor, queue_ptr: Tensor, features: Tensor, channel_class: Tensor) -> None:
    """Enqueue image by image and class by class, asking the device which classes and how many channels came."""
    slots = queue.shape[1]
    for image, classes in zip(features, channel_class, strict=True):
        for cls in classes.unique().tolist():
            channels = image[:, classes == cls].mT
            start = int(queue_ptr[cls])
            places = torch.arange(start, start + len(channels), device=queue.device) % slots
            queue[cls, places] = channels
            queue_ptr[cls] = (start + len(channels)) % slots
