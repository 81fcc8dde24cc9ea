"""The training step of the reference implementation against ours: time, memory, and FLOPs by count.

Sizes are those of the recipes, images random. FLOPs and the bytes saved on a GPU are counted on fake tensors: nothing
runs.
"""

import copy
import functools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping
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
from bench.harness import Record, device_rates, peak_bytes, percentile, saved_bytes, seconds_between, stamp, table

_COLUMNS = {
    "variant": ("variant", 1.0),
    "s p20": ("seconds_p20", 1.0),
    "p50": ("seconds_p50", 1.0),
    "p80": ("seconds_p80", 1.0),
    "ratio": ("ratio", 1.0),
    "images/s": ("images_per_s", 1.0),
    "GFLOP": ("flops", 1e-9),
    "GFLOP/s": ("flops_per_s", 1e-9),
    "% of GEMM": ("gemm_fraction", 100.0),
    "saved MB": ("saved_bytes", 1e-6),
    "peak MB": ("peak_bytes", 1e-6),
}
_COUNT_COLUMNS = {
    "variant": ("variant", 1.0),
    "GFLOP": ("flops", 1e-9),
    "FLOP ratio": ("flops_ratio", 1.0),
    "saved MB": ("saved_bytes", 1e-6),
    "saved ratio": ("saved_ratio", 1.0),
}
# Those with bfloat16 run under autocast.
NAMES = ("naive", "naive bfloat16", "ours", "ours bfloat16")
_ON_GPU = (
    "naive",
    "naive bfloat16",
    "naive bfloat16 compiled",
    "ours bfloat16",
    "ours bfloat16 compiled",
    "ours bfloat16 graph",
    "ours bfloat16 compiled graph",
)
_WARMUP_STEPS = 5
_TOLERANCE = {"cpu": 1e-4, "cuda": 3e-2}


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
    torch.ops.allspark_fast.channel_attention: lambda query, key, *_, **__: 2 * 2 * math.prod(query) * key[3],
    torch.ops.allspark_fast.channel_attention_backward: lambda grad, _, key, *__, **___: (
        5 * 2 * math.prod(grad) * key[3]
    ),
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


def measure(size: str, repeats: int) -> Iterator[tuple[list[Record], str]]:
    """Check that the variants agree, then time their steps in turn.

    Args:
        size: a name in ``SIZES``.
        repeats: rounds; the medians are over these.

    Yields:
        a record for each variant, and their table.

    Raises:
        AssertionError: a variant computes another loss.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = _ON_GPU if device == "cuda" else ("naive", "ours")
    model, batch = SIZES[size].build_model().to(device), SIZES[size].random_batch().to(device)
    # Compiling takes minutes and changes no mathematics.
    plain = {name: make_variant(name, without_dropout(copy.deepcopy(model)), batch) for name in names if name in NAMES}
    check_parity(plain, _TOLERANCE[device])
    variants = {name: make_variant(name, copy.deepcopy(model), batch) for name in names}
    for variant in variants.values():  # kernels are compiled and steps recorded
        for _ in range(_WARMUP_STEPS if device == "cuda" else 1):
            variant.step()
    rounds = [{name: _time(variant) for name, variant in variants.items()} for _ in range(repeats)]
    baseline = statistics.median(seconds["naive"] for seconds in rounds)
    records = [_record(size, name, variants[name], [seconds[name] for seconds in rounds], baseline) for name in names]
    yield records, table(records, _COLUMNS)


def check_parity(variants: Mapping[str, Variant], tolerance: float) -> None:
    """Compare the losses with those of the first variant, relative to these.

    Raises:
        AssertionError: they differ by more than the tolerance.
    """
    with torch.no_grad():
        losses = {name: variant.losses().total.item() for name, variant in variants.items()}
    baseline, expected = next(iter(losses.items()))
    for name, loss in losses.items():
        assert abs(loss / expected - 1) <= tolerance, f"{name} has the loss {loss}, {baseline} has {expected}"


def _time(variant: Variant) -> float:
    start = stamp()
    variant.step()
    return seconds_between(start, stamp())


def _record(size: str, name: str, variant: Variant, seconds: list[float], baseline: float) -> Record:
    median, flops = statistics.median(seconds), count_flops(size, name.partition(" ")[0])
    gemm = device_rates(torch.bfloat16 if "bfloat16" in name else torch.float32).flops
    return {
        "op": "train_step",
        "size": f"{size}: {SIZES[size]}",
        "variant": name,
        **{f"seconds_p{percent}": percentile(seconds, percent) for percent in (20, 50, 80)},
        "ratio": median / baseline,
        "images_per_s": 2 * SIZES[size].batch / median,
        "flops": flops,
        "flops_per_s": flops / median,
        "gemm_fraction": flops / median / gemm,
        "saved_bytes": count_saved_bytes(variant),
        # A graph's memory is taken once, when it is recorded.
        "peak_bytes": None if name.endswith(" graph") else peak_bytes(variant.step),
    }


def measure_counts(size: str, _: int) -> Iterator[tuple[list[Record], str]]:
    """Count FLOPs and saved bytes of the variants, in single precision and under autocast; yields as ``measure``."""
    saved = {}
    for name in NAMES:
        with fake_variant(size, name, "cuda") as variant:  # autocast saves more on a GPU than on a CPU
            saved[name] = count_saved_bytes(variant)
    flops = {name: count_flops(size, name.partition(" ")[0]) for name in NAMES}
    records: list[Record] = [
        {
            "op": "train_step_cost",
            "size": f"{size}: {SIZES[size]}",
            "variant": name,
            "flops": flops[name],
            "flops_ratio": flops[name] / flops["naive"],
            "saved_bytes": saved[name],
            "saved_ratio": saved[name] / saved["naive"],
        }
        for name in NAMES
    ]
    yield records, table(records, _COUNT_COLUMNS)
