"""What a run measures of its pseudo labels and of the Semantic Memory at each evaluation."""

import torch
from torch import Tensor

from allspark_fast.data.info import IGNORE_INDEX
from allspark_fast.data.loader import SemiBatch
from allspark_fast.distributed import all_reduce_sum
from allspark_fast.kernels.upsample_argmax import upsample_argmax
from allspark_fast.training.log import Record

# The threshold of FixMatch and its kin.
CONFIDENT = 0.95


@torch.no_grad()
def pseudo_label_record(class_logits: Tensor, pseudo_label: Tensor, batch: SemiBatch) -> Record:
    """Measure pseudo labels over all pixels of all crops of all ranks together; all ranks have to call this.

    No method here has a threshold, all its pseudo labels count. Coverage says what one of ``CONFIDENT`` would keep: the
    share of the pixels, without padding, whose pseudo label is at least so probable.

    Args:
        class_logits: (B, K, h, w), of the pseudo-label pass.
        pseudo_label: (B, H, W), its result.
        batch: the crops, with hidden labels (B, H, W) or without.

    Returns:
        ``pseudo_label_coverage``; and ``pseudo_label_accuracy``, the share of right ones among the pixels with a hidden
        label, unless there is no such pixel.
    """
    _, confidence = upsample_argmax(class_logits, (pseudo_label.shape[1], pseudo_label.shape[2]))
    valid = batch.unlabeled_valid
    known = torch.zeros_like(valid) if batch.unlabeled_label is None else batch.unlabeled_label != IGNORE_INDEX
    right = known if batch.unlabeled_label is None else known & (pseudo_label == batch.unlabeled_label)
    pixels = torch.stack([x.sum() for x in (valid & (confidence >= CONFIDENT), valid, right, known)])
    confident, valid_pixels, right_pixels, known_pixels = all_reduce_sum(pixels).tolist()
    record = {"pseudo_label_coverage": confident / valid_pixels}
    if known_pixels:
        record["pseudo_label_accuracy"] = right_pixels / known_pixels
    return record


def memory_record(received: Tensor) -> Record:
    """Say how the Semantic Memory is filled and used; this waits for the device.

    Args:
        received: (K,) int64, channels that each class received in this run; (0,) without a memory.

    Returns:
        ``memory_filled``, how many classes received a channel, and ``memory_received``, how many each received in this
        run so far. Empty without a memory.
    """
    if not len(received):
        return {}
    counts = received.tolist()
    return {"memory_filled": sum(count > 0 for count in counts), "memory_received": counts}
