"""Tiny models, and the forward pass of a training step."""

from typing import Any

import torch
from torch import Tensor

from allspark_fast.model import Segmentor, build_segmentor


def tiny_segmentor(
    backbone: str = "mit_tiny", classes: int = 3, crop: tuple[int, int] = (64, 64), **options: Any
) -> Segmentor:
    """Build the smallest model; ``options`` are those of build_segmentor."""
    return build_segmentor(backbone, classes, crop, **{"embedding_dim": 16, **options})


def training_logits(model: Segmentor, crop: tuple[int, int] = (64, 64), *, use_memory: bool = True) -> Tensor:
    """Run the pseudo-label pass and the training forward pass on two labeled and two unlabeled images of noise."""
    labeled, unlabeled = torch.randn(2, 2, 3, *crop)
    with torch.no_grad():
        class_logits = model.eval()(unlabeled, kv_source="batch")
    return model.train()(torch.cat([labeled, unlabeled]), class_logits, use_memory=use_memory)
