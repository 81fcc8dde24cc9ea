import os
import stat
from pathlib import Path

import pytest

from allspark_fast.files import remove_unfinished, write_atomically


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("before")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise RuntimeError("unexpected pos 704 vs 598")  # of torch, when a disk is full

    with pytest.raises(OSError, match=r"a\.txt was not written \(unexpected pos 704 vs 598\); [\d.]+ MB are free"):
        write_atomically(path, fail)
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "before"


def test_file_and_folder_are_flushed_around_the_rename(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, Path.replace

    def noted_fsync(descriptor: int) -> None:
        events.append("flush folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "flush file")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", lambda self, to: (events.append("rename"), replace(self, to)))
    write_atomically(tmp_path / "a.txt", lambda temporary: temporary.write_text(temporary.name))
    assert str(os.getpid()) in (tmp_path / "a.txt").read_text()  # other ranks write beside it
    assert events == ["flush file", "rename", "flush folder"]


def test_what_a_crash_left_is_removed(tmp_path):
    def crash(temporary: Path) -> None:
        temporary.write_text("half")
        raise KeyboardInterrupt  # stands for kill -9

    (tmp_path / "kept.tmp").touch()
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "a.pt", crash)
    assert len(list(tmp_path.iterdir())) == 2
    remove_unfinished(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["kept.tmp"]
