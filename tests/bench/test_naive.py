"""The reference implementation in bench computes the same losses, gradients and memory as ours."""

import copy

import pytest
import torch
from torch.testing import assert_close

from allspark_fast.config import TrainConfig
from allspark_fast.data.loader import SemiBatch
from allspark_fast.training.step import TrainState, compute_losses, train_step
from bench.bench_train_step import without_dropout
from bench.naive import make_naive, naive_losses, naive_train_step
from tests.helpers.models import tiny_segmentor

CONFIG = TrainConfig()


def model_and_batch(classes=5, crop=(65, 65)):
    """In float64 no rounding can move an argmax, so everything must agree."""
    images = torch.randn(2, 2, 3, *crop, dtype=torch.float64)
    label = torch.randint(classes, (2, *crop)).masked_fill(torch.rand(2, *crop) < 0.1, 255)
    batch = SemiBatch(images[0], label, images[1], torch.ones(2, *crop, dtype=torch.bool), None)
    return without_dropout(tiny_segmentor(classes=classes, crop=crop)).double(), batch


@pytest.mark.parametrize("use_memory", [False, True])
@pytest.mark.parametrize(
    ("classes", "crop"),
    [(5, (65, 65)), (2, (65, 65)), pytest.param(171, (65, 65), marks=pytest.mark.slow), (5, (65, 97))],
    ids=str,
)
def test_losses_gradients_and_memory_are_ours(classes, crop, use_memory):
    model, batch = model_and_batch(classes, crop)
    naive = make_naive(copy.deepcopy(model))
    ours = compute_losses(model, batch, CONFIG, use_memory=use_memory)
    theirs = naive_losses(naive, batch, CONFIG, use_memory=use_memory)
    assert_close(theirs, ours)
    ours.total.backward()
    theirs.total.backward()
    gradients = [{name: x.grad for name, x in m.named_parameters()} for m in (naive, model)]
    assert_close(*gradients)
    assert_close(naive.state_dict(), model.state_dict())
    assert model.decoder.allspark.attn.queue_ptr.any()


def test_steps_are_ours():
    model, batch = model_and_batch()
    naive = make_naive(copy.deepcopy(model))
    before = copy.deepcopy(model.state_dict())
    ours, theirs = (TrainState(x, CONFIG, total_steps=10) for x in (model, naive))
    for _ in range(2):  # both at the base rate
        train_step(ours, batch, use_memory=True)
        naive_train_step(theirs, batch, use_memory=True)
    assert_close(naive.state_dict(), model.state_dict())
    assert all(not torch.equal(before[name], x) for name, x in model.named_parameters())
