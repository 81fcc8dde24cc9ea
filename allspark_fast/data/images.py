"""Reading images and labels from disk, whatever mode they were saved in."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

from allspark_fast.errors import DataError

Color = tuple[int, int, int]
Result = TypeVar("Result")

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
# Files are read by their content, whatever they are called, and Pillow knows kinds that start other programs (EPS).
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def resolve_path(root: str | Path, relative: str, *, allow_outside: bool = False) -> Path:
    """Returns the path of a file of a data set, the only place where a listed path becomes a real one.

    Args:
        root: Folder of the data set.
        relative: Path as written in a split file, relative to `root`. Its `..` are resolved as text, so that none
            can climb out through a symbolic link.
        allow_outside: Accept absolute paths and paths that climb out of `root` with `..`.

    Raises:
        DataError: The path leaves `root` and `allow_outside` is false. Symbolic links inside `root` may point
            anywhere: whoever owns the folder made them, which split files cannot do.
    """
    inside = Path(os.path.normpath(relative))
    if (inside.is_absolute() or inside.parts[:1] == ("..",)) and not allow_outside:
        raise DataError(
            f"{relative}: this path leaves the data root {root}; write it relative to the root, without a"
            f" leading slash and without '..', or put a symbolic link to the folder into the root"
        )
    return Path(root) / inside


def require_bytes(path: Path) -> None:
    """Looks whether a file holds anything.

    Raises:
        DataError: No such file, or it is empty.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; check the data root and the split file that lists it")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty (0 bytes); fetch it again")


def _decode(path: Path, convert: Callable[[Image.Image], Result]) -> Result:
    """Opens, decodes and converts an image, so that a damaged file fails here and by name."""
    require_bytes(path)
    try:
        with Image.open(path, formats=_FORMATS) as image:
            return convert(image)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except UnidentifiedImageError as error:
        raise DataError(
            f"{path}: cannot be read as an image of the kinds {', '.join(_FORMATS)}; fetch or convert it again"
        ) from error
    except Image.DecompressionBombError as error:
        raise DataError(f"{path}: {error}; cut it into tiles of at most {Image.MAX_IMAGE_PIXELS} pixels") from error
    # Decoders raise OSError, SyntaxError, ValueError, EOFError, struct.error and more on damaged files.
    except Exception as error:
        raise DataError(f"{path}: cannot be read as an image ({error}); fetch or convert it again") from error


def read_orientation(path: str | Path) -> int:
    """Reads the EXIF orientation of an image: 1 is upright, 2 to 8 say how `read_image` turns it.

    Raises:
        DataError: No such file, or not an image.
    """
    return _decode(Path(path), _orientation)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation; of TIFF only before its pixels are loaded, which turns it and removes the tag."""
    found = image.getexif().get(ExifTags.Base.Orientation)
    return found if found in _TURNS else 1


def _upright(image: Image.Image) -> Image.Image:
    """Applies the EXIF orientation. ImageOps.exif_transpose also rewrites the EXIF block, which can fail."""
    image.load()
    turn = _TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _wide_to_grey(image: Image.Image) -> Image.Image:
    """Brings 16-bit grey (`I;16*`, or `I` from older files) to 8 bits: full scale 65535 becomes 255."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise DataError("grey values outside 0..65535; convert the image to 8 bits per channel")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def read_image(path: str | Path) -> Image.Image:
    """Reads an image as 8-bit RGB, upright.

    The EXIF orientation is applied. Grey, palette and CMYK images are converted, alpha is dropped, 16-bit
    grey is scaled from 0..65535 to 0..255.

    Args:
        path: Image file.

    Returns:
        PIL image of mode RGB.

    Raises:
        DataError: No such file, not an image, truncated, or floating point.
    """
    return _decode(Path(path), _to_rgb)


def _to_rgb(image: Image.Image) -> Image.Image:
    image = _upright(image)
    if image.mode == "F":
        raise DataError("floating point pixels have no fixed range; convert the image to 8 bits")
    if image.mode.startswith("I"):
        image = _wide_to_grey(image)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns on the direct way
    return image.convert("RGB")


def read_label(path: str | Path, colors: Mapping[Color, int] | None = None) -> Image.Image:
    """Reads a label as class indices, pixel for pixel as stored.

    It belongs to the upright image of `read_image`. One that has itself to be turned is refused: whether its pixels
    fit the image as stored or upright cannot be told, and half of the orientations change no size.

    Palette images give their indices; grey, 1-bit and 16-bit grey images their values; RGB images, and RGBA images
    whose alpha does not count, what `colors` says.

    Args:
        path: Label file of a lossless format.
        colors: What each colour of a colour image stands for; None refuses such images.

    Returns:
        PIL image of mode L holding class indices.

    Raises:
        DataError: No such file, not an image, truncated, JPEG, an EXIF orientation other than 1, a colour that is not
            in `colors`, or values outside 0..255.
    """
    return _decode(Path(path), lambda image: _to_indices(image, colors))


def _to_indices(image: Image.Image, colors: Mapping[Color, int] | None) -> Image.Image:
    if image.format == "JPEG":
        raise DataError("JPEG changes class indices; save labels as PNG")
    if (orientation := _orientation(image)) != 1:
        raise DataError(
            f"its EXIF orientation is {orientation}, by which viewers turn it, but labels are read as stored; save it"
            " without that tag, so that it lies on its image as viewers show that"
        )
    if image.mode in ("RGB", "RGBA") and colors is not None:
        return _indices_of_colors(np.asarray(image.convert("RGB")), colors)
    if image.mode not in ("1", "L", "P", "I") and not image.mode.startswith("I;16"):
        raise DataError(
            f"labels must hold one class index per pixel (grey or palette image), this one has mode {image.mode};"
            f" convert it to class indices, or, if its colours stand for classes, to RGB, and give them as 'palette' in"
            f" meta.json"
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
    strange = codes != known[position, 0]
    if strange.any():
        unknown = [[code >> 16, code >> 8 & 255, code & 255] for code in np.unique(codes[strange]).tolist()]
        shown = f"{unknown[:5]}" + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        raise DataError(
            f"holds colours that are not those of one class: {shown}; known are {sorted(map(list, colors))}. Correct"
            " 'palette' in meta.json (the colours of the classes, in their order), or repaint these pixels; many like"
            " colours come of smoothing or of JPEG"
        )
    return Image.fromarray(known[position, 1].astype(np.uint8))
