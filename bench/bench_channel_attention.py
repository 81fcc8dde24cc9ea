"""Channel attention of labeled features over the Semantic Memory."""

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from allspark_fast.kernels.channel_attention import channel_attention
from allspark_fast.kernels.channel_attention.similarity_norm import similarity_rstd
from bench.harness import UNAVAILABLE, Case
from bench.naive import naive_channel_attention

# Batch, tokens, channels, heads and classes of the training steps; ViT/14 at 518 pixels on Pascal.
SIZES = {
    "pascal": (2, 289, 512, 2, 21),
    "cityscapes": (2, 676, 512, 2, 19),
    "coco": (4, 289, 512, 2, 81),
    "vit14": (2, 1369, 768, 2, 21),
    "tiny": (2, 25, 32, 2, 5),
}
DROPOUT = 0.1
_UNAVAILABLE_ON_CPU = {
    **UNAVAILABLE,
    "xformers, no dropout": "has CUDA kernels only",
    "FlexAttention, no dropout": "has no backward on a CPU",
}


def cases(size: str) -> list[Case]:
    """The labeled branch in training, float32 on the CPU and bfloat16 on a GPU."""
    batch, tokens, channels, heads, classes = SIZES[size]
    rows, columns = heads * channels, classes * heads * channels
    cuda = torch.cuda.is_available()
    make = functools.partial(torch.randn, device="cuda" if cuda else "cpu", requires_grad=True)
    dtype = torch.bfloat16 if cuda else torch.float32
    query = make(batch, 1, tokens, rows, dtype=dtype)
    key, value = (make(1, 1, tokens, columns, dtype=dtype) for _ in range(2))
    functions: dict[str, Callable[..., Tensor]] = {
        "naive": naive_channel_attention,
        "naive, compiled": torch.compile(naive_channel_attention),
        "reference": functools.partial(channel_attention, backend="reference"),
        "chunked": functools.partial(channel_attention, backend="chunked"),
        "triton": functools.partial(channel_attention, backend="triton"),
    }
    without_dropout: dict[str, Callable[..., Tensor]] = {
        "sdpa, no dropout": functools.partial(channel_attention, backend="sdpa"),
        "xformers, no dropout": functools.partial(channel_attention, backend="xformers"),
        "FlexAttention, no dropout": compiled_flex_attention,
    }
    unavailable = {} if cuda else _UNAVAILABLE_ON_CPU
    comparators = [name for name in ("naive, compiled", *without_dropout) if name not in unavailable]

    def variants(dropout_p: float) -> Mapping[str, Callable[[], Tensor]]:
        tensors = (query, key, value)
        with_dropout = {name: functools.partial(run, *tensors, dropout_p=dropout_p) for name, run in functions.items()}
        return with_dropout | {name: functools.partial(run, *tensors) for name, run in without_dropout.items()}

    return [
        Case(
            op="channel_attention",
            size=f"{size}: B={batch} N={tokens} D={rows} L={columns} dropout={DROPOUT} {dtype}",
            variants=variants(DROPOUT),
            parity=variants(0.0),
            inputs=(query, key, value),
            comparators=comparators,
            unavailable=unavailable,
        )
    ]


def compiled_flex_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """FlexAttention with rstd in the query: what is left is plain softmax attention with a head dim of N."""
    rstd, _ = similarity_rstd(query.float(), key, None, eps=1e-5)
    batch = query.shape[0]
    sequences = ((query * rstd).to(key.dtype), key.expand(batch, -1, -1, -1), value.expand(batch, -1, -1, -1))
    output = _flex_attention()(*(x.mT.contiguous() for x in sequences), scale=1.0)
    return output.mT


@functools.cache
def _flex_attention() -> Callable[..., Tensor]:
    return torch.compile(flex_attention)
