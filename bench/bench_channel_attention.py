"""Channel attention of labeled features over the Semantic Memory."""

import functools
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention

from allspark_fast.kernels.channel_attention import channel_attention
from bench.harness import UNAVAILABLE, Case
from bench.naive import naive_channel_attention

# Batch, tokens, channels, heads and classes: by tokens, classes and batch, for tables of a GPU.
GRID = {
    f"n{tokens}_k{classes}_b{batch}": (batch, tokens, 768 if tokens == 1369 else 512, 2, classes)
    for tokens in (289, 676, 1369)
    for classes in (21, 81)
    for batch in (2, 8)
}
# Those of the training steps; ViT/14 at 518 pixels on Pascal.
SIZES = {
    "pascal": (2, 289, 512, 2, 21),
    "cityscapes": (2, 676, 512, 2, 19),
    "coco": (4, 289, 512, 2, 81),
    "vit14": (2, 1369, 768, 2, 21),
    "tiny": (2, 25, 32, 2, 5),
    **GRID,
}
DROPOUT = 0.1
# The libraries' kernels read 16 bytes at a time: head dims must be multiples of 8 half-precision numbers.
_ALIGNMENT = 8
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
        # The best that inductor finds; the harness warms every variant up.
        "naive, compiled": torch.compile(naive_channel_attention, mode="max-autotune-no-cudagraphs"),
        "reference": functools.partial(channel_attention, backend="reference"),
        "chunked": functools.partial(channel_attention, backend="chunked"),
        "triton": functools.partial(channel_attention, backend="triton"),
    }
    without_dropout: dict[str, Callable[..., Tensor]] = {
        "sdpa, no dropout": functools.partial(library_attention, _sdpa),
        "xformers, no dropout": functools.partial(library_attention, _xformers),
        "FlexAttention, no dropout": functools.partial(library_attention, lambda *x: _flex_attention()(*x, scale=1.0)),
    }
    unavailable = {} if cuda else _UNAVAILABLE_ON_CPU
    comparators = [name for name in ("naive, compiled", *without_dropout) if name not in unavailable]

    def variants(dropout_p: float) -> Mapping[str, Callable[[], Tensor]]:
        tensors = (query, key, value)
        with_dropout = {name: functools.partial(run, *tensors, dropout_p=dropout_p) for name, run in functions.items()}
        return with_dropout | {name: functools.partial(run, *tensors) for name, run in without_dropout.items()}

    product = 2.0 * batch * rows * tokens * columns
    bytes_once = sum(x.numel() * x.element_size() for x in (query, query, key, value))  # the output is like the query
    return [
        Case(
            op="channel_attention",
            size=f"{size}: B={batch} N={tokens} D={rows} L={columns} dropout={DROPOUT} {dtype}",
            variants=variants(DROPOUT),
            parity=variants(0.0),
            inputs=(query, key, value),
            comparators=comparators,
            unavailable=unavailable,
            flops=(2 * product, 5 * product),
            moved=3.0 * bytes_once,  # backward reads them, and writes as many gradients
            dtype=dtype,
            tolerance=3e-2 if cuda else 1e-4,
        )
    ]


def library_attention(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """Compute channel attention by a library's softmax attention, with the norm's factor in the query.

    Args:
        attend: softmax attention without a scale of (B, H, channels, head dim); tokens are the head dim.
        query: (B, H, N, Cq).
        key: (B or 1, H, N, L).
        value: (B or 1, H, N, L).

    Returns:
        (B, H, N, Cq).
    """
    tokens = query.shape[2]
    centered = key - key.mean(-1, keepdim=True)
    scaled = (query * _rstd(query.float(), key.float())).to(key.dtype)
    padding = (0, math.ceil(tokens / _ALIGNMENT) * _ALIGNMENT - tokens)
    sequences = [pad(x.mT, padding).contiguous().expand(len(query), -1, -1, -1) for x in (scaled, centered, value)]
    return attend(*sequences)[..., :tokens].mT


def _rstd(query: Tensor, key: Tensor) -> Tensor:
    """The norm's factor (B, H, 1, 1) of maps queryᵀ key, without the maps: docs/kernels.md has the formula."""
    mean = key.mean(-1, keepdim=True)
    covariance = (key - mean) @ (key - mean).mT / key.shape[-1]
    moment = query @ query.mT / query.shape[-1]
    shift = (query * mean).sum(2, keepdim=True)
    variance = (moment * covariance).sum((-2, -1), keepdim=True) + shift.var(-1, correction=0, keepdim=True)
    return (variance + 1e-5).rsqrt()


def _sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    kernel = SDPBackend.EFFICIENT_ATTENTION if query.is_cuda else SDPBackend.FLASH_ATTENTION
    with sdpa_kernel(kernel):
        return scaled_dot_product_attention(query, key, value, scale=1.0)


def _xformers(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention  # noqa: PLC0415 an optional package

    # xformers puts the sequence before the heads.
    output = memory_efficient_attention(*(x.transpose(1, 2) for x in (query, key, value)), scale=1.0)
    return output.transpose(1, 2)


@functools.cache
def _flex_attention() -> Callable[..., Tensor]:
    return torch.compile(flex_attention)
