"""One training step of each method, and the schedule around it: the mathematics of training, without a run."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from allspark_fast.config import TrainConfig
from allspark_fast.data.info import IGNORE_INDEX
from allspark_fast.data.loader import SemiBatch
from allspark_fast.kernels.upsample_argmax import upsample_argmax
from allspark_fast.kernels.upsample_cross_entropy import upsample_cross_entropy
from allspark_fast.model import Segmentor


class Losses(NamedTuple):
    """Losses of a step, scalars on the device; ``total`` is the mean of the two parts, or the labeled one alone."""

    total: Tensor
    labeled: Tensor
    unlabeled: Tensor


def train_step(
    model: Segmentor,
    optimizer: torch.optim.Optimizer,
    batch: SemiBatch,
    config: TrainConfig,
    *,
    lr: float,
    use_memory: bool,
    use_pseudo: bool = True,
) -> Losses:
    """Take one training step.

    Args:
        model: updated in place, its memory and BatchNorm statistics included.
        optimizer: of ``build_optimizer``.
        batch: as many labeled as unlabeled images.
        config: method, losses and switches.
        lr: learning rate of the backbone in this step.
        use_memory: False during warm-up.
        use_pseudo: whether the loss on pseudo labels counts.

    Returns:
        the losses before the update.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    amp = config.amp and batch.image.is_cuda
    with torch.autocast(batch.image.device.type, torch.bfloat16, enabled=amp):
        losses = compute_losses(model, batch, config, use_memory=use_memory, use_pseudo=use_pseudo)
    optimizer.zero_grad()
    losses.total.backward()
    optimizer.step()
    return Losses._make(loss.detach() for loss in losses)


def compute_losses(
    model: Segmentor, batch: SemiBatch, config: TrainConfig, *, use_memory: bool, use_pseudo: bool = True
) -> Losses:
    """Forward pass of a method, arguments as ``train_step``'s; the model is in training mode afterwards."""
    if config.method == "supervised":
        loss = _labeled_loss(model.train()(batch.image), batch.label, config)
        return Losses(loss, loss, torch.zeros_like(loss))
    class_logits, pseudo_label = pseudo_pass(model, batch, config)
    model.train()
    images = torch.cat([batch.image, batch.unlabeled_image])
    memory = {"class_logits": class_logits, "use_memory": use_memory} if config.method == "allspark" else {}
    labeled, unlabeled = model(images, **memory).chunk(2)
    labeled_loss = _labeled_loss(labeled, batch.label, config)
    unlabeled_loss = upsample_cross_entropy(unlabeled, pseudo_label, ignore_index=IGNORE_INDEX)
    total = (labeled_loss + unlabeled_loss) / 2 if use_pseudo else labeled_loss
    return Losses(total, labeled_loss, unlabeled_loss)


@torch.no_grad()
def pseudo_pass(model: Segmentor, batch: SemiBatch, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """Logits (B, K, h, w) and pseudo labels (B, H, W) of the unlabeled images; the model is in eval mode afterwards."""
    class_logits = model.eval()(batch.unlabeled_image, attend=config.attend)
    size = (batch.unlabeled_image.shape[2], batch.unlabeled_image.shape[3])
    pseudo_label, _ = upsample_argmax(class_logits, size)
    if not config.pseudo_padding:
        pseudo_label = pseudo_label.where(batch.unlabeled_valid, IGNORE_INDEX)
    return class_logits, pseudo_label


def _labeled_loss(logits: Tensor, label: Tensor, config: TrainConfig) -> Tensor:
    threshold = config.ohem_threshold if config.loss == "ohem" else None
    return upsample_cross_entropy(
        logits, label, ignore_index=IGNORE_INDEX, ohem_threshold=threshold, ohem_min_kept=config.ohem_min_kept
    )


def build_optimizer(model: Segmentor, config: TrainConfig) -> torch.optim.Optimizer:
    """SGD with momentum 0.9 or AdamW: ``lr`` for the backbone, ``lr * lr_multi`` for the rest, decay on everything."""
    groups: list[dict[str, Any]] = [
        {"params": list(model.backbone.parameters()), "lr_scale": 1.0},
        {"params": list(model.decoder.parameters()), "lr_scale": config.lr_multi},
    ]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(groups, lr=config.lr, momentum=0.9, weight_decay=config.weight_decay)


def poly_lr(step: int, total_steps: int, base_lr: float, power: float = 0.9) -> float:
    """Learning rate of a step under polynomial decay.

    The public code sets the rate after each step, from that step's number: step i runs at the rate of i - 1, so the
    first two share the base rate.
    """
    return base_lr * (1 - max(step - 1, 0) / total_steps) ** power
