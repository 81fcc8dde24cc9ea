"""Checkpoints of a run, one file each: whole or not there, and read only if every checksum holds."""

import logging
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from allspark_fast.distributed import all_gather_cat, all_reduce_any
from allspark_fast.errors import InputError
from allspark_fast.files import make_folder, remove_unfinished, write_atomically
from allspark_fast.weights.files import read_torch_file

logger = logging.getLogger(__name__)

# Kept in every checkpoint: no other file is taken for one, nor one whose contents have changed their meaning.
_FORMAT = "allspark_fast checkpoint 2"
# What follows the number of ranks and the device, not the model.
_RANDOM = ("rng", "cuda_rng")


def save_checkpoint(folder: Path, step: int, state: Mapping[str, Any], *, keep_last: int) -> Path:
    """Write ``step_<step>.pt``, then remove all but the ``keep_last`` newest and what a crash left half written.

    Raises OSError if it cannot be written; the checkpoints that were there stay.
    """
    path = folder / f"step_{step:08d}.pt"
    write_atomically(path, lambda temporary: torch.save({"format": _FORMAT, **state}, temporary))
    for old in list_checkpoints(folder)[keep_last:]:
        old.unlink()
    remove_unfinished(folder)
    return path


def load_latest_checkpoint(folder: Path, expected: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """Read the newest checkpoint that is whole onto the CPU, the same one on all ranks, without running code from it.

    Names and shapes of tensors must be those of ``expected``, if given. Checkpoints that cannot be read are passed over
    with a warning. Returns None without a checkpoint; raises InputError if there are some, but none can be read, or if
    ranks find different ones.
    """
    paths = list_checkpoints(folder)
    names = ", ".join(path.name for path in paths)
    if len(all_gather_cat(torch.tensor([zlib.crc32(names.encode())])).unique()) > 1:
        raise InputError(f"{folder}: ranks find different checkpoints (here: {names}); they must share this folder")
    reasons = []
    for path in paths:
        state = None
        try:
            state = _read_checkpoint(path, expected)
        except (InputError, OSError) as error:
            logger.warning("%s; trying the one before", error)
            reasons.append(str(error))
        if not all_reduce_any(state is None):
            return state
    if not paths:
        return None
    why = "; ".join(reasons) or "another rank says why"
    raise InputError(
        f"{folder}: none of {len(paths)} checkpoints can be read ({why}); "
        "remove the folder, or give another --run.output-dir, to start afresh"
    )


def _read_checkpoint(path: Path, expected: Mapping[str, Any] | None) -> dict[str, Any]:
    state = read_torch_file(path)
    found = state.pop("format", None) if isinstance(state, dict) else None
    if found != _FORMAT:
        raise InputError(f"{path} is no checkpoint of this version: its format is {found!r}, expected {_FORMAT!r}")
    if expected is not None:
        # What an earlier version did not measure of classes starts afresh.
        state["classes"] = expected.get("classes", {}) | state.get("classes", {})
        if different := sorted(name for name, _ in _shapes(state) ^ _shapes(expected)):
            raise InputError(
                f"{path} is a checkpoint of another model: {different[:3]} are missing or of another shape"
            )
    return state


def _shapes(state: Mapping[str, Any]) -> set[tuple[str, torch.Size]]:
    """Return names and shapes of a state's tensors, without random states."""
    leaves, _ = pytree.tree_flatten_with_path({name: x for name, x in state.items() if name not in _RANDOM})
    return {(pytree.keystr(path), x.shape) for path, x in leaves if isinstance(x, Tensor)}


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, newest first."""
    return sorted(folder.glob("step_*.pt"), reverse=True)


def require_space(folder: Path, state: Mapping[str, Any], *, keep_last: int) -> None:
    """Make the folder of checkpoints; raises OSError if it lacks room for those that are kept, and one more."""
    make_folder(folder)
    size = sum(x.numel() * x.itemsize for x in pytree.tree_leaves(state) if isinstance(x, Tensor))
    missing = max(keep_last + 1 - len(list_checkpoints(folder)), 1)
    free = shutil.disk_usage(folder).free
    if free < missing * size:
        raise OSError(
            f"{folder}: {free / 1e6:.1f} MB are free, but {missing} more checkpoints take at least "
            f"{missing * size / 1e6:.1f} MB: free space, or give a --run.output-dir elsewhere"
        )


def random_states(device: torch.device) -> dict[str, Tensor]:
    """Return the states of the generators that work on a device draws from."""
    states = {"rng": torch.get_rng_state()}
    return {**states, "cuda_rng": torch.cuda.get_rng_state()} if device.type == "cuda" else states


def set_random_states(states: Mapping[str, Tensor]) -> None:
    """Set what ``random_states`` returned."""
    for name, set_state in (("rng", torch.set_rng_state), ("cuda_rng", torch.cuda.set_rng_state)):
        if name in states:
            set_state(states[name].clone())  # torch crashes on a part of a larger tensor
