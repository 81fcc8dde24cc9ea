"""The reference implementation's protocols, on a model whose answer is known; batches against single images."""

import pytest
import torch
from torch.nn import functional as F

from allspark_fast.inference.evaluate import batches_of_equal_size, evaluate, predict_labels
from allspark_fast.inference.metrics import ConfusionMatrix
from tests.helpers.models import Threshold, sample, tiny_segmentor


def test_images_of_equal_size_are_evaluated_together():
    model = Threshold()
    samples = [sample(height, 70) for height in (45, 45, 33, 45, 33, 45)]
    scores = evaluate(model, samples, 3, batch_size=2)
    assert model.seen == [(2, 3, 45, 70), (2, 3, 33, 70), (2, 3, 45, 70)]
    assert scores.confusion.sum() == sum(x.label.numel() for x in samples)


@pytest.mark.parametrize("mode", ["whole", "sliding"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batches_score_as_single_images_do(mode, dtype):
    """Images smaller than the model takes included: what pads one is never seen by another."""
    model = tiny_segmentor().eval().to(dtype)
    sizes = [(70, 100), (20, 90), (70, 100), (5, 6), (20, 90), (70, 100), (5, 6)]
    samples = [x._replace(image=x.image.to(dtype)) for x in (sample(*size) for size in sizes)]
    confusion = ConfusionMatrix(3)
    for x in samples:
        confusion.update(predict_labels(model, x.image, mode=mode, crop=64)[0], x.label)
    for batch_size, ranks in ((4, 1), (2, 3)):
        parts = (samples[rank::ranks] for rank in range(ranks))
        scores = [evaluate(model, part, 3, mode=mode, crop=64, batch_size=batch_size) for part in parts]
        assert torch.equal(sum(x.confusion for x in scores), confusion.compute().confusion)


def test_batches_hold_every_item_once_and_few_items_wait():
    items = [(size, i) for i, size in enumerate([*"abcdefghabcdefgh", *"aaaaab"])]
    taken, seen = [], []
    for batch in batches_of_equal_size((seen.append(x) or x for x in items), 2, lambda item: item[0]):
        assert len(batch) <= 2
        assert len({size for size, _ in batch}) == 1
        assert len(seen) - len(taken) <= 4 * 2
        taken += batch
    assert sorted(taken) == sorted(items)


@pytest.mark.gpu
def test_autocast_changes_few_labels():
    model, samples = tiny_segmentor().cuda(), [sample(70, 100) for _ in range(3)]
    exact, fast = (evaluate(model, samples, 3, device="cuda", amp=amp).confusion for amp in (False, True))
    assert (exact - fast).abs().sum() < 0.05 * exact.sum()


@pytest.mark.parametrize("classes", [3, 40])
def test_sliding_windows_are_those_of_the_reference_implementation(classes):
    """Stride int(2/3 crop), windows cut at the border, softmax summed, argmax."""
    image, crop, stride = torch.randn(1, 3, 150, 190), 90, 60
    model = Threshold(classes).eval()
    total = torch.zeros(1, classes, 150, 190)
    windows = []
    for top in (0, stride, 2 * stride - 2):  # 120 leaves 30 pixels, less than the model takes: it starts at 118
        for left in (0, stride, 2 * stride, 158):
            window = image[:, :, top : min(top + crop, 150), left : min(left + crop, 190)]
            windows.append(tuple(window.shape))
            logits = model(window, kv_source="image")
            probability = F.interpolate(logits, window.shape[2:], mode="bilinear", align_corners=False).softmax(1)
            total[:, :, top : top + window.shape[2], left : left + window.shape[3]] += probability
    model.seen.clear()
    assert torch.equal(predict_labels(model, image, mode="sliding", crop=crop)[0], total.argmax(1))
    assert model.seen == windows
    assert min(min(size[2:]) for size in windows) == model.min_size


@pytest.mark.parametrize("backbone", ["mit_tiny", "timm/test_efficientnet"])
@pytest.mark.parametrize("mode", ["whole", "sliding"])
def test_small_images_are_padded_and_cut(backbone, mode):
    if backbone.startswith("timm"):
        pytest.importorskip("timm", reason="needs the extra timm")
    model = tiny_segmentor(backbone).eval()
    image = torch.randn(1, 3, 5, 40)
    padded = F.pad(image, (0, 0, 0, model.min_size - 5), mode="replicate")
    for whole, part in zip(*(predict_labels(model, x, mode=mode, crop=64) for x in (padded, image)), strict=True):
        assert torch.equal(part, whole[:, :5])
