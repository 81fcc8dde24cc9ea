"""Half-precision copies of the weights, under the rules that autocast has on a CPU."""

import copy

import pytest
import torch

from allspark_fast.model import compile_blocks
from allspark_fast.training.half_weights import HalfWeights
from allspark_fast.training.step import train_step
from tests.helpers.runs import differences
from tests.helpers.steps import build_state, random_batch


@pytest.mark.parametrize(
    "options",
    [
        {"method": "allspark", "ema": 0.9},
        {"method": "allspark", "optimizer": "adamw", "gradient_accumulation_steps": 2},
        {"method": "semi", "ema": 0.9, "teacher": "ema", "activation_checkpointing": True},
        pytest.param({"method": "supervised", "compiled": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_steps_are_those_of_autocast_bit_for_bit(options):
    switches = {name: options.pop(name, False) for name in ("activation_checkpointing", "compiled")}
    autocast = build_state(**options)
    halves = build_state(**options)
    halves.load_state_dict(copy.deepcopy(autocast.state_dict()))
    batches = [random_batch() for _ in range(4)]
    losses = []
    for state in (autocast, halves):
        state.model.backbone.activation_checkpointing = switches["activation_checkpointing"]
        if switches["compiled"]:
            compile_blocks(state.model, "aot_eager")
        state.amp = True  # as on a GPU
        state.half_weights = HalfWeights(*((state.model, state.teacher) if state is halves else ()))
        torch.manual_seed(1)
        losses.append([train_step(state, x, use_memory=step > 1) for step, x in enumerate(batches)])
    assert losses[0] == losses[1]
    assert differences(autocast.state_dict(), halves.state_dict()) == []
    assert autocast.read_metrics() == halves.read_metrics()


def test_they_are_there_in_a_step_only():
    state = build_state()
    state.half_weights = HalfWeights(state.model)
    weights = list(state.model.parameters())
    names = list(state.model.state_dict())
    with pytest.raises(ZeroDivisionError), state.half_weights.installed():  # noqa: PT012
        halves = [x for x in state.model.parameters() if x.dtype == torch.bfloat16]
        assert len(halves) > len(weights) / 3
        assert list(state.model.state_dict()) == names
        raise ZeroDivisionError
    assert all(x is y for x, y in zip(state.model.parameters(), weights, strict=True))
    addresses = [x.data_ptr() for x in halves]
    with state.half_weights.installed():
        again = [x for x in state.model.parameters() if x.dtype == torch.bfloat16]
    assert [x.data_ptr() for x in again] == addresses


def test_an_outer_autocast_is_refused():
    with torch.autocast("cpu"), pytest.raises(RuntimeError, match=r"outside of torch\.autocast"):
        train_step(build_state(), random_batch(), use_memory=True)
