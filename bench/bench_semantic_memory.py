"""Grouping and enqueue of a batch of unlabeled channels."""

import torch
from torch import Tensor

from allspark_fast.kernels.semantic_memory import channel_semantic_grouping, semantic_memory_enqueue
from bench.bench_channel_attention import SIZES
from bench.harness import Case
from bench.naive import naive_enqueue, naive_grouping


def cases(size: str) -> list[Case]:
    """Return grouping, and enqueue into the memory."""
    batch, tokens, channels, _, classes = SIZES[size]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    features = torch.randn(batch, tokens, channels, device=device)
    class_map = torch.randn(batch, classes, tokens, device=device)
    channel_class = channel_semantic_grouping(features, class_map)
    stored = torch.zeros(tokens, classes, channels, device=device)
    pointer = torch.zeros(classes, dtype=torch.int64, device=device)

    compiled_grouping = torch.compile(naive_grouping)

    def grouping() -> Tensor:
        return channel_semantic_grouping(features, class_map).float()

    def naive() -> Tensor:
        queue = stored.permute(1, 2, 0).contiguous()
        naive_enqueue(queue, pointer.clone(), features, channel_class)
        return queue

    def ours() -> Tensor:
        queue = stored.clone().permute(1, 2, 0)
        semantic_memory_enqueue(queue, pointer.clone(), features, channel_class)
        return queue

    name = f"{size}: B={batch} N={tokens} C={channels} K={classes}"
    return [
        Case(
            op="channel_semantic_grouping",
            size=name,
            variants={
                "naive": lambda: naive_grouping(features, class_map).float(),
                "naive, compiled": lambda: compiled_grouping(features, class_map).float(),
                "vectorized": grouping,
                "triton": grouping,
            },
            flops=(2.0 * batch * classes * tokens * channels, 0.0),
            moved=4.0 * (features.numel() + class_map.numel()),
        ),
        # Both copy the memory first, and the channels into it: bytes are read and written.
        Case(
            op="semantic_memory_enqueue",
            size=name,
            variants={"naive": naive, "vectorized": ours, "triton": ours},
            unavailable={"naive, compiled": "reads the classes on the host, so it is no single graph"},
            moved=2 * 4.0 * (stored.numel() + features.numel()),
        ),
    ]
