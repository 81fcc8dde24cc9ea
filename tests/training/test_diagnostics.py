import pytest
import torch

from allspark_fast.data.loader import SemiBatch
from allspark_fast.inference.metrics import ConfusionMatrix
from allspark_fast.training.diagnostics import class_record, find_problems, pseudo_label_record


@pytest.mark.parametrize("hidden", [True, False])
def test_accuracy_and_coverage_of_pseudo_labels(hidden):
    """Of six crops of 2 x 4 pixels, of which the last column is padding; certain, except in the last crop."""
    confidence, valid = torch.ones(6, 2, 4), torch.ones(6, 2, 4, dtype=torch.bool)
    confidence[5] = 0.5
    valid[:, :, 3] = False
    image, pseudo_label = torch.zeros(6, 3, 2, 4), torch.ones(6, 2, 4, dtype=torch.int64)
    truth = pseudo_label.clone()
    truth[4:] = 0  # beyond the four that are pictured
    pseudo_label[5] = 0
    truth[~valid] = truth[0, 0, 0] = 255
    for known in (truth,) if hidden else (None, torch.full_like(truth, 255)):
        batch = SemiBatch(image, valid.long(), image, valid, known)
        expected = {"pseudo_label_coverage": pytest.approx(5 / 6), "pseudo_label_class_coverage": [0, 1, None]}
        if hidden:
            expected["pseudo_label_accuracy"] = pytest.approx((5 * 6 - 1) / (6 * 6 - 1))
            expected["pseudo_label_recall"] = [0.5, 1, None]
        assert pseudo_label_record(pseudo_label, confidence, 3, batch) == expected


def test_shares_of_classes_since_they_were_last_read_and_use_of_the_memory():
    pixels = torch.tensor([[30.0, 10.0, 0.0], [75.0, 5.0, 0.0], [75.0, 1.0, 0.0]])
    assert class_record(pixels, torch.zeros(0)) == {  # no bottleneck
        "label_share": [0.75, 0.25, 0],
        "pseudo_label_share": [0.9375, 0.0625, 0],
        "pseudo_label_kept": [1, 0.2, None],
    }
    assert class_record(pixels, torch.tensor([3, 0, 4])) == {"memory_received": [3, 0, 4]}


def problems(*pixels: tuple[int, int, int], best: float = 0.0, loss: float = 1.0, **record: object) -> dict[str, str]:
    """What is said of so many pixels of a true class with a prediction."""
    matrix = ConfusionMatrix(2)
    for true, predicted, count in pixels:
        matrix.update(torch.full((count,), predicted), torch.full((count,), true))
    return find_problems(record, matrix.compute(), ("ground", "object"), best=best, loss=loss)


def test_no_problem_in_a_good_run_nor_of_classes_without_labels():
    shares = {"label_share": [0.95, 0.05], "pseudo_label_share": [0.97, 0.03], "pseudo_label_coverage": 1.0}
    assert problems((0, 0, 950), (1, 1, 40), (1, 0, 10), best=0.9, loss=0.1, **shares) == {}
    assert problems((0, 0, 9), label_share=[1, 0], pseudo_label_share=[1, 0]) == {}


def test_a_collapse_to_one_class():
    shares = {"label_share": [0.95, 0.05], "pseudo_label_share": [0.999, 0.001], "pseudo_label_coverage": 1.0}
    found = problems((0, 0, 950), (1, 0, 49), (1, 1, 1), best=0.8, loss=0.001, **shares)
    assert list(found) == ["labels object", "labels", "predictions object", "certain", "below"]
    assert "almost no pseudo labels: 0.10% of them, but 5.00% of the labels" in found["labels object"]
    assert "object is almost never predicted" in found["predictions object"]
    assert "vanishes (0.0010)" in found["certain"]
    assert found["below"].endswith("the best was 80.0")
