"""The Triton kernels of grouping and enqueue, interpreted, against the one-at-a-time reference."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from allspark_fast.kernels.semantic_memory import reference
from tests.kernels.triton_checks import checked_memory, exact_bfloat16, uninitialized_memory_is_nan

from allspark_fast.kernels.semantic_memory import kernel  # isort: skip  (skipped above where triton is missing)


pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # how numpy announces a NaN


@pytest.fixture(autouse=True)
def strict_interpreter() -> Iterator[None]:
    with exact_bfloat16(), uninitialized_memory_is_nan():
        yield


def enqueue_inputs(
    batch: int, classes: int, slots: int, tokens: int, channels: int, queue_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    """A memory in its own strides with pointers anywhere, and channels of all, no and unknown classes."""
    queue = torch.randn(tokens, classes, slots).to(queue_dtype).permute(1, 2, 0)
    features = torch.randn(batch, tokens, channels)
    channel_class = torch.randint(-2, classes + 2, (batch, channels))
    return queue, torch.randint(slots, (classes,)), features, channel_class


def assert_equals_the_loop(queue: Tensor, queue_ptr: Tensor, features: Tensor, channel_class: Tensor) -> None:
    expected = queue.clone(), queue_ptr.clone()
    reference.semantic_memory_enqueue(*expected, features, channel_class)
    kernel.semantic_memory_enqueue(queue, queue_ptr, features, channel_class)
    assert torch.equal(queue, expected[0])
    assert torch.equal(queue_ptr, expected[1])


class TestEnqueue:
    """Bit-equal to the sequential loop."""

    @settings(max_examples=60, deadline=None)
    @given(
        batch=st.integers(0, 4),
        classes=st.integers(1, 5),
        slots=st.integers(1, 70),
        tokens=st.integers(1, 20),
        channels=st.integers(1, 40),
        seed=st.integers(0, 2**31),
    )
    def test_any_shape(self, batch: int, classes: int, slots: int, tokens: int, channels: int, seed: int) -> None:
        torch.manual_seed(seed)
        assert_equals_the_loop(*enqueue_inputs(batch, classes, slots, tokens, channels))

    @pytest.mark.parametrize("slots", [3, 64, 100])
    def test_one_class_gets_everything_over_several_steps(self, slots: int) -> None:
        queue, queue_ptr, features, channel_class = enqueue_inputs(2, 3, slots, 5, 50)
        for cls in (1, 1, 2):
            assert_equals_the_loop(queue, queue_ptr, features, torch.full_like(channel_class, cls))

    def test_more_channels_than_one_block(self) -> None:
        assert_equals_the_loop(*enqueue_inputs(3, 2, 700, 2, 700))

    @pytest.mark.parametrize("wrong", [-1, -9, 3, 2**63 - 1, -(2**63)])
    def test_a_pointer_beside_the_memory_is_taken_modulo_its_slots(self, wrong: int) -> None:
        queue, queue_ptr, features, channel_class = enqueue_inputs(2, 4, 3, 5, 9)
        queue_ptr[1] = wrong
        expected = queue.clone(), queue_ptr.remainder(3)
        reference.semantic_memory_enqueue(*expected, features, channel_class)
        with checked_memory():
            kernel.semantic_memory_enqueue(queue, queue_ptr, features, channel_class)
        assert torch.equal(queue, expected[0])
        assert torch.equal(queue_ptr, expected[1])

    @pytest.mark.parametrize("queue_dtype", [torch.float16, torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_casts_as_torch_does(self, dtype: torch.dtype, queue_dtype: torch.dtype) -> None:
        queue, queue_ptr, features, channel_class = enqueue_inputs(2, 3, 8, 5, 9, queue_dtype)
        assert_equals_the_loop(queue, queue_ptr, features.to(dtype), channel_class)

    def test_strides_do_not_matter(self) -> None:
        queue, queue_ptr, features, channel_class = enqueue_inputs(2, 3, 8, 5, 9)
        strided_ptr = torch.stack([queue_ptr, queue_ptr + 100], 1)[:, 0]
        assert_equals_the_loop(
            queue.contiguous(), strided_ptr, features.mT.contiguous().mT, channel_class.mT.contiguous().mT
        )

    def test_bounds_and_races(self) -> None:
        with checked_memory():
            kernel.semantic_memory_enqueue(*enqueue_inputs(3, 4, 70, 19, 43))
            kernel.semantic_memory_enqueue(*enqueue_inputs(2, 1, 5, 3, 1100))


class TestGrouping:
    """Classes equal to the reference's."""

    @settings(max_examples=40, deadline=None)
    @given(
        batch=st.integers(0, 3),
        classes=st.integers(1, 70),
        tokens=st.integers(1, 70),
        channels=st.integers(1, 70),
        seed=st.integers(0, 2**31),
    )
    def test_any_shape(self, batch: int, classes: int, tokens: int, channels: int, seed: int) -> None:
        torch.manual_seed(seed)
        features, class_map = torch.randn(batch, tokens, channels), torch.randn(batch, classes, tokens)
        actual = kernel.channel_semantic_grouping(features, class_map)
        similarity = torch.nn.functional.normalize(class_map.double(), dim=2) @ features.double()
        assert actual.shape == (batch, channels)
        # Up to ties within rounding.
        if batch:
            chosen = similarity.gather(1, actual[:, None])[:, 0]
            assert (chosen >= similarity.amax(1) - 1e-5 * similarity.abs().amax(1)).all()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_equals_the_reference(self, dtype: torch.dtype) -> None:
        features, class_map = torch.randn(2, 289, 40).to(dtype), torch.randn(2, 21, 289)
        expected = reference.channel_semantic_grouping(features, class_map)
        assert torch.equal(kernel.channel_semantic_grouping(features, class_map), expected)

    def test_strides_do_not_matter(self) -> None:
        features, class_map = torch.randn(2, 9, 40), torch.randn(2, 5, 9)
        expected = kernel.channel_semantic_grouping(features, class_map)
        actual = kernel.channel_semantic_grouping(features.mT.contiguous().mT, class_map.mT.contiguous().mT)
        assert torch.equal(actual, expected)

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("where", ["features", "class_map"])
    def test_image_with_a_bad_number_gets_no_class(self, where: str, bad: float) -> None:
        features, class_map = torch.randn(3, 9, 70), torch.randn(3, 5, 9)
        (features if where == "features" else class_map)[1, 4, 3] = bad
        expected = reference.channel_semantic_grouping(features, class_map)
        actual = kernel.channel_semantic_grouping(features, class_map)
        assert (actual[1] == -1).all()
        assert torch.equal(actual, expected)

    def test_empty_class_maps_fall_to_the_first_class(self) -> None:
        assert not kernel.channel_semantic_grouping(torch.randn(1, 9, 5), torch.zeros(1, 4, 9)).any()

    def test_bounds_and_races(self) -> None:
        with checked_memory():
            kernel.channel_semantic_grouping(torch.randn(2, 37, 45), torch.randn(2, 21, 37))
