"""What is measured of pseudo labels and memory, by hand."""

import pytest
import torch

from allspark_fast.data.loader import SemiBatch
from allspark_fast.training.diagnostics import memory_record, pseudo_label_record


def crops(truth: torch.Tensor | None, valid: torch.Tensor) -> SemiBatch:
    image = torch.zeros(len(valid), 3, *valid.shape[1:])
    return SemiBatch(image, valid.long(), image, valid, truth)


class TestPseudoLabels:
    """Accuracy and coverage of six crops of 2 x 4 pixels, of which the last column is padding."""

    valid = torch.ones(6, 2, 4, dtype=torch.bool)
    valid[:, :, 3] = False
    # Certain of class 1, except in the last crop, which is undecided.
    logits = torch.tensor([0.0, 9.0]).view(1, 2, 1, 1).repeat(6, 1, 2, 4)
    logits[5] = torch.tensor([0.0, 0.1]).view(2, 1, 1)
    pseudo_label = torch.ones(6, 2, 4, dtype=torch.int64)

    def test_all_crops_count(self) -> None:
        truth = torch.ones(6, 2, 4, dtype=torch.int64)
        truth[4:] = 0  # beyond the four that are pictured
        truth[~self.valid] = 255
        truth[0, 0, 0] = 255
        record = pseudo_label_record(self.logits, self.pseudo_label, crops(truth, self.valid))
        assert record == {
            "pseudo_label_accuracy": pytest.approx((4 * 6 - 1) / (6 * 6 - 1)),
            "pseudo_label_coverage": pytest.approx(5 / 6),
        }

    @pytest.mark.parametrize("truth", [None, torch.full((6, 2, 4), 255)])
    def test_without_hidden_labels_there_is_no_accuracy(self, truth: torch.Tensor | None) -> None:
        record = pseudo_label_record(self.logits, self.pseudo_label, crops(truth, self.valid))
        assert record == {"pseudo_label_coverage": pytest.approx(5 / 6)}


def test_memory_fill_and_use() -> None:
    assert memory_record(torch.tensor([3, 0, 4])) == {"memory_filled": 2, "memory_received": [3, 0, 4]}
    assert memory_record(torch.zeros(0, dtype=torch.int64)) == {}  # no bottleneck
