"""Metadata of datasets: class names, colors, label values, the ignored index."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allspark_fast.data.images import IMAGE_SUFFIXES, Color, map_in_threads, read_label
from allspark_fast.errors import DataError

Palette = tuple[Color, ...]

IGNORE_INDEX = 255


@dataclass(frozen=True)
class DatasetInfo:
    """Metadata of a dataset.

    Attributes:
        name: short name.
        classes: class names in the order of their indices.
        palette: 256 RGB colors, one per value of a label.
        ignore_index: value of label files that stands for no class; in batches it is always 255.
        values: value of label files that stands for each class, None where that is its index.
    """

    name: str
    classes: tuple[str, ...]
    palette: Palette
    ignore_index: int = IGNORE_INDEX
    values: tuple[int, ...] | None = None

    def class_indices(self) -> dict[int, int]:
        """Return the class index of every value that label files may hold, 255 where it is ignored."""
        ignored = {IGNORE_INDEX: IGNORE_INDEX, self.ignore_index: IGNORE_INDEX}
        if self.values is None:
            return {index: index for index in range(len(self.classes))} | ignored
        return ignored | {value: index for index, value in enumerate(self.values)}

    def label_colors(self) -> dict[Color, int]:
        """Return the value that every color of an RGB label stands for, without colors that classes share.

        The color of ``ignore_index`` (black if the palette is shorter) is ignored, unless it is the color of a class.
        """
        values = range(len(self.classes)) if self.values is None else self.values
        colors = self.palette[: len(values)]
        count = Counter(colors)
        ignored = {} if self.ignore_index in values else {self.palette[self.ignore_index]: self.ignore_index}
        ignored = {color: value for color, value in ignored.items() if color not in count}
        return ignored | {color: value for color, value in zip(colors, values, strict=True) if count[color] == 1}


def _voc_color(index: int) -> Color:
    """Return a color of the VOC color map: the bits of the index, dealt to R, G, B from the most significant down."""
    red = green = blue = 0
    for bit in range(8):
        red |= (index >> (3 * bit) & 1) << (7 - bit)
        green |= (index >> (3 * bit + 1) & 1) << (7 - bit)
        blue |= (index >> (3 * bit + 2) & 1) << (7 - bit)
    return red, green, blue


VOC_PALETTE: Palette = tuple(_voc_color(index) for index in range(256))


def _padded(colors: Sequence[Color]) -> Palette:
    """Fill a list of colors up with black to the 256 entries of a palette."""
    return tuple(colors) + ((0, 0, 0),) * (256 - len(colors))


def hex_palette(text: str) -> Palette:
    """Parse a palette of colors written as rrggbb and separated by spaces; the rest is black."""
    return _padded([(color[0], color[1], color[2]) for color in map(bytes.fromhex, text.split())])


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


_PASCAL = DatasetInfo(
    "pascal",
    _names(
        "background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable,"
        " dog, horse, motorbike, person, pottedplant, sheep, sofa, train, tvmonitor"
    ),
    VOC_PALETTE,
)

# Train IDs, as in the gtFine_labelTrainIds files.
_CITYSCAPES = DatasetInfo(
    "cityscapes",
    _names(
        "road, sidewalk, building, wall, fence, pole, traffic light, traffic sign, vegetation,"
        " terrain, sky, person, rider, car, truck, bus, train, motorcycle, bicycle"
    ),
    hex_palette(
        "804080 f423e8 464646 66669c be9999 999999 faaa1e dcdc00 6b8e23 98fb98 4682b4 dc143c ff0000 00008e"
        " 000046 003c64 005064 0000e6 770b20"
    ),
)

# The 80 thing classes of COCO in the order of their category IDs, after the background.
_COCO = DatasetInfo(
    "coco",
    _names(
        "background, person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic"
        " light, fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow,"
        " elephant, bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis,"
        " snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis"
        " racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,"
        " broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining"
        " table, toilet, tv, laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster,"
        " sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush"
    ),
    VOC_PALETTE,
)

_CAMVID = DatasetInfo(
    "camvid",
    _names("sky, building, pole, road, pavement, tree, signsymbol, fence, car, pedestrian, bicyclist"),
    hex_palette("808080 800000 c0c080 804080 3c28de 808000 c08080 404080 400080 404000 0080c0"),
)

DATASETS = {info.name: info for info in (_PASCAL, _CITYSCAPES, _COCO, _CAMVID)}


def _parse_classes(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(name, str) for name in value):
        raise ValueError("'classes' must be a list of names, in the order of their indices")
    if len(value) > 255:
        raise ValueError(f"at most 255 classes are possible beside the ignored index, found {len(value)}")
    return tuple(value)


def _parse_ignore_index(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value <= 255:
        raise ValueError(f"'ignore_index' must be an integer in 0..255, found {value!r}")
    return value


def _parse_values(value: Any, classes: int) -> tuple[int, ...]:
    fits = isinstance(value, list) and all(isinstance(x, int) and 0 <= x <= 255 for x in value)
    if not fits or len(value) != classes or len(set(value)) != classes:
        raise ValueError(f"'values' must be a list of {classes} different integers in 0..255, one for each class")
    return tuple(value)


def _parse_palette(value: Any, classes: int) -> Palette:
    """Accepts [[r, g, b], ...] and the flat [r, g, b, r, g, b, ...]."""
    if not isinstance(value, list):
        raise ValueError("'palette' must be a list of colors [r, g, b]")
    flat = [part for entry in value for part in (entry if isinstance(entry, list) else [entry])]
    if not all(isinstance(part, int) and 0 <= part <= 255 for part in flat) or len(flat) % 3:
        raise ValueError("'palette' must hold three integers in 0..255 per color")
    colors = [(flat[i], flat[i + 1], flat[i + 2]) for i in range(0, len(flat), 3)]
    if not classes <= len(colors) <= 256:
        raise ValueError(f"'palette' must hold a color for each of {classes} classes, found {len(colors)}")
    return _padded(colors)


def parse_meta(meta: Any, name: str) -> DatasetInfo:
    """Validate the object of a ``meta.json``, see ``read_info``.

    Raises:
        ValueError: it is not valid; the message says what was expected.
    """
    if not isinstance(meta, dict):
        raise ValueError("expected an object with the key 'classes'")
    unknown = sorted(set(meta) - {"classes", "ignore_index", "palette", "values"})
    if unknown:
        raise ValueError(f"unknown keys {unknown}; known are 'classes', 'ignore_index', 'palette', 'values'")
    classes = _parse_classes(meta.get("classes"))
    palette = _parse_palette(meta["palette"], len(classes)) if "palette" in meta else VOC_PALETTE
    values = _parse_values(meta["values"], len(classes)) if "values" in meta else None
    return DatasetInfo(name, classes, palette, _parse_ignore_index(meta.get("ignore_index", IGNORE_INDEX)), values)


def _highest_class(path: Path) -> int:
    """Return the highest class index of a label file, -1 where all is ignored."""
    return max((value for value, count in enumerate(read_label(path).histogram()[:IGNORE_INDEX]) if count), default=-1)


def _infer_info(root: Path, file: Path) -> DatasetInfo:
    labels = sorted(path for path in (root / "labels").rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    highest = max(map_in_threads(_highest_class, labels), default=-1)
    if highest < 0:
        raise DataError(f"{root}: no class in labels/ and no meta.json; name the classes in {file}")
    if highest == 0:
        raise DataError(
            f"{root}: no meta.json, and labels/ holds no class but 0 (255 is ignored); write {file}, for"
            ' black-and-white masks {"classes": ["background", "object"], "values": [0, 255]}'
        )
    return DatasetInfo(root.name, tuple(f"class {index}" for index in range(highest + 1)), VOC_PALETTE)


def read_info(root: str | Path) -> DatasetInfo:
    """Read the metadata of a folder with images/ and labels/.

    ``meta.json`` is an object with the keys "classes": [name, ...] and, optionally, "ignore_index": 255, "palette":
    [[r, g, b], ...] and "values": [0, 1, ...]. "values" gives the value of each class in label files, if that is not
    its index: [0, 255] for black-and-white masks. Without the file, the number of classes is the highest index in
    ``labels/`` plus one, which reads every label.

    Args:
        root: folder that holds ``images/``, ``labels/`` and, optionally, ``meta.json``.

    Raises:
        DataError: ``meta.json`` is not valid, or there is neither it nor any label.
    """
    root = Path(root).resolve()
    file = root / "meta.json"
    if not file.is_file():
        return _infer_info(root, file)
    try:
        return parse_meta(json.loads(file.read_text(encoding="utf-8")), root.name)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise DataError(f"{file}: {error}") from error
