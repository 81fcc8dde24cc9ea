"""The Triton kernels of the upsampling operators, interpreted, against the materialising references in float64."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from allspark_fast.kernels.upsample_argmax import reference as argmax_reference
from allspark_fast.kernels.upsample_cross_entropy import reference as loss_reference
from tests.helpers.triton_checks import checked_memory, exact_bfloat16, uninitialized_memory_is_nan

from allspark_fast.kernels.upsample_argmax import kernel as argmax_kernel  # isort: skip  (skipped above without triton)
from allspark_fast.kernels.upsample_cross_entropy import kernel as loss_kernel  # isort: skip


# How numpy announces what masked lanes compute, and NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SIDE = st.tuples(st.integers(1, 5), st.integers(1, 6))
SIZE = st.tuples(st.integers(1, 13), st.integers(1, 15))


@pytest.fixture(autouse=True)
def strict_interpreter() -> Iterator[None]:
    with exact_bfloat16(), uninitialized_memory_is_nan():
        yield


def example(
    batch: int = 2, classes: int = 5, small: tuple[int, int] = (3, 5), large: tuple[int, int] = (9, 13)
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, a target with ignored pixels, and a gradient of the loss."""
    target = torch.randint(classes, (batch, *large))
    return (
        torch.randn(batch, classes, *small),
        target.where(torch.rand(target.shape) > 0.2, 255),
        torch.rand(target.shape),
    )


def strided(logits: Tensor) -> list[Tensor]:
    """The same numbers in other strides."""
    return [
        logits.contiguous(memory_format=torch.channels_last),
        logits.mT.contiguous().mT,
        torch.stack([logits, logits + 9], 4)[..., 0],
    ]


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    scale = expected.abs().max().clamp(min=1).item()
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance * scale)


def assert_loss_is_right(logits: Tensor, target: Tensor, grad: Tensor, tolerance: float = 1e-5) -> None:
    loss, lse = loss_kernel.forward(logits, target, 255)
    grad_logits = loss_kernel.backward(grad, logits, target, lse, 255)
    assert loss.dtype == lse.dtype == torch.float32
    assert grad_logits.dtype == logits.dtype
    assert grad_logits.stride() == torch.empty_like(logits).stride()
    exact = logits.double()
    assert_close(loss, loss_reference.forward(exact, target, 255))
    assert_close(grad_logits, loss_reference.backward(grad.double(), exact, target, 255), tolerance)


class TestLoss:
    """Loss and gradient."""

    @settings(max_examples=10, deadline=None)
    @given(batch=st.integers(0, 2), classes=st.integers(1, 20), small=SIDE, large=SIZE, seed=st.integers(0, 2**31))
    def test_any_size(
        self, batch: int, classes: int, small: tuple[int, int], large: tuple[int, int], seed: int
    ) -> None:
        torch.manual_seed(seed)
        logits, target, grad = example(batch, classes, small, large)
        if batch:
            assert_loss_is_right(logits, target, grad)
        else:
            loss, lse = loss_kernel.forward(logits, target, 255)
            assert loss.shape == lse.shape == target.shape
            assert loss_kernel.backward(grad, logits, target, lse, 255).shape == logits.shape

    @pytest.mark.parametrize("classes", [1, 2, 171])
    def test_class_counts_of_real_data(self, classes: int) -> None:
        assert_loss_is_right(*example(1, classes, (2, 2), (3, 5)))

    def test_more_than_one_block_of_pixels_and_of_cells(self) -> None:
        assert_loss_is_right(*example(1, 3, (2, 40), (3, 150)))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_computed_in_float32(self, dtype: torch.dtype) -> None:
        logits, target, grad = example()
        assert_loss_is_right(logits.to(dtype), target, grad, tolerance=1e-2)

    def test_strides_do_not_matter(self) -> None:
        logits, target, grad = example()
        target, grad = target.mT.contiguous().mT, grad[:1, :1, :1].expand(target.shape)
        expected = loss_kernel.forward(logits, target, 255)
        expected_grad = loss_kernel.backward(grad, logits, target, expected[1], 255)
        for other in strided(logits):
            loss, lse = loss_kernel.forward(other, target, 255)
            assert torch.equal(loss, expected[0])
            assert torch.equal(loss_kernel.backward(grad, other, target, lse, 255), expected_grad)

    def test_all_ignored(self) -> None:
        logits, target, grad = example()
        target.fill_(255)
        loss, lse = loss_kernel.forward(logits, target, 255)
        assert not loss.any()
        assert not loss_kernel.backward(grad, logits, target, lse, 255).any()

    def test_large_logits_do_not_overflow(self) -> None:
        logits, target, grad = example()
        assert_loss_is_right(logits * 1e4, target, grad)

    @pytest.mark.parametrize("wrong", [-1, 5])
    def test_target_that_is_no_class_shows(self, wrong: int) -> None:
        logits, target, grad = example()
        target[1, 4, 6] = wrong
        loss, lse = loss_kernel.forward(logits, target, 255)
        assert loss.isnan().nonzero().tolist() == [[1, 4, 6]]
        assert loss_kernel.backward(grad, logits, target, lse, 255)[1].isnan().any()

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_bad_logits_show(self, bad: float) -> None:
        logits, target, _ = example()
        logits[1, 2, 0, 0] = bad
        target[1, 0, 0] = 0
        loss, _ = loss_kernel.forward(logits, target, 255)
        assert loss[1, 0, 0].isnan()
        assert loss[0].isfinite().all()

    @pytest.mark.parametrize("small", [(3, 5), (11, 14), (1, 1)])
    def test_bounds_and_races(self, small: tuple[int, int]) -> None:
        logits, target, grad = example(2, 11, small, (7, 9))
        with checked_memory():
            _, lse = loss_kernel.forward(logits, target, 255)
            loss_kernel.backward(grad, logits, target, lse, 255)


class TestArgmax:
    """Labels and confidence."""

    @settings(max_examples=10, deadline=None)
    @given(batch=st.integers(0, 2), classes=st.integers(1, 20), small=SIDE, size=SIZE, seed=st.integers(0, 2**31))
    def test_any_size(self, batch: int, classes: int, small: tuple[int, int], size: tuple[int, int], seed: int) -> None:
        torch.manual_seed(seed)
        logits = torch.randn(batch, classes, *small)
        labels, confidence = argmax_kernel.upsample_argmax(logits, size)
        assert labels.shape == confidence.shape == (batch, *size)
        if batch:
            expected = argmax_reference.upsample_argmax(logits.double(), size)
            assert torch.equal(labels, expected[0])
            assert_close(confidence, expected[1])

    def test_more_than_one_block_of_pixels(self) -> None:
        logits = torch.randn(1, 171, 2, 30)
        labels, confidence = argmax_kernel.upsample_argmax(logits, (3, 130))
        expected = argmax_reference.upsample_argmax(logits.double(), (3, 130))
        assert torch.equal(labels, expected[0])
        assert_close(confidence, expected[1])

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_and_strides(self, dtype: torch.dtype) -> None:
        logits = torch.randn(2, 11, 4, 6).to(dtype)
        expected = argmax_kernel.upsample_argmax(logits.float(), (9, 13))
        for other in [logits, *strided(logits)]:
            for actual, exact in zip(argmax_kernel.upsample_argmax(other, (9, 13)), expected, strict=True):
                assert torch.equal(actual, exact)

    def test_the_first_maximum_wins(self) -> None:
        logits = torch.zeros(1, 20, 2, 2)
        logits[:, [3, 12, 19]] = 1.0
        labels, _ = argmax_kernel.upsample_argmax(logits, (3, 3))
        assert (labels == 3).all()

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_numbers_that_are_not_finite(self, bad: float) -> None:
        logits = torch.randn(1, 20, 3, 3)
        logits[0, [12, 17], 0, 0] = bad
        labels, confidence = argmax_kernel.upsample_argmax(logits, (3, 3))
        expected = argmax_reference.upsample_argmax(logits, (3, 3))
        assert labels[0, 0, 0] == expected[0][0, 0, 0] == 12
        assert confidence[0, 0, 0].isnan()
        torch.testing.assert_close(confidence[0, 1:], expected[1][0, 1:])

    def test_bounds_and_races(self) -> None:
        with checked_memory():
            argmax_kernel.upsample_argmax(torch.randn(2, 11, 3, 5), (7, 9))
            argmax_kernel.upsample_argmax(torch.randn(1, 3, 9, 70), (2, 4))
