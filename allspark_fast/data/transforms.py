"""Joint transforms of image and label; one generator provides all randomness.

The distributions are those of the reference implementation (``dataset/semi.py``) and of UniMatch, its origin.
"""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

import torch
from PIL import Image, ImageFilter
from torch import Generator, Tensor
from torchvision.transforms.v2 import functional as tvf  # type: ignore[import-untyped]

from allspark_fast.config import Augment
from allspark_fast.data.info import IGNORE_INDEX

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_TURNS = (None, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)


class Preset(NamedTuple):
    """What changes beside size and place of a training crop.

    Attributes:
        adjustments: names of torchvision's adjust_* and ranges of amounts; in random order, p 0.8.
        gray: probability that the colors go.
        blur: probability of a Gaussian blur, of sigma 0.1 to 2 pixels.
        mirror: whether half of the crops are mirrored.
        turn: whether crops are turned by 0, 90, 180 or 270 degrees.
    """

    adjustments: tuple[tuple[str, float, float], ...] = ()
    gray: float = 0.0
    blur: float = 0.0
    mirror: bool = True
    turn: bool = False


_PHOTO = (*((name, 0.5, 1.5) for name in ("brightness", "contrast", "saturation")), ("hue", -0.25, 0.25))
_INTENSITY = (("brightness", 0.7, 1.3), ("contrast", 0.7, 1.3), ("gamma", 0.7, 1.4))
_AERIAL = (*_INTENSITY, ("saturation", 0.7, 1.3), ("hue", -0.03, 0.03))
PRESETS: dict[Augment, Preset] = {
    "photo": Preset(_PHOTO, gray=0.2, blur=0.5),  # the reference implementation's
    "microscopy": Preset(_INTENSITY, blur=0.5, turn=True),
    "aerial": Preset(_AERIAL, blur=0.2, turn=True),
    "none": Preset(mirror=False),
}


class Sample(NamedTuple):
    """One transformed crop: images (3, H, W) float32, normalized, the label (H, W) uint8, masks (H, W) bool.

    Attributes:
        label: 255 ignored; all 255 where there is no label.
        valid: False where the crop added padding.
        strong: the same crop after photometric changes; None unless requested.
        mixed: pixels that CutMix takes from another crop, or, of a labeled crop, those that are pasted into an
            unlabeled one; None unless requested.
    """

    image: Tensor
    label: Tensor
    valid: Tensor
    strong: Tensor | None = None
    mixed: Tensor | None = None


class Geometry(NamedTuple):
    """A resize to (width, height), a crop at (x, y) of it, whether it is mirrored, and its turns counterclockwise."""

    scaled: tuple[int, int]
    offset: tuple[int, int]
    flip: bool
    turns: int = 0


def _uniform(generator: Generator, low: float, high: float) -> float:
    return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()


def _integer(generator: Generator, low: int, high: int) -> int:
    """Draw uniformly from low..high, both included."""
    return int(torch.randint(low, high + 1, (), generator=generator))


def _chance(generator: Generator, probability: float) -> bool:
    return _uniform(generator, 0.0, 1.0) < probability


def draw_geometry(
    size: tuple[int, int],
    crop_size: int,
    scale_range: tuple[float, float],
    generator: Generator,
    preset: Preset = PRESETS["photo"],
) -> Geometry:
    """Draw resize, crop, flip and turn for an image of ``size`` (width, height).

    The long side is an integer, uniform over int(scale_range * long side), both ends included; the short side keeps the
    aspect ratio, rounded half up. The crop is uniform over all positions inside the resized image, which is padded on
    the right and at the bottom where it is smaller than the crop. The flip has probability 0.5.
    """
    long_side, short_side = max(size), min(size)
    long_scaled = _integer(generator, int(long_side * scale_range[0]), int(long_side * scale_range[1]))
    short_scaled = int(short_side * long_scaled / long_side + 0.5)
    width, height = (short_scaled, long_scaled) if size[1] > size[0] else (long_scaled, short_scaled)
    # An image a few pixels wide can scale to nothing.
    scaled = max(width, 1), max(height, 1)
    x, y = (_integer(generator, 0, max(side - crop_size, 0)) for side in scaled)
    flip = preset.mirror and _chance(generator, 0.5)
    return Geometry(scaled, (x, y), flip, _integer(generator, 0, 3) if preset.turn else 0)


def apply_geometry(
    image: Image.Image, geometry: Geometry, crop_size: int, resample: Image.Resampling, fill: int
) -> Image.Image:
    """Resize, crop, pad with ``fill``, flip and turn an image or label at once: only what the crop keeps is resized.

    Resizing the whole image first gives the same up to rounding: two gray levels, or one of two equally near labels.
    """
    (scaled_width, scaled_height), (x, y), flip, turns = geometry
    width, height = min(crop_size, scaled_width), min(crop_size, scaled_height)
    step_x, step_y = image.width / scaled_width, image.height / scaled_height
    right, bottom = min((x + width) * step_x, image.width), min((y + height) * step_y, image.height)
    part = image.resize((width, height), resample, box=(x * step_x, y * step_y, right, bottom))
    crop = Image.new(image.mode, (crop_size, crop_size), (fill,) * len(image.getbands()))
    crop.paste(part)
    crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else crop
    turn = _TURNS[turns]
    return crop if turn is None else crop.transpose(turn)


def change_colors(image: Image.Image, preset: Preset, generator: Generator) -> Image.Image:
    """Adjust colors (p 0.8), take them away and blur, as a preset says."""
    if preset.adjustments and _chance(generator, 0.8):
        steps = [(name, _uniform(generator, low, high)) for name, low, high in preset.adjustments]
        for position in torch.randperm(len(steps), generator=generator).tolist():
            name, amount = steps[position]
            image = getattr(tvf, f"adjust_{name}")(image, amount)
    if preset.gray and _chance(generator, preset.gray):
        image = tvf.rgb_to_grayscale(image, num_output_channels=3)
    if preset.blur and _chance(generator, preset.blur):
        image = image.filter(ImageFilter.GaussianBlur(_uniform(generator, 0.1, 2.0)))
    return image


def draw_box(size: int, probability: float, generator: Generator) -> Tensor:
    """Draw the box of CutMix as a mask (size, size), empty unless a draw of ``probability`` succeeds.

    As in UniMatch, it covers 2 to 40 % of the crop, with sides in a ratio of 0.3 to 1 / 0.3.
    """
    mask = torch.zeros(size, size, dtype=torch.bool)
    if _chance(generator, probability):
        area, ratio = _uniform(generator, 0.02, 0.4) * size**2, _uniform(generator, 0.3, 1 / 0.3)
        height, width = (min(round(side), size) for side in ((area * ratio) ** 0.5, (area / ratio) ** 0.5))
        y, x = (_integer(generator, 0, size - side) for side in (height, width))
        mask[y : y + height, x : x + width] = True
    return mask


def draw_classes(label: Tensor, probability: float, generator: Generator) -> Tensor:
    """Draw half of the classes of a label (H, W), rounded down (ClassMix), as a mask; see ``draw_box``."""
    chosen = torch.zeros(256, dtype=torch.bool)
    if _chance(generator, probability):
        classes = label.flatten().bincount(minlength=256)[:IGNORE_INDEX].nonzero().flatten()
        chosen[classes[torch.randperm(len(classes), generator=generator)[: len(classes) // 2]]] = True
    return chosen[label.long()]


def normalize_image(image: Image.Image, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Convert an RGB image to a (3, H, W) float32 tensor: scaled to 0..1, minus ``mean``, divided by ``std``."""
    tensor = tvf.to_dtype(tvf.pil_to_tensor(image), torch.float32, scale=True)
    return tvf.normalize(tensor, list(mean), list(std), inplace=True)


@dataclass(frozen=True)
class CropTransform:
    """Random resize, crop, flip and turn of image and label, and photometric changes of the image.

    Attributes:
        photometric: whether to change colors; the reference implementation does so for labeled images only.
        augment: name of the Preset of flips, turns and changes of colors.
        scale_range: least and greatest scale of the resize.
        strong: whether to return the crop after photometric changes too.
        cutmix: probability of a box that CutMix takes from another crop.
        copy_paste: probability that half of the classes of the label are pasted into another crop.
    """

    crop_size: int
    _: KW_ONLY
    photometric: bool
    augment: Augment = "photo"
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    scale_range: tuple[float, float] = (0.5, 2.0)
    strong: bool = False
    cutmix: float = 0.0
    copy_paste: float = 0.0

    def __call__(self, image: Image.Image, label: Image.Image | None, generator: Generator) -> Sample:
        """Transform one RGB image, and its label (mode L) of the same size if there is one."""
        preset = PRESETS[self.augment]
        geometry = draw_geometry(image.size, self.crop_size, self.scale_range, generator, preset)
        crop = apply_geometry(image, geometry, self.crop_size, Image.Resampling.BILINEAR, 0)
        if self.photometric:
            crop = change_colors(crop, preset, generator)
        target = torch.full((self.crop_size, self.crop_size), IGNORE_INDEX, dtype=torch.uint8)
        if label is not None:
            nearest = Image.Resampling.NEAREST
            target = tvf.pil_to_tensor(apply_geometry(label, geometry, self.crop_size, nearest, IGNORE_INDEX))[0]
        valid = torch.zeros(self.crop_size, self.crop_size, dtype=torch.bool)
        valid[: geometry.scaled[1], : geometry.scaled[0]] = True
        # Drawn last, so that without them crops stay the same.
        strong = self._normalize(change_colors(crop, preset, generator)) if self.strong else None
        mixed = draw_box(self.crop_size, self.cutmix, generator) if self.cutmix else None
        if self.copy_paste:
            mixed = draw_classes(target, self.copy_paste, generator)
        valid = (valid.flip(1) if geometry.flip else valid).rot90(geometry.turns).contiguous()
        return Sample(self._normalize(crop), target, valid, strong, mixed)

    def _normalize(self, crop: Image.Image) -> Tensor:
        return normalize_image(crop, self.mean, self.std)
