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
