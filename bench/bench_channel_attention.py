"""Channel attention of labeled features over the Semantic Memory."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from allspark_fast.kernels.channel_attention import channel_attention
from bench.harness import Case
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
        "reference": functools.partial(channel_attention, backend="reference"),
        "chunked": functools.partial(channel_attention, backend="chunked"),
    }

    def variants(dropout_p: float) -> dict[str, Callable[[], Tensor]]:
        return {
            name: functools.partial(function, query, key, value, dropout_p=dropout_p)
            for name, function in functions.items()
        }

    product = 2.0 * batch * rows * tokens * columns
    return [
        Case(
            op="channel_attention",
            size=f"{size}: B={batch} N={tokens} D={rows} L={columns} dropout={DROPOUT} {dtype}",
            variants=variants(DROPOUT),
            parity=variants(0.0),
            inputs=(query, key, value),
            flops=(2 * product, 5 * product),
            tolerance=3e-2 if cuda else 1e-4,
        )
    ]
