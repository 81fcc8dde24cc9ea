import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from allspark_fast.distributed import rank
from allspark_fast.model import AllSpark, AllSparkOptions
from allspark_fast.model.semantic_memory import token_class_map
from tests.helpers.ranks import run_on_ranks

K, C, SIDE = 4, 8, 3


def bottleneck(**options: object) -> AllSpark:
    return AllSpark(C, K, SIDE * SIDE, AllSparkOptions(**{"dropout": 0.0, **options}))


def batch(images: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(2 * images, C, SIDE, SIDE), torch.randn(images, K, 5, 5)


class TestMemory:
    def test_a_class_stays_filled_when_it_gets_nothing_more(self):
        memory = bottleneck(memory_init="empty").attn
        features = torch.ones(1, SIDE**2, C)
        for cls in (2, 0):
            class_map = torch.full((1, K, SIDE**2), -1.0)
            class_map[:, cls] = 1
            memory.enqueue(features, class_map)
        assert memory.queue_filled.tolist() == [True, False, True, False]

    @pytest.mark.parametrize("use_memory", [False, True])
    @pytest.mark.parametrize("grad", [False, True])
    def test_every_channel_is_enqueued_in_warm_up_and_without_gradients_too(self, use_memory, grad):
        module = bottleneck(memory_init="empty")
        with torch.set_grad_enabled(grad):
            assert module(*batch(), use_memory=use_memory).requires_grad == grad
        assert (module.attn.kv_queue.abs().sum(2) > 0).sum() == module.attn.received.sum() == 2 * C
        assert torch.equal(module.attn.queue_filled, module.attn.received > 0)

    def test_eval_neither_uses_nor_changes_it(self):
        module = bottleneck().eval()
        features = batch()[0]
        expected = module(features)
        before = module.attn.kv_queue.clone()
        module.attn.kv_queue.add_(1)
        assert torch.equal(module(features), expected)
        assert torch.equal(module.attn.kv_queue, before + 1)

    @pytest.mark.parametrize("clone", [copy.deepcopy, lambda module: module.double().float()])
    def test_strides_survive(self, clone):
        module = clone(bottleneck())
        assert module.attn.stored_channels().is_contiguous()
        module.load_state_dict({name: x.contiguous() for name, x in module.state_dict().items()})
        assert module.attn.stored_channels().is_contiguous()

    def test_backward_comes_once_and_before_the_next_forward(self):
        module = bottleneck()
        first, second = (module(*batch(), use_memory=True).sum() for _ in range(2))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            first.backward()
        second.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            second.backward()


class TestSwitches:
    def test_class_map_softmax_changes_the_grouping(self):
        features, class_logits = batch(16)
        modules = [bottleneck(class_map=kind) for kind in ("logits", "softmax")]
        for module in modules:
            module(features, 3 * class_logits)
        assert not torch.equal(*(module.attn.received for module in modules))

    def test_empty_leaves_out_classes_without_a_channel(self):
        features, class_logits = batch()
        class_logits[:, 2:] = 0  # two classes cannot win
        class_logits[:, :2] += 3
        module = bottleneck(memory_init="empty")
        output = module(features, class_logits, use_memory=True)
        absent = ~module.attn.queue_filled
        assert absent.any()
        # What stands in the slots of an absent class cannot matter.
        other = bottleneck(memory_init="empty")
        other.load_state_dict({**module.state_dict(), "attn.queue_ptr": torch.zeros(K, dtype=torch.int64)})
        other.attn.kv_queue[absent] = 100.0
        assert torch.equal(other(features, class_logits, use_memory=True), output)

    def test_kv_source_batch_sees_the_other_images_and_image_does_not(self):
        module = bottleneck().eval()
        features = batch()[0]
        alone = torch.cat([module(x, kv_source="image") for x in features.split(1)])
        torch.testing.assert_close(module(features, kv_source="image"), alone)
        assert not torch.allclose(module(features, kv_source="batch"), alone, atol=1e-3)
        torch.testing.assert_close(module(features[:1], kv_source="batch"), alone[:1])

    @pytest.mark.parametrize("crop_size", [(65, 97), (33, 21), None])
    def test_class_map_is_resized_to_the_crop_and_then_to_the_tokens(self, crop_size):
        logits = torch.randn(2, K, 17, 25)
        full = logits if crop_size is None else F.interpolate(logits, crop_size, mode="bilinear", align_corners=False)
        expected = F.interpolate(full, (3, 4), mode="bilinear", align_corners=False).flatten(2)
        torch.testing.assert_close(token_class_map(logits, (3, 4), crop_size=crop_size), expected)
        softmax = token_class_map(logits, (3, 4), crop_size=crop_size, kind="softmax")
        torch.testing.assert_close(softmax, expected.softmax(1))


def state_after_step(module: AllSpark, step: int, index: int) -> dict[str, Tensor]:
    """The state after a step on rank ``index``'s labeled and unlabeled image, the same whichever process asks."""
    torch.manual_seed(1)
    features, class_logits = batch(2)
    module((features + step)[index::2], class_logits[index : index + 1])
    return copy.deepcopy(module.state_dict())


def states_of_this_rank() -> list[dict[str, Tensor]]:
    torch.manual_seed(0)
    module = bottleneck(memory_init="empty", memory_sync="rank0")
    return [state_after_step(module, step, rank()) for step in range(2)]


@pytest.mark.slow
def test_memory_sync_rank0_starts_each_step_from_rank_0(tmp_path):
    """``all`` is tested in tests/training/test_distributed.py."""
    states = run_on_ranks(states_of_this_rank, 2, tmp_path)
    start = bottleneck(memory_init="empty")
    for step in range(2):
        for index in (1, 0):  # rank 0 last: its memory is what the next step starts from
            module = copy.deepcopy(start)
            expected = state_after_step(module, step, index)
            assert all(torch.equal(x, expected[name]) for name, x in states[index][step].items())
        start = module
