"""Grouping and enqueue as the paper tells them, one image and one channel at a time: the oracle of the other forms."""

import torch
from torch import Tensor
from torch.nn.functional import normalize


def channel_semantic_grouping(features: Tensor, class_map: Tensor) -> Tensor:
    """The class most similar to every channel, by cosine similarity over tokens.

    Args:
        features: (B, N, C).
        class_map: (B, K, N).

    Returns:
        (B, C) int64; -1 for all channels of an image in which anything is not finite.
    """
    classes = []
    for image, scores in zip(features, class_map, strict=True):
        similarity = normalize(scores.float(), dim=1) @ normalize(image.float(), dim=0)
        finite = image.isfinite().all() and scores.isfinite().all()
        classes.append(similarity.argmax(0) if finite else similarity.new_full(image.shape[1:], -1).long())
    return torch.stack(classes)


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
