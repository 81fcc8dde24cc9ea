"""Datasets as lists of files: split files, folders with images/ and labels/, and the images they name."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image

from allspark_fast.data.images import IMAGE_SUFFIXES, list_images, read_image, resolve_path
from allspark_fast.data.info import DatasetInfo
from allspark_fast.data.labels import read_label
from allspark_fast.errors import DataError


@dataclass(frozen=True)
class Entry:
    """One line of a split file.

    Attributes:
        image: path of the image, relative to the data root.
        label: path of its label, or None.
    """

    image: str
    label: str | None


def _is_image_path(text: str) -> bool:
    return text.lower().endswith(IMAGE_SUFFIXES)


def _parse_line(line: str) -> Entry:
    if not _is_image_path(line):
        raise ValueError(f"expected `image_path label_path` or `image_path`, found {line!r}")
    cuts = [(line[: gap.start()], line[gap.end() :]) for gap in re.finditer(r"\s+", line)]
    pairs = [Entry(*cut) for cut in cuts if all(map(_is_image_path, cut))]
    if len(pairs) > 1:
        raise ValueError(f"more than two image paths in {line!r}")
    return pairs[0] if pairs else Entry(line, None)


def split_line(entry: Entry) -> str:
    """Return the line of a split file that ``read_split`` reads as this entry.

    Raises:
        DataError: no line does: a path is not valid UTF-8, contains a line break, or reads as two paths.
    """
    line = entry.image if entry.label is None else f"{entry.image} {entry.label}"
    try:
        line.encode()
        survives = line.splitlines() == [line.strip().lstrip("\ufeff")] and _parse_line(line) == entry
    except ValueError:
        survives = False
    if not survives:
        raise DataError(f"{line!r}: a split file cannot hold such a name, rename the file")
    return line


def read_split(path: str | Path) -> list[Entry]:
    """Read a split file in the format of AllSpark, UniMatch and related code.

    Each line is ``image_path label_path``; a single path is an unlabeled image. Blank lines, surrounding whitespace,
    tabs, CRLF and a byte order mark are accepted. Paths may contain spaces: a line is split where both parts end in an
    image suffix (.jpg, .png, ...), otherwise the whole line is one path.

    Args:
        path: split file, UTF-8.

    Returns:
        entries in the order of the lines, repeated lines included.

    Raises:
        DataError: no such file, or a line with no image path or more than two; names file and line.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a split file ({error})") from error
    entries = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entries.append(_parse_line(line.strip()))
        except ValueError as error:
            raise DataError(f"{path}, line {number}: {error}") from error
    return entries


def stem_of(file: Path, folder: Path) -> str:
    """Return what a label and its image have in common: the path below their folders, without the suffix."""
    return file.relative_to(folder).with_suffix("").as_posix()


def _files_by_stem(folder: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for file in list_images(folder):
        first = files.setdefault(stem_of(file, folder), file)
        if first is not file:
            raise DataError(f"{file}: has the same stem as {first.name}; keep one (stems match labels to images)")
    return files


def find_split(root: Path, file: Path) -> list[Entry]:
    """Read a split file whose path is relative to the data root or to the working directory, or absolute.

    Raises:
        DataError: the file is in neither place, or malformed.
    """
    for candidate in (root / file, file):
        if candidate.is_file():
            return read_split(candidate)
    raise DataError(
        f"split file {file}: not found below {root} nor in the working directory; check both paths"
        " (`python -m allspark_fast splits` writes split files for a folder)"
    )


def scan_folder(root: str | Path) -> list[Entry]:
    """List a folder with ``images/`` and ``labels/``, which have the same subfolders.

    The label of ``images/a/b.jpg`` is ``labels/a/b.png`` (any suffix); an image without one is unlabeled.

    Args:
        root: folder that holds ``images/`` and, if there are labels, ``labels/``.

    Returns:
        entries in alphabetical order.

    Raises:
        DataError: no ``images/`` folder, two files with the same stem, or labels of which none matches an image.
    """
    root = Path(root)
    if not (root / "images").is_dir():
        raise DataError(f"{root}: expected a folder with images/ (and labels/), found no {root / 'images'}")
    images, labels = _files_by_stem(root / "images"), _files_by_stem(root / "labels")
    if labels and not labels.keys() & images.keys():
        raise DataError(
            f"{root}: no label has the name of an image; {next(iter(labels.values())).name} needs an image named"
            f" {next(iter(labels))}.jpg (or .png, ...): give each label the name of its image"
        )
    return [
        Entry(file.relative_to(root).as_posix(), labels[key].relative_to(root).as_posix() if key in labels else None)
        for key, file in images.items()
    ]


def require_equal_size(entry: Entry, image: tuple[int, int], label: tuple[int, int]) -> None:
    """Raise DataError unless an image and its label have the same (width, height)."""
    if image != label:
        raise DataError(
            f"{entry.label}: its image {entry.image} is {image[0]}x{image[1]} pixels (EXIF orientation applied), but"
            f" the label is {label[0]}x{label[1]}; the sizes must be equal"
        )


class ImageSource(Protocol):
    """What the loaders need of a dataset."""

    @property
    def entries(self) -> Sequence[Entry]:
        """Names of the samples."""

    def image(self, index: int) -> Image.Image:
        """Read the RGB image alone."""

    def __getitem__(self, index: int) -> tuple[Image.Image, Image.Image | None]:
        """Read the RGB image and its label (mode L, 255 ignored), None where the entry has none."""


@dataclass(frozen=True)
class Sources:
    """An opened dataset.

    Attributes:
        info: classes and colors.
        labeled: training images with labels.
        unlabeled: training images whose labels are not used.
        val: validation images with labels.
    """

    info: DatasetInfo
    labeled: ImageSource
    unlabeled: ImageSource
    val: ImageSource


class SegmentationDataset:
    """Images and labels of a list of entries as PIL images; the loaders apply the transforms.

    Args:
        root: folder that the paths of the entries are relative to.
        entries: what to read, in order.
        info: meaning of the values and colors of label files; others are refused. None reads labels as they are.
    """

    def __init__(self, root: str | Path, entries: Sequence[Entry], *, info: DatasetInfo | None = None):
        self.root = Path(root)
        self.entries = list(entries)
        self.info = info

    def image(self, index: int) -> Image.Image:
        """Read the RGB image alone, see ``read_image``."""
        return read_image(resolve_path(self.root, self.entries[index].image))

    def label(self, index: int) -> Image.Image | None:
        """Read the label alone, see ``read_label``; None where the entry has none."""
        path = self.entries[index].label
        return None if path is None else read_label(resolve_path(self.root, path), self.info)

    def __getitem__(self, index: int) -> tuple[Image.Image, Image.Image | None]:
        """Read one sample: an RGB image and its label (mode L, 255 ignored), None where the entry has none.

        Raises:
            DataError: a file is missing, unreadable, outside the root or not what it should be, or the sizes differ.
        """
        image, label = self.image(index), self.label(index)
        if label is not None:
            require_equal_size(self.entries[index], image.size, label.size)
        return image, label
