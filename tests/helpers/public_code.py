from pathlib import Path

import numpy as np
import torch
from torch import nn

from allspark_fast.model import AllSparkOptions, build_segmentor


def save_public_checkpoint(model: nn.Module, path: Path) -> Path:
    """Save what the public trainer does: names of DistributedDataParallel, optimizer, scores as NumPy scalars."""
    checkpoint = {
        "model": {f"module.{name}": x for name, x in model.state_dict().items()},
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1).state_dict(),
        "epoch": 3,
        "best_epoch": 2,
        "previous_best": np.mean([61.0, 62.5]),
    }
    torch.save(checkpoint, path)
    return path


def public_checkpoint(path: Path, classes: int = 21, crop: int = 65, **options: object) -> Path:
    """Save such a checkpoint of a tiny model; ``options`` are those of its bottleneck."""
    model = build_segmentor("mit_tiny", classes, (crop, crop), allspark=AllSparkOptions(**options), embedding_dim=16)
    return save_public_checkpoint(model, path)
