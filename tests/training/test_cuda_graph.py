"""Training steps as replays of a CUDA graph."""

import contextlib
import copy
import functools
from collections.abc import Iterator
from unittest.mock import MagicMock, Mock

import pytest
import torch

from allspark_fast.training import cuda_graph
from allspark_fast.training.cuda_graph import GraphedSteps
from allspark_fast.training.step import train_step
from tests.helpers.steps import METHODS, build_state, random_batch

PHASES = [False] * 6 + [True] * 6  # without the memory, then with it


def test_what_is_recorded_and_replayed_in_each_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: three steps as they are, then one recording, at every change of phase."""
    done = []

    @contextlib.contextmanager
    def record(*_: object, **__: object) -> Iterator[None]:
        done.append("record")
        yield

    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Mock(replay=lambda: done.append("replay")))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("wait"))
    monkeypatch.setattr(cuda_graph, "train_step", lambda _, batch, **__: done.append(batch))
    steps, batches = GraphedSteps(build_state()), [random_batch() for _ in range(6)]
    for use_memory in (False, True):
        for batch in batches:
            steps(batch, use_memory=use_memory)
    # What is recorded reads tensors of its own, into which later batches are copied.
    for recorded in (done.pop(4), done.pop(12)):
        assert torch.equal(recorded.image, batches[-1].image)
        assert recorded.image is not batches[3].image
    phase = [*batches[:3], "record", "replay", "replay", "replay"]
    assert done == [*phase, "wait", *phase]


@pytest.mark.gpu
@pytest.mark.parametrize(("method", "optimizer"), [*((x, "sgd") for x in METHODS), ("allspark", "adamw")])
def test_replays_change_what_steps_change(method: str, optimizer: str) -> None:
    # In single precision and small steps, or what is added in another order grows to other pseudo labels.
    options = {"method": method, "optimizer": optimizer, "ema": 0.9, "lr": 1e-4, "lr_multi": 1.0, "amp": False}
    with torch.device("cuda"):
        plain, graphed = build_state(**options), build_state(**options)
        batches = [random_batch() for _ in PHASES]
    graphed.load_state_dict(copy.deepcopy(plain.state_dict()))
    before = torch.cat([x.detach().clone().flatten() for x in plain.model.parameters()])
    steps = GraphedSteps(graphed)
    losses, changes = [], []
    for state, take in ((plain, functools.partial(train_step, plain)), (graphed, steps)):
        torch.manual_seed(0)
        losses.append(torch.stack([torch.stack(take(x, use_memory=y)) for x, y in zip(batches, PHASES, strict=True)]))
        changes.append(torch.cat([x.detach().flatten() for x in state.model.parameters()]) - before)
        assert (state.step, state.skipped) == (len(PHASES), 0)
    # Other random numbers would change the losses by some 5 %.
    torch.testing.assert_close(*losses, rtol=5e-3, atol=1e-5)
    assert (changes[0] - changes[1]).norm() < 0.1 * changes[0].norm()
    torch.testing.assert_close(plain.read_metrics(), graphed.read_metrics(), rtol=5e-3, atol=1e-5)


@pytest.mark.gpu
def test_a_loss_that_is_not_finite_is_skipped_in_a_replay() -> None:
    with torch.device("cuda"):
        state, batch = build_state(), random_batch()
    steps = GraphedSteps(state)
    for _ in range(5):
        steps(batch, use_memory=True)
    before = copy.deepcopy(dict(state.model.named_parameters()))
    steps(batch._replace(image=torch.full_like(batch.image, torch.nan)), use_memory=True)
    assert state.skipped == 1
    assert all(torch.equal(x, before[name]) for name, x in state.model.named_parameters())
    steps(batch, use_memory=True)
    assert state.skipped == 1
