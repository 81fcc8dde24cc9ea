"""The training step of AllSpark: pseudo labels, one forward of labeled and unlabeled images, one update."""

from typing import NamedTuple

import torch
from torch import Tensor

from allspark_fast.data.loader import SemiBatch
from allspark_fast.kernels.upsample_argmax import upsample_argmax
from allspark_fast.kernels.upsample_cross_entropy import upsample_cross_entropy
from allspark_fast.model import Segmentor
from allspark_fast.model.cross_attention import Attend


class Losses(NamedTuple):
    """Losses of a step, scalars on the device: the mean of the two parts, and the parts."""

    total: Tensor
    labeled: Tensor
    unlabeled: Tensor


def build_optimizer(
    model: Segmentor, *, lr: float, lr_multi: float, momentum: float = 0.9, weight_decay: float = 1e-4
) -> torch.optim.SGD:
    """SGD as in the public code: ``lr`` for the backbone, ``lr * lr_multi`` for the rest, decay on everything."""
    groups = [
        {"params": list(model.backbone.parameters()), "lr_scale": 1.0},
        {"params": list(model.decoder.parameters()), "lr_scale": lr_multi},
    ]
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, weight_decay=weight_decay)


def poly_lr(step: int, total_steps: int, base_lr: float, power: float = 0.9) -> float:
    """Learning rate of a step under polynomial decay.

    The public code sets the rate after each step, from that step's number: step i runs at the rate of i - 1, so the
    first two share the base rate.
    """
    return base_lr * (1 - max(step - 1, 0) / total_steps) ** power


def train_step(
    model: Segmentor,
    optimizer: torch.optim.Optimizer,
    batch: SemiBatch,
    *,
    lr: float,
    use_memory: bool,
    attend: Attend,
    ignore_padding: bool = False,
    ignore_index: int = 255,
) -> Losses:
    """Take one step of AllSpark training.

    Args:
        model: updated in place, its memory and BatchNorm statistics included.
        optimizer: of ``build_optimizer``.
        batch: as many labeled as unlabeled images.
        lr: learning rate of the backbone in this step.
        use_memory: False during warm-up.
        attend: in the pseudo-label pass, see CrossAttention.infer.
        ignore_padding: leave the padding that the crop added out of the pseudo labels (the public code trains on it).
        ignore_index: label of pixels that do not count.

    Returns:
        the losses before the update.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    class_logits = _pseudo_pass(model, batch.unlabeled_image, attend)
    pseudo_label, _ = upsample_argmax(class_logits, (batch.unlabeled_image.shape[2], batch.unlabeled_image.shape[3]))
    if ignore_padding:
        pseudo_label = pseudo_label.where(batch.unlabeled_valid, ignore_index)
    model.train()
    images = torch.cat([batch.image, batch.unlabeled_image])
    labeled, unlabeled = model(images, class_logits, use_memory=use_memory).chunk(2)
    labeled_loss = upsample_cross_entropy(labeled, batch.label, ignore_index=ignore_index)
    unlabeled_loss = upsample_cross_entropy(unlabeled, pseudo_label, ignore_index=ignore_index)
    total = (labeled_loss + unlabeled_loss) / 2
    optimizer.zero_grad()
    total.backward()
    optimizer.step()
    return Losses(total.detach(), labeled_loss.detach(), unlabeled_loss.detach())


@torch.no_grad()
def _pseudo_pass(model: Segmentor, images: Tensor, attend: Attend) -> Tensor:
    """Logits of unlabeled images, in eval mode: running BatchNorm statistics, no dropout, no memory."""
    model.eval()
    return model(images, attend=attend)
