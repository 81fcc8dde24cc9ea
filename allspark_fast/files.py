"""Files that are written whole or not at all, and read without running code from them."""

import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from allspark_fast.errors import InputError


def read_torch_file(path: Path) -> Any:
    """Read what ``torch.save`` wrote onto the CPU, without running code from it.

    Since torch 1.6 such files are zip archives, which hold a checksum of every tensor. ``torch.load`` does not compare
    it: a flipped bit in a tensor would go unnoticed.

    Raises:
        InputError: the file is damaged, or holds more than tensors and plain values; the message names it.
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
        raise InputError(
            f"{path} cannot be read, it is damaged or holds more than weights ({reason(error)})"
        ) from error


def _begins_like_weights(path: Path) -> bool:
    """Return whether this may be an archive, or what torch wrote before 1.6: else torch advises to allow more."""
    with path.open("rb") as file:
        return file.read(2).startswith((b"PK", pickle.PROTO))


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file beside ``path``, flush it to disk and rename it: ``path`` is never half written.

    Raises:
        OSError: there is no such folder, the disk is full, or the folder is read-only; ``path`` is as it was before.
    """
    require_parent(path)
    # Named after the process, because ranks may write at the same time.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")
    try:
        write(temporary)
        _flush(temporary, os.O_RDWR)
        temporary.replace(path)
        if os.name == "posix":  # elsewhere folders cannot be opened
            _flush(path.parent, os.O_RDONLY)
    # torch reports a full disk by a RuntimeError, and safetensors by an error of its own.
    except (OSError, RuntimeError, SafetensorError) as error:
        free = shutil.disk_usage(path.parent).free  # before anything is removed
        temporary.unlink(missing_ok=True)
        raise OSError(
            f"{path} was not written ({reason(error)}); {free / 1e6:.1f} MB are free there. Nothing that was there is "
            "lost: mend this and give the same command again"
        ) from error


def remove_unfinished(folder: Path) -> None:
    """Remove what processes that died in ``write_atomically`` left in a folder, which nobody else may write into."""
    for left in folder.glob(".*.tmp*"):
        left.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Make a folder and its parents, unless it exists.

    Raises:
        NotADirectoryError: one of them is a file.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(
            f"{path}: expected a folder, but it or a parent is a file: give another name"
        ) from error


def require_parent(path: Path) -> None:
    """Check that there is a folder to write a file into, before work starts.

    Raises:
        FileNotFoundError: there is none.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}, make it first")


def reason(error: BaseException) -> str:
    """Return the first line of an error's message, or its type."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _flush(path: Path, flags: int) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
