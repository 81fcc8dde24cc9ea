"""Grouping and enqueue as in the paper, one image and one channel at a time: the oracle of the faster versions."""

import torch
from torch import Tensor
from torch.nn.functional import normalize


def channel_semantic_grouping(features: Tensor, class_map: Tensor) -> Tensor:
    """Return the class most similar to every channel, by cosine similarity over tokens.

    Args:
        features: (B, N, C).
        class_map: (B, K, N).

    Returns:
        (B, C) int64; -1 for all channels of an image with a non-finite feature or score.
    """
    batch, _, channels = features.shape
    channel_class = torch.full((batch, channels), -1, device=features.device)
    for image, scores, assigned in zip(features, class_map, channel_class, strict=True):
        if image.isfinite().all() and scores.isfinite().all():
            similarity = normalize(scores.float(), dim=1) @ normalize(image.float(), dim=0)
            assigned.copy_(similarity.argmax(0))
    return channel_class


def semantic_memory_enqueue(queue: Tensor, queue_ptr: Tensor, features: Tensor, channel_class: Tensor) -> None:
    """Write every channel into the ring buffer of its class, in order of images, then channels.

    Args:
        queue: (K, S, N), changed in place.
        queue_ptr: (K,) int64, the next slot of every class, changed in place.
        features: (B, N, C).
        channel_class: (B, C) int64; channels of a class outside [0, K) are skipped.
    """
    classes, slots, _ = queue.shape
    for image, assigned in zip(features, channel_class.tolist(), strict=True):
        for channel, cls in enumerate(assigned):
            if 0 <= cls < classes:
                queue[cls, queue_ptr[cls]] = image[:, channel].to(queue.dtype)
                queue_ptr[cls] = (queue_ptr[cls] + 1) % slots
