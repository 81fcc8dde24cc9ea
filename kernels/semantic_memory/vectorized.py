"""Grouping and enqueue without a loop over images, channels or classes and without waiting for the device."""

import torch
from torch import Tensor
from torch.nn.functional import normalize


def channel_semantic_grouping(features: Tensor, class_map: Tensor) -> Tensor:
    """As in ``reference``; the norm of a channel is left out, since it cannot change the channel's argmax."""
    similarity = normalize(class_map.float(), dim=2) @ features.float()
    finite = features.isfinite().all(2).all(1) & class_map.isfinite().all(2).all(1)
    return similarity.argmax(1).masked_fill_(~finite[:, None], -1)


def semantic_memory_enqueue(queue: Tensor, queue_ptr: Tensor, features: Tensor, channel_class: Tensor) -> None:
    """As in ``reference``, as one gather: every slot looks up the last channel that falls into it, if any."""
    classes, slots, tokens = queue.shape
    assigned = channel_class.reshape(-1)
    members = assigned[:, None] == torch.arange(classes, device=queue.device)
    arrivals = members.sum(0)
    # Rank of every channel among those of its class; class 0 stands in where there is none.
    known = members.any(1)
    cls = assigned.where(known, 0)
    rank = members.cumsum(0).gather(1, cls[:, None])[:, 0] - 1
    kept = known & (rank >= arrivals[cls] - slots)
    slot = cls * slots + (queue_ptr[cls] + rank) % slots
    # Channels that are not kept all write to one slot more, which is cut off again.
    source = torch.full((classes * slots + 1,), -1, device=queue.device)
    source.scatter_(0, slot.where(kept, classes * slots), torch.arange(assigned.numel(), device=queue.device))
    source = source[:-1].view(classes, slots)

    channels = features.permute(1, 0, 2).reshape(tokens, -1)
    arrived = channels[:, source.clamp(min=0)].permute(1, 2, 0).to(queue.dtype)
    queue.copy_(torch.where(source[..., None] >= 0, arrived, queue))
    queue_ptr.copy_((queue_ptr + arrivals) % slots)
