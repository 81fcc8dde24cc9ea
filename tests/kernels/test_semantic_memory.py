"""Grouping and enqueue against the one-at-a-time reference."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from allspark_fast.kernels.semantic_memory import channel_semantic_grouping, reference, semantic_memory_enqueue
from tests.helpers.compare import strided
from tests.helpers.kernels import MOSTLY_TORCH, use_kernels

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def example(batch=2, classes=3, slots=8, tokens=5, channels=9):
    """A queue in the memory's own strides, pointers anywhere, features, and channels of all, no and unknown classes."""
    queue = torch.randn(tokens, classes, slots).permute(1, 2, 0)
    channel_class = torch.randint(-2, classes + 2, (batch, channels))
    return queue, torch.randint(slots, (classes,)), torch.randn(batch, tokens, channels), channel_class


def assert_equals_the_loop(queue, queue_ptr, *rest, enqueue=semantic_memory_enqueue):
    """Bit for bit."""
    expected = queue.clone(), queue_ptr.remainder(queue.shape[1])
    reference.semantic_memory_enqueue(*expected, *rest)
    enqueue(queue, queue_ptr, *rest)
    assert torch.equal(queue, expected[0])
    assert torch.equal(queue_ptr, expected[1])


class TestEnqueue:
    """Ring buffers."""

    @settings(max_examples=150, deadline=None)
    @given(
        kernels=MOSTLY_TORCH,
        sizes=st.tuples(*(st.integers(*limits) for limits in ((0, 4), (1, 5), (1, 70), (1, 20), (0, 40)))),
        seed=st.integers(0, 2**31),
    )
    def test_any_shape(self, kernels, sizes, seed):
        torch.manual_seed(seed)
        with use_kernels(kernels):
            assert_equals_the_loop(*example(*sizes))

    @pytest.mark.parametrize("slots", [3, 64, 100])
    def test_one_class_gets_everything_over_several_steps(self, kernels, slots):
        queue, queue_ptr, features, channel_class = example(2, 3, slots, 5, 50)
        for cls in (1, 1, 2):
            assert_equals_the_loop(queue, queue_ptr, features, torch.full_like(channel_class, cls))

    def test_more_channels_than_one_block(self, kernels):
        assert_equals_the_loop(*example(3, 2, 700, 2, 700))

    @pytest.mark.parametrize("queue_dtype", DTYPES)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_casts_as_torch_does(self, kernels, dtype, queue_dtype):
        queue, queue_ptr, features, channel_class = example()
        assert_equals_the_loop(queue.to(queue_dtype), queue_ptr, features.to(dtype), channel_class)

    def test_any_strides(self, kernels):
        queue, queue_ptr, features, channel_class = example()
        strided_ptr = torch.stack([queue_ptr, queue_ptr + 100], 1)[:, 0]
        for other in strided(features):
            assert_equals_the_loop(queue.contiguous(), strided_ptr, other, strided(channel_class)[0])

    @pytest.mark.parametrize("wrong", [-1, -9, 3, 2**63 - 1, -(2**63)])
    @pytest.mark.parametrize("kernels", ["triton"], indirect=True)
    def test_the_kernel_takes_pointers_modulo_the_slots(self, kernels, wrong):
        """On a GPU; on the CPU such pointers are refused."""
        from allspark_fast.kernels.semantic_memory import kernel  # noqa: PLC0415 needs triton

        queue, queue_ptr, features, channel_class = example(slots=3)
        queue_ptr[1] = wrong
        assert_equals_the_loop(queue, queue_ptr, features, channel_class, enqueue=kernel.semantic_memory_enqueue)

    def test_a_valid_class_stores_the_channel_unchanged(self, kernels):
        queue, pointer = torch.zeros(1, 2, 2), torch.zeros(1, dtype=torch.int64)
        semantic_memory_enqueue(queue, pointer, torch.tensor([[[1.0], [math.inf]]]), torch.zeros(1, 1).long())
        assert queue[0].tolist() == [[1.0, math.inf], [0.0, 0.0]]


class TestGrouping:
    """Classes of channels."""

    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, 3), st.tuples(*3 * [st.integers(1, 70)]), st.integers(0, 2**31))
    def test_any_shape(self, batch, sizes, seed):
        torch.manual_seed(seed)
        classes, tokens, channels = sizes
        features, class_map = torch.randn(batch, tokens, channels), torch.randn(batch, classes, tokens)
        actual = channel_semantic_grouping(features, class_map)
        assert actual.shape == (batch, channels)
        # A tie to rounding may go either way: compare the similarity reached.
        similarity = normalize(class_map.double(), dim=2) @ features.double()
        reached = similarity.gather(1, actual[:, None])[:, 0]
        assert (reached >= similarity.amax(1) - 1e-5 * similarity.abs().amax(1)).all()

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_equals_the_reference(self, dtype):
        features, class_map = torch.randn(2, 289, 40).to(dtype), torch.randn(2, 21, 289) * torch.arange(1, 22)[:, None]
        expected = reference.channel_semantic_grouping(features, class_map)
        assert torch.equal(channel_semantic_grouping(features, class_map), expected)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("where", ["features", "class_map"])
    def test_an_image_with_a_non_finite_number_gets_no_class(self, where, bad):
        features, class_map = torch.randn(3, 9, 70), torch.randn(3, 5, 9)
        (features if where == "features" else class_map)[1, 4, 3] = bad
        actual = channel_semantic_grouping(features, class_map)
        assert (actual[1] == -1).all()
        assert torch.equal(actual, reference.channel_semantic_grouping(features, class_map))

    def test_a_class_map_of_zeros_is_fine(self):
        assert (channel_semantic_grouping(torch.randn(1, 9, 16), torch.zeros(1, 4, 9)) == 0).all()
