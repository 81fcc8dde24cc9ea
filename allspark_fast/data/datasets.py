"""Datasets as lists of files: what lies in a folder, split files, and the images and labels that they name."""

import codecs
import os
import re
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from PIL import Image

from allspark_fast.data.images import PixelRange, read_image, read_label
from allspark_fast.data.info import DatasetInfo
from allspark_fast.errors import DataError

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Entry:
    """One line of a split file: paths of an image and of its label, or None, relative to the data root."""

    image: str
    label: str | None


def is_image(path: str | Path) -> bool:
    """Return whether a path has the suffix of a format that can be read."""
    return str(path).lower().endswith(IMAGE_SUFFIXES)


def list_files(folder: Path) -> list[Path]:
    """List the files below a folder in alphabetical order.

    Hidden files and folders are left out. Links to folders are followed, but for those that lead back to a folder in
    which they or ``folder`` lie. A folder is entered once, and of several ways to it one without links is taken.
    """
    found, entered, waiting = list[Path](), set[str](), deque([folder] * folder.is_dir())
    while waiting:
        current = waiting.popleft()
        real = os.path.realpath(current)
        inside = () if current == folder else (folder, current.parent)
        if real in entered or any(Path(os.path.realpath(x)).is_relative_to(real) for x in inside):
            continue
        entered.add(real)
        for path in sorted(path for path in current.iterdir() if not path.name.startswith(".")):
            if not path.is_dir():
                found.append(path)
            elif path.is_symlink():
                waiting.append(path)
            else:
                waiting.appendleft(path)
    return sorted(found)


def stem_of(file: Path, folder: Path) -> str:
    """Return what a label and its image have in common: the path below their folders, without the suffix."""
    return file.relative_to(folder).with_suffix("").as_posix()


def scan_folder(root: Path) -> list[Entry]:
    """List a folder with ``images/`` and ``labels/``, which have the same subfolders, in alphabetical order.

    The label of ``images/a/b.jpg`` is ``labels/a/b.png`` (any suffix); an image without one is unlabeled.

    Raises:
        DataError: no ``images/`` folder, two files with the same stem, or labels of which none matches an image.
    """
    if not (root / "images").is_dir():
        raise DataError(f"{root}: expected a folder with images/ (and labels/), found no {root / 'images'}")
    images, labels = dict[str, Path](), dict[str, Path]()
    for folder, found in ((root / "images", images), (root / "labels", labels)):
        for file in filter(Path.is_file, filter(is_image, list_files(folder))):
            if (first := found.setdefault(stem_of(file, folder), file)) is not file:
                raise DataError(f"{file}: has the same stem as {first.name}; keep one (stems match labels to images)")
    if labels and not labels.keys() & images.keys():
        stem, file = next(iter(labels.items()))
        raise DataError(
            f"{root}: no label has the name of an image; {file.name} needs an image named {stem}.jpg (or .png, ...):"
            " give each label the name of its image"
        )
    paths = {stem: file.relative_to(root).as_posix() for stem, file in labels.items()}
    return [Entry(file.relative_to(root).as_posix(), paths.get(stem)) for stem, file in images.items()]


def _parse_line(line: str, where: str = "") -> Entry:
    # Two paths with a comma between them would be one, of a file in a folder named like an image.
    if not is_image(line) or any(map(is_image, re.split("[,;]", line)[:-1])):
        raise DataError(f"{where}: expected `image_path label_path` or `image_path`, found {line!r}")
    cuts = [(line[: gap.start()], line[gap.end() :]) for gap in re.finditer(r"\s+", line)]
    pairs = [Entry(*cut) for cut in cuts if all(map(is_image, cut))]
    if len(pairs) > 1:
        raise DataError(f"{where}: more than two image paths in {line!r}")
    return pairs[0] if pairs else Entry(line, None)


def split_line(entry: Entry) -> str:
    """Return the line of a split file that ``read_split`` reads as this entry.

    Raises:
        DataError: no line does: a path is not valid UTF-8, contains a line break, or reads as two paths.
    """
    line = entry.image if entry.label is None else f"{entry.image} {entry.label}"
    with suppress(ValueError):
        line.encode()
        if line.splitlines() == [line.strip().lstrip("\ufeff")] and _parse_line(line) == entry:
            return line
    raise DataError(f"{line!r}: a split file cannot hold such a name, rename the file")


def read_split(path: Path) -> list[Entry]:
    """Read a split file in the format of AllSpark, UniMatch and related code.

    Each line is ``image_path label_path``; a single path is an unlabeled image. Blank lines, surrounding whitespace,
    tabs, CRLF and a byte order mark are accepted. Paths may contain spaces: a line is split where both parts end in an
    image suffix (.jpg, .png, ...), otherwise the whole line is one path. Repeated lines are kept.

    Raises:
        DataError: no such file, or a line with no image path or more than two; names file and line.
    """
    try:
        content = path.read_bytes()
        is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # as PowerShell writes it
        lines = content.decode("utf-16" if is_utf16 else "utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a split file ({error})") from error
    return [_parse_line(line.strip(), f"{path}, line {i}") for i, line in enumerate(lines, start=1) if line.strip()]


def split_file(root: Path, file: Path) -> Path | None:
    """Find a split file, whose path is relative to the data root or to the working directory, or absolute."""
    return next(filter(Path.is_file, (root / file, file)), None)


def find_split(root: Path, file: Path) -> list[Entry]:
    """Read a split file; raises DataError if ``split_file`` does not find it, or it is malformed."""
    if (path := split_file(root, file)) is None:
        raise DataError(
            f"split file {file}: not found below {root} nor in the working directory; check both paths"
            " (`python -m allspark_fast splits` writes split files for a folder)"
        )
    return read_split(path)


def resolve_path(root: Path, relative: str) -> Path:
    """Resolve a path of a split file; every listed path passes through here.

    Symbolic links inside ``root`` may point anywhere, as a split file cannot create them; but ``..`` are resolved as
    text, so that none climbs out through a link. Raises DataError if the path leaves ``root``.
    """
    inside = Path(os.path.normpath(relative))
    if inside.is_absolute() or inside.parts[:1] == ("..",):
        raise DataError(
            f"{relative}: this path leaves the data root {root} or is absolute; make it relative to the root, without a"
            " leading slash or '..', or create a symbolic link to the folder inside the root"
        )
    return root / inside


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


class Sources(NamedTuple):
    """An opened dataset: its classes, and its labeled, unlabeled and validation images."""

    info: DatasetInfo
    labeled: ImageSource
    unlabeled: ImageSource
    val: ImageSource


LISTS = Sources._fields[1:]


@dataclass(frozen=True)
class SegmentationDataset:
    """Images and labels of a list of entries below a root as PIL images; the loaders apply the transforms.

    ``info`` is the meaning of labels, see ``to_classes``; for ``pixel_range`` see ``to_rgb``.
    """

    root: Path
    entries: Sequence[Entry]
    info: DatasetInfo | None = None
    pixel_range: PixelRange | None = None

    def image(self, index: int) -> Image.Image:
        """Read the RGB image alone."""
        return read_image(resolve_path(self.root, self.entries[index].image), self.pixel_range)

    def label(self, index: int) -> Image.Image | None:
        """Read the label alone; None where the entry has none."""
        path = self.entries[index].label
        return None if path is None else read_label(resolve_path(self.root, path), self.info)

    def __getitem__(self, index: int) -> tuple[Image.Image, Image.Image | None]:
        """Read both; raises DataError if a file is missing, unreadable or outside the root, or the sizes differ."""
        image, label = self.image(index), self.label(index)
        if label is not None:
            require_equal_size(self.entries[index], image.size, label.size)
        return image, label
