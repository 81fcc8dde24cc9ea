"""The enqueue without a loop over images, channels or classes, and without a host sync."""

import torch
from torch import Tensor


def semantic_memory_enqueue(queue: Tensor, queue_ptr: Tensor, features: Tensor, channel_class: Tensor) -> None:
    """Compute ``reference.semantic_memory_enqueue`` by one scatter that writes every slot at most once."""
    classes, slots, tokens = queue.shape
    assigned = channel_class.reshape(-1)
    members = assigned[:, None] == torch.arange(classes, device=queue.device)
    arrivals = members.sum(0)
    # Rank of every channel among those of its class; 0 stands for classes outside [0, K).
    known = members.any(1)
    cls = assigned.where(known, 0)
    rank = members.cumsum(0).gather(1, cls[:, None])[:, 0] - 1
    kept = known & (rank >= arrivals[cls] - slots)
    slot = (queue_ptr[cls] + rank) % slots

    stored = queue.permute(2, 0, 1)
    channels = features.permute(1, 0, 2).reshape(tokens, -1).to(queue.dtype)
    # Shapes must not depend on how many channels are kept, so all others write to slot 0 of class 0 the value that it
    # holds afterwards.
    first = kept & (cls == 0) & (slot == 0)
    # index_select: indexing with a tensor of one number reads it on the host.
    first_channel = channels.index_select(1, first.int().argmax()[None]).where(first.any(), stored[:, 0, :1])
    stored[:, cls.where(kept, 0), slot.where(kept, 0)] = channels.where(kept, first_channel)
    queue_ptr.copy_((queue_ptr + arrivals) % slots)
