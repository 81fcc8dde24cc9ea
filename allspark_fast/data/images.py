"""Images and labels on disk, in whatever mode they were saved."""

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile

from allspark_fast.data.info import IGNORE_INDEX, VOC_PALETTE, Color, DatasetInfo
from allspark_fast.errors import DataError
from allspark_fast.text import first_of

Result = TypeVar("Result")
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
# Compressions of TIFF, by Pillow's names. WebP may be lossless there too, but that cannot be told.
_LOSSY = ("jpeg", "tiff_jpeg", "webp", "tiff_sgilog", "tiff_sgilog24")
# Stored values that become 0 and 255: numbers, or percentiles such as "1%".
PixelRange = tuple[str, str]


def require_bytes(path: Path) -> None:
    """Raise DataError unless a file exists and is not empty, without reading it."""
    if not path.is_file():
        if os.path.lexists(path):
            raise DataError(f"{path}: a broken link, a folder or a device, where a file was expected; replace it")
        hint = ", in which folders are separated by /" if "\\" in path.name else ""
        raise DataError(f"{path}: no such file; check the data root and the split file that lists it{hint}")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty (0 bytes); download it again")


def decode(path: Path, convert: Callable[[ImageFile], Result]) -> Result:
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
        is_system = isinstance(error, OSError) and error.errno is not None
        advice = "check its permissions and the disk" if is_system else "convert it or download it again"
        raise DataError(f"{path}: cannot be read as an image ({error}); {advice}") from error


def pages_of(image: Image.Image) -> int:
    """Return how many pages or frames a file has; of images only the first is read."""
    return getattr(image, "n_frames", 1)


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation; for TIFF only before loading the pixels, which applies it and removes the tag."""
    orientation = image.getexif().get(ExifTags.Base.Orientation)
    return orientation if orientation in _TRANSPOSITIONS else 1


def stored_form(image: ImageFile) -> tuple[str, int]:
    """Return Pillow's raw mode of a file that is not loaded yet, and the greatest integer that it can store."""
    codec, _, _, arguments = image.tile[0] if image.tile else ("", None, 0, image.mode)
    raw, *more = arguments if isinstance(arguments, tuple) else (arguments,)
    if codec.startswith("ppm"):
        return str(raw), int(more[0])
    bits = re.search(r";(\d+)", str(raw))
    return str(raw), 2 ** (int(bits[1]) if bits else {"1": 1, "I": 32, "F": 32}.get(image.mode, 8)) - 1


def read_image(path: str | Path, pixel_range: PixelRange | None = None) -> Image.Image:
    """Read an image as 8-bit RGB, see ``to_rgb``; raises DataError, which names the file."""
    return decode(Path(path), lambda image: to_rgb(image, pixel_range))


def to_rgb(image: Image.Image, pixel_range: PixelRange | None) -> Image.Image:
    """Convert an opened image, of several pages the first, to 8-bit RGB, upright and without alpha.

    Values of ``pixel_range`` become 0 and 255, for files of all kinds: ``("0", "4095")``, or percentiles of each image,
    ``("1%", "99%")``. None scales gray of 16 bits from 0..65535, and refuses what has no fixed range.

    Raises:
        DataError: the image has no fixed range, or values that are not finite.
    """
    image.load()
    # ImageOps.exif_transpose also rewrites the EXIF block, which can fail.
    if (orientation := orientation_of(image)) != 1:
        image = image.transpose(_TRANSPOSITIONS[orientation])
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns about the direct conversion
    is_deep = image.mode.startswith(("F", "I"))
    if not is_deep:
        image = image.convert("RGB")
    return _rescaled(image, pixel_range).convert("RGB") if is_deep or pixel_range else image


def mean_color(image: Image.Image) -> npt.NDArray[np.float64]:
    """Return the mean of red, green and blue of an opened image, (3,), in the numbers of the file."""
    image.draft("RGB", (64, 64))  # of a JPEG, decodes a part of the resolution
    if image.mode.startswith(("F", "I")):
        return np.nan_to_num(np.full(3, np.asarray(image).mean(dtype=float)), posinf=0, neginf=0)
    image = image.convert("RGBA" if image.mode == "P" else "RGB")  # Pillow warns of a P with alpha made RGB
    return np.asarray(image.resize((1, 1), Image.Resampling.BOX), float).ravel()[:3]


def _rescaled(image: Image.Image, pixel_range: PixelRange | None) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise DataError("holds values that are not finite; replace them")
    if pixel_range is None:
        pixel_range = "0", "65535"
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            found = f"{values.min():g}..{values.max():g}"
            kind = "floating point pixels" if image.mode == "F" else "gray values outside 0..65535"
            raise DataError(f"{kind}, here {found}, have no fixed range; train with one, such as --data.range 1% 99%")
    low, high = (np.percentile(values, float(x[:-1])) if x.endswith("%") else float(x) for x in pixel_range)
    scaled = (values - low) * (255 / max(high - low, 1e-30))
    return Image.fromarray(np.rint(scaled.clip(0, 255)).astype(np.uint8))


def read_label(path: str | Path, info: DatasetInfo | None = None) -> Image.Image:
    """Read a lossless label as class indices, see ``to_classes``; raises DataError, which names the file."""
    return decode(Path(path), lambda image: to_classes(image, info))


def colors_of(image: Image.Image, values: npt.NDArray[np.integer]) -> dict[Color, int]:
    """Return the index that each color has in a palette image, of the indices that occur and colors that do once."""
    palette = image.getpalette() or [] if image.mode == "P" else []
    used = [index for index in np.unique(values).tolist() if 3 * index + 2 < len(palette)]
    colors = {index: (palette[3 * index], palette[3 * index + 1], palette[3 * index + 2]) for index in used}
    count = Counter(colors.values())
    return {color: index for index, color in colors.items() if count[color] == 1}


def to_classes(image: ImageFile, info: DatasetInfo | None) -> Image.Image:
    """Convert an opened label to class indices, a PIL image of mode L, 255 ignored.

    Palette images give their indices; gray images of any depth the numbers in the file; RGB images, and RGBA images
    without regard to alpha, the values that the palette of ``info`` assigns to their colors. Without ``info`` values
    are as stored, and colors refused.

    Raises:
        DataError: it is compressed with loss, of several pages, turned by EXIF (whether it matches the image as stored
            or upright cannot be known), has a palette that contradicts ``info``, or a value or color without meaning.
    """
    raw, greatest = stored_form(image)  # before the EXIF block of a PNG, which lies behind its pixels
    _refuse_what_changes_numbers(image, raw)
    is_color = image.mode in ("RGB", "RGBA") and info is not None
    if is_color and "16" in raw:
        raise DataError("has 16 bits per channel, of which only the upper 8 are read; save it with 8 bits per channel")
    if not is_color and image.mode not in ("1", "L", "P", "I") and not image.mode.startswith("I;16"):
        raise DataError(
            f"labels must hold one class index per pixel (gray or palette image), this one has mode {image.mode};"
            " convert it to class indices, or, if colors stand for classes, to RGB with 'palette' in meta.json"
        )
    values = np.asarray(image.convert("RGB") if is_color else image)
    if not is_color and greatest < (full := {"L": 255, "I": 65535}.get(image.mode, 0)):
        values = (values.astype(np.int64) * greatest + full // 2) // full  # Pillow scales few bits to the full range
    if info is not None and info.values == "nonzero":
        found = values.any(axis=2) if is_color else np.where(values == info.ignore_index, IGNORE_INDEX, values != 0)
        return Image.fromarray(found.astype(np.uint8))
    if info is not None and is_color:
        values = _values_of_colors(values, info.label_colors())
    elif info is not None and info.palette != VOC_PALETTE:
        _refuse_other_palette(colors_of(image, values), info)
    if values.min() < 0 or values.max() > 255:
        raise DataError(
            f"class indices must lie in 0..255, found {values.min()}..{values.max()}; if these number"
            ' objects, write "values": "nonzero" into meta.json'
        )
    label = Image.fromarray(values.astype(np.uint8))
    if info is None:
        return label
    indices = info.class_indices()
    if wrong := [value for value, count in enumerate(label.histogram()) if count and value not in indices]:
        expected = f"the values {list(info.values)}" if info.values else f"the indices 0..{len(info.classes) - 1}"
        raise DataError(
            f"holds {wrong}, but the {len(info.classes)} classes of {info.name} have {expected}; convert the label, or"
            " list the missing classes, or the values of the classes, in meta.json"
        )
    return label.point([indices.get(value, value) for value in range(256)])


def _refuse_what_changes_numbers(image: ImageFile, raw: str) -> None:
    # Lossy pixels are in chunks of this name.
    is_lossy_webp = image.format == "WEBP" and b"VP8 " in Path(str(image.filename)).read_bytes()
    if image.format in ("JPEG", "MPO") or is_lossy_webp or image.info.get("compression") in _LOSSY:
        name = image.info.get("compression", image.format)
        raise DataError(f"{name} compression changes class indices; save labels as PNG where they were drawn")
    if (pages := pages_of(image)) > 1:
        raise DataError(f"holds {pages} pages, but a label is one; save the one that counts as PNG")
    if (orientation := orientation_of(image)) != 1:
        raise DataError(
            f"its EXIF orientation is {orientation}, but labels are read as stored; save it upright, without that tag,"
            " so that it matches the image as viewers show it"
        )
    if re.search(r";\d*I", raw):
        raise DataError("stores white as 0 (WhiteIsZero), so programs disagree about its numbers; save it as PNG")


def _refuse_other_palette(colors: Mapping[Color, int], info: DatasetInfo) -> None:
    expected = info.label_colors()
    for color, index in colors.items():
        value = expected.get(color, index)
        if value not in (index, info.ignore_index):
            raise DataError(
                f"its own palette gives the color {list(color)} to {index}, but 'palette' in meta.json gives it to"
                f" {value}; convert this label to RGB, whose colors count, or correct one of the palettes"
            )


def _values_of_colors(pixels: npt.NDArray[np.uint8], colors: Mapping[Color, int]) -> npt.NDArray[np.integer]:
    codes = pixels.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)
    known = np.array(sorted([(red << 16) + (green << 8) + blue, index] for (red, green, blue), index in colors.items()))
    position = known[:, 0].searchsorted(codes).clip(max=len(known) - 1)
    if unknown := np.unique(codes[codes != known[position, 0]]).tolist():
        shown = first_of([str([code >> 16, code >> 8 & 255, code & 255]) for code in unknown])
        raise DataError(
            f"holds colors that do not stand for exactly one class: {shown}; known are"
            f" {sorted(map(list, colors))}. Correct 'palette' in meta.json (one color per class, in class order), or"
            " repaint these pixels; many similar colors come from anti-aliasing or JPEG compression"
        )
    return known[position, 1]
