import torch

from allspark_fast.config import TrainConfig
from allspark_fast.data.loader import SemiBatch
from allspark_fast.model import AllSparkOptions, build_segmentor
from allspark_fast.training.step import TrainState

METHODS = ("allspark", "semi", "supervised")


def build_state(total_steps: int = 100, lr: float = 0.01, **options: object) -> TrainState:
    """A tiny model on crops of 64 pixels, with an average of its weights if options say so."""
    config = TrainConfig(batch_size=2, lr=lr, **options)
    bottleneck = AllSparkOptions() if config.method == "allspark" else None
    model, ema = (build_segmentor("mit_tiny", 3, (64, 64), allspark=bottleneck, embedding_dim=16) for _ in range(2))
    ema.requires_grad_(False).load_state_dict(model.state_dict())
    return TrainState(model, config, total_steps=total_steps, ema=ema if config.ema > 0 else None)


# Everything beyond the paper that a step may do; its batches are those of ``mixing=True``.
BEYOND = {
    "teacher": "ema", "ema": 0.9, "conf_thresh": 0.95, "conf_mode": "class", "strong": True, "cutmix": 1.0,
    "copy_paste": 1.0, "dist_align": 10.0, "pseudo_padding": False, "unlabeled_weight": 0.5,
}  # fmt: skip


def random_batch(size: int = 2, *, mixing: bool = False) -> SemiBatch:
    """Crops of noise, whose lower part is padding; with another view for the student and boxes if asked for."""
    images = torch.randn(2, size, 3, 64, 64)
    valid = torch.ones(size, 64, 64, dtype=torch.bool)
    valid[:, 40:] = False
    batch = SemiBatch(images[0], torch.randint(3, (size, 64, 64)), images[1], valid, None)
    if not mixing:
        return batch
    mixed, pasted = torch.zeros(2, size, 64, 64, dtype=torch.bool)
    mixed[:, 8:32, 16:48] = True
    pasted[:, 20:60, 30:60] = True
    return batch._replace(unlabeled_strong=torch.randn(size, 3, 64, 64), mixed=mixed, pasted=pasted)
