"""Recorded steps equal ordinary ones bit for bit, shown by logs of calls in place of CUDA graphs."""

import copy
import functools
import random

import pytest
import torch

from allspark_fast.errors import RunError
from allspark_fast.training import cuda_graph, step
from allspark_fast.training.half_weights import HalfWeights
from allspark_fast.training.log import read_metrics
from allspark_fast.training.step import Losses, train_step
from allspark_fast.training.trainer import Trainer
from tests.helpers.runs import assert_same_run, differences, run_and_die, tiny_config
from tests.helpers.steplog import StepLog, logged_steps
from tests.helpers.steps import BEYOND, build_state, random_batch

CASES = [
    {"optimizer": "sgd", "ema": 0.9},
    {"optimizer": "adamw", "gradient_accumulation_steps": 2},
    {"loss": "ohem", "ohem_min_kept": 500, "pseudo_padding": False, "kv_source": "image"},
    {"method": "semi", "optimizer": "adamw", "ema": 0.9},
    {"method": "supervised"},
    BEYOND,
]
# In each phase an ordinary step, a recording with its first replay, and two replays.
PHASES = [{"use_memory": False, "use_pseudo": False}] * 4 + [{"use_memory": True, "use_pseudo": True}] * 4


@pytest.fixture(autouse=True)
def _record_early(monkeypatch):
    monkeypatch.setattr(cuda_graph, "WARMUP_STEPS", 1)


def differences_of_replays(report=None, *, amp=False, sizes=(2,) * 8, **options):
    """Names of all that differs between runs of ordinary and of recorded steps; a replay and an ordinary one skip."""
    plain, recorded = build_state(**options), build_state(**options)
    recorded.load_state_dict(copy.deepcopy(plain.state_dict()))
    for state in (plain, recorded) if amp else ():
        state.amp, state.half_weights = True, HalfWeights(state.model, state.teacher)
    batches = [random_batch(size, mixing=plain.config.cutmix > 0) for size in sizes]
    for index in (2, 4):
        batches[index].image[0, 0, 5, 5] = float("nan")
    results, ordinary = [], functools.partial(train_step, plain)
    for state, take in ((plain, ordinary), (recorded, logged_steps(recorded, report=report))):
        torch.manual_seed(1)
        random.seed(1)
        losses = [torch.stack(take(x, **phase)).clone() for x, phase in zip(batches, PHASES, strict=True)]
        finite = torch.stack(losses).nan_to_num(-1)
        results.append({"state": state.state_dict(), "losses": finite, "random": torch.get_rng_state()})
    return differences(*results)


# A batch of another size is a phase of its own.
@pytest.mark.parametrize("options", [*CASES, {"amp": True, **BEYOND}, {"sizes": (2, 2, 2, 1, 1, 2, 2, 2)}], ids=str)
def test_replays_equal_ordinary_steps(options):
    assert differences_of_replays(**options) == []


def branch_on_data(state, losses, update=step._update):
    return update(state, losses) if losses.isfinite().all() else Losses(*losses)


def seed_from_python(high, size, draw=torch.randint, **options):
    return draw(high, size, **options) if size else torch.tensor(random.getrandbits(60))


MUTANTS = {
    "branch on data": (step, "_update", branch_on_data),
    "rate from Python": (step, "poly_lr", lambda *_: torch.tensor(random.random() / 100)),
    "seed from Python": (torch, "randint", seed_from_python),
}


def test_what_two_branches_share_is_noticed(monkeypatch):
    """Casts of the weights, which autocast keeps, if they are not cast beforehand."""
    monkeypatch.setattr(HalfWeights, "__init__", lambda *_: vars(_[0]).update(_places=[], _weights=[], _copies=[]))
    with pytest.raises(AssertionError, match="in one branch of a graph is used in the other"):
        differences_of_replays(amp=True)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_what_a_recording_would_bake_is_noticed(mutant, monkeypatch):
    monkeypatch.setattr(*MUTANTS[mutant])
    with pytest.raises(AssertionError, match=r"waits for the device|assert \[.*\] == \[\]"):
        assert differences_of_replays() == []


def forget_the_update(log, replay=StepLog.replay):
    log.calls = [call for call in log.calls if "_fused" not in str(call[0])]
    replay(log)


def run_out_of_memory(_):
    raise torch.OutOfMemoryError("CUDA out of memory.")


def run_out_of_memory_in_backward(log, func, *arguments, call=StepLog.__torch_dispatch__):
    if "convolution_backward" in str(func):
        run_out_of_memory(log)
    return call(log, func, *arguments)


@pytest.mark.parametrize(
    ("name", "fault", "warning"),
    [
        ("replay", forget_the_update, "a replay is no ordinary step"),
        ("__enter__", run_out_of_memory, "longer: CUDA out of memory."),
        ("__torch_dispatch__", run_out_of_memory_in_backward, "longer: CUDA out of memory."),
    ],
)
def test_steps_are_ordinary_after_a_recording_that_is_wrong_or_fails(name, fault, warning, monkeypatch, caplog):
    monkeypatch.setattr(StepLog, name, fault)
    assert differences_of_replays(lambda _: None, optimizer="adamw") == []
    assert caplog.text.count("not recorded as a CUDA graph") == caplog.text.count(warning) == 1


def test_a_failed_recording_of_a_sharded_model_ends_the_run(monkeypatch):
    monkeypatch.setattr(StepLog, "__enter__", run_out_of_memory)
    state = build_state()
    state.replica = state.model
    steps = logged_steps(state)
    steps(random_batch(), use_memory=True)
    with pytest.raises(RunError, match=r"recorded \(CUDA out of memory\.\): go on with --train.cuda_graph off"):
        steps(random_batch(), use_memory=True)


@pytest.mark.usefixtures("no_pictures")
def test_a_run_of_recorded_steps_resumes(tmp_path, monkeypatch):
    """Three phases, one of them twice, an evaluation between two steps, a death, and figures in the log."""

    def recorded(folder):
        trainer = Trainer(config, folder)
        trainer.train_step = logged_steps(trainer.state, report=trainer.findings.update)
        return trainer

    config = tiny_config(ema=0.9, pseudo_from_epoch=2)
    Trainer(config, tmp_path / "whole").run()
    run_and_die(recorded(tmp_path / "broken"), 7, monkeypatch)
    recorded(tmp_path / "broken").run()
    figures = [x["recorded_step"] for x in read_metrics(tmp_path / "broken") if "recorded_step" in x]
    assert len(figures) == 4
    assert all(x["error"] == x["noise"] == 0 < x["change"] for x in figures)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")
