"""The training step of the reference implementation and ours, at the sizes of the recipes, on random images.

Their FLOPs and saved bytes are counted on fake tensors: nothing runs.
"""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from allspark_fast.config import TrainConfig
from allspark_fast.data.loader import SemiBatch
from allspark_fast.model import Segmentor, build_segmentor
from allspark_fast.model.cross_attention import CrossAttention
from allspark_fast.model.mit import Block, compile_blocks
from allspark_fast.training.cuda_graph import GraphedSteps
from allspark_fast.training.step import Losses, TrainState, compute_losses, train_step
from bench import bench_upsample, naive
from bench.harness import saved_bytes

# Those with bfloat16 run under autocast.
NAMES = ("naive", "naive bfloat16", "ours", "ours bfloat16")


class StepSize(NamedTuple):
    """Sizes of a training step; ``batch`` labeled and as many unlabeled images."""

    backbone: str
    batch: int
    classes: int
    crop: int
    embedding_dim: int = 768

    def __str__(self) -> str:
        return f"{self.backbone} E={self.embedding_dim} B={self.batch}+{self.batch} K={self.classes} {self.crop} pixels"

    def build_model(self) -> Segmentor:
        """Return a model with random weights and a full memory of noise."""
        crop = (self.crop, self.crop)
        return build_segmentor(self.backbone, self.classes, crop, embedding_dim=self.embedding_dim).train()

    def random_batch(self) -> SemiBatch:
        """Return images of noise; a tenth of the labels are to be ignored."""
        shape = (self.batch, self.crop, self.crop)
        image, unlabeled_image = (torch.randn(self.batch, 3, self.crop, self.crop) for _ in range(2))
        label = torch.randint(self.classes, shape).masked_fill(torch.rand(shape) < 0.1, 255)
        return SemiBatch(image, label, unlabeled_image, torch.ones(shape, dtype=torch.bool), None)


SIZES = {
    "pascal": StepSize("mit_b5", *bench_upsample.SIZES["pascal"]),
    "cityscapes": StepSize("mit_b5", *bench_upsample.SIZES["cityscapes"]),
    "coco": StepSize("mit_b5", *bench_upsample.SIZES["coco"]),
    "pascal_b0": StepSize("mit_b0", 2, 21, 257),
    "tiny": StepSize("mit_tiny", 2, 5, 65, embedding_dim=32),
}


@dataclass(frozen=True)
class Variant:
    """One way to compute the training step.

    Attributes:
        model: whose step it is.
        optimizer: of its parameters.
        losses: pseudo-label pass, forward pass and losses.
        step: all of it.
    """

    model: Segmentor
    optimizer: torch.optim.Optimizer
    losses: Callable[[], Losses]
    step: Callable[[], Losses]


def make_variant(name: str, model: Segmentor, batch: SemiBatch, *, backend: str = "inductor") -> Variant:
    """Build a variant with memory on, which takes the model over.

    Args:
        name: one of ``NAMES``, perhaps with " compiled" and " graph" appended.
        model: in training mode.
        batch: of every step.
        backend: of ``torch.compile``.
    """
    kind, *options = name.split()
    config = TrainConfig(amp="bfloat16" in options)
    if kind == "naive":
        naive.make_naive(model)
        if "compiled" in options:
            model.compile(backend=backend)
    elif "compiled" in options:
        compile_blocks(model, backend)
    state = TrainState(model, config, total_steps=10**6)

    def losses() -> Losses:
        with torch.autocast(batch.image.device.type, torch.bfloat16, enabled=config.amp):
            if kind == "naive":
                return naive.naive_losses(model, batch, use_memory=True)
            return compute_losses(model, batch, config, use_memory=True)

    take_step: Callable[..., Losses]
    if kind == "naive":
        take_step = functools.partial(naive.naive_train_step, model, state.optimizer, config=config, lr=config.lr)
    else:
        take_step = GraphedSteps(state) if "graph" in options else functools.partial(train_step, state)
    return Variant(model, state.optimizer, losses, lambda: take_step(batch, use_memory=True))


def without_dropout(model: Segmentor) -> Segmentor:
    """Turn off, in place, all that is random in training; returns the model."""
    for module in model.modules():
        if isinstance(module, Block):
            module.drop_path = 0.0
        elif isinstance(module, CrossAttention):
            module.dropout = 0.0
        elif isinstance(module, nn.Dropout2d):
            module.p = 0.0
    return model


# What torch's counter lacks: our operators, and its own attention on a CPU. Its formula of the gradients of
# a convolution overlooks groups.
FLOP_FORMULAS: dict[object, Callable[..., int]] = {
    # Similarity and the product with the values: query (B, H, N, Cq), key (B or 1, H, N, L); backward the similarity
    # again, and gradients of the map, query, key and value.
    torch.ops.allspark_fast.softmax_attention: lambda query, key, *_, **__: 2 * 2 * math.prod(query) * key[3],
    torch.ops.allspark_fast.softmax_attention_backward: lambda grad, _, key, *__, **___: (
        5 * 2 * math.prod(grad) * key[3]
    ),
    # Products of all pairs of tokens: x (B, H, N, C).
    torch.ops.allspark_fast.covariance: lambda x, *_, **__: 2 * math.prod(x) * x[2],
    # Cosine similarities of features (B, N, C) and class_map (B, K, N).
    torch.ops.allspark_fast.channel_semantic_grouping: lambda x, classes, *_, **__: 2 * math.prod(x) * classes[1],
    # Nine products for each number of tokens (B, N, C); backward the same again, and gradients of tokens and weights.
    torch.ops.allspark_fast.depthwise_gelu: lambda tokens, *_, **__: 2 * 9 * math.prod(tokens),
    torch.ops.allspark_fast.depthwise_gelu_backward: lambda grad, *_, **__: 3 * 2 * 9 * math.prod(grad),
    # Gradients (B, C, h, w) of input and weight cost as much as the forward pass each.
    torch.ops.aten.convolution_backward: lambda grad, _, weight, *rest, **__: (
        sum(rest[-1][:2]) * 2 * grad[0] * math.prod(grad[2:]) * math.prod(weight)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}


@functools.cache
def count_flops(size: str, kind: str) -> int:
    """Count the products and convolutions of pseudo-label pass, forward and backward pass; nothing is computed.

    Args:
        size: a name in ``SIZES``.
        kind: ``naive`` or ``ours``.
    """
    with fake_variant(size, kind) as variant, FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as counter:
        variant.losses().total.backward()
    return counter.get_total_flops()


def count_saved_bytes(variant: Variant) -> int:
    """Count the bytes saved for backward beyond parameters and buffers."""
    own = [*variant.model.parameters(), *variant.model.buffers()]
    return saved_bytes(lambda: variant.losses().total, beyond=own)


@contextmanager
def fake_variant(size: str, name: str, device: str = "cpu") -> Iterator[Variant]:
    """Yield a variant that computes nothing, as long as the context lasts.

    Args:
        size: a name in ``SIZES``.
        name: see ``make_variant``.
        device: ``cpu``, or ``cuda``, which needs no GPU but then allows no backward pass.
    """

    def fused_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, True)[0]

    with (
        FakeTensorMode(),
        torch.device(device),
        # Without a GPU torch would choose the attention that materializes its map, and turn autocast off.
        patch.object(F, "scaled_dot_product_attention", fused_attention) if device == "cuda" else nullcontext(),
        patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        patch.object(torch.cuda, "is_bf16_supported", lambda *_: True),
        # These look at numbers, and neither counts.
        patch.object(nn.init, "trunc_normal_", lambda tensor, **_: tensor),
        patch.object(naive, "naive_enqueue", lambda *_: None),
    ):
        yield make_variant(name, SIZES[size].build_model(), SIZES[size].random_batch())
