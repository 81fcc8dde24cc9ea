"""Folders of shards: what they give back, on other numbers of ranks too, and which of them are passed over."""

import dataclasses
import functools
import json
import logging
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from allspark_fast.__main__ import main
from allspark_fast.distributed import rank, world_size
from allspark_fast.training import trainer
from allspark_fast.training.checkpoint import load_latest_checkpoint, save_checkpoint
from allspark_fast.training.checkpoint_writer import ShardedCheckpointWriter
from allspark_fast.training.log import read_metrics
from allspark_fast.training.sharded_checkpoint import (
    read_any_checkpoint,
    read_sharded_checkpoint,
    save_sharded_checkpoint,
)
from allspark_fast.training.step import TrainState, train_step
from allspark_fast.training.trainer import Trainer
from tests.faults.test_damaged_checkpoints import flip
from tests.helpers.ranks import run_on_ranks
from tests.training.test_distributed import flatten, make_batch, make_state, own_part
from tests.training.test_distributed_runs import arguments, finish, start
from tests.training.test_trainer import assert_same_run, logged, run_and_die, tiny_config


def small_state(value: float) -> dict[str, Any]:
    """Strides, several types, no dimension, plain values in a tuple; as many random bytes as you like."""
    return {
        "model": {"a.b": torch.full((2, 3), value).T, "full": torch.tensor([True, False])},
        "optimizer": {"state": {0: {"step": torch.tensor(value)}}, "groups": [{"betas": (value, 0.999), "x": None}]},
        "rng": torch.full((int(value),), 7, dtype=torch.uint8),
    }


def load(folder: Path) -> dict[str, Any] | None:
    return load_latest_checkpoint(folder, functools.partial(read_any_checkpoint, state=small_state(0.0)))


def assert_equal(actual: Any, expected: Any) -> None:
    flat = [torch.utils._pytree.tree_flatten(state) for state in (actual, expected)]
    assert flat[0][1] == flat[1][1]
    for x, y in zip(flat[0][0], flat[1][0], strict=True):
        assert torch.equal(x, y) and x.dtype == y.dtype if isinstance(y, Tensor) else x == y


def test_one_process_reads_what_it_wrote_in_place(tmp_path: Path) -> None:
    path = save_sharded_checkpoint(tmp_path, 3, small_state(2.0), keep=1)
    assert sorted(x.name for x in path.iterdir()) == ["manifest.json", "shard-00001-model-00001-of-00001.safetensors"]
    state = small_state(0.0)
    read = read_sharded_checkpoint(path, state)
    assert_equal(read, small_state(2.0))
    assert read["model"]["a.b"] is state["model"]["a.b"]
    assert read["model"]["a.b"].stride() == (1, 3)


def test_the_newest_of_both_kinds_are_kept_and_read(tmp_path: Path) -> None:
    for step, save in enumerate((save_checkpoint, save_sharded_checkpoint, save_checkpoint, save_sharded_checkpoint)):
        (tmp_path / ".step_00000009.tmp").mkdir()
        (tmp_path / ".step_00000009.tmp" / "half").touch()
        save(tmp_path, step, small_state(float(step)), keep=2)
        assert_equal(load(tmp_path), small_state(float(step)))
    assert sorted(x.name for x in tmp_path.iterdir()) == ["step_00000002.pt", "step_00000003"]


def test_what_was_killed_before_it_was_whole_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_sharded_checkpoint(tmp_path, 1, small_state(1.0), keep=2)

    def killed(self: Path, target: Path) -> None:
        raise OSError("killed")

    with monkeypatch.context() as patch:
        patch.setattr("allspark_fast.training.sharded_checkpoint.shutil.rmtree", lambda *_, **__: None)
        patch.setattr(Path, "rename", killed)
        with pytest.raises(OSError, match=r"step_00000002 was not written \(rank 0: killed\); [\d.]+ MB are free"):
            save_sharded_checkpoint(tmp_path, 2, small_state(2.0), keep=2)
    (tmp_path / ".step_00000002.tmp" / "shard-00002-model-00001-of-00001.safetensors").touch()  # of a second rank
    assert_equal(load(tmp_path), small_state(1.0))
    save_sharded_checkpoint(tmp_path, 2, small_state(2.0), keep=2)
    assert_equal(load(tmp_path), small_state(2.0))
    assert not list(tmp_path.glob(".*"))


def shard_of(path: Path) -> Path:
    (shard,) = path.glob("*.safetensors")
    return shard


def change_manifest(path: Path, **values: object) -> None:
    manifest = path / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **values}))


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda path: flip(shard_of(path), 8 * shard_of(path).stat().st_size - 1), r"checksum of shard-\S+ is wrong"),
        (lambda path: shard_of(path).write_bytes(shard_of(path).read_bytes()[:-1]), r"shard-\S+ has \d+ bytes"),
        (lambda path: shard_of(path).write_bytes(b""), "has 0 bytes, expected"),
        (lambda path: shard_of(path).unlink(), "are missing or not in"),
        (lambda path: (path / "more.safetensors").touch(), r"\['more.safetensors'\] are missing or not in"),
        (lambda path: (path / "manifest.json").unlink(), "No such file"),
        (lambda path: (path / "manifest.json").write_bytes(b""), "Expecting value"),
        (lambda path: (path / "manifest.json").write_text("[1]"), "format of manifest.json is None"),
        (lambda path: change_manifest(path, format="other"), "format of manifest.json is 'other', expected"),
        (lambda path: change_manifest(path, plain={}), "checksum of manifest.json is wrong"),
        (lambda path: save_sharded_checkpoint(path.parent, 2, {"b": torch.ones(1)}, keep=2), "of another model"),
    ],
    ids=[
        "bit",
        "cut",
        "empty",
        "no shard",
        "more",
        "no manifest",
        "empty manifest",
        "list",
        "foreign",
        "plain",
        "other",
    ],
)
def test_the_one_before_is_used_and_said_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], object], why: str
) -> None:
    save_sharded_checkpoint(tmp_path, 1, small_state(1.0), keep=2)
    path = save_sharded_checkpoint(tmp_path, 2, small_state(2.0), keep=2)
    damage(path)
    with caplog.at_level(logging.WARNING):
        assert_equal(load(tmp_path), small_state(1.0))
    (warning,) = [record.getMessage() for record in caplog.records if "trying the one before" in record.getMessage()]
    assert warning.startswith(f"{path} ")
    assert re.search(why, warning), warning


def other_model(change: str) -> dict[str, Any]:
    state = small_state(2.0)
    weights = state["model"]
    if change == "shape":
        weights["a.b"] = weights["a.b"][:2]
    elif change == "name":
        weights["b"] = weights.pop("a.b")
    elif change == "more":
        weights["b"] = torch.ones(1)
    else:
        del weights["full"]
    return state


@pytest.mark.parametrize("save", [save_checkpoint, save_sharded_checkpoint])
@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("shape", r"model\.a\.b has the shape \(2, 2\), expected \(3, 2\)"),
        ("name", r"\['model\.a\.b', 'model\.b'\] are missing or unknown"),
        ("more", r"\['model\.b'\] are missing or unknown"),
        ("less", r"\['model\.full'\] are missing or unknown"),
    ],
)
def test_another_model_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, save: Callable[..., Path], change: str, why: str
) -> None:
    """Random states of another size are those of another number of ranks; plain values are torch's affair."""
    save(tmp_path, 1, {**small_state(1.0), "rng": torch.zeros(9, dtype=torch.uint8)}, keep=3)
    for step in (2, 3):
        save(tmp_path, step, other_model(change), keep=3)
    with caplog.at_level(logging.WARNING):
        assert load(tmp_path)["model"]["a.b"].tolist() == [[1.0, 1.0]] * 3
    assert len(re.findall(f"step_0000000[23]\\S* is a checkpoint of another model: {why}; trying", caplog.text)) == 2


def test_none_but_another_model_is_told(tmp_path: Path) -> None:
    state = small_state(0.0)
    for step in (1, 2):
        save_checkpoint(tmp_path, step, other_model("shape"), keep=2)
    with pytest.raises(
        ValueError, match=r"none of 2 checkpoints can be read \((\S+ is a checkpoint of another model.*){2}"
    ):
        load_latest_checkpoint(tmp_path, functools.partial(read_any_checkpoint, state=state))
    assert_equal(state, small_state(0.0))


def test_the_background_writes_what_was_there_and_tells_what_failed(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    writer = ShardedCheckpointWriter(folder, keep=2, background=True, timeout=timedelta(minutes=1))
    state = small_state(2.0)
    writer.save(1, state)
    state["model"]["a.b"] += 1
    writer.wait()
    assert_equal(load(folder), small_state(2.0))
    (folder / ".step_00000002.tmp").write_text("in the way")
    writer.save(2, state)
    with pytest.raises(OSError, match="step_00000002 was not written"):
        writer.save(3, state)
    writer.wait()  # told once


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_run_resumes_from_shards_and_may_change_the_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    config = tiny_config(ema=0.9, optimizer=optimizer)
    sharded = dataclasses.replace(config, run=dataclasses.replace(config.run, sharded_checkpoints=True))
    Trainer(config, tmp_path / "whole").run()
    run_and_die(sharded, tmp_path / "broken", 7, monkeypatch)
    assert [x.name for x in (tmp_path / "broken" / "checkpoints").iterdir()] == ["step_00000003", "step_00000006"]
    resumed = Trainer(config, tmp_path / "broken")
    assert resumed.step == 6
    resumed.run()
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def trained(**options: Any) -> TrainState:
    state = make_state(**options)
    for step in range(2):
        train_step(state, make_batch(step, 2, own_part(2)), use_memory=True)
    return state


def save_trained(folder: Path, **options: Any) -> dict[str, Tensor]:
    """Saves at once and in the background, which training overtakes; returns whole tensors as they were."""
    state = trained(**options)
    expected = flatten(state)
    writers = [
        ShardedCheckpointWriter(folder / kind, keep=2, background=kind == "background", timeout=timedelta(minutes=1))
        for kind in ("foreground", "background")
    ]
    for writer in writers:
        writer.save(2, {**state.state_dict(), "best": 0.5})
    train_step(state, make_batch(2, 2, own_part(2)), use_memory=True)
    writers[1].wait()
    return expected


def load_untrained(folder: Path, **options: Any) -> dict[str, Tensor]:
    """What a state that has taken no step takes over."""
    state = make_state(**options)
    read = functools.partial(read_any_checkpoint, state={**state.state_dict(), "best": 0.0})
    found = load_latest_checkpoint(folder, read)
    assert found["best"] == 0.5
    state.load_state_dict(found)
    return flatten(state)


def exchange(folder: Path, optimizer: str) -> list[Any]:
    """On two ranks: what was saved, read again as shards and replicated, and the same from one rank's checkpoint."""
    saved = save_trained(folder / "two", optimizer=optimizer, sharding="fsdp")
    found = [
        load_untrained(folder / "two" / kind, optimizer=optimizer, sharding=sharding)
        for kind, sharding in (("foreground", "fsdp"), ("background", "fsdp"), ("foreground", "replicate"))
    ]
    found.append(load_untrained(folder / "one" / "background", optimizer=optimizer, sharding="fsdp"))
    shard = folder / "two" / "foreground" / "step_00000002" / "shard-00002-model-00001-of-00001.safetensors"
    if rank() == 1:
        flip(shard, 8 * shard.stat().st_size - 1)
    try:
        load_untrained(folder / "two" / "foreground", optimizer=optimizer, sharding="fsdp")
        refused = ""
    except ValueError as error:
        refused = str(error)
    return [world_size(), saved, found, refused]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_ranks_exchange_checkpoints(tmp_path: Path, optimizer: str) -> None:
    alone = save_trained(tmp_path / "one", optimizer=optimizer)
    results = run_on_ranks(functools.partial(exchange, tmp_path, optimizer), 2, tmp_path)
    shards = list((tmp_path / "two" / "background" / "step_00000002").glob("shard-0000[12]-*"))
    assert min(x.stat().st_size for x in shards) > 0.3 * max(x.stat().st_size for x in shards)
    ranks, saved, (shards, background, replicated, of_one), _ = results[0]
    assert ranks == len(list((tmp_path / "two" / "background" / "step_00000002").glob("shard-*"))) == 2
    one_of_two = load_untrained(tmp_path / "two" / "background", optimizer=optimizer)
    for found in (shards, background, replicated, one_of_two):
        assert found.keys() == saved.keys()
        assert all(torch.equal(x, saved[name]) for name, x in found.items())
    assert all(torch.equal(x, alone[name]) for name, x in of_one.items())
    refused = [result[3] for result in results]
    assert all("none of 1 checkpoints can be read" in x for x in refused)
    assert sum("the checksum of shard-00002" in x for x in refused) == 1
    assert sum("another rank says why" in x for x in refused) == 1


@pytest.mark.slow
def test_a_killed_run_of_two_ranks_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options = ["--run.sharded-checkpoints", "True", "--run.save-in-background", "True"]
    program = ["-m", "tests.training.test_sharded_checkpoint"]
    finish(start(["train.py", *arguments(whole, ema=0.9, epochs=2), *options], 2))
    finish(start([*program, *arguments(broken, ema=0.9, epochs=2), *options], 2), -signal.SIGKILL)
    alone = shutil.copytree(broken, tmp_path / "alone")
    assert "resumed at step" in finish(start(["train.py", *arguments(broken, ema=0.9, epochs=2), *options], 2))[0]
    folders = [run / "checkpoints" / "step_00000008" for run in (whole, broken)]
    plain = [json.loads((folder / "manifest.json").read_text())["plain"] for folder in folders]
    assert plain[0] == plain[1]
    names = sorted(x.name for x in folders[0].glob("shard-*"))
    assert len(names) == 2
    for name in names:  # not byte for byte: the order of a file's metadata differs
        shards = [load_file(folder / name) for folder in folders]
        assert_equal(shards[1], shards[0])
    assert logged(whole) == logged(broken)

    assert main(["train", *arguments(alone, ema=0.9, epochs=2), *options]) == 0  # one process goes on too
    assert read_metrics(alone)[-1]["step"] == 8


def _step_or_die(state: TrainState, *args: Any, **options: Any) -> object:
    """Kills this process in step 7, when the checkpoint of step 6 may still be being written."""
    if state.step == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return train_step(state, *args, **options)


if __name__ == "__main__":
    trainer.train_step = _step_or_die
    sys.exit(main(["train", *sys.argv[1:]]))
