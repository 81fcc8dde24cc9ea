"""Floating-point operations and saved bytes of a training step, counted on fake tensors: nothing runs."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from bench import naive_model
from bench.harness import Record, saved_bytes, table
from bench.step_variants import NAMES, SIZES, Variant, make_variant

Shape = torch.Size

_COLUMNS = {
    "variant": ("variant", 1.0),
    "GFLOP": ("flops", 1e-9),
    "FLOP ratio": ("flops_ratio", 1.0),
    "saved MB": ("saved_bytes", 1e-6),
    "saved ratio": ("saved_ratio", 1.0),
}


def _attention(query: Shape, key: Shape, *_: object, **__: object) -> int:
    """Similarity and the product with the values: query (B, H, N, Cq), key (B or 1, H, N, L)."""
    return 2 * 2 * math.prod(query) * key[3]


def _attention_backward(grad: Shape, _: Shape, key: Shape, *__: object, **___: object) -> int:
    """The similarity again, and gradients of the map, query, key and value."""
    return 5 * 2 * math.prod(grad) * key[3]


def _grouping(features: Shape, class_map: Shape, *_: object, **__: object) -> int:
    """Cosine similarities: features (B, N, C), class_map (B, K, N)."""
    return 2 * math.prod(features) * class_map[1]


def _convolution_backward(grad: Shape, _: Shape, weight: Shape, *arguments: object, **__: object) -> int:
    """Gradients (B, C, h, w) of input and weight cost as much as the forward pass each."""
    *_rest, needed = arguments
    assert isinstance(needed, list)
    return sum(needed[:2]) * 2 * grad[0] * math.prod(grad[2:]) * math.prod(weight)


def _depthwise(tokens: Shape, *_: object, **__: object) -> int:
    """Nine products for each of the tokens' numbers (B, N, C)."""
    return 2 * 9 * math.prod(tokens)


def _depthwise_backward(grad: Shape, *_: object, **__: object) -> int:
    """The convolution again, and gradients of tokens and weights."""
    return 3 * 2 * 9 * math.prod(grad)


# What torch has no formula for: our operators, and its own attention on a CPU. Its formula for the backward pass of a
# convolution overlooks groups.
FORMULAS: dict[object, Callable[..., int]] = {
    torch.ops.allspark_fast.channel_attention: _attention,
    torch.ops.allspark_fast.channel_attention_backward: _attention_backward,
    torch.ops.allspark_fast.channel_semantic_grouping: _grouping,
    torch.ops.allspark_fast.depthwise_gelu: _depthwise,
    torch.ops.allspark_fast.depthwise_gelu_backward: _depthwise_backward,
    torch.ops.aten.convolution_backward: _convolution_backward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}


def count_flops(variant: Variant) -> int:
    """Operations of the matrix products and convolutions of pseudo-label pass, forward and backward pass."""
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        variant.losses().total.backward()
    return counter.get_total_flops()


def count_saved_bytes(variant: Variant) -> int:
    """Bytes kept for backward beyond parameters and buffers."""
    own = [*variant.model.parameters(), *variant.model.buffers()]
    return saved_bytes(lambda: variant.losses().total, beyond=own)


def measure(size: str, _: int) -> Iterator[tuple[list[Record], str]]:
    """Count the official way and ours, in single precision and under autocast; yields records and their table."""
    counts = {}
    for name in NAMES:
        with fake_variant(size, name) as variant:
            flops = count_flops(variant)
        # A GPU's rules of autocast keep more than those of a CPU.
        with fake_variant(size, name, "cuda") as variant:
            counts[name] = flops, count_saved_bytes(variant)
    naive_flops, naive_saved = counts[NAMES[0]]
    records: list[Record] = [
        {
            "op": "train_step_cost",
            "size": f"{size}: {SIZES[size]}",
            "variant": name,
            "flops": flops,
            "flops_ratio": flops / naive_flops,
            "saved_bytes": saved,
            "saved_ratio": saved / naive_saved,
        }
        for name, (flops, saved) in counts.items()
    ]
    yield records, table(records, _COLUMNS)


def _fused_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """What a GPU takes; for one that is not there torch would take the form that keeps the map."""
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, True)[0]


@contextmanager
def fake_tensors(device: str = "cpu") -> Iterator[None]:
    """New tensors have shapes but no numbers; ``cuda`` needs no GPU, but there autograd can only go forward."""
    with (
        FakeTensorMode(allow_non_fake_inputs=True),  # timm tries encoders on meta tensors
        torch.device(device),
        patch.object(F, "scaled_dot_product_attention", _fused_attention) if device == "cuda" else nullcontext(),
        # Initialisation and the official memory look at numbers; neither counts.
        patch.object(nn.init, "trunc_normal_", lambda tensor, **_: tensor),
        patch.object(naive_model, "naive_enqueue", lambda *_: None),
        # Without a GPU autocast would turn itself off.
        patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        patch.object(torch.cuda, "is_bf16_supported", lambda *_: True),
    ):
        yield


@contextmanager
def fake_variant(size: str, name: str, device: str = "cpu") -> Iterator[Variant]:
    """A variant at a size in ``SIZES`` that computes nothing, as long as the context lasts."""
    with fake_tensors(device):
        yield make_variant(name, SIZES[size].build_model(), SIZES[size].random_batch())
