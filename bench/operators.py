"""Each operator against what the reference implementation does, and channel attention against libraries too."""

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

from allspark_fast.kernels.channel_attention import channel_attention
from allspark_fast.kernels.semantic_memory import channel_semantic_grouping, semantic_memory_enqueue
from allspark_fast.kernels.upsample_argmax import upsample_argmax
from allspark_fast.kernels.upsample_cross_entropy import upsample_cross_entropy
from allspark_fast.model.common import checkpointed, to_map, to_tokens
from allspark_fast.model.mit import MIT_CONFIGS, STRIDES, MixFFN
from bench.bench_train_step import SIZES
from bench.harness import DEVICE, DTYPE, Case, with_compiled
from bench.naive import naive_channel_attention, naive_enqueue, naive_grouping, naive_mix_ffn, upsample

Function = Callable[..., Tensor]

# Batch, tokens, channels and classes: for tables of a GPU, beside those of the training steps.
ATTENTION_GRID = {
    f"n{tokens}_k{classes}_b{batch}": (batch, tokens, 768 if tokens == 1369 else 512, classes)
    for batch in (2, 8)
    for classes in (21, 81)
    for tokens in (289, 676, 1369)
}
_DROPOUT = 0.1


def attention_size(size: str) -> tuple[int, int, int, int]:
    """Return batch, tokens, channels and classes of a size."""
    if size in ATTENTION_GRID:
        return ATTENTION_GRID[size]
    backbone, batch, classes, crop, _ = SIZES[size]
    return batch, (-(-crop // STRIDES[-1])) ** 2, MIT_CONFIGS[backbone].embed_dims[-1], classes


def attention_inputs(size: str, dtype: torch.dtype) -> list[Tensor]:
    """Return query, and keys and values from the memory, of two heads."""
    batch, tokens, channels, classes = attention_size(size)
    columns = classes * 2 * channels
    shapes = [(batch, 1, tokens, 2 * channels), (1, 1, tokens, columns), (1, 1, tokens, columns)]
    return [torch.randn(shape, device=DEVICE, dtype=dtype, requires_grad=True) for shape in shapes]


def attention_cases(size: str) -> list[Case]:
    """Return the labeled branch in training, the libraries without dropout."""
    inputs = attention_inputs(size, DTYPE)
    (batch, _, tokens, rows), columns = inputs[0].shape, inputs[1].shape[3]
    functions = with_compiled({"naive": naive_channel_attention})
    functions["chunked"] = functools.partial(channel_attention, backend="chunked")
    libraries: dict[str, Function] = {"sdpa": F.scaled_dot_product_attention}
    if DEVICE == "cuda":  # on a CPU xformers has no kernels, and FlexAttention no backward pass
        functions["triton"] = functools.partial(channel_attention, backend="triton")
        libraries |= {"xformers": _xformers, "FlexAttention": torch.compile(flex_attention)}
    without_dropout = {
        f"{name}, no dropout": functools.partial(library_attention, functools.partial(attend, scale=1.0), *inputs)
        for name, attend in libraries.items()
    }

    def variants(dropout_p: float) -> Mapping[str, Function]:
        ours = {name: functools.partial(run, *inputs, dropout_p=dropout_p) for name, run in functions.items()}
        return ours | without_dropout

    return [
        Case(
            op="channel_attention",
            size=f"{size}: B={batch} N={tokens} D={rows} L={columns} dropout={_DROPOUT} {DTYPE}",
            variants=variants(_DROPOUT),
            parity=variants(0.0),
            inputs=inputs,
            comparators=["naive, compiled", *without_dropout],
        )
    ]


def library_attention(attend: Function, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute channel attention, shapes as the operator's, by a softmax attention of (B, H, channels, tokens)."""
    tokens = query.shape[2]
    centered = key - key.mean(-1, keepdim=True)
    scaled = (query * _rstd(query.float(), key.float())).to(key.dtype)
    padding = (0, -tokens % 8)  # the libraries read 16 bytes at a time
    sequences = [F.pad(x.mT, padding).contiguous().expand(len(query), -1, -1, -1) for x in (scaled, centered, value)]
    return attend(*sequences)[..., :tokens].mT


def _rstd(query: Tensor, key: Tensor) -> Tensor:
    """The norm's factor (B, H, 1, 1) of maps queryᵀ key, without the maps: docs/kernels.md has the formula."""
    mean = key.mean(-1, keepdim=True)
    covariance = (key - mean) @ (key - mean).mT / key.shape[-1]
    moment = query @ query.mT / query.shape[-1]
    shift = (query * mean).sum(2, keepdim=True)
    variance = (moment * covariance).sum((-2, -1), keepdim=True) + shift.var(-1, correction=0, keepdim=True)
    return (variance + 1e-5).rsqrt()


def _xformers(*sequences: Tensor, scale: float) -> Tensor:
    from xformers.ops import memory_efficient_attention  # noqa: PLC0415 an optional package

    # xformers puts the sequence before the heads.
    return memory_efficient_attention(*(x.transpose(1, 2) for x in sequences), scale=scale).transpose(1, 2)


def upsample_cases(size: str) -> list[Case]:
    """Return upsampling with cross-entropy, and with argmax, of logits at a quarter of the crop."""
    _, batch, classes, crop, _ = SIZES[size]
    side, target_size = -(-crop // 4), (crop, crop)
    # Classes last in memory, as our head returns them.
    logits = torch.randn(batch, side, side, classes, device=DEVICE).permute(0, 3, 1, 2).requires_grad_()
    target = torch.randint(classes, (batch, crop, crop), device=DEVICE)
    losses = with_compiled({"naive": lambda: F.cross_entropy(upsample(logits, target_size), target)})
    losses["ours"] = lambda: upsample_cross_entropy(logits, target)
    labels = with_compiled({"naive": lambda: upsample(logits.detach(), target_size).softmax(1).max(1).values})
    labels["ours"] = lambda: upsample_argmax(logits, target_size)[1]
    name = f"{size}: B={batch} K={classes} {side} -> {crop} pixels"
    return [Case("upsample_cross_entropy", name, losses, inputs=(logits,)), Case("upsample_argmax", name, labels)]


def memory_cases(size: str) -> list[Case]:
    """Return grouping of a batch of unlabeled channels, and their enqueue into a copy of the memory."""
    batch, tokens, channels, classes = attention_size(size)
    features = torch.randn(batch, tokens, channels, device=DEVICE)
    class_map = torch.randn(batch, classes, tokens, device=DEVICE)
    channel_class = channel_semantic_grouping(features, class_map)
    stored = torch.zeros(tokens, classes, channels, device=DEVICE)
    pointer = torch.zeros(classes, dtype=torch.int64, device=DEVICE)

    def enqueue(function: Callable[..., None], queue: Tensor) -> Tensor:
        function(queue, pointer.clone(), features, channel_class)
        return queue

    name = f"{size}: B={batch} N={tokens} C={channels} K={classes}"
    groupings = with_compiled({"naive": lambda: naive_grouping(features, class_map).float()})
    groupings["ours"] = lambda: channel_semantic_grouping(features, class_map).float()
    enqueues: dict[str, Function] = {
        "naive": lambda: enqueue(naive_enqueue, stored.permute(1, 2, 0).contiguous()),
        "ours": lambda: enqueue(semantic_memory_enqueue, stored.clone().permute(1, 2, 0)),
    }
    return [Case("channel_semantic_grouping", name, groupings), Case("semantic_memory_enqueue", name, enqueues)]


def ffn_cases(size: str) -> list[Case]:
    """Return the Mix-FFN of each stage of the encoder, on all images of a training step.

    ``naive`` copies tokens to a contiguous map and back. ``torch`` convolves them as they are, and again in backward;
    ours does the same, on a GPU by one operator for convolution and GELU.
    """
    stages = zip(MIT_CONFIGS[SIZES[size].backbone].embed_dims, STRIDES, strict=True)
    return [_ffn_case(size, channels, -(-SIZES[size].crop // stride)) for channels, stride in stages]


def _ffn_case(name: str, channels: int, side: int) -> Case:
    ffn, size, batch = MixFFN(channels, 4 * channels).to(DEVICE, DTYPE), (side, side), 2 * SIZES[name].batch
    tokens = torch.randn(batch, side * side, channels, device=DEVICE, dtype=DTYPE, requires_grad=True)

    def mix(hidden: Tensor) -> Tensor:
        return ffn.fc2(F.gelu(to_tokens(ffn.dwconv.dwconv(to_map(hidden, size)))))

    variants = with_compiled({"naive": lambda: naive_mix_ffn(ffn, tokens, size)})
    variants |= {"torch": lambda: checkpointed(mix, ffn.fc1(tokens)), "ours": lambda: ffn(tokens, size)}
    numbers = f"{name}: B={batch} C={channels} {side} x {side} {DTYPE}"
    return Case("mix_ffn", numbers, variants, inputs=(tokens, *ffn.parameters()))
