"""Finds what is wrong with a data set before a training does."""

import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image

from allspark_fast.data.datasets import Entry, values_of, wrong_values
from allspark_fast.data.images import read_image, read_label, read_orientation, require_bytes, resolve_path
from allspark_fast.data.info import IGNORE_INDEX, DatasetInfo
from allspark_fast.errors import DataError

Read = TypeVar("Read")

# Below this the deepest feature map (stride 32) has no pixel left.
MIN_CROP = 32

_TRAIN = ("labeled", "unlabeled")
_WARNINGS = ("train_and_val", "crop_padding", "absent_class", "turned_image")


@dataclass(frozen=True)
class Problem:
    """Something wrong with a data set.

    Attributes:
        kind: One of `missing_file`, `unreadable`, `outside_root`, `missing_label`, `size_mismatch`,
            `label_value`, `black_and_white`, `empty_split`, `labeled_and_unlabeled`, `crop_size`, and the
            warnings `train_and_val`, `turned_image`, `absent_class` and `crop_padding`.
        file: The file or list concerned, as the user named it.
        message: What was expected and how to mend it.
    """

    kind: str
    file: str
    message: str

    @property
    def is_warning(self) -> bool:
        """Whether training can go on all the same."""
        return self.kind in _WARNINGS

    def __str__(self) -> str:
        return f"{'warning' if self.is_warning else 'error'}: {self.file}: {self.message}"


class _Found(NamedTuple):
    """What the files of an entry told: problems, (width, height) of a readable image, values of a readable label.

    `turned` is whether the image is turned by its EXIF orientation, and has a label of the size that it has then.
    """

    problems: list[Problem]
    size: tuple[int, int] | None
    values: frozenset[int]
    turned: bool


class _FileChecks:
    """The checks of single entries; collects nothing, so that threads can share it."""

    def __init__(self, root: Path, info: DatasetInfo, allow_outside: bool):
        self.root = root
        self.info = info
        self.allow_outside = allow_outside

    def check(self, entry: Entry, with_label: bool) -> _Found:
        """Reads the files of an entry."""
        image = self._read(entry.image, read_image)
        if isinstance(image, Problem):
            problems, size = [image], None
        else:
            problems, size = [], image.size
        if not with_label:
            return _Found(problems, size, frozenset(), turned=False)
        label = self._read_label(entry)
        if isinstance(label, Problem):
            return _Found([*problems, label], size, frozenset(), turned=False)
        values = values_of(label)
        problems.extend(self._check_label(entry, label, values, size))
        turned = size == label.size and read_orientation(self._path(entry.image)) != 1
        return _Found(problems, size, frozenset(values), turned)

    def look(self, entry: Entry, with_label: bool) -> list[Problem]:
        """Looks whether the files of an entry are there, without reading them."""
        files = [entry.image, *([entry.label] if with_label and entry.label is not None else [])]
        found = [self._read(file, require_bytes) for file in files]
        if with_label and entry.label is None:
            found.append(_without_label(entry))
        return [problem for problem in found if problem is not None]

    def _path(self, file: str) -> Path:
        return resolve_path(self.root, file, allow_outside=self.allow_outside)

    def _read(self, file: str, read: Callable[[Path], Read]) -> Read | Problem:
        try:
            path = self._path(file)
        except DataError as error:
            return Problem("outside_root", file, str(error))
        if not path.is_file():
            return Problem("missing_file", file, f"no such file below {self.root}; check root and split file")
        try:
            return read(path)
        except DataError as error:
            return Problem("unreadable", file, str(error))

    def _read_label(self, entry: Entry) -> Image.Image | Problem:
        if entry.label is None:
            return _without_label(entry)
        return self._read(entry.label, lambda path: read_label(path, self.info.label_colors()))

    def _check_label(
        self, entry: Entry, label: Image.Image, values: list[int], size: tuple[int, int] | None
    ) -> Iterator[Problem]:
        file = entry.label or entry.image
        if size is not None and size != label.size:
            yield Problem(
                "size_mismatch",
                file,
                f"is {label.width}x{label.height}, its image {entry.image} {size[0]}x{size[1]} pixels (EXIF"
                f" orientation applied); they must be equal",
            )
        wrong = wrong_values(values, self.info)
        if wrong:
            yield Problem("label_value", file, wrong)


def _reads_label(name: str, hidden_labels: bool, entry: Entry) -> bool:
    """Whether the label of an entry in the list `name` matters."""
    return name != "unlabeled" or (hidden_labels and entry.label is not None)


def _without_label(entry: Entry) -> Problem:
    return Problem("missing_label", entry.image, "has no label, but is in a list that needs them")


def _draw(entries: Sequence[Entry], sample: int | None, seed: int) -> list[Entry]:
    """All different entries, or `sample` of them."""
    different = list(dict.fromkeys(entries))
    if sample is None or sample >= len(different):
        return different
    chosen = np.random.default_rng(seed).choice(len(different), sample, replace=False)
    return [different[position] for position in sorted(chosen.tolist())]


def _images(entries: Iterable[Entry]) -> set[str]:
    return {posixpath.normpath(entry.image) for entry in entries}


def _check_overlaps(splits: Mapping[str, Sequence[Entry]]) -> Iterator[Problem]:
    labeled, unlabeled = (_images(splits.get(name, ())) for name in _TRAIN)
    for file in sorted(labeled & unlabeled):
        yield Problem(
            "labeled_and_unlabeled", file, "is in both lists, so it would count twice: take it out of one of them"
        )
    for name in (name for name in splits if name not in _TRAIN):
        for file in sorted(_images(splits[name]) & (labeled | unlabeled)):
            yield Problem("train_and_val", file, f"is trained on and also in {name}, whose score it flatters")


def _check_turned(name: str, turned: Sequence[str]) -> Iterator[Problem]:
    """A label that was drawn on the pixels as stored has the right size for half of the orientations."""
    if turned:
        yield Problem(
            "turned_image",
            name,
            f"{len(turned)} images with labels, {turned[0]} first, are turned by their EXIF orientation; make sure that"
            " these labels were drawn on the images as viewers show them",
        )


def _check_classes(info: DatasetInfo, values: Set[int], *, all_read: bool) -> Iterator[Problem]:
    """Compares the classes with the values of all labels of the labeled list that were read."""
    black, white = 0, IGNORE_INDEX
    if info.values is None and white in values and len(info.classes) > 1 and values <= {black, white}:
        yield Problem(
            "black_and_white",
            "labeled",
            f"all labels read hold nothing but 0 and 255, which is ignored, so no class but {info.classes[0]} would be"
            ' learned; for black-and-white masks add "values": [0, 255] to meta.json ([0, 1, ...] says that 255 is'
            " meant to be ignored)",
        )
        return
    indices = info.class_indices()
    present = {indices.get(value) for value in values}
    absent = [name for index, name in enumerate(info.classes) if index not in present]
    if absent and values and all_read:
        yield Problem("absent_class", "labeled", f"no label holds {', '.join(absent)}, which cannot be learned")


def _check_crop(crop_size: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> Iterator[Problem]:
    crop = f"{crop_size[0]}x{crop_size[1]}"
    if min(crop_size) < MIN_CROP:
        yield Problem("crop_size", f"crop {crop}", f"both sides must be at least {MIN_CROP} pixels")
    # The resize goes up to twice the size.
    if sizes and all(2 * width < crop_size[1] or 2 * height < crop_size[0] for width, height in sizes):
        width, height = max(sizes)
        yield Problem(
            "crop_padding",
            f"crop {crop}",
            f"every crop holds padding, the largest image is {height}x{width}; a smaller crop wastes less",
        )


def check_dataset(
    root: str | Path,
    info: DatasetInfo,
    splits: Mapping[str, Sequence[Entry]],
    crop_size: int | tuple[int, int],
    *,
    hidden_labels: bool = False,
    allow_outside: bool = False,
    sample: int | None = None,
    seed: int = 0,
) -> list[Problem]:
    """Finds everything that would break or spoil a training, and never stops at the first.

    Reads every file unless `sample` is given; that files are there and not empty is looked at, and lists are compared,
    in any case.

    Args:
        root: Folder of the data set.
        info: Its classes and ignored index.
        splits: Entries by list name: `labeled` and `unlabeled` are trained on, any other is for validation.
        crop_size: Side of the square training crop, or (height, width), in pixels.
        hidden_labels: Check the labels of unlabeled entries too, where they have one.
        allow_outside: Accept paths that leave `root`.
        sample: Number of entries per list whose files are read; None reads all.
        seed: Seed of that choice.

    Returns:
        Problems in the order of the lists; empty if all is well.
    """
    checks = _FileChecks(Path(root), info, allow_outside)
    problems = [
        Problem("empty_split", name, "holds no image; check the split file and the number of labeled images")
        for name, entries in splits.items()
        if not entries
    ]
    problems.extend(_check_overlaps(splits))
    train_sizes: list[tuple[int, int]] = []
    for name, entries in splits.items():
        drawn = _draw(entries, sample, seed)
        read = set(drawn)
        others = [entry for entry in dict.fromkeys(entries) if entry not in read]
        reads_label = partial(_reads_label, name, hidden_labels)
        with ThreadPoolExecutor() as pool:
            results = list(pool.map(checks.check, drawn, map(reads_label, drawn)))
            absent = [problem for found in pool.map(checks.look, others, map(reads_label, others)) for problem in found]
        problems.extend(problem for found in results for problem in found.problems)
        problems.extend(absent)
        turned = [entry.image for entry, found in zip(drawn, results, strict=True) if found.turned]
        problems.extend(_check_turned(name, turned))
        train_sizes.extend(found.size for found in results if found.size is not None and name in _TRAIN)
        if name == "labeled":
            values = frozenset[int]().union(*(found.values for found in results))
            problems.extend(_check_classes(info, values, all_read=len(drawn) == len(set(entries))))
    height, width = (crop_size, crop_size) if isinstance(crop_size, int) else crop_size
    problems.extend(_check_crop((height, width), train_sizes))
    return problems
