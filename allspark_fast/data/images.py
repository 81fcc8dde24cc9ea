"""Images and labels on disk, in whatever mode they were saved."""

import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

from allspark_fast.device import available_cpus
from allspark_fast.errors import DataError

Color = tuple[int, int, int]
Item = TypeVar("Item")
Result = TypeVar("Result")

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
# Pillow identifies files by content, not by suffix, and for some formats (EPS) it starts other programs.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
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
    folders, links = [folder], list[Path]()
    while folders or links:
        current = folders.pop() if folders else links.pop(0)
        real = os.path.realpath(current)
        is_loop = current != folder and Path(os.path.realpath(current.parent)).is_relative_to(real)
        if real in entered or is_loop or not current.is_dir():
            continue
        entered.add(real)
        visible = [path for path in sorted(current.iterdir()) if not path.name.startswith(".")]
        for path in visible:
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


def _decode(path: Path, convert: Callable[[Image.Image], Result]) -> Result:
    """Open, decode and convert an image, so that a damaged file fails here and by name."""
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


def read_orientation(path: str | Path) -> int:
    """Read the EXIF orientation of an image: 1 is upright; ``read_image`` rotates or mirrors by 2 to 8.

    Raises:
        DataError: no such file, or not an image.
    """
    return _decode(Path(path), _orientation)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation; for TIFF only before loading the pixels, which applies it and removes the tag."""
    orientation = image.getexif().get(ExifTags.Base.Orientation)
    return orientation if orientation in _TRANSPOSITIONS else 1


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; ImageOps.exif_transpose also rewrites the EXIF block, which can fail."""
    image.load()
    transposition = _TRANSPOSITIONS.get(_orientation(image))
    return image if transposition is None else image.transpose(transposition)


def _wide_to_gray(image: Image.Image) -> Image.Image:
    """Scale 16-bit gray (``I;16*``, or ``I`` from older files) from 0..65535 to 0..255."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise DataError("gray values outside 0..65535; convert the image to 8 bits per channel")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def read_image(path: str | Path) -> Image.Image:
    """Read an image as 8-bit RGB, upright.

    Applies the EXIF orientation, converts gray, palette and CMYK images, drops alpha, and scales 16-bit gray from
    0..65535 to 0..255.

    Returns:
        PIL image of mode RGB.

    Raises:
        DataError: no such file, not an image, truncated, or floating point.
    """
    return _decode(Path(path), _to_rgb)


def _to_rgb(image: Image.Image) -> Image.Image:
    image = _upright(image)
    if image.mode == "F":
        raise DataError("floating point pixels have no fixed range; convert the image to 8 bits per channel")
    if image.mode.startswith("I"):
        image = _wide_to_gray(image)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns about the direct conversion
    return image.convert("RGB")


def read_label(path: str | Path, colors: Mapping[Color, int] | None = None) -> Image.Image:
    """Read a label as class indices, pixel by pixel as stored.

    Palette images give their indices; gray, 1-bit and 16-bit gray images their values; RGB images, and RGBA images
    without regard to alpha, the values that ``colors`` assigns.

    A label whose own EXIF orientation is not 1 is refused: whether its pixels match the image as stored or upright
    cannot be known, and half of the orientations do not change the size.

    Args:
        path: label file of a lossless format.
        colors: value of every color in RGB labels; None refuses such labels.

    Returns:
        PIL image of mode L.

    Raises:
        DataError: no such file, not an image, truncated, JPEG, an EXIF orientation other than 1, a color that is not
            in ``colors``, or values outside 0..255.
    """
    return _decode(Path(path), lambda image: _to_indices(image, colors))


def values_of(label: Image.Image) -> list[int]:
    """Return the distinct values of a label (mode L), ascending."""
    return [value for value, count in enumerate(label.histogram()) if count]


def _to_indices(image: Image.Image, colors: Mapping[Color, int] | None) -> Image.Image:
    if image.format == "JPEG":
        raise DataError("JPEG compression changes class indices; save labels as PNG")
    if (orientation := _orientation(image)) != 1:
        raise DataError(
            f"its EXIF orientation is {orientation}, but labels are read as stored; save it upright, without that tag,"
            " so that it matches the image as viewers show it"
        )
    if image.mode in ("RGB", "RGBA") and colors is not None:
        return _indices_of_colors(np.asarray(image.convert("RGB")), colors)
    if image.mode not in ("1", "L", "P", "I") and not image.mode.startswith("I;16"):
        raise DataError(
            f"labels must hold one class index per pixel (gray or palette image), this one has mode {image.mode};"
            " convert it to class indices, or, if colors stand for classes, to RGB with 'palette' in meta.json"
        )
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 255:
        raise DataError(f"class indices must lie in 0..255, found {values.min()}..{values.max()}")
    return Image.fromarray(values.astype(np.uint8))


def _indices_of_colors(pixels: npt.NDArray[np.uint8], colors: Mapping[Color, int]) -> Image.Image:
    codes = pixels.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)
    known = np.array([[(red << 16) + (green << 8) + blue, index] for (red, green, blue), index in colors.items()])
    known = known[known[:, 0].argsort()]
    position = known[:, 0].searchsorted(codes).clip(max=len(known) - 1)
    unknown = np.unique(codes[codes != known[position, 0]]).tolist()
    if unknown:
        shown = f"{[[code >> 16, code >> 8 & 255, code & 255] for code in unknown[:5]]}"
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise DataError(
            f"holds colors that do not stand for exactly one class: {shown}{more}; known are"
            f" {sorted(map(list, colors))}. Correct 'palette' in meta.json (one color per class, in class order), or"
            " repaint these pixels; many similar colors come from anti-aliasing or JPEG compression"
        )
    return Image.fromarray(known[position, 1].astype(np.uint8))
