"""Checkpoints that run code when unpickled, put into the folder of a run: resuming runs nothing."""

import functools
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from allspark_fast.training.checkpoint import load_latest_checkpoint, save_checkpoint
from tests.helpers.malicious import Malicious


def as_pickle(state: dict, path: Path) -> None:
    path.write_bytes(pickle.dumps(state, protocol=2))


@pytest.mark.parametrize(
    "write", [torch.save, functools.partial(torch.save, _use_new_zipfile_serialization=False), as_pickle]
)
def test_resuming_passes_over_a_malicious_checkpoint(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[dict, Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    whole = save_checkpoint(tmp_path / "checkpoints", 3, {"step": 3, "model": {}}, keep_last=2)
    write({**torch.load(whole), "model": Malicious()}, whole.with_name("step_00000009.pt"))
    assert load_latest_checkpoint(tmp_path / "checkpoints")["step"] == 3
    assert "step_00000009" in caplog.text
    assert not Path("pwned").exists()
    pickle.loads(pickle.dumps(Malicious()))
    assert Path("pwned").exists()
