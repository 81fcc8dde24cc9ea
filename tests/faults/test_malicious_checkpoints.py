"""Checkpoints that run code when unpickled, put into the folder of a run: resuming runs nothing."""

import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from allspark_fast.training.checkpoint import _FORMAT
from allspark_fast.training.trainer import Trainer
from tests.helpers.runs import run_and_die, tiny_config
from tests.weights.test_weights import Malicious


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that appears if such a file is unpickled."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Malicious()))
    mark = tmp_path / "pwned"
    mark.unlink()
    return mark


def as_checkpoint(path: Path) -> None:
    torch.save({"format": _FORMAT, "model": Malicious()}, path)


def as_old_checkpoint(path: Path) -> None:
    torch.save({"format": _FORMAT, "model": Malicious()}, path, _use_new_zipfile_serialization=False)


def as_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Malicious(), protocol=2))


def as_foreign_shards(path: Path) -> None:
    path.with_suffix("").mkdir()
    (path.with_suffix("") / ".metadata").write_bytes(pickle.dumps(Malicious()))


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("write", [as_checkpoint, as_old_checkpoint, as_pickle, as_foreign_shards])
def test_resuming_passes_over_a_malicious_checkpoint(
    tmp_path: Path,
    ran: Path,
    write: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run_and_die(tiny_config(), tmp_path / "run", 3, monkeypatch)
    write(tmp_path / "run" / "checkpoints" / "step_00000009.pt")
    assert Trainer(tiny_config(), tmp_path / "run").step == 3
    assert "step_00000009" in caplog.text
    assert not ran.exists()


@pytest.mark.usefixtures("no_pictures")
def test_metadata_among_shards_is_not_unpickled(tmp_path: Path, ran: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.distributed.checkpoint keeps a pickle of this name in folders of its own kind, and unpickles it."""
    config = tiny_config()
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, sharded_checkpoints=True))
    run_and_die(config, tmp_path / "run", 3, monkeypatch)
    as_pickle(tmp_path / "run" / "checkpoints" / "step_00000003" / ".metadata")
    assert Trainer(config, tmp_path / "run").step == 3
    assert not ran.exists()
