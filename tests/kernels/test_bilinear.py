"""Weights of linear resizing against torch.nn.functional.interpolate."""

import pytest
import torch
from torch.nn.functional import interpolate

from allspark_fast.kernels.bilinear import linear_matrix, linear_taps


@pytest.mark.parametrize("source", [1, 2, 5, 17, 129])
@pytest.mark.parametrize("target", [1, 2, 4, 17, 51, 513])
def test_weights_are_those_of_interpolate(source, target):
    x = torch.randn(3, source, dtype=torch.float64)
    index, weight = linear_taps(source, target, x)
    expected = interpolate(x[None], target, mode="linear", align_corners=False)[0]
    torch.testing.assert_close((x[:, index] * weight).sum(2), expected)
    torch.testing.assert_close(x @ linear_matrix(source, target, x).mT, expected)


def test_weights_are_exact_in_single_precision():
    _, single = linear_taps(129, 4097, torch.empty(()))
    _, double = linear_taps(129, 4097, torch.empty((), dtype=torch.float64))
    assert torch.equal(single[:, 1], double[:, 1].float())
