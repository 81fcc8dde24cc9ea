"""Upsampling + argmax against torch's two functions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck
from torch.nn.functional import interpolate

from allspark_fast.kernels.bilinear import BAND_BYTES
from allspark_fast.kernels.upsample_argmax import reference, upsample_argmax
from bench.harness import peak_bytes
from tests.helpers.compare import assert_close, strided
from tests.helpers.kernels import MOSTLY_TORCH, use_kernels


@settings(max_examples=40, deadline=None)
@given(
    kernels=MOSTLY_TORCH,
    sizes=st.tuples(st.integers(0, 2), st.integers(1, 20), st.integers(1, 6), st.integers(1, 6)),
    size=st.tuples(st.integers(1, 13), st.integers(1, 19)),
    seed=st.integers(0, 2**31),
)
def test_any_size(kernels: str, sizes: tuple[int, ...], size: tuple[int, int], seed: int) -> None:
    torch.manual_seed(seed)
    logits = torch.randn(sizes)
    with use_kernels(kernels):
        labels, confidence = upsample_argmax(logits, size)
    assert labels.shape == confidence.shape == (len(logits), *size)
    if len(logits):
        probability = interpolate(logits.double(), size, mode="bilinear", align_corners=False).softmax(1)
        assert_close([confidence, probability.gather(1, labels[:, None])[:, 0].float()], 2 * [probability.amax(1)])


@pytest.mark.parametrize("classes", [4, 20, 171])
def test_the_first_maximum_wins(kernels: str, classes: int) -> None:
    logits = torch.zeros(1, classes, 2, 2)
    labels, confidence = upsample_argmax(logits, (3, 3))
    assert (labels == 0).all()
    torch.testing.assert_close(confidence, torch.full((1, 3, 3), 1 / classes))
    logits[:, [1, 3, classes - 1]] = 1
    assert (upsample_argmax(logits, (3, 3))[0] == 1).all()


@pytest.mark.parametrize("classes", [2, 19, 171])
def test_equals_the_reference_in_several_bands(classes: int) -> None:
    logits = torch.randn(2, classes, 17, 33, dtype=torch.float64)
    expected = reference.upsample_argmax(logits, (65, 129))
    labels, confidence = upsample_argmax(logits.contiguous(memory_format=torch.channels_last), (65, 129))
    assert torch.equal(labels, expected[0])
    assert_close([confidence], expected[1:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_and_strides(kernels: str, dtype: torch.dtype) -> None:
    """Half precision is computed in float32; rows are longer than a block of pixels."""
    logits = torch.randn(1, 20, 2, 30).to(dtype)
    expected = reference.upsample_argmax(logits.double(), (3, 130))
    for other in (logits, *strided(logits)):
        labels, confidence = upsample_argmax(other, (3, 130))
        assert torch.equal(labels, expected[0])
        assert confidence.dtype == torch.promote_types(dtype, torch.float32)
        assert_close([confidence], expected[1:])


@pytest.mark.parametrize("classes", [5, 40])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_logits(kernels: str, bad: float, classes: int) -> None:
    logits = torch.randn(1, classes, 3, 3)
    logits[0, [2, 4], 0, 0] = bad
    labels, confidence = upsample_argmax(logits, (6, 6))
    expected = reference.upsample_argmax(logits, (6, 6))
    assert torch.equal(labels, expected[0])
    assert labels[0, 0, 0] == 2
    assert confidence[0, 0, 0].isnan()
    assert_close([confidence], expected[1:])


def test_memory_is_bounded() -> None:
    logits = torch.randn(2, 40, 65, 65)
    results = 2 * 257 * 257 * 12
    peak = peak_bytes(lambda: upsample_argmax(logits, (257, 257)))
    assert peak <= results + logits.nbytes + 5 * BAND_BYTES
    assert peak < 2 * 257 * 257 * 40 * 4 / 2  # half of the logits at full resolution


def test_opcheck_and_no_gradient() -> None:
    logits = torch.randn(2, 5, 4, 6, requires_grad=True)
    opcheck(torch.ops.allspark_fast.upsample_argmax.default, (logits.detach(), [13, 17]))
    assert not any(x.requires_grad for x in upsample_argmax(logits, (13, 17)))
