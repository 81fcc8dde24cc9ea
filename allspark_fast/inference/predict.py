"""Predictions for images: in memory, and from files to label images, overlays and confidences."""

import glob
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from allspark_fast.config import EvalMode
from allspark_fast.data.files import IMAGE_SUFFIXES, list_images
from allspark_fast.data.images import PixelRange, read_image
from allspark_fast.data.info import DatasetInfo
from allspark_fast.data.transforms import normalize_image
from allspark_fast.device import DeviceName, choose_device
from allspark_fast.errors import DataError, InputError
from allspark_fast.files import make_folder, write_atomically
from allspark_fast.inference.evaluate import batches_of_equal_size, predict_labels
from allspark_fast.model import Segmentor
from allspark_fast.weights.spec import ModelSpec

# Whole images take memory in proportion to their pixels, and more; larger ones than 2048 x 1024 go through windows.
MAX_WHOLE_PIXELS = 2048 * 1024
# Of an overlay, in pixels: what Pillow writes as JPEG.
MAX_OVERLAY_SIDE = 65500
_OVERLAY = 0.5


class Prediction(NamedTuple):
    """The labels of an image.

    Attributes:
        labels: (H, W) uint8, class indices.
        confidence: (H, W) float32, the probability of the label.
    """

    labels: npt.NDArray[np.uint8]
    confidence: npt.NDArray[np.float32]


class Predictor:
    """Labels images with a trained model.

    Each image is treated alone: its batch mates change nothing, their number no more than the rounding of logits.

    Args:
        model: what predicts; it is moved to the device and in eval mode afterwards.
        spec: what ``load_model`` returned with it.
        device: where to compute.
        mode: ``whole`` images or ``sliding`` windows, see predict_labels; None as the model was validated, but with
            windows for images of more than MAX_WHOLE_PIXELS.
        half: bfloat16 autocast, on a GPU.

    Raises:
        InputError: ``device`` is unknown, or it or ``half`` needs a GPU, and there is none.
    """

    def __init__(
        self,
        model: Segmentor,
        spec: ModelSpec,
        *,
        device: DeviceName = "auto",
        mode: EvalMode | None = None,
        half: bool = False,
    ) -> None:
        self.device = choose_device(device)
        if half and self.device.type != "cuda":
            raise InputError("half precision needs a GPU: leave --half out")
        self.model = model.to(self.device).eval()
        self.spec = spec
        self.mode = mode
        self.half = half

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> list[Prediction]:
        """Label RGB images of equal size together; ``read_image`` returns such images.

        Raises:
            TypeError: one is no Pillow image.
            ValueError: one is not RGB, their sizes differ, there is none, or ``mode`` is unknown.
        """
        for image in images:
            if not isinstance(image, Image.Image):
                kind = type(image).__name__
                raise TypeError(f"expected Pillow images, got {kind}: use Image.fromarray or read_image(path)")
            if image.mode != "RGB":
                raise ValueError(f"expected RGB images, got mode {image.mode}: use image.convert('RGB')")
        sizes = {image.size for image in images}
        if len(sizes) != 1:
            raise ValueError(f"the images of a batch must have one size, got {sorted(sizes)}")
        ((width, height),) = sizes
        batch = torch.stack([normalize_image(image, self.spec.mean, self.spec.std) for image in images])
        mode = self.mode or ("sliding" if width * height > MAX_WHOLE_PIXELS else self.spec.mode)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            labels, confidence = predict_labels(self.model, batch.to(self.device), mode=mode, crop=self.spec.crop)
        pairs = zip(labels.byte().cpu().numpy(), confidence.float().cpu().numpy(), strict=True)
        return [Prediction(*pair) for pair in pairs]


@dataclass(frozen=True)
class OutputFolder:
    """Where predictions go: ``labels/NAME.png``, ``overlays/NAME.jpg`` and, if asked for, ``confidence/NAME.png``."""

    path: Path
    info: DatasetInfo
    confidence: bool = False

    def claim(self, images: Mapping[Path, Path], *, overwrite: bool = False) -> None:
        """Make the folders for the predictions of the images that ``find_images`` found.

        Raises:
            InputError: two images would share a file, or a file exists and ``overwrite`` is False.
            NotADirectoryError: one is a file.
        """
        name, count = Counter(images.values()).most_common(1)[0]
        if count > 1:
            shared = ", ".join(str(path) for path in images if images[path] == name)
            raise InputError(f"{shared}: these would share one file {name}.png; predict them into different folders")
        files = [file for name in images.values() for file in self._files(name).values()]
        existing = [file for file in files if file.exists()]
        if existing and not overwrite:
            raise InputError(
                f"{existing[0]} exists, as do {len(existing) - 1} others: pass --overwrite, or write to another "
                "folder (--out)"
            )
        for folder in {file.parent for file in files}:
            make_folder(folder)

    def write(self, name: Path, image: Image.Image, prediction: Prediction) -> None:
        """Write the prediction of ``image``, its labels first.

        Raises:
            DataError: a side has more than MAX_OVERLAY_SIDE pixels; all but the overlay is written.
            OSError: a file cannot be written.
        """
        labels = Image.fromarray(prediction.labels)
        labels.putpalette([part for color in self.info.palette for part in color])
        pictures = {
            "labels": labels,
            "overlays": Image.blend(image, labels.convert("RGB"), _OVERLAY),
            "confidence": Image.fromarray((255 * prediction.confidence).round().astype(np.uint8)),
        }
        for kind, file in self._files(name).items():
            if kind == "overlays" and max(image.size) > MAX_OVERLAY_SIDE:
                raise DataError(
                    f"{file} was not written: the image is {image.width}x{image.height} pixels, and a JPEG has at most"
                    f" {MAX_OVERLAY_SIDE} a side; its labels were written"
                )
            write_atomically(file, pictures[kind].save)

    def _files(self, name: Path) -> dict[str, Path]:
        confidence = {"confidence": ".png"} if self.confidence else {}
        suffixes = {"labels": ".png", **confidence, "overlays": ".jpg"}
        return {kind: self.path / kind / f"{name}{suffix}" for kind, suffix in suffixes.items()}


def find_images(arguments: Iterable[str], *, skip: Path) -> dict[Path, Path]:
    """Find the images that files, folders (searched recursively) and patterns (``**`` for any folders) name.

    Args:
        arguments: of the command line.
        skip: folder whose images do not count, that of earlier predictions, unless they are named one by one.

    Returns:
        names of predictions by paths of images: where an image lies below its folder, or below what stands before the
        first wildcard of a pattern, without suffix. Hidden files and folders are left out.

    Raises:
        FileNotFoundError: one of them names none.
    """
    found: dict[Path, Path] = {}
    for argument in arguments:
        path = Path(argument)
        files = {path: Path(path.stem)} if path.is_file() else dict(_search(argument, skip))
        if not files:
            raise FileNotFoundError(f"{argument!r}: no image, no folder with images, and no pattern that matches any")
        for file, name in files.items():
            found.setdefault(file, name)
    return found


def _search(argument: str, skip: Path) -> Iterator[tuple[Path, Path]]:
    """Yield the images of a folder or a pattern, in alphabetical order."""
    if argument != "" and Path(argument).is_dir():
        base, files = Path(argument), list_images(Path(argument))
    else:
        base = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), Path(argument).parts))
        matches = map(Path, sorted(glob.glob(argument, recursive=True)))
        files = [path for path in matches if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]
    for path in files:
        if not path.resolve().is_relative_to(skip.resolve()):
            yield path, path.relative_to(base).with_suffix("")


def predict_files(
    predictor: Predictor, files: Mapping[Path, Path], output: OutputFolder, *, batch_size: int
) -> Iterator[DataError | OSError | None]:
    """Predict what ``find_images`` found; yields None, or what went wrong with the file, for each as it is done."""
    images = zip(files.values(), (_read(path, predictor.spec.range) for path in files), strict=True)
    # Files that cannot be read have no size, and so a batch of their own.
    for batch in batches_of_equal_size(images, batch_size, lambda pair: getattr(pair[1], "size", None)):
        readable = [image for _, image in batch if isinstance(image, Image.Image)]
        predictions = iter(predictor(readable) if readable else [])
        for name, image in batch:
            if isinstance(image, Image.Image):
                yield _write(output, name, image, next(predictions))
            else:
                yield image


def _write(output: OutputFolder, name: Path, image: Image.Image, prediction: Prediction) -> DataError | OSError | None:
    try:
        output.write(name, image, prediction)
    except (DataError, OSError) as error:
        return error
    return None


def _read(path: Path, pixel_range: PixelRange | None) -> Image.Image | DataError:
    try:
        return read_image(path, pixel_range)
    except DataError as error:
        return error
