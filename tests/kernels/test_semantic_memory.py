"""Grouping and enqueue against the one-at-a-time reference."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from allspark_fast.kernels.semantic_memory import channel_semantic_grouping, reference, semantic_memory_enqueue
from tests.kernels.forbid_sync import forbid_sync


def memory(classes: int, slots: int, tokens: int) -> tuple[Tensor, Tensor]:
    """A queue in the memory's own strides, and pointers anywhere."""
    return torch.randn(tokens, classes, slots).permute(1, 2, 0), torch.randint(slots, (classes,))


class TestEnqueue:
    """Ring buffers."""

    @settings(max_examples=150, deadline=None)
    @given(
        classes=st.integers(1, 5),
        slots=st.integers(1, 6),
        tokens=st.integers(1, 4),
        batch=st.integers(0, 4),
        channels=st.integers(0, 9),
        seed=st.integers(0, 2**31),
    )
    def test_equals_the_loop_bit_for_bit(
        self, classes: int, slots: int, tokens: int, batch: int, channels: int, seed: int
    ) -> None:
        torch.manual_seed(seed)
        queue, pointer = memory(classes, slots, tokens)
        features = torch.randn(batch, tokens, channels)
        channel_class = torch.randint(-2, classes + 2, (batch, channels))
        expected = queue.clone(), pointer.clone()
        reference.semantic_memory_enqueue(*expected, features, channel_class)
        semantic_memory_enqueue(queue, pointer, features, channel_class)
        assert torch.equal(queue, expected[0])
        assert torch.equal(pointer, expected[1])

    def test_wraps_around_and_keeps_the_last(self) -> None:
        queue, pointer = torch.zeros(2, 3, 1), torch.tensor([2, 0])
        features = torch.arange(1.0, 8.0).view(1, 1, 7)
        semantic_memory_enqueue(queue, pointer, features, torch.tensor([[0, 0, 1, 0, 0, 0, -1]]))
        # Class 0 receives 1 2 4 5 6 from slot 2 on: 5 and 6 overwrite 1 and 2.
        assert queue[..., 0].tolist() == [[6.0, 4.0, 5.0], [3.0, 0.0, 0.0]]
        assert pointer.tolist() == [1, 1]

    def test_casts_to_the_dtype_of_the_queue(self) -> None:
        queue, pointer = torch.zeros(1, 2, 3), torch.zeros(1, dtype=torch.int64)
        features = torch.randn(1, 3, 2, dtype=torch.bfloat16)
        semantic_memory_enqueue(queue, pointer, features, torch.zeros(1, 2, dtype=torch.int64))
        assert torch.equal(queue[0].mT, features[0].float())

    def test_strides_of_the_queue_do_not_matter(self) -> None:
        queue, pointer = memory(3, 4, 5)
        other, other_pointer = queue.contiguous(), pointer.clone()
        features, channel_class = torch.randn(2, 5, 6).mT.contiguous().mT, torch.randint(3, (2, 6))
        semantic_memory_enqueue(queue, pointer, features, channel_class)
        semantic_memory_enqueue(other, other_pointer, features, channel_class)
        assert torch.equal(queue, other)

    def test_no_gradient_and_no_host_sync(self) -> None:
        queue, pointer = memory(3, 4, 5)
        features = torch.randn(2, 5, 6, requires_grad=True)
        with forbid_sync():
            semantic_memory_enqueue(queue, pointer, features, torch.randint(3, (2, 6)))
        assert not queue.requires_grad

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_what_is_not_finite_is_kept_out_by_its_class(self, bad: float) -> None:
        queue, pointer = memory(3, 4, 5)
        features, class_map = torch.randn(2, 5, 2), torch.randn(2, 3, 5)
        features[0, 3, 1] = bad
        channel_class = channel_semantic_grouping(features, class_map)
        expected = queue.clone(), pointer.clone()
        reference.semantic_memory_enqueue(*expected, features[1:], channel_class[1:])
        semantic_memory_enqueue(queue, pointer, features, channel_class)
        assert torch.equal(queue, expected[0])
        assert torch.equal(pointer, expected[1])

    def test_a_valid_class_stores_the_channel_as_it_is(self) -> None:
        queue, pointer = torch.zeros(1, 2, 2), torch.zeros(1, dtype=torch.int64)
        semantic_memory_enqueue(queue, pointer, torch.tensor([[[1.0], [math.inf]]]), torch.zeros(1, 1).long())
        assert queue[0].tolist() == [[1.0, math.inf], [0.0, 0.0]]

    def test_opcheck_and_compile(self) -> None:
        queue, pointer = memory(3, 4, 5)
        features, channel_class = torch.randn(2, 5, 6), torch.randint(3, (2, 6))
        op = torch.ops.allspark_fast.semantic_memory_enqueue.default
        opcheck(op, (queue.clone(), pointer.clone(), features, channel_class))
        expected = queue.clone(), pointer.clone()
        semantic_memory_enqueue(*expected, features, channel_class)
        compiled = torch.compile(semantic_memory_enqueue, fullgraph=True, backend="aot_eager")
        compiled(queue, pointer, features, channel_class)
        assert torch.equal(queue, expected[0])
        assert torch.equal(pointer, expected[1])


class TestGrouping:
    """Classes of channels."""

    @settings(max_examples=60, deadline=None)
    @given(
        batch=st.integers(1, 3),
        classes=st.integers(1, 7),
        tokens=st.integers(1, 12),
        channels=st.integers(1, 9),
        seed=st.integers(0, 2**31),
    )
    def test_equals_cosine_similarity(self, batch: int, classes: int, tokens: int, channels: int, seed: int) -> None:
        torch.manual_seed(seed)
        features, class_map = torch.randn(batch, tokens, channels), torch.randn(batch, classes, tokens)
        expected = reference.channel_semantic_grouping(features, class_map)
        actual = channel_semantic_grouping(features, class_map)
        # A tie to rounding may go either way: compare the similarity reached.
        similarity = torch.einsum("bkn,bnc->bkc", class_map / class_map.norm(dim=2, keepdim=True), features)
        reached = [similarity.gather(1, x[:, None]) for x in (actual, expected)]
        torch.testing.assert_close(*reached, rtol=1e-5, atol=1e-5)

    def test_a_scaled_class_map_changes_nothing(self) -> None:
        features, class_map = torch.randn(2, 9, 16), torch.randn(2, 4, 9)
        scaled = class_map * torch.tensor([0.1, 1.0, 10.0, 100.0])[:, None]
        assert torch.equal(channel_semantic_grouping(features, class_map), channel_semantic_grouping(features, scaled))

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("where", ["features", "class_map"])
    def test_images_that_are_not_finite_get_no_class(self, bad: float, where: str) -> None:
        features, class_map = torch.randn(3, 9, 16), torch.randn(3, 4, 9)
        {"features": features, "class_map": class_map}[where][1, 2, 3] = bad
        channel_class = channel_semantic_grouping(features, class_map)
        assert (channel_class[1] == -1).all()
        assert (channel_class[[0, 2]] >= 0).all()
        assert torch.equal(channel_class, reference.channel_semantic_grouping(features, class_map))

    def test_a_class_map_of_zeros_is_fine(self) -> None:
        channel_class = channel_semantic_grouping(torch.randn(1, 9, 16), torch.zeros(1, 4, 9))
        assert (channel_class == 0).all()

    def test_no_host_sync(self) -> None:
        with forbid_sync():
            channel_semantic_grouping(torch.randn(2, 9, 16), torch.randn(2, 4, 9))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_opcheck(self, dtype: torch.dtype) -> None:
        arguments = (torch.randn(2, 9, 5, dtype=dtype), torch.randn(2, 4, 9, dtype=dtype))
        opcheck(torch.ops.allspark_fast.channel_semantic_grouping.default, arguments)

    def test_autocast_does_not_change_the_arithmetic(self) -> None:
        features, class_map = torch.randn(2, 49, 64), torch.randn(2, 8, 49)
        expected = channel_semantic_grouping(features, class_map)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(channel_semantic_grouping(features, class_map), expected)


GROUPING = {"features": torch.ones(2, 5, 6), "class_map": torch.ones(2, 3, 5)}
ENQUEUE = {
    "queue": torch.ones(3, 4, 5),
    "queue_ptr": torch.zeros(3, dtype=torch.int64),
    "features": torch.ones(2, 5, 6),
    "channel_class": torch.zeros(2, 6, dtype=torch.int64),
}
BAD_GROUPING = {
    "features is no tensor": ({"features": None}, TypeError, "features must be a tensor"),
    "features dtype": ({"features": torch.ones(2, 5, 6).int()}, TypeError, "features must have dtype"),
    "features axes": ({"features": torch.ones(5, 6)}, ValueError, r"features must have shape \(B, N, C\)"),
    "tokens": ({"class_map": torch.ones(2, 3, 4)}, ValueError, r"class_map must have shape .* \(2, 3, 5\)"),
    "batch": ({"class_map": torch.ones(1, 3, 5)}, ValueError, "class_map must have shape"),
    "no classes": ({"class_map": torch.ones(2, 0, 5)}, ValueError, "class_map has K = 0"),
    "device": ({"class_map": torch.ones(2, 3, 5, device="meta")}, ValueError, "class_map is on meta"),
}
BAD_ENQUEUE = {
    "queue dtype": ({"queue": torch.ones(3, 4, 5).int()}, TypeError, "queue must have dtype"),
    "no slots": ({"queue": torch.ones(3, 0, 5)}, ValueError, "queue has S = 0"),
    "shared slots": ({"queue": torch.ones(3, 1, 5).expand(3, 4, 5)}, ValueError, "queue has strides .* clone"),
    "windows": ({"queue": torch.ones(3, 8).unfold(1, 5, 1)}, ValueError, "queue has strides .* clone"),
    "shared pointers": ({"queue_ptr": torch.zeros(1).long().expand(3)}, ValueError, "queue_ptr has strides .* clone"),
    "a pointer too far": ({"queue_ptr": torch.tensor([0, 4, 0])}, ValueError, r"holds 4, expected slots in \[0, 4\)"),
    "a negative pointer": ({"queue_ptr": torch.tensor([0, 0, -1])}, ValueError, "queue_ptr holds -1"),
    "pointer dtype": ({"queue_ptr": torch.zeros(3)}, TypeError, "queue_ptr must have dtype int64"),
    "pointer length": ({"queue_ptr": torch.zeros(4).long()}, ValueError, r"queue_ptr must have shape .* \(3,\)"),
    "tokens": ({"features": torch.ones(2, 4, 6)}, ValueError, r"features must have shape .* \(2, 5, 6\)"),
    "class dtype": ({"channel_class": torch.zeros(2, 6)}, TypeError, "channel_class must have dtype int64"),
    "class shape": ({"channel_class": torch.zeros(2, 5).long()}, ValueError, "channel_class must have shape"),
    "device": ({"features": torch.ones(2, 5, 6, device="meta")}, ValueError, "features is on meta"),
}


@pytest.mark.parametrize("case", BAD_GROUPING)
def test_bad_arguments_of_grouping_are_named(case: str) -> None:
    change, error, message = BAD_GROUPING[case]
    with pytest.raises(error, match=message):
        channel_semantic_grouping(**{**GROUPING, **change})


@pytest.mark.parametrize("case", BAD_ENQUEUE)
def test_bad_arguments_of_enqueue_are_named(case: str) -> None:
    change, error, message = BAD_ENQUEUE[case]
    with pytest.raises(error, match=message):
        semantic_memory_enqueue(**{**ENQUEUE, **change})
