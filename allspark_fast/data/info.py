"""Metadata of datasets: class names, colors, label values, the ignored index."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allspark_fast.data.images import Color, list_images, map_in_threads, read_label, values_of
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
    red, green, blue = (sum((index >> (3 * bit + part) & 1) << (7 - bit) for bit in range(8)) for part in range(3))
    return red, green, blue


VOC_PALETTE: Palette = tuple(_voc_color(index) for index in range(256))


def _padded(colors: Sequence[Color]) -> Palette:
    """Fill a list of colors up with black to the 256 entries of a palette."""
    return tuple(colors) + ((0, 0, 0),) * (256 - len(colors))


def hex_palette(text: str) -> Palette:
    """Parse a palette of colors written as rrggbb and separated by spaces; the rest is black."""
    return _padded([(color[0], color[1], color[2]) for color in map(bytes.fromhex, text.split())])


# Cityscapes by train IDs, as in the gtFine_labelTrainIds files; of COCO, the 80 thing classes in the order of their
# category IDs, after the background.
_CLASSES = {
    "pascal": "background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, dog, horse,"
    " motorbike, person, pottedplant, sheep, sofa, train, tvmonitor",
    "cityscapes": "road, sidewalk, building, wall, fence, pole, traffic light, traffic sign, vegetation, terrain, sky,"
    " person, rider, car, truck, bus, train, motorcycle, bicycle",
    "coco": "background, person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire"
    " hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe,"
    " backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball"
    " glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple,"
    " sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table,"
    " toilet, tv, laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book,"
    " clock, vase, scissors, teddy bear, hair drier, toothbrush",
    "camvid": "sky, building, pole, road, pavement, tree, signsymbol, fence, car, pedestrian, bicyclist",
}
_PALETTES = {
    "cityscapes": "804080 f423e8 464646 66669c be9999 999999 faaa1e dcdc00 6b8e23 98fb98 4682b4 dc143c ff0000 00008e"
    " 000046 003c64 005064 0000e6 770b20",
    "camvid": "808080 800000 c0c080 804080 3c28de 808000 c08080 404080 400080 404000 0080c0",
}
DATASETS = {
    name: DatasetInfo(
        name, tuple(classes.split(", ")), hex_palette(_PALETTES[name]) if name in _PALETTES else VOC_PALETTE
    )
    for name, classes in _CLASSES.items()
}


def _expect(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _is_byte(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value <= 255


def _parse_palette(palette: Any, classes: int) -> Palette:
    """Accept [[r, g, b], ...] and the flat [r, g, b, r, g, b, ...]."""
    _expect(isinstance(palette, list), "'palette' must be a list of colors [r, g, b]")
    is_flat = not any(isinstance(x, list) for x in palette)
    colors = [palette[i : i + 3] for i in range(0, len(palette), 3)] if is_flat else palette
    are_colors = all(isinstance(x, list) and len(x) == 3 and all(map(_is_byte, x)) for x in colors)
    _expect(are_colors, "'palette' must hold three integers in 0..255 per color")
    _expect(
        classes <= len(colors) <= 256, f"'palette' must hold a color for each of {classes} classes, found {len(colors)}"
    )
    return _padded([(red, green, blue) for red, green, blue in colors])


def parse_meta(meta: Any, name: str) -> DatasetInfo:
    """Validate the object of a ``meta.json``, see ``read_info``.

    Raises:
        ValueError: it is not valid; the message says what was expected.
    """
    _expect(isinstance(meta, dict), "expected an object with the key 'classes'")
    unknown = sorted(set(meta) - {"classes", "ignore_index", "palette", "values"})
    _expect(not unknown, f"unknown keys {unknown}; known are 'classes', 'ignore_index', 'palette', 'values'")
    classes, ignore_index = meta.get("classes"), meta.get("ignore_index", IGNORE_INDEX)
    are_names = isinstance(classes, list) and bool(classes) and all(isinstance(x, str) for x in classes)
    _expect(are_names, "'classes' must be a list of names, in the order of their indices")
    count = len(classes)
    _expect(count <= 255, f"at most 255 classes are possible beside the ignored index, found {count}")
    _expect(_is_byte(ignore_index), f"'ignore_index' must be an integer in 0..255, found {ignore_index!r}")
    palette = _parse_palette(meta["palette"], count) if "palette" in meta else VOC_PALETTE
    values = meta.get("values", list(range(count)))
    are_values = isinstance(values, list) and all(map(_is_byte, values)) and len(set(values)) == len(values) == count
    _expect(are_values, f"'values' must be a list of {count} different integers in 0..255, one for each class")
    return DatasetInfo(name, tuple(classes), palette, ignore_index, tuple(values) if "values" in meta else None)


def _infer_info(root: Path, file: Path) -> DatasetInfo:
    labels = list_images(root / "labels")
    values = set().union(*map_in_threads(lambda path: values_of(read_label(path)), labels))
    highest = max(values - {IGNORE_INDEX}, default=-1)
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
        return parse_meta(json.loads(file.read_text(encoding="utf-8-sig")), root.name)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise DataError(f"{file}: {error}") from error
