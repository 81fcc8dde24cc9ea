"""The training step the official way and ours, at the sizes of the recipes, on random images."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from allspark_fast.config import TrainConfig
from allspark_fast.data.loader import SemiBatch
from allspark_fast.model import Segmentor, build_segmentor
from allspark_fast.model.cross_attention import CrossAttention
from allspark_fast.model.mit import Block, compile_blocks
from allspark_fast.training.cuda_graph import GraphedSteps
from allspark_fast.training.step import Losses, TrainState, compute_losses, train_step
from bench import bench_upsample
from bench.naive_model import make_naive, naive_losses, naive_train_step


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
        """A model with random weights and a full memory of noise."""
        return build_segmentor(
            self.backbone, self.classes, (self.crop, self.crop), embedding_dim=self.embedding_dim
        ).train()

    def random_batch(self) -> SemiBatch:
        """Images of noise; a tenth of the labels are to be ignored."""
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


# Those with bfloat16 run under autocast. Each can be "compiled" too, which changes none of the counts.
NAMES = ("naive", "naive bfloat16", "ours", "ours bfloat16")
BACKEND = "inductor"


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


def make_variant(name: str, model: Segmentor, batch: SemiBatch) -> Variant:
    """One of ``NAMES``, perhaps with " compiled" and " graph" behind it, after warm-up; it takes the model over."""
    kind, *options = name.split()
    config = TrainConfig(amp="bfloat16" in options)
    if kind == "naive":
        model = make_naive(model)
        if "compiled" in options:
            model.compile(backend=BACKEND)
    elif "compiled" in options:
        compile_blocks(model, BACKEND)
    state = TrainState(model, config, total_steps=10**6)

    def losses() -> Losses:
        with torch.autocast(batch.image.device.type, torch.bfloat16, enabled=config.amp):
            if kind == "naive":
                return naive_losses(model, batch, use_memory=True)
            return compute_losses(model, batch, config, use_memory=True)

    if kind == "naive":
        step = functools.partial(naive_train_step, model, state.optimizer, batch, config, lr=config.lr, use_memory=True)
    else:
        take_step = GraphedSteps(state) if "graph" in options else functools.partial(train_step, state)
        step = functools.partial(take_step, batch, use_memory=True)
    return Variant(model, state.optimizer, losses, step)


def without_dropout(model: Segmentor) -> Segmentor:
    """Turns off, in place, all that is random in training."""
    for module in model.modules():
        if isinstance(module, Block):
            module.drop_path = 0.0
        elif isinstance(module, CrossAttention):
            module.dropout = 0.0
        elif isinstance(module, nn.Dropout2d):
            module.p = 0.0
    return model
