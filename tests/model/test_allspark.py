"""The bottleneck and its memory: use in a model of one's own, switches, mistakes, several processes."""

import copy
import functools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from allspark_fast.distributed import rank
from allspark_fast.model import AllSpark
from allspark_fast.model.semantic_memory import token_class_map
from tests.helpers.forbid_sync import forbid_sync
from tests.ranks import run_on_ranks

K, C, SIDE = 4, 8, 3


def bottleneck(**options: object) -> AllSpark:
    return AllSpark(C, K, SIDE * SIDE, **{"dropout": 0.0, **options})


def batch(images: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(2 * images, C, SIDE, SIDE), torch.randn(images, K, 5, 5)


class OnesOwnModel(nn.Module):
    """What a user does: one line between an encoder and a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, C, 16, 16)
        self.bottleneck = AllSpark(C, K, SIDE * SIDE)
        self.decoder = nn.Conv2d(C, K, 1)

    def forward(self, images: Tensor, class_logits: Tensor | None = None, **options: bool) -> Tensor:
        return self.decoder(self.bottleneck(self.encoder(images), class_logits, **options))


def test_use_in_ones_own_model() -> None:
    model = OnesOwnModel()
    labeled, unlabeled = torch.randn(2, 3, 48, 48), torch.randn(2, 3, 48, 48)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        with torch.no_grad():
            class_logits = model.eval()(unlabeled)
        logits = model.train()(torch.cat([labeled, unlabeled]), class_logits, use_memory=step > 0)
        assert logits.shape == (4, K, SIDE, SIDE)
        optimizer.zero_grad()
        logits.square().mean().backward()
        # The unlabeled branch, the labeled one and all around them learn.
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
        optimizer.step()


def test_a_map_on_its_side_gives_the_same_on_its_side() -> None:
    """Tokens have no order."""
    module = bottleneck().eval()
    feature_map = torch.randn(1, C, 2, 5)
    torch.testing.assert_close(module(feature_map.mT), module(feature_map).mT)


class TestMemory:
    """What training leaves in the memory, and what uses it."""

    def test_a_class_stays_filled_when_it_gets_nothing_more(self) -> None:
        memory = bottleneck(memory_init="empty").attn
        features = torch.ones(1, SIDE**2, C)
        for cls in (2, 0):
            class_map = torch.full((1, K, SIDE**2), -1.0)
            class_map[:, cls] = 1
            memory.enqueue(features, class_map)
        assert memory.queue_filled.tolist() == [True, False, True, False]

    def test_every_channel_is_enqueued_in_warm_up_too(self) -> None:
        for use_memory in (False, True):
            module = bottleneck(memory_init="empty")
            module(*batch(), use_memory=use_memory)
            assert (module.attn.kv_queue.abs().sum(2) > 0).sum() == 2 * C
            assert module.attn.queue_filled.any()

    def test_enqueue_comes_before_use(self) -> None:
        """With an empty memory and one class, the labeled branch of the first step already attends this batch."""
        features, class_logits = batch()
        class_logits[:, 1:] = 0
        module = bottleneck(memory_init="empty")
        memory, warm_up = (copy.deepcopy(module)(features, class_logits, use_memory=use) for use in (True, False))
        assert not torch.equal(memory[:2], torch.zeros_like(memory[:2]))
        assert torch.equal(memory[2:], warm_up[2:])

    def test_eval_neither_uses_nor_changes_it(self) -> None:
        module = bottleneck().eval()
        features = batch()[0]
        expected = module(features)
        before = module.attn.kv_queue.clone()
        module.attn.kv_queue.add_(1)
        assert torch.equal(module(features), expected)
        assert torch.equal(module.attn.kv_queue, before + 1)

    @pytest.mark.parametrize("clone", [copy.deepcopy, lambda module: module.double().float()])
    def test_strides_survive(self, clone: object) -> None:
        module = clone(bottleneck())
        assert module.attn.stored_channels().is_contiguous()
        module.load_state_dict({name: x.contiguous() for name, x in module.state_dict().items()})
        assert module.attn.stored_channels().is_contiguous()

    def test_backward_after_another_forward_is_a_clear_error(self) -> None:
        module = bottleneck()
        first = module(*batch(), use_memory=True)
        second = module(*batch(), use_memory=True)
        with pytest.raises(RuntimeError, match=r"Semantic Memory has changed .* call backward before"):
            first.sum().backward()
        second.sum().backward()

    def test_training_mode_without_gradients(self) -> None:
        """As when a model is only looked at: it answers, and the memory fills."""
        module = bottleneck(memory_init="empty")
        with torch.no_grad():
            assert not module(*batch(), use_memory=True).requires_grad
        assert module.attn.queue_filled.any()

    def test_second_backward_is_a_clear_error(self) -> None:
        output = bottleneck()(*batch(), use_memory=True).sum()
        output.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            output.backward()

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_nothing_that_is_not_finite_enters(self, bad: float) -> None:
        features, class_logits = batch()
        features[3, 1, 1, 1] = bad  # the second unlabeled image
        module = bottleneck(memory_init="empty")
        module(features, class_logits)
        assert module.attn.kv_queue.isfinite().all()
        assert (module.attn.kv_queue.abs().sum(2) > 0).sum() == C

    def test_no_host_sync(self) -> None:
        module = bottleneck(memory_init="empty", dropout=0.1)
        with forbid_sync():
            module(*batch(), crop_size=(48, 48), use_memory=True).sum().backward()

    @pytest.mark.slow
    def test_compiled_by_inductor(self) -> None:
        """The operators keep the strides that they promise: generated code relies on them."""
        torch._dynamo.reset()
        module = bottleneck(memory_init="empty")
        compiled_module = copy.deepcopy(module)
        compiled = torch.compile(compiled_module, fullgraph=True, dynamic=False)
        for use_memory in (False, True):
            features, class_logits = batch()
            results = []
            for function in (module, compiled):
                inputs = features.clone().requires_grad_()
                output = function(inputs, class_logits, use_memory=use_memory)
                parameters = list((module if function is module else compiled_module).parameters())
                gradients = torch.autograd.grad(output.square().sum(), [inputs, *parameters], allow_unused=True)
                results.append((output, *gradients))
            torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(compiled_module.state_dict(), module.state_dict(), rtol=1e-4, atol=1e-5)


class TestSwitches:
    """memory_init, class_map, attend."""

    def test_empty_leaves_out_classes_without_a_channel(self) -> None:
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
        other.attn.queue_filled.copy_(~absent)
        assert torch.equal(other(features, class_logits, use_memory=True), output)

    def test_randn_attends_noise(self) -> None:
        features, class_logits = batch()
        module = bottleneck(memory_init="randn")
        other = copy.deepcopy(module)
        other.attn.kv_queue.mul_(2)
        outputs = [x(features, class_logits, use_memory=True)[:2] for x in (module, other)]
        assert not torch.allclose(*outputs)

    def test_defaults_are_those_of_the_paper(self) -> None:
        """Two heads; the memory is not used before one says so."""
        assert bottleneck().attn.num_heads == 2
        inputs = batch()
        module = bottleneck()
        outputs = [copy.deepcopy(module)(*inputs, **options) for options in ({}, {"use_memory": False})]
        assert torch.equal(*outputs)

    def test_attend_batch_sees_batch_mates_and_image_does_not(self) -> None:
        module = bottleneck().eval()
        features = batch()[0]
        alone = torch.cat([module(x, attend="image") for x in features.split(1)])
        torch.testing.assert_close(module(features, attend="image"), alone)
        assert not torch.allclose(module(features, attend="batch"), alone, atol=1e-3)
        torch.testing.assert_close(module(features[:1], attend="batch"), alone[:1])

    @pytest.mark.parametrize("bad", [{"memory_init": "zeros"}, {"memory_sync": "mean"}, {"class_map": "argmax"}])
    def test_unknown_choices(self, bad: dict[str, str]) -> None:
        with pytest.raises(ValueError, match=f"{next(iter(bad))} must be .*{next(iter(bad.values()))}"):
            bottleneck(**bad)


class TestClassMap:
    """Two bilinear resizes as one."""

    @pytest.mark.parametrize("crop_size", [(65, 97), (33, 21)])
    def test_equals_two_resizes(self, crop_size: tuple[int, int]) -> None:
        logits = torch.randn(2, K, 17, 25)
        full = F.interpolate(logits, crop_size, mode="bilinear", align_corners=False)
        expected = F.interpolate(full, (3, 4), mode="bilinear", align_corners=False).flatten(2)
        torch.testing.assert_close(token_class_map(logits, (3, 4), crop_size=crop_size), expected)
        softmax = token_class_map(logits, (3, 4), crop_size=crop_size, kind="softmax")
        torch.testing.assert_close(softmax, expected.softmax(1))

    def test_equals_one_resize_without_a_crop(self) -> None:
        logits = torch.randn(2, K, 17, 25)
        expected = F.interpolate(logits, (3, 4), mode="bilinear", align_corners=False).flatten(2)
        torch.testing.assert_close(token_class_map(logits, (3, 4)), expected)

    def test_softmax_changes_the_grouping(self) -> None:
        features, class_logits = batch(16)
        pointers = []
        for kind in ("logits", "softmax"):
            module = bottleneck(class_map=kind, memory_init="empty")
            torch.manual_seed(1)
            module.load_state_dict(bottleneck(memory_init="empty").state_dict())
            module(features, class_logits * 3)
            pointers.append(module.attn.kv_queue)
        assert not torch.equal(*pointers)


class TestMistakes:
    """Each is named."""

    def test_training_without_class_logits(self) -> None:
        with pytest.raises(ValueError, match=r"needs class_logits.*or call eval\(\)"):
            bottleneck()(batch()[0])

    def test_class_logits_in_eval_mode(self) -> None:
        with pytest.raises(ValueError, match=r"call train\(\) first"):
            bottleneck().eval()(*batch())

    def test_unequal_halves(self) -> None:
        features, class_logits = batch(3)
        with pytest.raises(ValueError, match="holds 5 images, expected 2B = 6"):
            bottleneck()(features[:5], class_logits)

    def test_other_channels(self) -> None:
        with pytest.raises(ValueError, match="feature_map has 5 channels, expected 8"):
            bottleneck().eval()(torch.randn(1, 5, 3, 4))

    @pytest.mark.parametrize(("shape", "axis"), [((0, K, 5, 6), "B"), ((2, K, 0, 6), "h'"), ((2, K, 5, 0), "w'")])
    def test_no_class_logits(self, shape: tuple[int, ...], axis: str) -> None:
        with pytest.raises(ValueError, match=f"class_logits has {axis} = 0"):
            bottleneck()(batch()[0], torch.randn(shape))

    def test_everything_dropped(self) -> None:
        with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got 1"):
            bottleneck(dropout=1.0)

    def test_another_crop_than_the_memory_was_built_for(self) -> None:
        with pytest.raises(ValueError, match="channels of 9 tokens, but the features have 16"):
            bottleneck()(torch.randn(4, C, 4, 4), batch()[1])

    def test_another_class_count(self) -> None:
        with pytest.raises(ValueError, match="class_map has 5 classes, the Semantic Memory 4"):
            bottleneck()(batch()[0], torch.randn(2, 5, 5, 5))


def _states(memory_sync: str) -> list[dict[str, Tensor]]:
    """This rank's weights and memory after each of two steps on its half of the images."""
    torch.manual_seed(0)
    module = bottleneck(memory_sync=memory_sync, memory_init="empty")
    features, class_logits = batch(2)
    mine = slice(rank(), rank() + 1)
    states = []
    for step in range(2):
        labeled, unlabeled = (features + step).chunk(2)
        module(torch.cat([labeled[mine], unlabeled[mine]]), class_logits[mine])
        states.append(copy.deepcopy(module.state_dict()))
    return states


@pytest.mark.slow
def test_memory_sync_all_equals_one_process(tmp_path: Path) -> None:
    states = run_on_ranks(functools.partial(_states, "all"), 2, tmp_path)
    torch.manual_seed(0)
    module = bottleneck(memory_init="empty")
    features, class_logits = batch(2)
    for step in range(2):
        module(features + step, class_logits)
        for index in range(2):
            for name in ("queue_ptr", "queue_filled"):
                assert torch.equal(states[index][step][f"attn.{name}"], getattr(module.attn, name))
            torch.testing.assert_close(states[index][step]["attn.kv_queue"], module.attn.kv_queue)
        assert torch.equal(states[0][step]["attn.kv_queue"], states[1][step]["attn.kv_queue"])


@pytest.mark.slow
def test_memory_sync_rank0_starts_each_step_from_rank_0(tmp_path: Path) -> None:
    states = run_on_ranks(functools.partial(_states, "rank0"), 2, tmp_path)
    torch.manual_seed(0)
    start = bottleneck(memory_init="empty")
    features, class_logits = batch(2)
    for step in range(2):
        for index in (1, 0):  # rank 0 last: its memory is what the next step starts from
            module = copy.deepcopy(start)
            mine = slice(index, index + 1)
            labeled, unlabeled = (features + step).chunk(2)
            module(torch.cat([labeled[mine], unlabeled[mine]]), class_logits[mine])
            for name in ("queue_ptr", "queue_filled", "kv_queue"):
                saved = states[index][step][f"attn.{name}"]
                assert torch.equal(saved, getattr(module.attn, name))
        start = module
