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
    """A queue in the memory's own strides, pointers anywhere, features, and channels of all, no and unknown classes.

    Some features are infinite: the enqueue stores what it gets.
    """
    queue = torch.randn(tokens, classes, slots).permute(1, 2, 0)
    channel_class = torch.randint(-2, classes + 2, (batch, channels))
    features = torch.randn(batch, tokens, channels)
    return queue, torch.randint(slots, (classes,)), features.masked_fill(features > 1, math.inf), channel_class


def assert_equals_the_loop(queue, queue_ptr, *rest, enqueue=semantic_memory_enqueue):
    """Bit for bit."""
    expected = queue.clone(), queue_ptr.remainder(queue.shape[1])
    reference.semantic_memory_enqueue(*expected, *rest)
    enqueue(queue, queue_ptr, *rest)
    assert torch.equal(queue, expected[0])
    assert torch.equal(queue_ptr, expected[1])


class TestEnqueue:
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

    @pytest.mark.parametrize("slots", [3, 100, 700])
    def test_more_channels_than_a_block_and_most_memories_hold(self, kernels, slots):
        assert_equals_the_loop(*example(3, 2, slots, 2, 700))

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


class TestGrouping:
    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, 3), st.tuples(*3 * [st.integers(1, 70)]), st.sampled_from(DTYPES), st.integers(0, 2**31))
    def test_any_shape(self, batch, sizes, dtype, seed):
        torch.manual_seed(seed)
        classes, tokens, channels = sizes
        features, class_map = torch.randn(batch, tokens, channels).to(dtype), torch.randn(batch, classes, tokens)
        actual = channel_semantic_grouping(features, class_map)
        assert actual.shape == (batch, channels)
        # A tie to rounding may go either way: compare the similarity reached.
        similarity = normalize(class_map.double(), dim=2) @ features.double()
        reached = similarity.gather(1, actual[:, None])[:, 0]
        assert (reached >= similarity.amax(1) - 1e-5 * similarity.abs().amax(1)).all()

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("where", ["features", "class_map"])
    def test_an_image_with_a_non_finite_number_gets_no_class(self, where, bad):
        features, class_map = torch.randn(3, 9, 70), torch.randn(3, 5, 9)
        (features if where == "features" else class_map)[1, 4, 3] = bad
        class_map[2] = 0  # is no mistake
        actual = channel_semantic_grouping(features, class_map)
        assert (actual[1] == -1).all()
        assert (actual[2] == 0).all()
        assert torch.equal(actual, reference.channel_semantic_grouping(features, class_map))
