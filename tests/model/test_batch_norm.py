"""BatchNorm equals torch's; on real ranks it is tested in tests/training/test_distributed.py."""

import math

import pytest
import torch
from torch import nn

from allspark_fast.model.batch_norm import FiniteBatchNorm


@pytest.mark.parametrize(
    ("ours", "theirs", "shape"),
    [
        (FiniteBatchNorm(3), nn.BatchNorm2d(3), (4, 3, 5, 5)),
        (FiniteBatchNorm(3), nn.BatchNorm1d(3), (4, 3, 5)),
        (FiniteBatchNorm(3), nn.BatchNorm1d(3), (4, 3)),
    ],
)
def test_is_batch_norm(ours: nn.Module, theirs: nn.Module, shape: tuple[int, ...]) -> None:
    for _ in range(3):
        x = torch.randn(shape)
        torch.testing.assert_close(ours(x), theirs(x))
    for name, statistic in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], statistic)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("shape", [(4, 3, 5, 5), (4, 3)])
def test_over_ranks_is_that_of_the_whole_batch(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two ranks in one process: this one, and one whose mean and variance are told when they are asked for."""
    own, other = torch.randn(shape), 2 * torch.randn(shape) + 1
    kind = (FiniteBatchNorm, nn.BatchNorm2d) if len(shape) == 4 else (FiniteBatchNorm, nn.BatchNorm1d)
    ours, theirs = (x(3) for x in kind)
    for norm in (ours, theirs):
        nn.init.constant_(norm.weight, 3.0)
        nn.init.constant_(norm.bias, 0.5)
    var, mean = torch.var_mean(other, [axis for axis in range(len(shape)) if axis != 1], correction=0)
    means = []

    def all_reduce_mean(x: torch.Tensor) -> torch.Tensor:
        means.append((x + (var + (mean - means[0]).square() if means else mean)) / 2)
        return means[-1]

    monkeypatch.setattr("allspark_fast.model.batch_norm.world_size", lambda: 2)
    monkeypatch.setattr("allspark_fast.model.batch_norm.all_reduce_mean", all_reduce_mean)
    expected = theirs(torch.cat([own, other]))[: len(own)]
    actual = ours(own)
    torch.testing.assert_close(actual, expected)
    for name, statistic in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], statistic)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_running_statistics_skip_what_is_not_finite(bad: float) -> None:
    norm = FiniteBatchNorm(3)
    norm(torch.randn(4, 3, 5, 5))
    before = {name: x.clone() for name, x in norm.state_dict().items()}
    x = torch.randn(4, 3, 5, 5)
    x[1, 1, 2, 2] = bad
    norm(x)
    for name in ("running_mean", "running_var"):
        after = norm.state_dict()[name]
        assert after[1] == before[name][1]
        assert (after[[0, 2]] != before[name][[0, 2]]).all()
