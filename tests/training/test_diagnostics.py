"""What is measured of pseudo labels and memory, by hand."""

import pytest
import torch

from allspark_fast.data.loader import SemiBatch
from allspark_fast.model import AllSpark, AllSparkOptions
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


class TestMemory:
    """Fill and use."""

    @pytest.mark.parametrize("memory_init", ["randn", "empty"])
    def test_every_channel_is_counted_once(self, memory_init: str) -> None:
        bottleneck = AllSpark(channels=5, num_classes=4, tokens=6, options=AllSparkOptions(memory_init=memory_init))
        deepest, class_logits = torch.randn(4, 5, 2, 3), torch.randn(2, 4, 2, 3)
        class_logits[:, 1] = -9.0 * deepest[2:].abs().sum()  # no channel comes here
        for steps in (1, 2):
            bottleneck(deepest, class_logits, crop_size=(64, 96), use_memory=False)
            assert bottleneck.attn.received.sum() == steps * 2 * 5
        assert torch.equal(bottleneck.attn.received % 5, bottleneck.attn.queue_ptr)
        assert not any("received" in name for name in bottleneck.state_dict())
        if bottleneck.attn.queue_filled is not None:
            assert torch.equal(bottleneck.attn.received > 0, bottleneck.attn.queue_filled)

    def test_fill_and_use(self) -> None:
        assert memory_record(torch.tensor([3, 0, 4])) == {"memory_filled": 2, "memory_received": [3, 0, 4]}

    def test_none_without_memory(self) -> None:
        assert memory_record(torch.zeros(0, dtype=torch.int64)) == {}
