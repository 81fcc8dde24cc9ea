"""The training step of the reference implementation against ours, on random images: time, memory, FLOPs by count."""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from allspark_fast.config import Method, TrainConfig
from allspark_fast.data.loader import SemiBatch
from allspark_fast.model import Segmentor, build_segmentor
from allspark_fast.model.mit import compile_blocks
from allspark_fast.model.options import AllSparkOptions
from allspark_fast.recipes import folder
from allspark_fast.training.cuda_graph import GraphedSteps, capture
from allspark_fast.training.step import Losses, TrainState, compute_losses, train_step
from bench import naive
from bench.harness import DEVICE, DTYPE, Case, Record, flop_counter, run, saved_bytes


class StepSize(NamedTuple):
    """Sizes of a training step; ``batch`` labeled and as many unlabeled images."""

    backbone: str
    batch: int
    classes: int
    crop: int
    embedding_dim: int = 768

    def __str__(self) -> str:
        return f"{self.backbone} E={self.embedding_dim} B={self.batch}+{self.batch} K={self.classes} {self.crop} pixels"

    def build_model(self, method: Method = "allspark") -> Segmentor:
        """Return a model with random weights; that of allspark has a full memory of noise."""
        allspark, crop = AllSparkOptions() if method == "allspark" else None, (self.crop, self.crop)
        return build_segmentor(self.backbone, self.classes, crop, allspark=allspark, embedding_dim=self.embedding_dim)

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
    """One way to compute the training step: what it keeps anyway, the loss without an update, and all of it."""

    own: list[Tensor]
    loss: Callable[[], Tensor]
    step: Callable[[], Tensor]


def make_variant(name: str, model: Segmentor, batch: SemiBatch, *, backend: str = "inductor") -> Variant:
    """Build a variant with memory on, which takes the model over.

    ``name`` is ``naive`` or ``ours``; then may follow ``bfloat16``, autocast on a GPU; ``compiled``, the blocks of the
    encoder; and for ours ``recorded``, as a CUDA graph, and ``beyond``, what the recipe ``folder`` adds to the paper.
    """
    kind, *options = name.split()
    amp = "bfloat16" in options and batch.image.is_cuda
    config = TrainConfig(amp=amp and kind == "ours")  # it makes copies of the weights, which the reference does not
    if "beyond" in options:
        config = replace(folder().train, optimizer="sgd", amp=amp)
        batch = batch._replace(unlabeled_strong=batch.unlabeled_image, mixed=batch.label == 0, pasted=batch.label == 1)
    ema = copy.deepcopy(model).requires_grad_(False) if config.ema else None
    state = TrainState(naive.make_naive(model) if kind == "naive" else model, config, total_steps=10**6, ema=ema)
    step: Callable[..., Losses] = functools.partial(train_step, state)
    if kind == "naive":
        step = functools.partial(naive.naive_train_step, state, amp=amp)
    elif "recorded" in options:
        step = recorded_steps(state)
    if "compiled" in options:
        compile_blocks(model, backend)
    own = [*model.parameters(), *model.buffers()]
    with state.half_weights.installed():
        own += model.parameters()

    def loss() -> Tensor:
        compute = naive.naive_losses if kind == "naive" else compute_losses
        with state.half_weights.installed(), torch.autocast(batch.image.device.type, torch.bfloat16, enabled=amp):
            return compute(model, batch, config, use_memory=True).total.to(DTYPE)

    return Variant(own, loss, lambda: step(batch, use_memory=True).total.to(DTYPE))


def recorded_steps(state: TrainState) -> GraphedSteps:
    """Return ``train_step`` recorded as a CUDA graph; without a GPU, a replay takes the step again."""
    return GraphedSteps(state, record=capture if DEVICE == "cuda" else _take_again)


def _take_again(step: Callable[[], Losses], _: object) -> tuple[Losses, Callable[[], object]]:
    losses = Losses(*torch.zeros(3))
    return losses, lambda: [recorded.copy_(x) for recorded, x in zip(losses, step(), strict=True)]


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
        variant.loss().backward()
    return counter.get_total_flops()


@contextmanager
def fake_variant(size: str, name: str, device: str = "cpu") -> Iterator[Variant]:
    """Yield a variant that computes nothing; on ``cuda``, which needs no GPU, it allows no backward pass."""

    def fused_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, True)[0]

    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        stack.enter_context(torch.device(device))
        # These look at numbers, and neither counts.
        stack.enter_context(patch.object(nn.init, "trunc_normal_"))
        stack.enter_context(patch.object(naive, "naive_enqueue"))
        if device == "cuda":  # without a GPU torch takes the attention that materializes its map, and no autocast
            stack.enter_context(patch.object(F, "scaled_dot_product_attention", fused_attention))
            stack.enter_context(patch.object(torch.cuda.amp.common, "amp_definitely_not_available", return_value=False))
            stack.enter_context(patch.object(torch.cuda, "is_bf16_supported", return_value=True))
        yield make_variant(name, SIZES[size].build_model(), SIZES[size].random_batch())


def measure(size: str, repeats: int) -> Iterator[Record]:
    """Check that both compute the same loss, then time their steps in turn; under bfloat16 autocast on a GPU."""
    kinds, amp = ("naive", "ours"), " bfloat16" * (DEVICE == "cuda")
    model, batch = SIZES[size].build_model().to(DEVICE), SIZES[size].random_batch().to(DEVICE)
    fixed = {kind: make_variant(kind + amp, without_dropout(copy.deepcopy(model)), batch) for kind in kinds}
    variants = {kind: make_variant(kind + amp, copy.deepcopy(model), batch) for kind in (*kinds, "ours beyond")}
    case = Case(
        op="train_step",
        size=f"{size}: {SIZES[size]}{amp}",
        variants={kind: variant.step for kind, variant in variants.items()},
        parity={kind: variant.loss for kind, variant in fixed.items()},
        flops={kind: step_flops(size, kind.partition(" ")[0]) for kind in variants},
    )
    for record, variant in zip(run(case, repeats), variants.values(), strict=True):
        record["images_per_s"] = 2 * SIZES[size].batch / record["seconds_p50"]
        yield record | {"saved_bytes": saved_bytes(variant.loss, beyond=variant.own)}


def count(size: str) -> Iterator[Record]:
    """Count FLOPs and saved bytes, in single precision and under autocast."""
    for name in ("naive", "naive bfloat16", "ours", "ours bfloat16"):
        with fake_variant(size, name, "cuda") as variant:  # autocast saves more on a GPU than on a CPU
            saved = saved_bytes(variant.loss, beyond=variant.own)
        record: Record = {"op": "train_step_cost", "size": f"{size}: {SIZES[size]}", "variant": name}
        yield record | {"flops": step_flops(size, name.partition(" ")[0]), "saved_bytes": saved}
