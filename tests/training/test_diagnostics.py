"""What is measured of pseudo labels and memory, by hand and in whole runs."""

import dataclasses
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from allspark_fast.data.loader import SemiBatch
from allspark_fast.data.scenes import SCENES
from allspark_fast.model import AllSpark
from allspark_fast.model.options import AllSparkOptions
from allspark_fast.training.diagnostics import memory_record, pseudo_label_record
from allspark_fast.training.log import read_metrics
from allspark_fast.training.pictures import draw_curves
from allspark_fast.training.trainer import Trainer
from tests.helpers.runs import tiny_config


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


def test_a_run_logs_it(tmp_path: Path) -> None:
    config = dataclasses.replace(tiny_config(), train=dataclasses.replace(tiny_config().train, epochs=1))
    trainer = Trainer(config, tmp_path)
    trainer.run()
    record = read_metrics(tmp_path)[-1]
    channels = trainer.state.model.decoder.allspark.attn.kv_queue.shape[1]
    assert sum(record["memory_received"]) == trainer.total_steps * config.train.batch_size * channels
    events = EventAccumulator(str(tmp_path)).Reload()
    for name in ("pseudo_label_accuracy", "pseudo_label_coverage", "memory_filled"):
        assert events.Scalars(name)[0].value == pytest.approx(record[name])
    for index, count in enumerate(record["memory_received"]):
        assert events.Scalars(f"memory_received/{index}")[0].value == count


def test_the_memory_is_drawn(tmp_path: Path) -> None:
    pictures = []
    for received in ([4, 0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]):
        record = {"miou": 0.5, "memory_filled": 8, "memory_received": received}
        records = [{"step": step, **record, "memory_received": [step * x for x in received]} for step in range(20)]
        draw_curves(tmp_path, records, SCENES)
        pictures.append(Image.open(tmp_path / "curves.png").convert("RGB").tobytes())
    assert pictures[0] != pictures[1]
