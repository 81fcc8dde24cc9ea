"""BatchNorm as torch's, whose running statistics survive a bad batch; tests/test_distributed.py has several ranks."""

import math

import pytest
import torch
from torch import nn

from allspark_fast.model.batch_norm import FiniteBatchNorm1d, FiniteBatchNorm2d


@pytest.mark.parametrize(
    ("ours", "theirs", "shape"),
    [
        (FiniteBatchNorm2d(3), nn.BatchNorm2d(3), (4, 3, 5, 5)),
        (FiniteBatchNorm1d(3), nn.BatchNorm1d(3), (4, 3, 5)),
        (FiniteBatchNorm1d(3), nn.BatchNorm1d(3), (4, 3)),
    ],
)
def test_is_batch_norm(ours: nn.Module, theirs: nn.Module, shape: tuple[int, ...]) -> None:
    for _ in range(3):
        x = torch.randn(shape)
        torch.testing.assert_close(ours(x), theirs(x))
    for name, statistic in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], statistic)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_running_statistics_skip_what_is_not_finite(bad: float) -> None:
    norm = FiniteBatchNorm2d(3)
    norm(torch.randn(4, 3, 5, 5))
    before = {name: x.clone() for name, x in norm.state_dict().items()}
    x = torch.randn(4, 3, 5, 5)
    x[1, 1, 2, 2] = bad
    norm(x)
    for name in ("running_mean", "running_var"):
        after = norm.state_dict()[name]
        assert after[1] == before[name][1]
        assert (after[[0, 2]] != before[name][[0, 2]]).all()
