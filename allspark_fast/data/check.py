"""Finds what is wrong with a data set before a training does."""

import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from allspark_fast.data.datasets import Entry
from allspark_fast.data.errors import DataError
from allspark_fast.data.images import read_image, read_label, resolve_path
from allspark_fast.data.info import IGNORE_INDEX, DatasetInfo

# Below this the deepest feature map (stride 32) has no pixel left.
MIN_CROP = 32

_TRAIN = ("labeled", "unlabeled")
_WARNINGS = ("train_and_val", "crop_padding")


@dataclass(frozen=True)
class Problem:
    """Something wrong with a data set.

    Attributes:
        kind: One of `missing_file`, `unreadable`, `outside_root`, `missing_label`, `size_mismatch`,
            `label_value`, `empty_split`, `labeled_and_unlabeled`, `crop_size`, and the warnings
            `train_and_val` and `crop_padding`.
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


class _FileChecks:
    """The checks of single entries; collects nothing, so that threads can share it."""

    def __init__(self, root: Path, info: DatasetInfo, allow_outside: bool):
        self.root = root
        self.info = info
        self.allow_outside = allow_outside

    def check(self, entry: Entry, with_label: bool) -> tuple[list[Problem], tuple[int, int] | None]:
        """Returns an entry's problems and the (width, height) of its image, None where it is unreadable."""
        image = self._read(entry.image, read_image)
        if isinstance(image, Problem):
            problems, size = [image], None
        else:
            problems, size = [], image.size
        if with_label:
            problems.extend(self._check_label(entry, size))
        return problems, size

    def _read(self, file: str, read: Callable[[Path], Image.Image]) -> Image.Image | Problem:
        try:
            path = resolve_path(self.root, file, allow_outside=self.allow_outside)
        except DataError as error:
            return Problem("outside_root", file, str(error))
        if not path.is_file():
            return Problem("missing_file", file, f"no such file below {self.root}; check root and split file")
        try:
            return read(path)
        except DataError as error:
            return Problem("unreadable", file, str(error))

    def _check_label(self, entry: Entry, size: tuple[int, int] | None) -> Iterator[Problem]:
        if entry.label is None:
            yield Problem("missing_label", entry.image, "has no label, but is in a list that needs them")
            return
        label = self._read(entry.label, read_label)
        if isinstance(label, Problem):
            yield label
            return
        if size is not None and size != label.size:
            yield Problem(
                "size_mismatch",
                entry.label,
                f"is {label.width}x{label.height}, its image {entry.image} {size[0]}x{size[1]} pixels (EXIF"
                f" orientation applied); they must be equal",
            )
        yield from self._check_values(entry.label, label)

    def _check_values(self, file: str, label: Image.Image) -> Iterator[Problem]:
        values = np.flatnonzero(np.bincount(np.asarray(label).ravel(), minlength=256)).tolist()
        allowed = {*range(len(self.info.classes)), self.info.ignore_index, IGNORE_INDEX}
        wrong = [value for value in values if value not in allowed]
        if wrong:
            yield Problem(
                "label_value",
                file,
                f"holds class indices {wrong}, but {self.info.name} has the {len(self.info.classes)} classes"
                f" 0..{len(self.info.classes) - 1} and ignores {self.info.ignore_index}; convert the label or"
                f" name the missing classes",
            )


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
        yield Problem("labeled_and_unlabeled", file, "is in both lists; an image must be in one of them")
    for name in (name for name in splits if name not in _TRAIN):
        for file in sorted(_images(splits[name]) & (labeled | unlabeled)):
            yield Problem("train_and_val", file, f"is trained on and also in {name}, whose score it flatters")


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

    Reads every file unless `sample` is given; lists are compared whole in any case.

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
        with_label = [name != "unlabeled" or (hidden_labels and entry.label is not None) for entry in drawn]
        with ThreadPoolExecutor() as pool:
            results = list(pool.map(checks.check, drawn, with_label))
        problems.extend(problem for found, _ in results for problem in found)
        train_sizes.extend(size for _, size in results if size is not None and name in _TRAIN)
    height, width = (crop_size, crop_size) if isinstance(crop_size, int) else crop_size
    problems.extend(_check_crop((height, width), train_sizes))
    return problems
