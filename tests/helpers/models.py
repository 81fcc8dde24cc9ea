from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from allspark_fast.data.loader import EvalSample
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


class Threshold(nn.Module):
    """Logits at a quarter of the resolution, from the first channel; remembers the shapes that it saw."""

    min_size = 32

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.factors = 1 + torch.arange(classes - 3.0)
        self.seen: list[tuple[int, ...]] = []

    def forward(self, images: Tensor, *, kv_source: str) -> Tensor:
        assert kv_source == "image"
        assert not self.training
        self.seen.append(tuple(images.shape))
        size = tuple(-(-side // 4) for side in images.shape[2:])
        x = F.interpolate(images[:, :1], size, mode="bilinear", align_corners=False)
        more = torch.sin(self.factors[:, None, None] * x)
        return torch.cat([-x, x, 0.1 * x + images.mean((1, 2, 3), keepdim=True), more], 1)


def sample(height: int, width: int) -> EvalSample:
    """An image of noise whose label has three classes."""
    label = torch.randint(3, (1, height, width))
    return EvalSample(torch.randn(1, 3, height, width), label)
