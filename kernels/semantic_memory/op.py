"""Public functions and registration of channel semantic grouping and the memory's enqueue."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from allspark_fast.kernels.arguments import FLOATING, check_tensor
from allspark_fast.kernels.semantic_memory import vectorized
from allspark_fast.kernels.triton_support import implementation


def channel_semantic_grouping(features: Tensor, class_map: Tensor) -> Tensor:
    """Assign every channel to the class of the most similar map (AllSpark, "Channel Semantic Grouping").

    Args:
        features: (B, N, C), any float dtype and strides.
        class_map: (B, K, N), logits or probabilities of the classes at the same N tokens, any float dtype.

    Returns:
        (B, C) int64 classes in [0, K): argmax of the cosine similarity over tokens, computed in float32. All channels
        of an image with a non-finite number get -1, which the enqueue skips. No gradient flows.

    Raises:
        TypeError: an argument is not a float tensor.
        ValueError: a shape does not match the others, or the devices differ.
    """
    sizes: dict[str, int] = {}
    check_tensor("features", features, "(B, N, C)", FLOATING, sizes=sizes)
    check_tensor("class_map", class_map, "(B, K, N)", FLOATING, features, sizes, not_empty="K N")
    with torch.autocast(features.device.type, enabled=False):
        # A channel's norm is left out: its argmax ignores it.
        similarity = normalize(class_map.detach().float(), dim=2) @ features.detach().float()
        # A product with a number that is not finite is not finite either.
        return similarity.argmax(1).where(similarity.isfinite().flatten(1).all(1, keepdim=True), -1)


def semantic_memory_enqueue(queue: Tensor, queue_ptr: Tensor, features: Tensor, channel_class: Tensor) -> None:
    """Write every channel into the ring buffer of its class, in place (AllSpark, "Semantic Memory").

    The result is that of a loop over images, then channels: a class that receives more than S channels keeps the last
    S. It is deterministic, without a host sync.

    Args:
        queue: (K, S, N) ring buffers, any float dtype and strides; features are cast to its dtype.
        queue_ptr: (K,) int64, the slot that each class writes next, in [0, S).
        features: (B, N, C), any float dtype and strides; stored as they are. Non-finite features are kept out of
            the memory by their class: the grouping gives such images -1.
        channel_class: (B, C) int64; channels with a class outside [0, K) are skipped.

    Raises:
        TypeError: an argument is not a tensor or has another dtype.
        ValueError: a shape does not match the others, the devices differ, entries of ``queue`` or ``queue_ptr`` share
            memory, or, on the CPU, a pointer is outside [0, S). On a GPU, where the check would wait for the device,
            such a pointer is taken modulo S.
    """
    sizes: dict[str, int] = {}
    check_tensor("queue", queue, "(K, S, N)", FLOATING, sizes=sizes, not_empty="K S N")
    check_tensor("queue_ptr", queue_ptr, "(K,)", (torch.int64,), queue, sizes)
    check_tensor("features", features, "(B, N, C)", FLOATING, queue, sizes)
    check_tensor("channel_class", channel_class, "(B, C)", (torch.int64,), queue, sizes)
    if channel_class.numel():
        _semantic_memory_enqueue(queue, queue_ptr, features.detach(), channel_class)


def _check_no_overlap(name: str, value: Tensor) -> None:
    """Check that each stride steps over all that the smaller ones reach."""
    reach = 1
    for stride, side in sorted(zip(value.stride(), value.shape, strict=True)):
        if side > 1 and stride < reach:
            raise ValueError(
                f"{name} has strides {value.stride()}: entries share memory, as after expand(); clone() it first"
            )
        reach += stride * (side - 1)


def _check_pointers(queue_ptr: Tensor, slots: int) -> None:
    wrong = queue_ptr[(queue_ptr < 0) | (queue_ptr >= slots)]
    if wrong.numel():
        raise ValueError(f"queue_ptr holds {wrong[0].item()}, expected slots in [0, {slots})")


@torch.library.custom_op("allspark_fast::semantic_memory_enqueue", mutates_args=("queue", "queue_ptr"))
def _semantic_memory_enqueue(queue: Tensor, queue_ptr: Tensor, features: Tensor, channel_class: Tensor) -> None:
    _check_no_overlap("queue", queue)  # here strides are known
    _check_no_overlap("queue_ptr", queue_ptr)
    if queue.device.type == "cpu":
        _check_pointers(queue_ptr, queue.shape[1])
    with torch.cuda.device_of(queue):
        implementation(vectorized, queue, features).semantic_memory_enqueue(queue, queue_ptr, features, channel_class)
