"""Data sets as lists of files: official split files, a folder of one's own, and the images behind them."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image
from torch.utils.data import Dataset

from allspark_fast.data.images import IMAGE_SUFFIXES, read_image, read_label, resolve_path
from allspark_fast.data.info import DatasetInfo
from allspark_fast.errors import DataError


@dataclass(frozen=True)
class Entry:
    """One line of a split file.

    Attributes:
        image: Path of the image, relative to the data root.
        label: Path of the label, or None where there is none.
    """

    image: str
    label: str | None


def _is_image_path(text: str) -> bool:
    return text.lower().endswith(IMAGE_SUFFIXES)


def _cuts(line: str) -> Iterator[Entry]:
    """Every way to read a line as two image paths."""
    for blank in re.finditer(r"\s+", line):
        image, label = line[: blank.start()], line[blank.end() :]
        if _is_image_path(image) and _is_image_path(label):
            yield Entry(image, label)


def _parse_line(line: str) -> Entry:
    if not _is_image_path(line):
        raise ValueError(f"expected `image_path label_path` or `image_path`, found {line!r}")
    pairs = list(_cuts(line))
    if len(pairs) > 1:
        raise ValueError(f"more than two image paths in {line!r}")
    return pairs[0] if pairs else Entry(line, None)


def split_line(entry: Entry) -> str:
    """The line of a split file from which ``read_split`` gets the entry back.

    Raises:
        DataError: there is none, since a path is no UTF-8, holds an end of line, or reads like two paths.
    """
    line = entry.image if entry.label is None else f"{entry.image} {entry.label}"
    try:
        line.encode()
        comes_back = line.splitlines() == [line.strip().lstrip("\ufeff")] and _parse_line(line) == entry
    except ValueError:
        comes_back = False
    if not comes_back:
        raise DataError(f"{line!r}: names like this cannot stand in a split file, rename it")
    return line


def read_split(path: str | Path) -> list[Entry]:
    """Reads a split file as the public code of AllSpark, UniMatch and their like writes them.

    One `image_path label_path` per line; a lone image path is an unlabeled image. Blank lines, blanks around
    a line, tabs, CRLF and a byte order mark are tolerated. Paths may hold blanks: a line is cut where both
    sides end in the suffix of an image (.jpg, .png, ...); without such a place the whole line is one path.

    Args:
        path: Split file, UTF-8.

    Returns:
        The entries in the order of the lines, repeated lines included.

    Raises:
        DataError: No such file, or a line that holds no image path or more than two; names file and line.
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


def _files_by_stem(folder: Path) -> dict[str, Path]:
    """Image files below a folder, keyed by their path without suffix; hidden files are left out."""
    files: dict[str, Path] = {}
    for file in sorted(folder.rglob("*")):
        if file.name.startswith(".") or not _is_image_path(file.name):
            continue
        key = file.relative_to(folder).with_suffix("").as_posix()
        if key in files:
            raise DataError(f"{file}: has the same stem as {files[key].name}; keep one (labels go by stem)")
        files[key] = file
    return files


def find_split(root: Path, file: Path) -> list[Entry]:
    """Read a split file whose path is relative to the data root or to the working directory, or absolute.

    Raises:
        DataError: it is in neither place, or malformed.
    """
    for candidate in (root / file, file):
        if candidate.is_file():
            return read_split(candidate)
    raise DataError(
        f"split file {file}: not found below {root} nor here; check the folder of the data and the split's name"
        " (`python -m allspark_fast splits` makes lists out of a folder)"
    )


def scan_folder(root: str | Path) -> list[Entry]:
    """Lists a folder of one's own: `images/` and `labels/`, nested alike on both sides.

    An image `images/a/b.jpg` has the label `labels/a/b.png` (any suffix); an image without one is unlabeled.

    Args:
        root: Folder holding `images/`, and `labels/` if there are any.

    Returns:
        Entries in alphabetical order.

    Raises:
        DataError: No `images/` folder, two files with the same stem, or labels none of which belongs to an image.
    """
    root = Path(root)
    if not (root / "images").is_dir():
        raise DataError(f"{root}: expected a folder with images/ (and labels/), found no {root / 'images'}")
    images, labels = _files_by_stem(root / "images"), _files_by_stem(root / "labels")
    if labels and not labels.keys() & images.keys():
        raise DataError(
            f"{root}: no label has the name of an image; {next(iter(labels.values())).name} would belong to an image"
            f" {next(iter(labels))}.jpg (or .png, ...): rename labels like their images"
        )
    return [
        Entry(
            file.relative_to(root).as_posix(),
            labels[key].relative_to(root).as_posix() if key in labels else None,
        )
        for key, file in images.items()
    ]


def values_of(label: Image.Image) -> list[int]:
    """The different values of a label, ascending."""
    return [value for value, count in enumerate(label.histogram()) if count]


def wrong_values(values: Sequence[int], info: DatasetInfo) -> str:
    """What is wrong with the values of a label file, and how to mend it; empty if nothing is."""
    allowed = info.class_indices()
    wrong = [value for value in values if value not in allowed]
    if not wrong:
        return ""
    owned = f"the values {list(info.values)}" if info.values else f"the indices 0..{len(info.classes) - 1}"
    return (
        f"holds {wrong}, but the {len(info.classes)} classes of {info.name} have {owned}; convert the label,"
        " or name the missing classes, or the values of the classes, in meta.json"
    )


class ImageSource(Protocol):
    """What the loaders need of a data set: the name of every sample, its image, its image with the label."""

    @property
    def entries(self) -> Sequence[Entry]:
        """Names of the samples."""

    def image(self, index: int) -> Image.Image:
        """Returns the RGB image alone."""

    def __getitem__(self, index: int) -> tuple[Image.Image, Image.Image | None]:
        """Returns the RGB image and its label (mode L, 255 ignored), None where the entry has none."""


class SegmentationDataset(Dataset[tuple[Image.Image, Image.Image | None]]):
    """Images and labels of a list of entries, as PIL images; transforms belong to the loader.

    Args:
        root: Folder that the paths of the entries are relative to.
        entries: What to read, in order.
        info: What the values and colours of label files mean, to refuse any other; None takes labels as they are.
        allow_outside: Accept paths that leave `root`.
    """

    def __init__(
        self,
        root: str | Path,
        entries: Sequence[Entry],
        *,
        info: DatasetInfo | None = None,
        allow_outside: bool = False,
    ):
        self.root = Path(root)
        self.entries = list(entries)
        self.info = info
        self.allow_outside = allow_outside

    def __len__(self) -> int:
        return len(self.entries)

    def image(self, index: int) -> Image.Image:
        """Reads the image alone: a PIL image of mode RGB.

        Raises:
            DataError: The file is missing, unreadable or outside the root.
        """
        return read_image(self._path(self.entries[index].image))

    def label(self, index: int) -> Image.Image | None:
        """Reads the label alone (mode L, 255 ignored), None where the entry has none.

        Raises:
            DataError: The file is missing, unreadable or outside the root, or holds a value or colour that is no class.
        """
        path = self.entries[index].label
        if path is None:
            return None
        label = read_label(self._path(path), None if self.info is None else self.info.label_colors())
        if self.info is None:
            return label
        wrong = wrong_values(values_of(label), self.info)
        if wrong:
            raise DataError(f"{path}: {wrong} (`python -m allspark_fast check` lists all such files)")
        indices = self.info.class_indices()
        return label.point([indices.get(value, value) for value in range(256)])

    def __getitem__(self, index: int) -> tuple[Image.Image, Image.Image | None]:
        """Reads one sample: an RGB image and its label (mode L, 255 ignored), None where the entry has none.

        Raises:
            DataError: A file is missing, unreadable or outside the root, the label holds an index that is no class,
                or the two sizes differ.
        """
        entry, image, label = self.entries[index], self.image(index), self.label(index)
        if label is not None and label.size != image.size:
            raise DataError(
                f"{entry.image} is {image.width}x{image.height} pixels (EXIF orientation applied) but its"
                f" label {entry.label} is {label.width}x{label.height}; they must be equal"
            )
        return image, label

    def _path(self, relative: str) -> Path:
        return resolve_path(self.root, relative, allow_outside=self.allow_outside)
