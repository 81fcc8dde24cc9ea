"""The official protocols, on a model whose answer is known."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from allspark_fast.data.datasets import Entry
from allspark_fast.data.loader import EvalSample
from allspark_fast.inference.evaluate import MIN_WINDOW, evaluate, predict_labels
from allspark_fast.model import build_segmentor
from bench.harness import peak_bytes


class Threshold(nn.Module):
    """Logits at a quarter of the resolution, from the first channel; remembers what it saw."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.factors = 1 + torch.arange(classes - 3.0)
        self.seen: list[tuple[int, ...]] = []

    def forward(self, images: Tensor, *, kv_source: str) -> Tensor:
        assert kv_source == "image"
        assert not self.training
        self.seen.append(tuple(images.shape[2:]))
        size = tuple(-(-side // 4) for side in images.shape[2:])
        x = F.interpolate(images[:, :1], size, mode="bilinear", align_corners=False)
        more = torch.sin(self.factors[:, None, None] * x)
        return torch.cat([-x, x, 0.1 * x + images.mean(), more], 1)


def sample(height: int, width: int) -> EvalSample:
    label = torch.randint(3, (1, height, width))
    return EvalSample(torch.randn(1, 3, height, width), label, Entry("image.png", "label.png"))


def test_whole_images_of_any_size() -> None:
    model = Threshold()
    samples = [sample(45, 70), sample(30, 33)]
    scores = evaluate(model, samples, 3)
    assert model.seen == [(45, 70), (30, 33)]
    correct = torch.cat([predict_labels(model, x.image)[0].eq(x.label).flatten() for x in samples])
    assert 0 < scores.mean_iou < correct.float().mean() + 0.5


@pytest.mark.parametrize("classes", [3, 40])
def test_sliding_windows_are_those_of_the_public_code(classes: int) -> None:
    """Stride int(2/3 crop), windows cut at the border, softmax summed, argmax."""
    image, crop, stride = torch.randn(1, 3, 150, 190), 90, 60
    model = Threshold(classes).eval()
    total = torch.zeros(1, classes, 150, 190)
    windows = []
    for top in (0, stride, 2 * stride - 2):  # 120 leaves 30 pixels, less than a MiT can take: it starts at 118
        for left in (0, stride, 2 * stride, 158):
            window = image[:, :, top : min(top + crop, 150), left : min(left + crop, 190)]
            windows.append(tuple(window.shape[2:]))
            logits = model(window, kv_source="image")
            probability = F.interpolate(logits, window.shape[2:], mode="bilinear", align_corners=False).softmax(1)
            total[:, :, top : top + window.shape[2], left : left + window.shape[3]] += probability
    model.seen.clear()
    assert torch.equal(predict_labels(model, image, mode="sliding", crop=crop)[0], total.argmax(1))
    assert model.seen == windows
    assert min(min(size) for size in windows) == MIN_WINDOW


def peak_of_windows(height: int, width: int) -> float:
    """Bytes that windows of 64 pixels and 100 classes take."""

    class Classes(nn.Module):
        def forward(self, images: Tensor, *, kv_source: str) -> Tensor:
            return F.avg_pool2d(images[:, :1], 4, ceil_mode=True) * torch.arange(100.0)[:, None, None]

    images = torch.randn(1, 3, height, width)
    return peak_bytes(lambda: predict_labels(Classes().eval(), images, mode="sliding", crop=64))


def test_memory_of_windows_does_not_grow_with_the_height() -> None:
    # The probabilities of a pixel take 400 bytes; its label and confidence 12, which are stacked once.
    assert peak_of_windows(2048, 256) - peak_of_windows(512, 256) < 1.1 * 24 * 1536 * 256


def test_memory_of_windows_is_that_of_one_row_of_them() -> None:
    """And of the rows of it that the next one goes on with: 22, or 30 before windows cut by the border."""
    assert peak_of_windows(192, 1024) < 1.7 * 400 * 64 * 1024


@pytest.mark.parametrize("mode", ["whole", "sliding"])
def test_a_prediction_does_not_depend_on_its_batch(mode: str) -> None:
    model = build_segmentor("mit_tiny", 4, (64, 64), embedding_dim=16).eval()
    images = torch.randn(3, 3, 70, 100)
    batch, _ = predict_labels(model, images, mode=mode, crop=64)
    alone = torch.cat([predict_labels(model, image[None], mode=mode, crop=64)[0] for image in images])
    assert (batch == alone).float().mean() > 0.999  # ties to rounding may fall either way
