"""Checkpoints that are whole or not there: written aside, flushed, renamed, and read only if every checksum holds."""

import logging
import os
import shutil
import zipfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils import _pytree as pytree

logger = logging.getLogger(__name__)

# Kept in every checkpoint: no other file is taken for one, nor one whose contents have changed their meaning.
_FORMAT = "allspark_fast checkpoint 1"


def save_checkpoint(folder: Path, step: int, state: Mapping[str, Any], *, keep: int) -> Path:
    """Write ``step_<step>.pt`` and remove all but the newest ``keep`` checkpoints, and what a crash left half written.

    Args:
        folder: of checkpoints; made if need be.
        step: number of steps taken.
        state: tensors and plain values.
        keep: checkpoints to keep, at least 1.

    Raises:
        OSError: it cannot be written; the checkpoints that were there stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:08d}.pt"
    write_atomically(path, lambda temporary: torch.save({"format": _FORMAT, **state}, temporary))
    for old in [*_newest_first(folder)[keep:], *folder.glob(".step_*.tmp.pt")]:
        old.unlink()
    return path


class CheckpointWriter:
    """Writes the checkpoints of a run, at once or in the background.

    Args:
        folder: of checkpoints.
        keep: checkpoints to keep, at least 1.
        background: copy the state, and write the copy in a thread while training goes on.
    """

    def __init__(self, folder: Path, *, keep: int, background: bool) -> None:
        self.folder = folder
        self.keep = keep
        self._thread = ThreadPoolExecutor(1) if background else None
        self._pending: Future[Path] | None = None

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Save as ``save_checkpoint`` does, after what is still being written.

        Raises:
            OSError: this checkpoint, or the last one in the background, cannot be written.
        """
        self.wait()
        if self._thread is None:
            save_checkpoint(self.folder, step, state, keep=self.keep)
            return
        copied = pytree.tree_map(lambda x: x.to("cpu", copy=True) if isinstance(x, Tensor) else x, dict(state))
        self._pending = self._thread.submit(save_checkpoint, self.folder, step, copied, keep=self.keep)

    def wait(self) -> None:
        """Wait for what is being written in the background.

        Raises:
            OSError: it cannot be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def load_latest_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Read the newest checkpoint that is whole, without running code from it.

    Args:
        folder: of checkpoints.

    Returns:
        the state, or None if there is no checkpoint. Damaged and foreign ones are named in a warning and passed over.

    Raises:
        ValueError: there are checkpoints, but none can be read.
    """
    paths = _newest_first(folder)
    for path in paths:
        try:
            return _read_checkpoint(path)
        except ValueError as error:
            logger.warning("%s; trying the one before", error)
    if paths:
        raise ValueError(f"{folder}: none of {len(paths)} checkpoints can be read; remove the folder to start afresh")
    return None


def _read_checkpoint(path: Path) -> dict[str, Any]:
    state = read_torch_file(path)
    found = state.pop("format", None) if isinstance(state, dict) else None
    if found != _FORMAT:
        raise ValueError(f"{path} is no checkpoint of a run: its format is {found!r}, expected {_FORMAT!r}")
    return state


def read_torch_file(path: Path) -> Any:
    """Read what ``torch.save`` wrote onto the CPU, without running code from it.

    Since torch 1.6 such files are zip archives, which hold a checksum of every tensor. ``torch.load`` does not look at
    it: of the bits of a file, one flipped in a tensor would go unnoticed.

    Raises:
        ValueError: the file is damaged, or holds more than tensors and plain values; the message names it.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if (damaged := archive.testzip()) is not None:
                    raise ValueError(f"the checksum of {damaged} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    # Damaged files raise almost anything: BadZipFile, UnpicklingError, RuntimeError, EOFError, KeyError and more.
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read, it is damaged or holds more than weights ({_reason(error)})"
        ) from error


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file beside ``path``, flush it to disk and rename it: ``path`` is never half written.

    Raises:
        OSError: the disk is full, or the folder read-only; ``path`` is as it was before.
    """
    temporary = path.with_name(f".{path.name}.tmp{path.suffix}")
    try:
        write(temporary)
        _flush(temporary, os.O_RDWR)
        temporary.replace(path)
        if os.name == "posix":  # elsewhere folders cannot be opened
            _flush(path.parent, os.O_RDONLY)
    # torch reports a full disk by a RuntimeError, as it does the death of a loading process meanwhile; safetensors by
    # an error of its own.
    except (OSError, RuntimeError, SafetensorError) as error:
        free = shutil.disk_usage(path.parent).free
        temporary.unlink(missing_ok=True)
        raise OSError(
            f"{path} was not written ({_reason(error)}); {free / 1e6:.1f} MB are free there. Nothing that was there "
            "is lost: mend this and give the same command again, training goes on from its last checkpoint"
        ) from error


def require_room(folder: Path, state: Mapping[str, Any], *, keep: int) -> None:
    """Check that checkpoints can be written before work starts.

    Args:
        folder: of checkpoints; made if need be.
        state: what they will hold.
        keep: checkpoints to keep; while one is written, there is one more.

    Raises:
        OSError: the folder cannot be made, or has less room than the tensors of the missing checkpoints need.
    """
    folder.mkdir(parents=True, exist_ok=True)
    size = sum(x.numel() * x.itemsize for x in pytree.tree_leaves(state) if isinstance(x, Tensor))
    missing = max(keep + 1 - len(_newest_first(folder)), 1)
    free = shutil.disk_usage(folder).free
    if free < missing * size:
        raise OSError(
            f"{folder}: {free / 1e6:.1f} MB are free, but {missing} more checkpoints take at least "
            f"{missing * size / 1e6:.1f} MB: free space, or give a --run.folder elsewhere"
        )


def _flush(path: Path, flags: int) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_*.pt"), reverse=True)
