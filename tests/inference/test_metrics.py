"""The confusion matrix against counting by hand."""

import pytest
import torch

from allspark_fast.inference.metrics import ConfusionMatrix
from tests.helpers.forbid_sync import forbid_sync


def test_counts_and_iou_by_hand() -> None:
    target = torch.tensor([[0, 0, 1, 1, 255, 3, 4]])
    prediction = torch.tensor([[0, 1, 1, 1, 2, 0, 4]])
    confusion = ConfusionMatrix(5)
    confusion.update(prediction, target)
    scores = confusion.compute()
    assert scores.confusion.tolist() == [
        [1, 1, 0, 0, 0], [0, 2, 0, 0, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 1]
    ]  # fmt: skip
    # Class 2 occurs nowhere that counts: 0 in the mean over all classes. Class 3 was missed.
    assert scores.iou.tolist() == pytest.approx([1 / 3, 2 / 3, 0, 0, 1])
    assert scores.present.tolist() == [True, True, False, True, True]
    assert scores.mean_iou == pytest.approx(2 / 5)
    assert scores.mean_iou_present == pytest.approx(1 / 2)


def test_updates_add_up_in_any_dtype() -> None:
    target, prediction = torch.randint(5, (2, 3, 40)), torch.randint(5, (2, 3, 40))
    whole, parts = ConfusionMatrix(5), ConfusionMatrix(5)
    whole.update(prediction, target)
    for a, b in zip(prediction, target, strict=True):
        parts.update(a.to(torch.uint8), b.to(torch.uint8))
    assert torch.equal(whole.compute().confusion, parts.compute().confusion)
    assert whole.compute().confusion.sum() == target.numel()


def test_nothing_counted_and_no_waiting_for_the_device() -> None:
    confusion = ConfusionMatrix(2)
    with forbid_sync():
        confusion.update(torch.zeros(3, dtype=torch.int64), torch.full((3,), 255))
    scores = confusion.compute()
    assert scores.confusion.sum() == scores.mean_iou == scores.mean_iou_present == 0
