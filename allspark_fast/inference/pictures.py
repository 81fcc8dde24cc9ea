"""Pictures of labels: overlays, and panels of images beside truth, prediction and errors."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from allspark_fast.data.info import IGNORE_INDEX, VOC_PALETTE, DatasetInfo, hex_palette
from allspark_fast.data.loader import EvalSample
from allspark_fast.files import write_atomically
from allspark_fast.inference.metrics import dilate, find_borders
from allspark_fast.text import drawable, font_file, one_line
from allspark_fast.weights.spec import ModelSpec

Labels = npt.NDArray[np.uint8]
# A caption, and pictures by the title of their column.
Row = tuple[str, Mapping[str, Image.Image]]
# The colors of Okabe and Ito (Color Universal Design, 2008); then, one by one, those farthest from all before and from
# white, with any kind of color vision (Machado et al., 2009): they are at least 16 apart in CIELAB, those of VOC 1.
_DISTINCT = "000000 e69f00 56b4e9 009e73 f0e442 0072b2 d55e00 cc79a7 8800ff 663311 112288 aaff88 554455 88bb66 bb55ff"
_TINT = 0.45
_WRONG = (200, 0, 0)
# In pixels: the longer side of a picture in a panel, the space around it, and its text.
_CELL, _GAP, _TEXT = 300, 10, 15


def palette_of(info: DatasetInfo) -> npt.NDArray[np.uint8]:
    """Return 256 RGB colors (256, 3): those of the dataset; or, where it has none and few classes, distinct ones."""
    count = len(info.classes)
    has_own = info.palette[:count] != VOC_PALETTE[:count] or count > len(_DISTINCT.split())
    palette = np.array(info.palette if has_own else hex_palette(_DISTINCT), np.uint8)
    palette[IGNORE_INDEX] = 255
    return palette


def overlay(image: Image.Image, labels: Labels, info: DatasetInfo) -> Image.Image:
    """Tint the regions of an RGB image (W, H) and outline them in white and their color; a legend lies below it.

    A class that is named background or whose color is black is left alone, and so are ignored pixels.
    """
    palette = palette_of(info)
    shown = palette.max(1) > 0
    shown[[IGNORE_INDEX, *(i for i, name in enumerate(info.classes) if name.strip().casefold() == "background")]] = 0
    colors, visible = Image.fromarray(palette[labels]), shown[labels]
    picture = image.copy()
    picture.paste(Image.blend(image, colors, _TINT), mask=Image.fromarray(visible))
    borders, width = find_borders(torch.from_numpy(labels)), max(1, round(np.hypot(*labels.shape) / 1000))
    for paint, reach in ((colors, 3 * width), ("white", width)):
        picture.paste(paint, mask=Image.fromarray(visible & dilate(borders, reach - 1).numpy()))
    return _stack([picture, _legend(info, np.unique(labels), image.width, max(12, round(image.height / 30)))])


def to_image(pixels: Tensor, spec: ModelSpec) -> Image.Image:
    """Return an image of the pixels (3, H, W) that were normalized for a model."""
    values = pixels.cpu().permute(1, 2, 0).double().numpy() * spec.std + spec.mean
    return Image.fromarray((255 * np.nan_to_num(values).clip(0, 1)).round().astype(np.uint8))


def label_map(labels: Labels | Tensor, info: DatasetInfo) -> Image.Image:
    """Return labels (H, W) as an image with a palette; ignored pixels are white."""
    picture = Image.fromarray(np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels, np.uint8))
    picture.putpalette(palette_of(info).ravel().tolist())
    return picture


def comparison(sample: EvalSample, prediction: Tensor, spec: ModelSpec) -> dict[str, Image.Image]:
    """Return pictures of a sample, its label, its prediction (H, W), and where these differ, by their titles."""
    image = to_image(sample.image[0], spec)
    truth, prediction = sample.label[0].cpu(), prediction.cpu()
    errors = Image.blend(image.convert("L").convert("RGB"), Image.new("RGB", image.size, "white"), 0.5)
    errors.paste(_WRONG, mask=Image.fromarray(((truth != prediction) & (truth != IGNORE_INDEX)).numpy()))
    labels = {"truth": truth, "prediction": prediction}
    return {"image": image, **{title: label_map(x, spec.info) for title, x in labels.items()}, "errors": errors}


def draw_panel(path: Path, rows: Sequence[Row], info: DatasetInfo) -> None:
    """Write a picture of at least one row of pictures with their captions, titles above and a legend below."""
    titles = list(rows[0][1])
    width = len(titles) * (_CELL + _GAP) + _GAP
    parts = [_line(titles, width)]
    for caption, pictures in rows:
        scales = [(picture, _CELL / max(picture.size)) for picture in pictures.values()]
        # Pillow never mixes the indices of a palette.
        cells = [picture.resize([max(1, round(side * scale)) for side in picture.size]) for picture, scale in scales]
        row = Image.new("RGB", (width, max(picture.height for picture in cells) + _GAP), "white")
        for column, picture in enumerate(cells):
            row.paste(picture, (_GAP + column * (_CELL + _GAP) + (_CELL - picture.width) // 2, 0))
        parts += [*([_line([caption], width)] if caption else []), row]
    panel = _stack([*parts, _legend(info, range(len(info.classes)), width, _TEXT)])
    write_atomically(path, panel.save)


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(font_file(), size)


def _line(texts: Sequence[str], width: int) -> Image.Image:
    """Return a line of texts, each at the start of its column."""
    line = Image.new("RGB", (width, round(1.6 * _TEXT)), "white")
    for column, text in enumerate(map(one_line, texts)):
        ImageDraw.Draw(line).text((_GAP + column * (_CELL + _GAP), 2), text, "black", _font(_TEXT))
    return line


def _legend(info: DatasetInfo, labels: Iterable[int], width: int, size: int) -> Image.Image:
    """Return the colors and names of classes, in lines of a width, or of the longest name."""
    palette, names, font = palette_of(info), drawable(info.classes), _font(size)
    places: list[tuple[int, int, int]] = []
    x = y = right = 0
    for label in (int(label) for label in labels if label < len(names)):
        needed = round(3 * size + font.getlength(names[label]))
        if x and x + needed > width:
            x, y = 0, y + round(1.6 * size)
        places.append((label, x, y))
        x += needed
        right = max(right, x)
    legend = Image.new("RGB", (max(width, right), y + 2 * size), "white")
    draw = ImageDraw.Draw(legend)
    for label, x, y in places:
        swatch = (x + size // 2, y + size // 2, x + 3 * size // 2, y + 3 * size // 2)
        draw.rectangle(swatch, fill=tuple(palette[label].tolist()), outline="gray")
        draw.text((x + 2 * size, y + size), names[label], "black", font, anchor="lm")
    return legend


def _stack(pictures: Sequence[Image.Image]) -> Image.Image:
    stacked = Image.new("RGB", (max(x.width for x in pictures), sum(x.height for x in pictures)), "white")
    y = 0
    for picture in pictures:
        stacked.paste(picture, (0, y))
        y += picture.height
    return stacked
