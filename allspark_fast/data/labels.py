"""Labels on disk: what the numbers, the palette or the colors of a mask stand for."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from allspark_fast.data.images import decode, orientation_of
from allspark_fast.data.info import Color, DatasetInfo
from allspark_fast.errors import DataError


def read_label(path: str | Path, info: DatasetInfo | None = None) -> Image.Image:
    """Read a label as class indices, pixel by pixel.

    Palette images give their indices; gray, 1-bit and 16-bit gray images their values; RGB images, and RGBA images
    without regard to alpha, the values that the palette of ``info`` assigns to their colors.

    A label whose own EXIF orientation is not 1 is refused: whether its pixels match the image as stored or upright
    cannot be known, and half of the orientations do not change the size.

    Args:
        path: label file of a lossless format.
        info: meaning of values and colors; others are refused. None returns values as stored, and refuses colors.

    Returns:
        PIL image of mode L, 255 ignored.

    Raises:
        DataError: no such file, not an image, truncated, JPEG, an EXIF orientation other than 1, or a value or color
            that stands for no class; names the file.
    """
    return decode(Path(path), lambda image: _to_classes(image, info))


def values_of(label: Image.Image) -> list[int]:
    """Return the distinct values of a label (mode L), ascending."""
    return [value for value, count in enumerate(label.histogram()) if count]


def _to_classes(image: Image.Image, info: DatasetInfo | None) -> Image.Image:
    label = _to_values(image, None if info is None else info.label_colors())
    if info is None:
        return label
    indices = info.class_indices()
    if wrong := [value for value in values_of(label) if value not in indices]:
        expected = f"the values {list(info.values)}" if info.values else f"the indices 0..{len(info.classes) - 1}"
        raise DataError(
            f"holds {wrong}, but the {len(info.classes)} classes of {info.name} have {expected}; convert the label, or"
            " list the missing classes, or the values of the classes, in meta.json"
        )
    return label.point([indices.get(value, value) for value in range(256)])


def _to_values(image: Image.Image, colors: Mapping[Color, int] | None) -> Image.Image:
    if image.format == "JPEG":
        raise DataError("JPEG compression changes class indices; save labels as PNG")
    if (orientation := orientation_of(image)) != 1:
        raise DataError(
            f"its EXIF orientation is {orientation}, but labels are read as stored; save it upright, without that tag,"
            " so that it matches the image as viewers show it"
        )
    if image.mode in ("RGB", "RGBA") and colors is not None:
        return _values_of_colors(np.asarray(image.convert("RGB")), colors)
    if image.mode not in ("1", "L", "P", "I") and not image.mode.startswith("I;16"):
        raise DataError(
            f"labels must hold one class index per pixel (gray or palette image), this one has mode {image.mode};"
            " convert it to class indices, or, if colors stand for classes, to RGB with 'palette' in meta.json"
        )
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 255:
        raise DataError(f"class indices must lie in 0..255, found {values.min()}..{values.max()}")
    return Image.fromarray(values.astype(np.uint8))


def _values_of_colors(pixels: npt.NDArray[np.uint8], colors: Mapping[Color, int]) -> Image.Image:
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
