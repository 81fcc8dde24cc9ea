"""The training step of the reference implementation against ours: time, memory, and FLOPs by count.

Sizes are those of the recipes, images random. FLOPs and the bytes saved on a GPU are counted on fake tensors: nothing
runs.
"""

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from allspark_fast.config import TrainConfig
from allspark_fast.data.loader import SemiBatch
from allspark_fast.model import Segmentor, build_segmentor
from allspark_fast.model.mit import compile_blocks
from allspark_fast.training.cuda_graph import GraphedSteps
from allspark_fast.training.step import Losses, TrainState, compute_losses, train_step
from bench import naive
from bench.flops import flop_counter
from bench.harness import DEVICE, Record, check_parity, peak_bytes, saved_bytes, time_figures, timed

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
    "pascal": StepSize("mit_b5", 2, 21, 513),
    "cityscapes": StepSize("mit_b5", 2, 19, 801),
    "coco": StepSize("mit_b5", 4, 81, 513),
    "pascal_b0": StepSize("mit_b0", 2, 21, 257),
    "tiny": StepSize("mit_tiny", 2, 5, 65, embedding_dim=32),
}


class Variant(NamedTuple):
    """One way to compute the training step: the losses of a model without an update, and all of it."""

    model: Segmentor
    losses: Callable[[], Losses]
    step: Callable[[], Losses]


def make_variant(name: str, model: Segmentor, batch: SemiBatch, *, backend: str = "inductor") -> Variant:
    """Build a variant with memory on, which takes the model over; ``name`` may end with " compiled" and " graph"."""
    kind, *options = name.split()
    config = TrainConfig(amp="bfloat16" in options)
    compute: Callable[..., Losses] = compute_losses
    step: Callable[..., Losses] = train_step
    if kind == "naive":
        compute, step = naive.naive_losses, naive.naive_train_step
        naive.make_naive(model)
        if "compiled" in options:
            model.compile(backend=backend)
    elif "compiled" in options:
        compile_blocks(model, backend)
    state = TrainState(model, config, total_steps=10**6)
    take_step: Callable[..., Losses] = GraphedSteps(state) if "graph" in options else functools.partial(step, state)

    def losses() -> Losses:
        with torch.autocast(batch.image.device.type, torch.bfloat16, enabled=config.amp):
            return compute(model, batch, config, use_memory=True)

    return Variant(model, losses, functools.partial(take_step, batch, use_memory=True))


def without_dropout(model: Segmentor) -> Segmentor:
    """Turn off, in place, all that is random in training; returns the model."""
    for module in model.modules():
        for name in ("drop_path", "dropout", "p"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


@functools.cache
def step_flops(size: str, kind: str) -> int:
    """Count the FLOPs of the losses of ``naive`` or ``ours``, forward and backward; nothing is computed."""
    with fake_variant(size, kind) as variant, flop_counter() as counter:
        variant.losses().total.backward()
    return counter.get_total_flops()


def count_saved_bytes(variant: Variant) -> int:
    """Count the bytes saved for backward beyond parameters and buffers."""
    own = [*variant.model.parameters(), *variant.model.buffers()]
    return saved_bytes(lambda: variant.losses().total, beyond=own)


@contextmanager
def fake_variant(size: str, name: str, device: str = "cpu") -> Iterator[Variant]:
    """Yield a variant that computes nothing; on ``cuda``, which needs no GPU, it allows no backward pass."""

    def fused_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, True)[0]

    with (
        FakeTensorMode(),
        torch.device(device),
        # Without a GPU torch would choose the attention that materializes its map, and turn autocast off.
        patch.object(F, "scaled_dot_product_attention", fused_attention) if device == "cuda" else nullcontext(),
        patch.object(torch.cuda.amp.common, "amp_definitely_not_available", return_value=False),
        patch.object(torch.cuda, "is_bf16_supported", return_value=True),
        # These look at numbers, and neither counts.
        patch.object(nn.init, "trunc_normal_"),
        patch.object(naive, "naive_enqueue"),
    ):
        yield make_variant(name, SIZES[size].build_model(), SIZES[size].random_batch())


def measure(size: str, repeats: int) -> Iterator[list[Record]]:
    """Check that the variants compute the same loss, then time their steps in turn."""
    names, warmup_steps = (_ON_GPU, 5) if DEVICE == "cuda" else (("naive", "ours"), 1)
    model, batch = SIZES[size].build_model().to(DEVICE), SIZES[size].random_batch().to(DEVICE)
    # Compiling takes minutes and changes no mathematics.
    plain = {name: make_variant(name, without_dropout(copy.deepcopy(model)), batch) for name in names if name in NAMES}
    check_losses(plain)
    variants = {name: make_variant(name, copy.deepcopy(model), batch) for name in names}
    for variant in variants.values():  # kernels are compiled and steps recorded
        for _ in range(warmup_steps):
            variant.step()
    rounds = [{name: timed(variant.step)[1] for name, variant in variants.items()} for _ in range(repeats)]
    records = []
    for name, variant in variants.items():
        record: Record = {"op": "train_step", "size": f"{size}: {SIZES[size]}", "variant": name}
        dtype = torch.bfloat16 if "bfloat16" in name else torch.float32
        record |= time_figures(rounds, name, "naive", step_flops(size, name.partition(" ")[0]), dtype)
        record["images_per_s"] = 2 * SIZES[size].batch / record["seconds_p50"]
        record["saved_bytes"] = count_saved_bytes(variant)
        # A graph's memory is taken once, when it is recorded.
        record["peak_bytes"] = None if name.endswith(" graph") else peak_bytes(variant.step)
        records.append(record)
    yield records


@torch.no_grad()
def check_losses(variants: Mapping[str, Variant]) -> None:
    """Raise an AssertionError if the loss of a variant differs from that of the first."""
    tolerance = 3e-2 if DEVICE == "cuda" else 1e-4
    check_parity({name: {"loss": variant.losses().total} for name, variant in variants.items()}, tolerance)


def count(size: str, _: int) -> Iterator[list[Record]]:
    """Count FLOPs and saved bytes of the variants, in single precision and under autocast."""
    records: list[Record] = []
    for name in NAMES:
        with fake_variant(size, name, "cuda") as variant:  # autocast saves more on a GPU than on a CPU
            saved = count_saved_bytes(variant)
        record: Record = {"op": "train_step_cost", "size": f"{size}: {SIZES[size]}", "variant": name}
        records.append(record | {"flops": step_flops(size, name.partition(" ")[0]), "saved_bytes": saved})
    for record in records:
        record |= {f"{key}_ratio": record[key] / records[0][key] for key in ("flops", "saved_bytes")}
    yield records
