"""Pseudo labels: who gives them, which of them count, and how unlabeled crops are mixed (docs/method.md)."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from allspark_fast.config import TrainConfig
from allspark_fast.data.info import IGNORE_INDEX
from allspark_fast.data.loader import SemiBatch
from allspark_fast.distributed import all_reduce_sum
from allspark_fast.kernels.upsample_argmax import upsample_argmax
from allspark_fast.model import Segmentor
from allspark_fast.model.batch_norm import FiniteBatchNorm

# Weights of one batch in the running means of a class: its confidence, its shares.
_CONFIDENCE_RATE, _SHARE_RATE = 0.02, 0.05


class ClassStatistics(NamedTuple):
    """What training knows of each class: on the device, over all ranks, from every 16th pixel of its crops.

    Attributes:
        confidence: (K,) float32, running mean of the teacher's confidence in pseudo labels; 0 for a class without any.
        pixels: (3, K) float64, pixels since they were last read: with this label, with this pseudo label, and those of
            the latter that counted.
        shares: (2, K) float32, running means of the share of the class in labels, and in the teacher's predictions
            before alignment; 0 before the first step, and without ``train.dist_align``.
    """

    confidence: Tensor
    pixels: Tensor
    shares: Tensor

    @classmethod
    def start(cls, classes: int, device: torch.device) -> "ClassStatistics":
        """Return those of no pixel."""
        confidence, *shares = torch.zeros(3, classes, device=device)
        return cls(confidence, torch.zeros(3, classes, dtype=torch.float64, device=device), torch.stack(shares))

    def alignment(self, most: float) -> Tensor | None:
        """Return what distribution alignment (ReMixMatch) adds to logits, (K, 1, 1); None if ``most`` is 0.

        Probabilities are multiplied by the share of the class in labels over that in predictions, at most by ``most``
        and at least by its inverse, so that a class that the teacher does not know yet is not unlearned. Predictions
        are counted, as pseudo labels are: a rare class has a larger share of the probabilities of an uncertain teacher.
        """
        if most == 0:
            return None
        label, predicted = self.shares
        ratio = (label / predicted.clamp(min=1e-9)).clamp(1 / most, most)
        return ratio.log().where(predicted.sum() > 0, 0)[:, None, None]


@torch.no_grad()
def pseudo_pass(
    model: Segmentor, batch: SemiBatch, config: TrainConfig, *, alignment: Tensor | None = None, adapt: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Label the unlabeled images; leaves the model in eval mode.

    Args:
        model: what labels them.
        batch: the images.
        config: the optimization.
        alignment: of ClassStatistics.
        adapt: whether BatchNorm normalizes by the statistics of these images, and its running statistics follow them.

    Returns:
        logits (B, K, h, w); pseudo labels (B, H, W), 255 in padding that does not count; their confidence (B, H, W).
    """
    model.eval()
    for module in model.modules() if adapt else ():
        if isinstance(module, FiniteBatchNorm):
            module.train()
    class_logits = model(batch.unlabeled_image, kv_source=config.kv_source)
    model.eval()
    size = (batch.unlabeled_image.shape[2], batch.unlabeled_image.shape[3])
    aligned = class_logits if alignment is None else class_logits + alignment
    pseudo_label, confidence = upsample_argmax(aligned, size)
    if not config.pseudo_padding:
        pseudo_label = pseudo_label.where(batch.unlabeled_valid, IGNORE_INDEX)
    return class_logits, pseudo_label, confidence


def confident(pseudo_label: Tensor, confidence: Tensor, classes: ClassStatistics, config: TrainConfig) -> Tensor:
    """Return which pseudo labels count, (B, H, W) bool: those of at least the threshold (of FixMatch, or of AEL)."""
    least: float | Tensor = config.conf_thresh
    if config.conf_mode == "class":
        bounded = classes.confidence.clamp(max=config.conf_thresh)
        least = bounded[pseudo_label.clamp(max=len(bounded) - 1)]
    # Not >=: a confidence that is NaN counts, so that the step is skipped.
    return (pseudo_label != IGNORE_INDEX) & ~(confidence < least)


@torch.no_grad()
def update_shares(classes: ClassStatistics, batch: SemiBatch, class_logits: Tensor) -> None:
    """Move the shares of the classes in place."""
    index = torch.arange(class_logits.shape[1], device=class_logits.device)
    label = (batch.label[:, ::4, ::4, None] == index).sum((0, 1, 2))
    valid = _like(batch.unlabeled_valid, class_logits)
    predicted = ((class_logits.argmax(1)[..., None] == index) & valid[:, 0, ..., None]).sum((0, 1, 2))
    pixels = all_reduce_sum(torch.stack([label, predicted]).float())
    now = pixels / pixels.sum(1, keepdim=True)
    moved = classes.shares.lerp(now, _SHARE_RATE).where(classes.shares[1].sum() > 0, now)
    classes.shares.copy_(moved.where(now.isfinite().all(), classes.shares))


@torch.no_grad()
def update_statistics(
    classes: ClassStatistics, label: Tensor, pseudo_label: Tensor, counts: Tensor, confidence: Tensor
) -> None:
    """Count the pixels of a step's labels and pseudo labels, and move the mean confidences, in place."""
    running, pixels, _ = classes
    label, pseudo_label, counts, confidence = (x[:, ::4, ::4, None] for x in (label, pseudo_label, counts, confidence))
    index = torch.arange(len(running), device=label.device)
    of_class = pseudo_label == index
    of_each = (label == index, of_class, of_class & counts, confidence.float().where(of_class, 0))
    *sums, confidences = all_reduce_sum(torch.stack([x.sum((0, 1, 2)).double() for x in of_each]))
    pixels += torch.stack(sums)
    mean = (confidences / sums[1].clamp(min=1)).float()
    moved = running.lerp(mean, _CONFIDENCE_RATE).where(running > 0, mean)
    running.copy_(moved.where((sums[1] > 0) & mean.isfinite(), running))


@torch.no_grad()
def mix_images(batch: SemiBatch) -> Tensor:
    """Return the unlabeled crops (B, 3, H, W) as the student sees them: strong views, mixed as the loader drew it.

    One of two crops gives the other its pixels in ``mixed``; of an odd number the last has no partner. Then come the
    labeled ``pasted``.
    """
    images = batch.unlabeled_image if batch.unlabeled_strong is None else batch.unlabeled_strong
    images = _mix_pairs(batch, images)
    return images if batch.pasted is None else batch.image.where(batch.pasted[:, None], images)


@torch.no_grad()
def mix_labels(batch: SemiBatch, class_logits: Tensor, target: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mix what belongs to the crops as these are.

    Args:
        batch: the crops, and what is mixed.
        class_logits: (B, K, h, w); those of a pasted pixel are certain of its label.
        target: (B, H, W) int64 pseudo labels, 255 ignored.
        valid: (B, H, W) bool, pixels that the loss is divided by.

    Returns:
        all three, mixed.
    """
    class_logits, target, valid = (_mix_pairs(batch, x) for x in (class_logits, target, valid))
    if batch.pasted is None:
        return class_logits, target, valid
    label = _like(batch.label.where(batch.pasted, IGNORE_INDEX), class_logits)
    is_label = label == torch.arange(class_logits.shape[1], device=label.device)[:, None, None]
    most, least = (bound((1, 2, 3), keepdim=True) for bound in (class_logits.amax, class_logits.amin))
    return (
        class_logits.where(label == IGNORE_INDEX, most.where(is_label, least)),
        batch.label.where(batch.pasted, target),
        valid | batch.pasted,
    )


def _mix_pairs(batch: SemiBatch, x: Tensor) -> Tensor:
    if batch.mixed is None:
        return x
    order = torch.arange(len(x), device=x.device)
    partner = (order ^ 1).clamp(max=len(order) - 1)  # of an odd number the last one is its own
    return x[partner].where(_like(batch.mixed, x), x)


def _like(mask: Tensor, x: Tensor) -> Tensor:
    """Resize (B, H, W) to a map of another resolution, each pixel to the nearest one, and make it broadcast."""
    if mask.shape[1:] != x.shape[-2:]:
        mask = F.interpolate(mask[:, None].float(), x.shape[-2:], mode="nearest-exact")[:, 0].to(mask.dtype)
    return mask if x.ndim == 3 else mask[:, None]
