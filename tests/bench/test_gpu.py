"""``python -m bench gpu`` on a CPU: the parts run, notice what is wrong, and keep to the time that they have."""

import dataclasses
import functools
import json
import re

import pytest
import torch

from allspark_fast.kernels.selftest import Result
from allspark_fast.training.cuda_graph import GraphedSteps
from allspark_fast.training.step import Losses
from bench import gpu
from bench.__main__ import main
from bench.bench_train_step import SIZES

CASE = "allspark adamw float32"
# They take a minute here, and tests of their own cover them.
SLOW = {"parity", "step ours bfloat16 compiled recorded", "step naive bfloat16 compiled"}
SLOW |= {f"lock_step {name}" for name in gpu.LOCK_STEPS if name != CASE}


def dry_run(monkeypatch, file, keep, *arguments):
    parts = [part for part in gpu.parts("tiny") if keep(part[0])]
    monkeypatch.setattr(gpu, "parts", lambda _: parts)
    main(["gpu", "--size", "tiny", "--json", str(file), *arguments])
    return json.loads(file.read_text())


def test_a_dry_run(monkeypatch, tmp_path, capsys):
    records = dry_run(monkeypatch, tmp_path / "gpu.json", lambda name: name not in SLOW)
    printed = capsys.readouterr().out
    assert not any("failed" in record.get("note", "") for record in records)
    assert {record["op"] for record in records} >= {"attention_parity", "lock_step", "step", "step_kernels"}
    lock_step = next(record for record in records if record["op"] == "lock_step")
    assert (lock_step["error"], lock_step["noise"]) == (0, 0)
    assert "ordinary steps in place of recorded ones" in printed
    steps = [record["variant"] for record in records if record["op"] == "step"]
    variants = ["ours bfloat16 recorded", "ours bfloat16", "naive bfloat16", "validation, ours bfloat16"]
    assert steps == [*variants, "ours bfloat16 recorded, one stream"]
    kernels = [record for record in records if record["op"] == "step_kernels"]
    assert sum(record["seconds"] for record in kernels[1:]) <= kernels[0]["seconds"]


@pytest.mark.slow
def test_a_whole_dry_run(monkeypatch, tmp_path):
    records = dry_run(monkeypatch, tmp_path / "gpu.json", lambda _: True, "--budget", "100000")
    assert sum(record["op"] == "lock_step" for record in records) == len(gpu.LOCK_STEPS)


def wrong_rate(state):
    state.config = dataclasses.replace(state.config, lr=1.05 * state.config.lr)


def wrong_numbers(_):
    torch.rand(())


def no_skipping(state):
    state.skipped.fill_(0)


@pytest.mark.parametrize("mutant", [wrong_rate, wrong_numbers, no_skipping])
def test_wrong_recorded_steps_are_noticed(monkeypatch, mutant):
    """Replays take the step after a mutation."""

    def record(state, step, _):
        losses = Losses(*torch.zeros(3))
        return losses, lambda: [mutant(state), *(x.copy_(y) for x, y in zip(losses, step(), strict=True))]

    def recorded_steps(state):
        return GraphedSteps(state, record=functools.partial(record, state))

    monkeypatch.setattr(gpu, "recorded_steps", recorded_steps)
    found = gpu.lock_step(SIZES["tiny"], CASE)
    worst = next(found)
    assert worst["error"] > worst["allowed"]
    with pytest.raises(AssertionError, match="differs in a recorded step"):
        next(found)


def test_what_fails_ends_no_other_part(monkeypatch, tmp_path, capsys):
    def broken():
        yield {"op": "a", "size": "", "value": 1}
        raise RuntimeError("out of luck")

    monkeypatch.setattr(gpu, "check_kernels", lambda _: [Result("op", "float16", 0.5, "wrong by 5.0e-01")])
    parts = [
        ("a", 1, broken),
        ("b", 1, gpu.parity),
        ("c", 1000, broken),
        ("d", 1, lambda: iter([{"op": "d", "size": ""}])),
    ]
    monkeypatch.setattr(gpu, "parts", lambda _: parts)
    file = tmp_path / "gpu.json"
    with pytest.raises(SystemExit, match="failed: a, b"):
        main(["gpu", "--size", "tiny", "--budget", "100", "--json", str(file)])
    records = json.loads(file.read_text())
    assert [record["op"] for record in records] == ["a", "a", "parity", "b", "c", "d"]
    assert records[1]["note"] == "failed: RuntimeError: out of luck"
    assert re.fullmatch(r"not run: \d+ of 100 s are spent", records[4]["note"])
    assert "out of luck" in capsys.readouterr().err
