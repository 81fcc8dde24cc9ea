"""Files of a dataset: paths of split files, and what lies in a folder."""

import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from allspark_fast.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def resolve_path(root: str | Path, relative: str) -> Path:
    """Resolve a path of a split file; every listed path passes through here.

    Symbolic links inside ``root`` may point anywhere, as a split file cannot create them; but ``..`` are resolved as
    text, so that none climbs out through a link.

    Raises:
        DataError: the path leaves ``root``.
    """
    inside = Path(os.path.normpath(relative))
    if inside.is_absolute() or inside.parts[:1] == ("..",):
        raise DataError(
            f"{relative}: this path leaves the data root {root} or is absolute; make it relative to the root, without a"
            " leading slash or '..', or create a symbolic link to the folder inside the root"
        )
    return Path(root) / inside


def require_bytes(path: Path) -> None:
    """Raise DataError unless a file exists and is not empty, without reading it."""
    if not path.is_file():
        if os.path.lexists(path):
            raise DataError(f"{path}: a broken link, a folder or a device, where a file was expected; replace it")
        hint = ", in which folders are separated by /" if "\\" in path.name else ""
        raise DataError(f"{path}: no such file; check the data root and the split file that lists it{hint}")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty (0 bytes); download it again")


def is_image(path: str | Path) -> bool:
    """Return whether a path has the suffix of a format that can be read."""
    return str(path).lower().endswith(IMAGE_SUFFIXES)


def list_images(folder: Path) -> list[Path]:
    """List the images below a folder, see ``list_files``, but for broken links and what is no file."""
    return [path for path in list_files(folder) if is_image(path) and path.is_file()]


def list_files(folder: Path) -> list[Path]:
    """List the files below a folder in alphabetical order.

    Hidden files and folders are left out. Links to folders are followed, but for those that lead back to a folder in
    which they or ``folder`` lie. A folder is entered once, and of several ways to it one without links is taken.
    """
    found, entered, waiting = list[Path](), set[str](), deque([folder] * folder.is_dir())
    while waiting:
        current = waiting.popleft()
        real = os.path.realpath(current)
        inside = () if current == folder else (folder, current.parent)
        if real in entered or any(Path(os.path.realpath(x)).is_relative_to(real) for x in inside):
            continue
        entered.add(real)
        for path in sorted(path for path in current.iterdir() if not path.name.startswith(".")):
            if not path.is_dir():
                found.append(path)
            elif path.is_symlink():
                waiting.append(path)
            else:
                waiting.appendleft(path)
    return sorted(found)


def map_in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Call a function that reads files on every item, in threads, and return the results in order."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(function, items))
