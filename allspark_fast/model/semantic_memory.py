"""The Semantic Memory: class-wise ring buffers of unlabeled channels, and the class map that assigns channels."""

import torch
from torch import Tensor, nn

from allspark_fast.distributed import all_gather_cat, broadcast
from allspark_fast.kernels.bilinear import resize_matrices
from allspark_fast.kernels.semantic_memory import channel_semantic_grouping, semantic_memory_enqueue
from allspark_fast.model.options import AllSparkOptions, ClassMap


class SemanticMemory(nn.Module):
    """Ring buffers of unlabeled channels, one for each class (AllSpark, "Semantic Memory").

    Attributes:
        kv_queue: buffer (K, S, N) float32, the channels; its memory layout is [N, K, S], so that keys are projected
            from it without a copy.
        queue_ptr: buffer (K,) int64, the slot that each class writes next.
        queue_filled: buffer (K,) bool, whether a class ever received a channel; None unless ``memory_init`` is
            ``empty``.
        received: buffer (K,) int64, channels that each class received so far; not in the ``state_dict``.
    """

    def __init__(self, num_classes: int, slots: int, tokens: int, options: AllSparkOptions) -> None:
        super().__init__()
        self.memory_sync = options.memory_sync
        noise = torch.randn if options.memory_init == "randn" else torch.zeros
        self.queue_ptr: Tensor = nn.Buffer(torch.zeros(num_classes, dtype=torch.int64))
        self.kv_queue: Tensor = nn.Buffer(noise(tokens, num_classes, slots).permute(1, 2, 0))
        filled = nn.Buffer(torch.zeros(num_classes, dtype=torch.bool))
        self.queue_filled: Tensor | None = filled if options.memory_init == "empty" else None
        self.received: Tensor = nn.Buffer(torch.zeros(num_classes, dtype=torch.int64), persistent=False)
        self.register_load_state_dict_pre_hook(_assume_filled)

    @torch.no_grad()
    def enqueue(self, features: Tensor, class_map: Tensor) -> None:
        """Write the channels of features (B, N, C) to the classes that a map (B, K, N) assigns them to, and count them.

        Those of all ranks, or into rank 0's memory, as ``memory_sync`` says.
        """
        classes, _, tokens = self.kv_queue.shape
        if features.shape[1] != tokens:
            raise ValueError(
                f"the Semantic Memory holds channels of {tokens} tokens, but the features have {features.shape[1]}: "
                "train with the crop size that the model was built for"
            )
        if class_map.shape[1] != classes:
            raise ValueError(f"class_map has {class_map.shape[1]} classes, the Semantic Memory {classes}")
        channel_class = channel_semantic_grouping(features, class_map)
        if self.memory_sync == "all":
            features, channel_class = all_gather_cat(features), all_gather_cat(channel_class)
        else:
            for x in (self.stored_channels(), self.queue_ptr, self.queue_filled):
                if x is not None:
                    broadcast(x)
        semantic_memory_enqueue(self.kv_queue, self.queue_ptr, features, channel_class)
        of_class = channel_class.flatten()[:, None] == torch.arange(len(self.queue_ptr), device=channel_class.device)
        self.received.add_(of_class.sum(0))
        if self.queue_filled is not None:
            self.queue_filled.logical_or_(of_class.any(0))

    def stored_channels(self) -> Tensor:
        """Return the memory as a contiguous view (N, K, S), which a linear layer maps to keys without a copy."""
        return self.kv_queue.permute(2, 0, 1)


def _assume_filled(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Take all classes as filled for checkpoints of the reference implementation, which do not say."""
    if module.queue_filled is not None and f"{prefix}kv_queue" in state_dict:
        filled = torch.ones(len(state_dict[f"{prefix}kv_queue"]), dtype=torch.bool)
        state_dict.setdefault(f"{prefix}queue_filled", filled)


def token_class_map(
    logits: Tensor, size: tuple[int, int], *, crop_size: tuple[int, int] | None = None, kind: ClassMap = "logits"
) -> Tensor:
    """Resize logits (B, K, h', w') to class scores (B, K, h·w) at the tokens of a map, at least float32, no gradient.

    The reference implementation resizes them to the crop and then to the tokens, bilinearly with align_corners=False,
    before the softmax. A resize is a matrix on each axis, so one product of two small matrices replaces both.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
        to_crop = resize_matrices((logits.shape[2], logits.shape[3]), crop_size or size, logits)
        to_tokens = resize_matrices(crop_size or size, size, logits)
        rows, columns = (second @ first for first, second in zip(to_crop, to_tokens, strict=True))
        scores = (rows @ logits @ columns.mT).flatten(2)
        return scores.softmax(1) if kind == "softmax" else scores
