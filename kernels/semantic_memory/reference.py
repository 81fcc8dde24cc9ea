"""Grouping and enqueue as in the paper, one image and one channel at a time: the oracle of the faster versions."""

import torch
from torch import Tensor
from torch.nn.functional import normalize


def channel_semantic_grouping(features: Tensor, class_map: Tensor) -> Tensor:
    """Return the class (B, C) most similar to every channel, for features (B, N, C) and class maps (B, K, N)."""
    batch, _, channels = features.shape
    channel_class = torch.full((batch, channels), -1, device=features.device)
    for image, scores, assigned in zip(features, class_map, channel_class, strict=True):
        if image.isfinite().all() and scores.isfinite().all():
            similarity = normalize(scores.float(), dim=1) @ normalize(image.float(), dim=0)
            assigned.copy_(similarity.argmax(0))
    return channel_class


def semantic_memory_enqueue(queue: Tensor, queue_ptr: Tensor, features: Tensor, channel_class: Tensor) -> None:
    """Write every channel of (B, N, C) into the ring buffer of its class (K, S, N), images in order, then channels."""
    classes, slots, _ = queue.shape
    for image, assigned in zip(features, channel_class.tolist(), strict=True):
        for channel, cls in enumerate(assigned):
            if 0 <= cls < classes:
                queue[cls, queue_ptr[cls]] = image[:, channel].to(queue.dtype)
                queue_ptr[cls] = (queue_ptr[cls] + 1) % slots
