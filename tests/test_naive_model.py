"""The official way that the step is compared with computes the same losses, gradients and memory as ours."""

import copy

import pytest
import torch
from torch.testing import assert_close

from allspark_fast.config import TrainConfig
from allspark_fast.data.loader import SemiBatch
from allspark_fast.model import Segmentor
from allspark_fast.step import TrainState, build_optimizer, compute_losses, train_step
from bench.naive_model import make_naive, naive_losses, naive_train_step
from bench.step_variants import SIZES, without_dropout

CONFIG = TrainConfig()


@pytest.fixture
def model() -> Segmentor:
    # In float64 no rounding can move an argmax, so everything must agree.
    return without_dropout(SIZES["tiny"].build_model()).double()


def double_batch() -> SemiBatch:
    batch = SIZES["tiny"].random_batch()
    return batch._replace(image=batch.image.double(), unlabeled_image=batch.unlabeled_image.double())


@pytest.mark.parametrize("use_memory", [False, True])
def test_losses_gradients_and_memory_are_ours(model: Segmentor, use_memory: bool) -> None:
    batch = double_batch()
    naive = make_naive(copy.deepcopy(model))
    ours = compute_losses(model, batch, CONFIG, use_memory=use_memory)
    theirs = naive_losses(naive, batch, use_memory=use_memory)
    assert_close(theirs, ours)
    ours.total.backward()
    theirs.total.backward()
    gradients = [{name: x.grad for name, x in m.named_parameters()} for m in (naive, model)]
    assert_close(*gradients)
    assert_close(naive.state_dict(), model.state_dict())
    assert model.decoder.allspark.attn.queue_ptr.any()


def test_steps_are_ours(model: Segmentor) -> None:
    batch = double_batch()
    naive = make_naive(copy.deepcopy(model))
    before = copy.deepcopy(model.state_dict())
    state = TrainState(model, CONFIG, total_steps=10)
    optimizer = build_optimizer(naive, CONFIG)
    for _ in range(2):  # both at the base rate
        train_step(state, batch, use_memory=True)
        naive_train_step(naive, optimizer, batch, CONFIG, lr=CONFIG.lr, use_memory=True)
    assert_close(naive.state_dict(), model.state_dict())
    assert all(not torch.equal(before[name], x) for name, x in model.named_parameters())
