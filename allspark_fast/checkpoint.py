"""Checkpoints that are whole or not there: written aside, flushed, then renamed."""

import logging
import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)


def save_checkpoint(folder: Path, step: int, state: Mapping[str, Any], *, keep: int) -> Path:
    """Write ``step_<step>.pt`` and remove all but the newest ``keep`` checkpoints.

    Args:
        folder: of checkpoints; made if need be.
        step: number of steps taken.
        state: tensors and plain values.
        keep: checkpoints to keep, at least 1.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:08d}.pt"
    write_atomically(path, lambda temporary: torch.save(dict(state), temporary))
    for old in _newest_first(folder)[keep:]:
        old.unlink()
    return path


def load_latest_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Read the newest checkpoint that is readable, without running code from it.

    Args:
        folder: of checkpoints.

    Returns:
        the state, or None if there is no checkpoint. Damaged ones are named in a warning and passed over.

    Raises:
        ValueError: there are checkpoints, but none is readable.
    """
    paths = _newest_first(folder)
    for path in paths:
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            logger.warning("%s cannot be read (%s); trying the one before", path, reason)
    if paths:
        raise ValueError(f"{folder}: none of {len(paths)} checkpoints can be read; remove the folder to start afresh")
    return None


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file beside ``path``, flush it to disk and rename it: ``path`` is never half written."""
    temporary = path.with_name(f".{path.name}.tmp{path.suffix}")
    write(temporary)
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_*.pt"), reverse=True)
