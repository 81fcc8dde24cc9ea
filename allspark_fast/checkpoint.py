"""Checkpoints that are whole or not there: written aside, flushed, renamed, and read only if every checksum holds."""

import logging
import os
import pickle
import shutil
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils import _pytree as pytree

from allspark_fast.distributed import any_rank, gather_batch

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
    prune(folder, keep=keep)
    return path


def prune(folder: Path, *, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints, and what a crash left half written."""
    for old in [*newest_first(folder)[keep:], *folder.glob(".step_*")]:
        if old.is_dir():
            shutil.rmtree(old)
        else:
            old.unlink()


def load_latest_checkpoint(folder: Path, read: Callable[[Path], dict[str, Any]] | None = None) -> dict[str, Any] | None:
    """Read the newest checkpoint that is whole, the same one on all ranks, without running code from it.

    Args:
        folder: of checkpoints.
        read: reads one checkpoint, and raises ValueError if it is damaged or of another model; ``read_checkpoint``,
            which knows no model, if not given.

    Returns:
        the state, or None if there is no checkpoint. Those that cannot be read are named in a warning and passed over.

    Raises:
        ValueError: there are checkpoints, but none can be read, or ranks find different ones.
    """
    paths = newest_first(folder)
    names = ", ".join(path.name for path in paths)
    if len(gather_batch(torch.tensor([zlib.crc32(names.encode())])).unique()) > 1:
        raise ValueError(f"{folder}: ranks find different checkpoints (here: {names}); they must share this folder")
    reasons = []
    for path in paths:
        state = None
        try:
            state = (read or read_checkpoint)(path)
        except ValueError as error:
            logger.warning("%s; trying the one before", error)
            reasons.append(str(error))
        if not any_rank(state is None):
            return state
    if paths:
        why = "; ".join(reasons) or "another rank says why"
        raise ValueError(
            f"{folder}: none of {len(paths)} checkpoints can be read ({why}); "
            "remove the folder, or give another --run.folder, to start afresh"
        )
    return None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read what ``save_checkpoint`` wrote onto the CPU, without running code from it.

    Raises:
        ValueError: the file is damaged, or no checkpoint of a run; the message names it.
    """
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
        elif not _begins_like_weights(path):
            raise ValueError("it does not begin like a file of torch.save")
        return torch.load(path, map_location="cpu", weights_only=True)
    # Damaged files raise almost anything: BadZipFile, UnpicklingError, RuntimeError, EOFError, KeyError and more.
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read, it is damaged or holds more than weights ({reason(error)})"
        ) from error


def _begins_like_weights(path: Path) -> bool:
    """Whether this may be a damaged archive, or what torch wrote before 1.6: else torch advises to allow more."""
    with path.open("rb") as file:
        return file.read(2).startswith((b"PK", pickle.PROTO))


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file beside ``path``, flush it to disk and rename it: ``path`` is never half written.

    Raises:
        OSError: there is no such folder, the disk is full, or the folder read-only; ``path`` is as it was before.
    """
    require_parent(path)
    temporary = path.with_name(f".{path.name}.tmp{path.suffix}")
    try:
        write(temporary)
        flush_file(temporary)
        temporary.replace(path)
        flush_folder(path.parent)
    # torch reports a full disk by a RuntimeError, as it does the death of a loading process meanwhile; safetensors by
    # an error of its own.
    except (OSError, RuntimeError, SafetensorError) as error:
        failure = not_written(path, reason(error))
        temporary.unlink(missing_ok=True)
        raise failure from error


def make_folder(path: Path) -> None:
    """Make a folder, and those that it is in, unless it is there.

    Raises:
        NotADirectoryError: one of them is a file.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(f"{path} is to be a folder, but it is a file, or in one: give another name") from error


def require_parent(path: Path) -> None:
    """Check that there is a folder to write a file into, before work starts.

    Raises:
        FileNotFoundError: there is none.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}, make it first")


def not_written(path: Path, why: str) -> OSError:
    """The error of a file or folder that could not be written; tells the free space before anything is removed."""
    free = shutil.disk_usage(path.parent).free
    return OSError(
        f"{path} was not written ({why}); {free / 1e6:.1f} MB are free there. Nothing that was there "
        "is lost: mend this and give the same command again, training goes on from its last checkpoint"
    )


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
    missing = max(keep + 1 - len(newest_first(folder)), 1)
    free = shutil.disk_usage(folder).free
    if free < missing * size:
        raise OSError(
            f"{folder}: {free / 1e6:.1f} MB are free, but {missing} more checkpoints take at least "
            f"{missing * size / 1e6:.1f} MB: free space, or give a --run.folder elsewhere"
        )


def flush_file(path: Path) -> None:
    """Wait until a file is on the disk."""
    _flush(path, os.O_RDWR)


def flush_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    if os.name == "posix":  # elsewhere folders cannot be opened
        _flush(path, os.O_RDONLY)


def _flush(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reason(error: BaseException) -> str:
    """The first line of what an error says."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints of a folder: files, and folders of shards."""
    return sorted((path for path in folder.glob("step_*") if path.suffix in ("", ".pt")), reverse=True)
