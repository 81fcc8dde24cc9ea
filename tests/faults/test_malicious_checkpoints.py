"""Checkpoints that run code when unpickled, put into the folder of a run: resuming runs nothing."""

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from allspark_fast.training.checkpoint import load_latest_checkpoint, save_checkpoint
from tests.helpers.malicious import Malicious


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that appears if such a file is unpickled."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Malicious()))
    mark = tmp_path / "pwned"
    mark.unlink()
    return mark


def as_old_file(state: dict, path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


def as_pickle(state: dict, path: Path) -> None:
    path.write_bytes(pickle.dumps(state, protocol=2))


@pytest.mark.parametrize("write", [torch.save, as_old_file, as_pickle])
def test_resuming_passes_over_a_malicious_checkpoint(
    tmp_path: Path, mark: Path, write: Callable[[dict, Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    whole = save_checkpoint(tmp_path / "checkpoints", 3, {"step": 3, "model": {}}, keep_last=2)
    write({**torch.load(whole), "model": Malicious()}, whole.with_name("step_00000009.pt"))
    assert load_latest_checkpoint(tmp_path / "checkpoints")["step"] == 3
    assert "step_00000009" in caplog.text
    assert not mark.exists()
