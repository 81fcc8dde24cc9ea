"""Predictions for images: in memory, and from files to label images, overlays and confidences."""

import fnmatch
import glob
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from allspark_fast.config import EvalMode
from allspark_fast.data.datasets import is_image, list_files
from allspark_fast.data.images import decode, pages_of, read_image
from allspark_fast.data.info import DatasetInfo
from allspark_fast.data.transforms import normalize_image
from allspark_fast.device import DeviceName, choose_device
from allspark_fast.errors import DataError, InputError, RunError
from allspark_fast.files import make_folder, write_atomically
from allspark_fast.inference.evaluate import predict_labels
from allspark_fast.inference.pictures import label_map, overlay
from allspark_fast.model import Segmentor
from allspark_fast.weights.spec import ModelSpec

# Whole images take memory in proportion to their pixels, and more; larger ones than 2048 x 1024 go through windows.
MAX_WHOLE_PIXELS = 2048 * 1024
# Of an overlay, in pixels: what Pillow writes as JPEG.
MAX_OVERLAY_SIDE = 65500
# Files of these suffixes are images too, but read only if they are named one by one.
OTHER_SUFFIXES: tuple[str, ...] = ("", ".arw", ".avif", ".cr2", ".cr3", ".dib", ".dng", ".heic", ".heif", ".hif")
OTHER_SUFFIXES += (".jfif", ".jp2", ".jpe", ".jxl", ".nef", ".orf", ".pbm", ".pnm", ".psd", ".raf", ".rw2", ".tga")


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

    Args:
        model: what predicts; it is moved to the device and in eval mode afterwards.
        spec: what ``load_model`` returned with it.
        device: where to compute.
        mode: ``whole`` images or ``sliding`` windows, see predict_labels; None as the model was validated, but with
            windows for images of more than MAX_WHOLE_PIXELS.

    Raises:
        InputError: ``device`` is unknown, or needs a GPU, and there is none.
    """

    def __init__(
        self, model: Segmentor, spec: ModelSpec, *, device: DeviceName = "auto", mode: EvalMode | None = None
    ) -> None:
        self.device = choose_device(device)
        self.model = model.to(self.device).eval()
        self.spec = spec
        self.mode = mode

    @torch.no_grad()
    def predict(self, image: str | Path | Image.Image | npt.NDArray[np.uint8]) -> Prediction:
        """Label one image: a file, a Pillow image, or an array (H, W, 3) or (H, W) of uint8.

        Raises:
            DataError: the file cannot be read as an image.
            TypeError: the array is not of uint8, or of another shape.
            ValueError: ``mode`` is unknown.
        """
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.shape[2:] not in ((), (3,)):
                raise TypeError(f"expected uint8 (H, W, 3) or (H, W), got {image.dtype} {image.shape}")
            image = Image.fromarray(image)
        elif not isinstance(image, Image.Image):
            image = read_image(image, self.spec.range)
        pixels = normalize_image(image.convert("RGB"), self.spec.mean, self.spec.std)[None].to(self.device)
        mode = self.mode or ("sliding" if image.width * image.height > MAX_WHOLE_PIXELS else self.spec.mode)
        labels, confidence = predict_labels(self.model, pixels, mode=mode, crop=self.spec.crop)
        return Prediction(labels[0].byte().cpu().numpy(), confidence[0].float().cpu().numpy())


def find_images(arguments: Iterable[str], *, skip: Path) -> tuple[dict[Path, Path], list[Path]]:
    """Find the images that files, folders (searched recursively) and patterns (``**`` for any folders) name.

    Images in the folder ``skip``, that of earlier predictions, do not count unless they are named one by one.

    Returns:
        names of predictions by paths of images: where an image lies below its folder, or below what stands before the
        first wildcard of a pattern, without suffix; and the files whose suffix is that of no image. Hidden files and
        folders count in neither, and linked folders once.

    Raises:
        FileNotFoundError: one of the arguments names no image.
    """
    found, others, predictions = dict[Path, Path](), set[Path](), skip.resolve()
    for argument in arguments:
        path = Path(argument)
        if os.path.lexists(argument) and not path.is_dir():
            found.setdefault(path, Path(path.stem))
            continue
        base, listed = _search(argument)
        files = [file for file in listed if not file.resolve().is_relative_to(predictions)]
        if any(map(is_image, listed)) and not any(map(is_image, files)):
            raise FileNotFoundError(
                f"{argument!r}: all its images lie in {skip}, the place of predictions: give another --out"
            )
        if not any(map(is_image, files)):
            raise FileNotFoundError(f"{argument!r}: no image, no folder with images, and no pattern that matches any")
        for file in filter(is_image, files):
            found.setdefault(file, file.relative_to(base).with_suffix(""))
        others |= set(itertools.filterfalse(is_image, files))
    return found, sorted(others - found.keys())


def _search(argument: str) -> tuple[Path, list[Path]]:
    """Return the files of a folder or a pattern in alphabetical order, and the folder in which it starts."""
    path = Path(argument)
    if argument != "" and path.is_dir():
        return path, list_files(path)
    base = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
    pattern = path.parts[len(base.parts) :]
    if "**" not in pattern:
        return base, [file for file in map(Path, sorted(glob.glob(argument))) if not file.is_dir()]
    # glob follows links in circles.
    return base, [file for file in list_files(base) if _matches(file.relative_to(base).parts, pattern)]


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[start:], pattern[1:]) for start in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatch(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def plan_files(
    images: Mapping[Path, Path], out: Path, *, confidence: bool = False, overwrite: bool = False
) -> dict[Path, dict[str, Path]]:
    """Make the folders for predictions of the images of ``find_images``, and return the files of each image by kind.

    These are ``labels/NAME.png``, ``confidence/NAME.png`` if asked for, and ``overlays/NAME.jpg``. Raises InputError if
    a file exists and ``overwrite`` is False.
    """
    kinds = {"labels": ".png"} | ({"confidence": ".png"} if confidence else {}) | {"overlays": ".jpg"}
    plan = {path: {kind: out / kind / f"{x}{suffix}" for kind, suffix in kinds.items()} for path, x in images.items()}
    # False for a name that is too long.
    existing = [file for files in plan.values() for file in files.values() if os.path.exists(file)]
    if existing and not overwrite:
        there = f"{existing[0]} exists ({len(existing)} files in all)"
        raise InputError(f"{there}: pass --overwrite, or write to another folder (--out)")
    for kind in kinds:
        make_folder(out / kind)
    return plan


def predict_files(predictor: Predictor, plan: Mapping[Path, Mapping[str, Path]]) -> Iterator[Exception | None]:
    """Predict what ``plan_files`` planned; yields for each as it is done None, what went wrong, or a UserWarning.

    Of images that share a name, such as a.jpg and a.png, the first is labeled.
    """
    owners: dict[Path, Path] = {}
    for path, files in plan.items():
        error: Exception | None = None
        try:
            if (owner := owners.setdefault(files["labels"], path)) is not path:
                instead = "name it alone, with another --out"
                raise DataError(f"{path}: its prediction would replace that of {owner}; {instead}")
            pages = decode(path, pages_of)
            image = read_image(path, predictor.spec.range)
            _write(files, image, predictor.predict(image), predictor.spec.info)
            if pages > 1:
                error = UserWarning(f"{path}: has {pages} pages, of which only the first is labeled")
        except (DataError, OSError) as failure:
            error = failure
        except (MemoryError, torch.OutOfMemoryError):
            error = RunError(f"{path}: out of memory: pass --window, or make the image smaller")
        yield error


def _write(files: Mapping[str, Path], image: Image.Image, prediction: Prediction, info: DatasetInfo) -> None:
    pictures = {
        "labels": label_map(prediction.labels, info),
        "confidence": Image.fromarray((255 * prediction.confidence).round().astype(np.uint8)),
        "overlays": overlay(image, prediction.labels, info),
    }
    for kind, file in files.items():
        if kind == "overlays" and max(pictures[kind].size) > MAX_OVERLAY_SIDE:
            raise DataError(
                f"{file} was not written: the image is {image.width}x{image.height} pixels, and a JPEG has at most"
                f" {MAX_OVERLAY_SIDE} a side; its labels were written"
            )
        make_folder(file.parent)
        write_atomically(file, pictures[kind].save)
