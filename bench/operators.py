"""Upsampling with loss or labels, grouping, enqueue, and the Mix-FFN against what the reference implementation does."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from allspark_fast.kernels.semantic_memory import channel_semantic_grouping, semantic_memory_enqueue
from allspark_fast.kernels.upsample_argmax import upsample_argmax
from allspark_fast.kernels.upsample_cross_entropy import upsample_cross_entropy
from allspark_fast.model.common import checkpointed
from allspark_fast.model.mit import MIT_CONFIGS, STRIDES, MixFFN
from bench.bench_train_step import SIZES
from bench.harness import DEVICE, Case
from bench.naive import naive_enqueue, naive_grouping, naive_mix_ffn, upsample


def upsample_cases(size: str) -> list[Case]:
    """Return upsampling + cross-entropy, and upsampling + argmax, of logits at a quarter of the crop."""
    _, batch, classes, crop, _ = SIZES[size]
    side = -(-crop // 4)
    # Classes last in memory, as our head returns them.
    logits = torch.randn(batch, side, side, classes, device=DEVICE).permute(0, 3, 1, 2).requires_grad_()
    target = torch.randint(classes, (batch, crop, crop), device=DEVICE)

    def upsampled() -> Tensor:
        return upsample(logits, (crop, crop))

    def variants(naive: Callable[[], Tensor], ours: Callable[[], Tensor]) -> dict[str, Callable[[], Tensor]]:
        return {"naive": naive, "naive, compiled": torch.compile(naive), "ours": ours}

    name = f"{size}: B={batch} K={classes} {side} -> {crop} pixels"
    losses = variants(
        lambda: F.cross_entropy(upsampled(), target),
        lambda: upsample_cross_entropy(logits, target),
    )
    labels = variants(
        lambda: upsampled().detach().softmax(1).max(1).values,
        lambda: upsample_argmax(logits, (crop, crop))[1],
    )
    return [Case("upsample_cross_entropy", name, losses, inputs=(logits,)), Case("upsample_argmax", name, labels)]


def memory_cases(size: str) -> list[Case]:
    """Return grouping of a batch of unlabeled channels, and their enqueue into a copy of the memory."""
    backbone, batch, classes, crop, _ = SIZES[size]
    channels, tokens = MIT_CONFIGS[backbone].embed_dims[-1], (-(-crop // STRIDES[-1])) ** 2
    features = torch.randn(batch, tokens, channels, device=DEVICE)
    class_map = torch.randn(batch, classes, tokens, device=DEVICE)
    channel_class = channel_semantic_grouping(features, class_map)
    stored = torch.zeros(tokens, classes, channels, device=DEVICE)
    pointer = torch.zeros(classes, dtype=torch.int64, device=DEVICE)

    def grouping(function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return function(features, class_map).float()

    def enqueue(function: Callable[..., None], queue: Tensor) -> Tensor:
        function(queue, pointer.clone(), features, channel_class)
        return queue

    name = f"{size}: B={batch} N={tokens} C={channels} K={classes}"
    functions = {
        "naive": naive_grouping,
        "naive, compiled": torch.compile(naive_grouping),
        "ours": channel_semantic_grouping,
    }
    groupings = {name: functools.partial(grouping, function) for name, function in functions.items()}
    enqueues = {
        "naive": lambda: enqueue(naive_enqueue, stored.permute(1, 2, 0).contiguous()),
        "ours": lambda: enqueue(semantic_memory_enqueue, stored.clone().permute(1, 2, 0)),
    }
    return [Case("channel_semantic_grouping", name, groupings), Case("semantic_memory_enqueue", name, enqueues)]


def mix_ffn_cases(size: str) -> list[Case]:
    """Return one case for each stage of the encoder, on all images of a training step.

    Variants are ``naive`` (tokens are copied to a contiguous map and back), ``channels last`` (the convolution takes
    them as they are), ``recomputed`` (that, and convolution and GELU are computed again in backward: ours on a CPU) and
    ``operator`` (the same with convolution and GELU as one operator: ours on a GPU).
    """
    step = SIZES[size]
    config = MIT_CONFIGS[step.backbone]
    return [
        _mix_ffn_case(f"{size}, stage {stage}", 2 * step.batch, channels, config.mlp_ratio, -(-step.crop // stride))
        for stage, (channels, stride) in enumerate(zip(config.embed_dims, STRIDES, strict=True), 1)
    ]


def _mix_ffn_case(name: str, batch: int, channels: int, mlp_ratio: int, side: int) -> Case:
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    ffn, size = MixFFN(channels, mlp_ratio * channels).to(DEVICE, dtype), (side, side)
    tokens = torch.randn(batch, side * side, channels, device=DEVICE, dtype=dtype, requires_grad=True)

    def mix(hidden: Tensor) -> Tensor:
        return ffn.fc2(F.gelu(ffn.dwconv(hidden, size)))

    variants: dict[str, Callable[[], Tensor]] = {
        "naive": lambda: naive_mix_ffn(ffn, tokens, size),
        "channels last": lambda: mix(ffn.fc1(tokens)),
        "recomputed": lambda: checkpointed(mix, ffn.fc1(tokens)),
    }
    compiled: dict[str, Callable[[], Tensor]] = {}
    if DEVICE == "cuda":
        variants["operator"] = lambda: ffn(tokens, size)
        compiled = {f"{name}, compiled": torch.compile(variant) for name, variant in variants.items()}
    return Case(
        op="mix_ffn",
        size=f"{name}: B={batch} C={channels} {side} x {side} {dtype}",
        variants=variants | compiled,
        inputs=(tokens, *ffn.parameters()),
        comparators=tuple(compiled),
    )
