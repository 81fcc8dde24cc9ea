"""Files that are written whole or not at all."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file beside ``path``, flush it to disk and rename it: ``path`` is never half written.

    Raises:
        OSError: there is no such folder, the disk is full, or the folder is read-only; ``path`` is as it was before.
    """
    require_parent(path)
    # Named after the process, because ranks may write at the same time. A name may be as long as names can be.
    temporary = path.with_name(f".{path.name[:40]}.{os.getpid()}.tmp{path.suffix}")
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


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 as ``write_atomically`` does; half of a surrogate pair is escaped."""
    write_atomically(path, lambda temporary: temporary.write_bytes(text.encode(errors="backslashreplace")))


def remove_unfinished(folder: Path) -> None:
    """Remove what processes that died in ``write_atomically`` left in a folder, which nobody else may write into."""
    for left in folder.glob(".*.tmp*"):
        left.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Make a folder and its parents, unless it exists; raises NotADirectoryError if one of them is a file."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(
            f"{path}: expected a folder, but it or a parent is a file: give another name"
        ) from error


def require_parent(path: Path) -> None:
    """Check that there is a folder to write a file into, before work starts; raises FileNotFoundError."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}, make it first")


def reason(error: BaseException) -> str:
    """Return the first line of an error's message, or its type."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _flush(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
