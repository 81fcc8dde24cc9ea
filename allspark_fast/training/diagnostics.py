"""What a run measures of its pseudo labels and of the Semantic Memory at each evaluation, and when it warns."""

from collections.abc import Sequence

import torch
from torch import Tensor

from allspark_fast.data.info import IGNORE_INDEX
from allspark_fast.data.loader import SemiBatch
from allspark_fast.distributed import all_reduce_sum
from allspark_fast.inference.metrics import Scores
from allspark_fast.kernels.upsample_argmax import upsample_argmax
from allspark_fast.model import Segmentor
from allspark_fast.training.log import Record
from allspark_fast.training.pseudo_labels import pseudo_pass
from allspark_fast.training.step import TrainState

# The threshold of FixMatch and its kin.
CONFIDENT = 0.95
# A class with less than this part of its share is as good as lost.
_RARE = 0.05
_CERTAIN, _VANISHED = 0.999, 0.01
_FAR_BELOW = 0.85


@torch.no_grad()
def measure(state: TrainState, model: Segmentor, batch: SemiBatch) -> tuple[dict[str, Tensor], Record]:
    """Measure pseudo labels, classes and memory; all ranks have to call this, which waits for the device.

    Args:
        state: of the run; its counts of pixels by class are set to zero.
        model: what is evaluated.
        batch: unlabeled crops, with hidden labels or without.

    Returns:
        labels (B, H, W) of the crops by their title: truth where there is some, pseudo label, prediction of the model;
        and the figures of ``pseudo_label_record`` and ``class_record``.
    """
    alignment = state.classes.alignment(state.config.dist_align)
    _, pseudo_label, confidence = pseudo_pass(state.teacher, batch, state.config, alignment=alignment)
    logits = model.eval()(batch.unlabeled_image)
    prediction, _ = upsample_argmax(logits, (pseudo_label.shape[1], pseudo_label.shape[2]))
    truth = batch.unlabeled_label
    labels = {} if truth is None or (truth == IGNORE_INDEX).all() else {"truth": truth}
    record = pseudo_label_record(pseudo_label, confidence, logits.shape[1], batch)
    record |= class_record(state.classes.pixels, state.received)
    return labels | {"pseudo label": pseudo_label, "prediction": prediction}, record


def pseudo_label_record(pseudo_label: Tensor, confidence: Tensor, classes: int, batch: SemiBatch) -> Record:
    """Measure pseudo labels and their confidence (B, H, W) over all pixels of all crops of all ranks together.

    Returns:
        ``pseudo_label_coverage``, the share of the pixels, without padding, whose pseudo label has a probability of at
        least ``CONFIDENT``, and ``pseudo_label_class_coverage``, the same for the pseudo labels of each class;
        ``pseudo_label_accuracy``, the share of right ones among the pixels with a hidden label, and
        ``pseudo_label_recall``, the same for the pixels of each class. A class without such pixels has None.
    """
    valid = batch.unlabeled_valid
    truth = torch.full_like(pseudo_label, IGNORE_INDEX) if batch.unlabeled_label is None else batch.unlabeled_label
    is_known = truth != IGNORE_INDEX
    counted = [
        pseudo_label[valid & (confidence >= CONFIDENT)],
        pseudo_label[valid],
        truth[is_known & (pseudo_label == truth)],
        truth[is_known],
    ]
    counts = torch.stack([x.bincount(minlength=classes) for x in counted])
    confident, pixels, hits, known = all_reduce_sum(counts).tolist()
    record: Record = {
        "pseudo_label_coverage": sum(confident) / sum(pixels),
        "pseudo_label_class_coverage": _ratios(confident, pixels),
    }
    if sum(known):
        record["pseudo_label_accuracy"] = sum(hits) / sum(known)
        record["pseudo_label_recall"] = _ratios(hits, known)
    return record


def _ratios(parts: Sequence[float], wholes: Sequence[float]) -> list[float | None]:
    return [part / whole if whole else None for part, whole in zip(parts, wholes, strict=True)]


def class_record(pixels: Tensor, received: Tensor) -> Record:
    """Return shares of each class since the last call, and set the counts (3, K) of ClassStatistics to zero.

    Returns:
        ``label_share`` and ``pseudo_label_share``, of all pixels with a label or a pseudo label, and
        ``pseudo_label_kept``, the share of the pseudo labels of a class that counted, None without any, if there are
        pseudo labels; ``memory_received``, the channels in this run (K,), unless ``received`` is (0,).
    """
    labels, pseudo_labels, kept = pixels.tolist()
    pixels.zero_()
    record: Record = {"memory_received": received.tolist()} if len(received) else {}
    if not sum(pseudo_labels):
        return record
    return record | {
        "label_share": [x / max(sum(labels), 1) for x in labels],
        "pseudo_label_share": [x / sum(pseudo_labels) for x in pseudo_labels],
        "pseudo_label_kept": _ratios(kept, pseudo_labels),
    }


def find_problems(
    record: Record, scores: Scores, classes: Sequence[str], *, best: float, loss: float
) -> dict[str, str]:
    """Say what looks wrong at an evaluation of a run whose pseudo labels count, or at its end.

    It looks at what ``measure`` recorded, the scores, the best mean IoU before, and the last loss on pseudo labels.
    Each message has a key that stays the same as long as the problem does.
    """
    problems = {}
    shares = zip(classes, record.get("label_share", ()), record.get("pseudo_label_share", ()), strict=False)
    for name, label, pseudo_label in shares:
        if pseudo_label < _RARE * label:
            problems[f"labels {name}"] = (
                f"{name} gets almost no pseudo labels: {pseudo_label:.2%} of them, but {label:.2%} of the labels"
            )
    if problems:
        problems["labels"] = (
            "training on such pseudo labels unlearns these classes: train.pseudo_from lets them count later"
        )
    true, predicted = (scores.confusion.sum(axis).tolist() for axis in (1, 0))
    for name, pixels, predictions in zip(classes, true, predicted, strict=True):
        if predictions < _RARE * pixels:
            problems[f"predictions {name}"] = (
                f"{name} is almost never predicted: for {predictions / sum(true):.2%} of the validation pixels, "
                f"{pixels / sum(true):.2%} are {name}"
            )
    if record.get("pseudo_label_coverage", 0) > _CERTAIN and loss < _VANISHED:
        problems["certain"] = (
            f"the teacher is certain of all its pseudo labels and the loss on them vanishes ({loss:.4f}): "
            "unlabeled images teach nothing more, or the model agrees with itself on one class"
        )
    if scores.mean_iou < _FAR_BELOW * best:
        problems["below"] = f"mIoU fell to {100 * scores.mean_iou:.1f}, the best was {100 * best:.1f}"
    return problems
