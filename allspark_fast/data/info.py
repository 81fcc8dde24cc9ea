"""Metadata of datasets: class names, colors, label values, the ignored index."""

import json
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from allspark_fast.errors import DataError, InputError
from allspark_fast.text import one_line

Color = tuple[int, int, int]
Palette = tuple[Color, ...]

IGNORE_INDEX = 255


@dataclass(frozen=True)
class DatasetInfo:
    """Metadata of a dataset.

    Attributes:
        name: short name.
        classes: class names in the order of their indices.
        palette: 256 RGB colors, one per value of a label.
        ignore_index: value of label files that stands for no class, -1 for none; in batches it is always 255.
        values: value of label files that stands for each class, None where that is its index; ``nonzero``: 0 is the
            first class, and all other numbers or colors, as those of objects, are the second.
    """

    name: str
    classes: tuple[str, ...]
    palette: Palette
    ignore_index: int = IGNORE_INDEX
    values: tuple[int, ...] | Literal["nonzero"] | None = None

    def class_values(self) -> Sequence[int]:
        """Return the value of label files that stands for each class."""
        return self.values if isinstance(self.values, tuple) else range(len(self.classes))

    def class_indices(self) -> dict[int, int]:
        """Return the class index of every value that label files may hold, 255 where it is ignored."""
        ignored = {IGNORE_INDEX: IGNORE_INDEX, self.ignore_index: IGNORE_INDEX}
        classes = {value: index for index, value in enumerate(self.class_values())}
        return classes | ignored if self.values is None else ignored | classes

    def label_colors(self) -> dict[Color, int]:
        """Return the value that every color of an RGB label stands for, without colors that classes share.

        The color of ``ignore_index`` (black if the palette is shorter) is ignored, unless it is the color of a class.
        """
        values = self.class_values()
        colors = self.palette[: len(values)]
        count = Counter(colors)
        ignored = {} if self.ignore_index in values else {self.palette[self.ignore_index]: self.ignore_index}
        ignored = {color: value for color, value in ignored.items() if color not in count}
        return ignored | {color: value for color, value in zip(colors, values, strict=True) if count[color] == 1}


def _voc_color(index: int) -> Color:
    # The bits of the index, dealt to R, G, B from the most significant down.
    red, green, blue = (sum((index >> (3 * bit + part) & 1) << (7 - bit) for bit in range(8)) for part in range(3))
    return red, green, blue


VOC_PALETTE: Palette = tuple(_voc_color(index) for index in range(256))


def hex_palette(text: str) -> Palette:
    """Parse a palette of colors written as rrggbb and separated by spaces; the rest is black."""
    return _parse_palette([list(bytes.fromhex(color)) for color in text.split()], 1)


def _expect(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _is_byte(value: Any) -> bool:
    return type(value) is int and 0 <= value <= 255


def _parse_palette(palette: Any, classes: int) -> Palette:
    """Accept [[r, g, b], ...] and the flat [r, g, b, r, g, b, ...]."""
    _expect(isinstance(palette, list), "'palette' must be a list of colors [r, g, b]")
    is_flat = all(map(_is_byte, palette))
    has_alpha = is_flat and len(palette) % 4 == 0 and len(palette) >= 4 * classes and set(palette[3::4]) == {255}
    _expect(not has_alpha, "'palette' looks like colors [r, g, b, a]; leave out the alpha, or write [[r, g, b], ...]")
    colors = [palette[i : i + 3] for i in range(0, len(palette), 3)] if is_flat else palette
    are_colors = all(isinstance(x, list) and len(x) == 3 and all(map(_is_byte, x)) for x in colors)
    _expect(are_colors, "'palette' must hold three integers in 0..255 per color, [r, g, b] without alpha")
    _expect(
        classes <= len(colors) <= 256, f"'palette' must hold a color for each of {classes} classes, found {len(colors)}"
    )
    return tuple((red, green, blue) for red, green, blue in [*colors, *[[0, 0, 0]] * (256 - len(colors))])


def parse_meta(meta: Any, name: str) -> DatasetInfo:
    """Validate the object of a ``meta.json``, see ``read_info``; raise ValueError with what was expected."""
    _expect(isinstance(meta, dict), "expected an object with the key 'classes'")
    unknown = sorted(set(meta) - {"classes", "ignore_index", "palette", "values"})
    _expect(not unknown, f"unknown keys {unknown}; known are 'classes', 'ignore_index', 'palette', 'values'")
    classes, ignore_index = meta.get("classes"), meta.get("ignore_index", IGNORE_INDEX)
    are_names = isinstance(classes, list) and bool(classes) and all(isinstance(x, str) for x in classes)
    _expect(are_names, "'classes' must be a list of names, in the order of their indices")
    count, uses = len(classes), Counter(unicodedata.normalize("NFC", x).strip() for x in classes)
    _expect(count <= 255, f"at most 255 classes are possible beside the ignored index, found {count}")
    equal = [one_line(x) for x, times in uses.items() if times > 1]
    _expect(not equal, f"'classes' holds equal names: {', '.join(equal)}; give each class a name of its own")
    _expect(_is_byte(ignore_index), f"'ignore_index' must be an integer in 0..255, found {ignore_index!r}")
    palette = _parse_palette(meta["palette"], count) if "palette" in meta else VOC_PALETTE
    values = meta.get("values", list(range(count)))
    if values == "nonzero":
        _expect(count == 2, f"'values' \"nonzero\" needs two classes, such as background and object, found {count}")
        return DatasetInfo(name, tuple(classes), palette, meta.get("ignore_index", -1), "nonzero")
    are_values = isinstance(values, list) and all(map(_is_byte, values)) and len(set(values)) == len(values) == count
    _expect(are_values, f"'values' must be a list of {count} different integers in 0..255, one for each class")
    ignores_class = "ignore_index" in meta and ignore_index in values
    _expect(not ignores_class, f"'ignore_index' {ignore_index} is also the value of a class: change it or 'values'")
    return DatasetInfo(name, tuple(classes), palette, ignore_index, tuple(values) if "values" in meta else None)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _expect(len(dict(pairs)) == len(pairs), f"a key is there more than once: {[key for key, _ in pairs]}")
    return dict(pairs)


def read_info(root: str | Path) -> DatasetInfo:
    """Read ``meta.json`` of a folder with images/ and labels/; raises DataError if it is missing or not valid.

    It is an object with the keys "classes": [name, ...] and, optionally, "ignore_index": 255, "palette": [[r, g, b],
    ...] and "values": [0, 1, ...], the value of each class in label files, if that is not its index: [0, 255] for
    black-and-white masks, or "nonzero" for masks that number their objects.
    """
    root = Path(root).resolve()
    file = root / "meta.json"
    example = '{"classes": ["background", "object"], "values": [0, 255]} for black-and-white masks'
    if not file.is_file():
        raise DataError(f"{root}: no meta.json; write {file}, such as {example}")
    try:  # UTF-8 or 16, with or without mark
        info = parse_meta(json.loads(file.read_bytes(), object_pairs_hook=_without_repeats), root.name)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise DataError(f"{file}: {error}") from error
    if len(info.classes) == 1:
        alone = f"with the one class {info.classes[0]!r} every pixel would be right"
        raise DataError(f"{file}: {alone}; name what is around it too, such as {example}")
    return info


def match_classes(weights: Sequence[str], labels: DatasetInfo) -> list[int]:
    """Return the index that each class of the labels has among the classes of the weights, matched by name.

    Raises:
        InputError: their classes have other names; the message lists both.
    """
    ours, theirs = ([unicodedata.normalize("NFC", name) for name in names] for names in (weights, labels.classes))
    if sorted(ours) != sorted(theirs):
        known, found = (", ".join(map(one_line, names)) for names in (ours, theirs))
        rename = ", or name the classes of the weights by `convert --classes`" if len(ours) == len(theirs) else ""
        raise InputError(
            f"the classes of the weights are {known}, but those of the labels of {labels.name} are {found}: correct "
            f"meta.json{rename}"
        )
    return [ours.index(name) for name in theirs]


def _known(name: str) -> DatasetInfo:
    text = (Path(__file__).parent / "known" / f"{name}.json").read_text(encoding="utf-8")
    return parse_meta(json.loads(text), name)


# Cityscapes by train IDs, as in the gtFine_labelTrainIds files; of COCO, the 80 thing classes in the order of their
# category IDs, after the background.
DATASETS = {name: _known(name) for name in ("pascal", "cityscapes", "coco", "camvid")}
