"""Weights of linear resizing against torch.nn.functional.interpolate."""

import pytest
import torch
from torch.nn.functional import interpolate

from allspark_fast.kernels.bilinear import linear_matrix, linear_taps


@pytest.mark.parametrize("source", [1, 2, 5, 17, 129])
@pytest.mark.parametrize("target", [1, 2, 4, 17, 51, 513])
def test_matrix_is_that_of_interpolate(source: int, target: int) -> None:
    identity = torch.eye(source, dtype=torch.float64)
    expected = interpolate(identity[None], target, mode="linear", align_corners=False)[0].mT
    torch.testing.assert_close(linear_matrix(source, target, identity), expected)


def test_weights_are_exact_in_single_precision() -> None:
    _, single = linear_taps(129, 4097, torch.empty(()))
    _, double = linear_taps(129, 4097, torch.empty((), dtype=torch.float64))
    assert torch.equal(single[:, 1], double[:, 1].float())
