"""Checkpoints of a run: written at once or in the background, and which of them is read."""

from pathlib import Path

import pytest

from allspark_fast.files import write_atomically
from allspark_fast.training.checkpoint import load_latest_checkpoint, save_checkpoint


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"step": step}, keep_last=2)
    newest = tmp_path / "step_00000002.pt"
    newest.write_bytes(newest.read_bytes()[:100])
    state = load_latest_checkpoint(tmp_path)
    assert state == {"step": 1}
    assert "step_00000002.pt cannot be read" in caplog.text
    (tmp_path / "step_00000001.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="none of 2 checkpoints can be read"):
        load_latest_checkpoint(tmp_path)


def test_a_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere, make it first"):
        write_atomically(tmp_path / "nowhere" / "a.txt", lambda path: path.write_text("a"))
