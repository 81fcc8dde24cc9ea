"""The Semantic Memory: class-wise ring buffers of unlabeled channels, and the class maps that sort channels."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from allspark_fast.distributed import start_all_gather_cat, start_broadcast
from allspark_fast.kernels.bilinear import linear_matrix
from allspark_fast.kernels.semantic_memory import channel_semantic_grouping, semantic_memory_enqueue
from allspark_fast.model.options import AllSparkOptions, ClassMap


class SemanticMemory(nn.Module):
    """Ring buffers of unlabeled channels, one for each class (AllSpark, "Semantic Memory").

    Buffers, with the names of the public code:
        kv_queue: (K, S, N) float32, the channels; stored as [N, K, S], so that projecting it gives keys without a copy.
        queue_ptr: (K,) int64, the slot that each class writes next.
        queue_filled: (K,) bool, whether a class ever received a channel; only with ``memory_init`` ``empty``.
        received: (K,) int64, channels that each class received since the model was built; not in its ``state_dict``.

    Args:
        num_classes: number of classes K.
        slots: channels kept for each class, S.
        tokens: spatial tokens N of a channel.
        options: ``memory_init`` and ``memory_sync`` count here, see AllSparkOptions.
    """

    kv_queue: Tensor
    queue_ptr: Tensor
    queue_filled: Tensor | None
    received: Tensor

    def __init__(self, num_classes: int, slots: int, tokens: int, options: AllSparkOptions = AllSparkOptions()) -> None:
        super().__init__()
        self.memory_sync = options.memory_sync
        noise = torch.randn if options.memory_init == "randn" else torch.zeros
        self.register_buffer("queue_ptr", torch.zeros(num_classes, dtype=torch.int64))
        self.register_buffer("kv_queue", noise(tokens, num_classes, slots).permute(1, 2, 0))
        filled = torch.zeros(num_classes, dtype=torch.bool) if options.memory_init == "empty" else None
        self.register_buffer("queue_filled", filled)
        self.register_buffer("received", torch.zeros(num_classes, dtype=torch.int64), persistent=False)
        self.register_load_state_dict_pre_hook(_assume_filled)

    def enqueue(self, features: Tensor, class_map: Tensor) -> None:
        """Sort the channels of unlabeled features into classes and put them into the ring buffers.

        Args:
            features: (B, N, C).
            class_map: (B, K, N), scores of the classes at the same tokens.

        Raises:
            ValueError: N is not the memory's, or K not its number of classes.
        """
        self.start_enqueue(features, class_map)()

    @torch.no_grad()
    def start_enqueue(self, features: Tensor, class_map: Tensor) -> Callable[[], None]:
        """Begin ``enqueue``: sort the channels and let them travel between ranks.

        Returns:
            what has to be called before the memory is used: it waits for the other ranks, and puts the channels in.
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
            arrived = [start_all_gather_cat(features.detach()), start_all_gather_cat(channel_class)]
            return lambda: self._store(*(finish() for finish in arrived))
        updated = [start_broadcast(x) for x in self._shared_buffers()]

        def finish() -> None:
            for wait in updated:
                wait()
            self._store(features, channel_class)

        return finish

    def stored_channels(self) -> Tensor:
        """The memory as it is stored, (N, K, S): a linear layer makes keys (N, K, D) of it without a copy."""
        return self.kv_queue.permute(2, 0, 1)

    def expect_no_enqueue_before_backward(self, output: Tensor) -> None:
        """Make backward through ``output`` a clear error if the memory has changed since: its values are gone then."""
        version = self.kv_queue._version

        def check(_: Tensor) -> None:
            if self.kv_queue._version != version:
                raise RuntimeError(
                    "the Semantic Memory has changed since this forward pass, so its backward would be wrong: call "
                    "backward before the next forward pass in training mode"
                )

        if output.requires_grad and not torch.compiler.is_compiling():
            output.register_hook(check)

    @torch.no_grad()
    def _store(self, features: Tensor, channel_class: Tensor) -> None:
        """Enqueue channels (B, N, C) whose classes (B, C) are known."""
        semantic_memory_enqueue(self.kv_queue, self.queue_ptr, features, channel_class)
        of_class = channel_class.flatten()[:, None] == torch.arange(len(self.queue_ptr), device=channel_class.device)
        self.received += of_class.sum(0)
        if self.queue_filled is not None:
            self.queue_filled |= of_class.any(0)

    def _shared_buffers(self) -> list[Tensor]:
        """What ``rank0`` takes from rank 0, contiguous."""
        return [x for x in (self.stored_channels(), self.queue_ptr, self.queue_filled) if x is not None]


def _assume_filled(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Checkpoints of the public code do not say which classes are filled: take all."""
    if module.queue_filled is not None and f"{prefix}kv_queue" in state_dict:
        filled = torch.ones(len(state_dict[f"{prefix}kv_queue"]), dtype=torch.bool)
        state_dict.setdefault(f"{prefix}queue_filled", filled)


def token_class_map(
    logits: Tensor,
    size: tuple[int, int],
    *,
    crop_size: tuple[int, int] | None = None,
    kind: ClassMap = "logits",
) -> Tensor:
    """Scores of the classes at the tokens of the deepest map, from the logits of the pseudo-label pass.

    The public code resizes logits to the crop and then to the tokens, both bilinearly with align_corners=False. Each
    resize is a matrix on each axis, so the logits meet only the product of the two.

    Args:
        logits: (B, K, h', w') at any resolution.
        size: (h, w) of the deepest map.
        crop_size: (H, W) of the crop, passed through on the way; None to resize directly.
        kind: ``logits`` as in the public code, or ``softmax`` over K, taken after the resize.

    Returns:
        (B, K, h·w) in at least float32, without gradient.
    """
    crop_height, crop_width = crop_size or size
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
        rows = linear_matrix(crop_height, size[0], logits) @ linear_matrix(logits.shape[2], crop_height, logits)
        columns = linear_matrix(crop_width, size[1], logits) @ linear_matrix(logits.shape[3], crop_width, logits)
        scores = (rows @ logits @ columns.mT).flatten(2)
        return scores.softmax(1) if kind == "softmax" else scores
