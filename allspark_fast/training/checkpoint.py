"""Checkpoints that are whole or not there: written aside, flushed, renamed, and read only if every checksum holds."""

import logging
import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from allspark_fast.distributed import all_gather_cat, all_reduce_any
from allspark_fast.files import read_torch_file, write_atomically

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
    if len(all_gather_cat(torch.tensor([zlib.crc32(names.encode())])).unique()) > 1:
        raise ValueError(f"{folder}: ranks find different checkpoints (here: {names}); they must share this folder")
    reasons = []
    for path in paths:
        state = None
        try:
            state = (read or read_checkpoint)(path)
        except ValueError as error:
            logger.warning("%s; trying the one before", error)
            reasons.append(str(error))
        if not all_reduce_any(state is None):
            return state
    if paths:
        why = "; ".join(reasons) or "another rank says why"
        raise ValueError(
            f"{folder}: none of {len(paths)} checkpoints can be read ({why}); "
            "remove the folder, or give another --run.output-dir, to start afresh"
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
            f"{missing * size / 1e6:.1f} MB: free space, or give a --run.output-dir elsewhere"
        )


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints of a folder: files, and folders of shards."""
    return sorted((path for path in folder.glob("step_*") if path.suffix in ("", ".pt")), reverse=True)
