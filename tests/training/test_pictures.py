"""The pictures of a run: of nothing finite, and of the memory."""

from pathlib import Path

import torch
from PIL import Image

from allspark_fast.data.scenes import SCENES
from allspark_fast.training.pictures import draw_curves, draw_predictions


def test_a_prediction_of_numbers_that_are_not_finite(tmp_path: Path) -> None:
    images, labels = torch.full((1, 3, 8, 8), torch.nan), {"truth": torch.full((1, 8, 8), 255)}
    draw_predictions(tmp_path / "p.png", images, labels, SCENES, (0, 0, 0), (1, 1, 1))
    assert Image.open(tmp_path / "p.png").width > 100


def test_the_memory_is_drawn(tmp_path: Path) -> None:
    pictures = []
    for received in ([4, 0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]):
        record = {"miou": 0.5, "memory_filled": 8}
        records = [{"step": i, **record, "memory_received": [i * x for x in received]} for i in range(20)]
        draw_curves(tmp_path, records, SCENES)
        pictures.append(Image.open(tmp_path / "curves.png").convert("RGB").tobytes())
    assert pictures[0] != pictures[1]
