"""BatchNorm equals torch's; other images on each rank, or such that are not finite: tests/training."""

import pytest
import torch
from torch import nn

from allspark_fast.model.batch_norm import FiniteBatchNorm


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("kind", "shape"), [(nn.BatchNorm2d, (4, 3, 5, 5)), (nn.BatchNorm1d, (4, 3, 5)), (nn.BatchNorm1d, (4, 3))]
)
def test_is_batch_norm_of_all_ranks(kind, shape, ranks, monkeypatch):
    """Ranks hold the same images here, so that a mean over ranks is that of each."""
    monkeypatch.setattr("allspark_fast.model.batch_norm.world_size", lambda: ranks)
    monkeypatch.setattr("allspark_fast.model.batch_norm.all_reduce_mean", lambda x: x)
    ours, theirs = FiniteBatchNorm(3), kind(3)
    for norm in (ours, theirs):
        nn.init.constant_(norm.weight, 3.0)
        nn.init.constant_(norm.bias, 0.5)
    for _ in range(3):
        x = 2 * torch.randn(shape) + 1
        torch.testing.assert_close(ours(x), theirs(torch.cat([x] * ranks))[: len(x)])
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
