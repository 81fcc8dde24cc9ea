import pytest
import torch
from torch.nn import functional as F

from allspark_fast.inference.metrics import ConfusionMatrix, boundary_f1, dilate, score_image
from tests.helpers.forbid_sync import forbid_sync


def test_counts_and_iou_by_hand():
    target = torch.tensor([[0, 0, 1, 1, 255, 3, 4]])
    prediction = torch.tensor([[0, 1, 1, 1, 2, 0, 4]])
    confusion = ConfusionMatrix(5)
    confusion.update(prediction, target)
    scores = confusion.compute()
    assert scores.confusion.tolist() == [
        [1, 1, 0, 0, 0], [0, 2, 0, 0, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 1]
    ]  # fmt: skip
    # Class 2 occurs nowhere that counts: 0 in the mean over all classes. Class 3 was missed.
    by_class = {name: values.tolist() for name, values in scores.by_class.items()}
    assert by_class["iou"] == pytest.approx([1 / 3, 2 / 3, 0, 0, 1])
    assert by_class["dice"] == pytest.approx([1 / 2, 4 / 5, 0, 0, 1])
    assert by_class["accuracy"] == pytest.approx([1 / 2, 1, 0, 0, 1])
    assert scores.pixel_accuracy == pytest.approx(4 / 6)
    assert scores.present.tolist() == [True, True, False, True, True]
    assert scores.mean_iou == pytest.approx(2 / 5)
    assert scores.mean_iou_present == pytest.approx(1 / 2)


def test_nothing_counted_and_no_waiting_for_the_device():
    confusion = ConfusionMatrix(2)
    with forbid_sync():
        confusion.update(torch.zeros(3, dtype=torch.int64), torch.full((3,), 255))
    scores = confusion.compute()
    assert scores.confusion.sum() == scores.mean_iou == scores.mean_iou_present == 0


def square(size: int, top: int, left: int, side: int) -> torch.Tensor:
    labels = torch.zeros(size, size, dtype=torch.int64)
    labels[top : top + side, left : left + side] = 1
    return labels


class TestBoundaryF1:
    """A tolerance of 0.75 % of the diagonal: of 100 x 100 pixels, one pixel."""

    def test_of_squares_that_are_moved_or_smaller(self):
        target = square(100, 20, 20, 40)
        assert boundary_f1(target, target, 3).tolist()[:2] == [1, 1]
        assert boundary_f1(target, target, 3)[2].isnan()
        assert boundary_f1(square(100, 21, 21, 40), target, 2).tolist() == [1, 1]
        # Moved by two to the right, 39 pixels of each horizontal side are near, and one beside each at the left.
        assert boundary_f1(square(100, 20, 22, 40), target, 2)[1].item() == pytest.approx((2 * 39 + 2) / (4 * 39))

    def test_of_classes_that_are_missed_or_invented(self):
        target, nothing = square(100, 20, 20, 40), torch.zeros(100, 100, dtype=torch.int64)
        assert boundary_f1(nothing, target, 2).tolist() == [0, 0]
        assert boundary_f1(target, nothing, 2).tolist() == [0, 0]
        assert boundary_f1(nothing, nothing, 2).isnan().all()

    def test_ignored_pixels_have_no_outline_and_none_is_counted_there(self):
        target, predicted = square(100, 20, 20, 40), square(100, 70, 70, 20)
        for labels in (target, predicted):
            labels[20:60, 20:60] = 1
        target[60:, 60:] = 255
        assert score_image(predicted, target, 2).by_class["boundary_f1"].tolist() == [1, 1]

    @pytest.mark.parametrize("radius", [0, 1, 4, 17])
    def test_dilation_reaches_as_far_as_max_pooling(self, radius):
        for shape in ((30, 50), (1, 7)):
            mask = torch.rand(shape) > 0.97
            expected = F.max_pool2d(mask[None].float(), 2 * radius + 1, 1, radius)[0] > 0
            assert torch.equal(dilate(mask, radius), expected)
