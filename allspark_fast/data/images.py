"""Images and labels on disk, in whatever mode they were saved."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from allspark_fast.device import available_cpus
from allspark_fast.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
# Pillow identifies files by content, not by suffix, and for some formats (EPS) it starts other programs.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

# By EXIF orientation.
_TRANSPOSITIONS = {
    number: Image.Transpose[name]
    for number, name in enumerate(
        ["FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"],
        start=2,
    )
}


def resolve_path(root: str | Path, relative: str) -> Path:
    """Resolve a path of a split file; every listed path passes through here.

    Symbolic links inside ``root`` may point anywhere: only the owner of the folder can create them, not a split file.

    Args:
        root: folder of the dataset.
        relative: path relative to ``root``; its ``..`` are resolved as text, so none climbs out through a link.

    Raises:
        DataError: the path leaves ``root``.
    """
    inside = Path(os.path.normpath(relative))
    if inside.is_absolute() or inside.parts[:1] == ("..",):
        raise DataError(
            f"{relative}: this path leaves the data root {root}; make it relative to the root, without a leading slash"
            " or '..', or create a symbolic link to the folder inside the root"
        )
    return Path(root) / inside


def require_bytes(path: Path) -> None:
    """Check that a file exists and is not empty, without reading it.

    Raises:
        DataError: no such file, or it is empty.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; check the data root and the split file that lists it")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty (0 bytes); download it again")


def list_images(folder: Path) -> list[Path]:
    """List the image files below a folder in alphabetical order, see ``list_files``."""
    return [file for file in list_files(folder) if file.suffix.lower() in IMAGE_SUFFIXES]


def list_files(folder: Path) -> list[Path]:
    """List the files below a folder in alphabetical order.

    Hidden files and folders are left out. Links to folders are followed, but for those that lead back to a folder in
    which they lie. A folder is entered once, and of several ways to it one without links is taken.
    """
    found: list[Path] = []
    entered: set[str] = set()
    folders, links = [folder] * folder.is_dir(), list[Path]()
    while folders or links:
        current = folders.pop() if folders else links.pop(0)
        real = os.path.realpath(current)
        is_loop = current != folder and Path(os.path.realpath(current.parent)).is_relative_to(real)
        if real in entered or is_loop:
            continue
        entered.add(real)
        for path in sorted(current.iterdir()):
            if path.name.startswith("."):
                continue
            if path.is_dir():
                (links if path.is_symlink() else folders).append(path)
            else:
                found.append(path)
    return sorted(found)


def map_in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Call a function that reads files on every item, in threads, and return the results in order."""
    # More threads than CPUs, as some wait for the disk.
    with ThreadPoolExecutor(available_cpus() + 4) as pool:
        return list(pool.map(function, items))


def decode(path: Path, convert: Callable[[Image.Image], Result]) -> Result:
    """Open an image, which need not be decoded yet, and return what ``convert`` makes of it.

    Raises:
        DataError: no such file, not an image, damaged, or refused by ``convert``; names the file.
    """
    require_bytes(path)
    try:
        with Image.open(path, formats=_FORMATS) as image:
            return convert(image)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except UnidentifiedImageError as error:
        raise DataError(
            f"{path}: not an image in a supported format ({', '.join(_FORMATS)}); convert it or download it again"
        ) from error
    except Image.DecompressionBombError as error:
        raise DataError(f"{path}: {error}; cut it into tiles of at most {Image.MAX_IMAGE_PIXELS} pixels") from error
    # Decoders raise OSError, SyntaxError, ValueError, EOFError, struct.error and more on damaged files.
    except Exception as error:
        raise DataError(f"{path}: cannot be read as an image ({error}); convert it or download it again") from error


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation; for TIFF only before loading the pixels, which applies it and removes the tag."""
    orientation = image.getexif().get(ExifTags.Base.Orientation)
    return orientation if orientation in _TRANSPOSITIONS else 1


def read_image(path: str | Path) -> Image.Image:
    """Read an image as 8-bit RGB, upright.

    Applies the EXIF orientation, converts gray, palette and CMYK images, drops alpha, and scales 16-bit gray from
    0..65535 to 0..255.

    Raises:
        DataError: no such file, not an image, truncated, or floating point.
    """
    return decode(Path(path), to_rgb)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an opened image as ``read_image`` does."""
    image.load()
    # ImageOps.exif_transpose also rewrites the EXIF block, which can fail.
    if (orientation := orientation_of(image)) != 1:
        image = image.transpose(_TRANSPOSITIONS[orientation])
    if image.mode == "F":
        raise DataError("floating point pixels have no fixed range; convert the image to 8 bits per channel")
    if image.mode.startswith("I"):
        image = _wide_to_gray(image)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns about the direct conversion
    return image.convert("RGB")


def _wide_to_gray(image: Image.Image) -> Image.Image:
    """Scale 16-bit gray (``I;16*``, or ``I`` from older files) from 0..65535 to 0..255."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise DataError("gray values outside 0..65535; convert the image to 8 bits per channel")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))
