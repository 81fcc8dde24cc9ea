"""Check a dataset before training: files, sizes, label values, and how the lists fit together."""

import posixpath
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np

from allspark_fast.data.datasets import Entry, SegmentationDataset, values_of
from allspark_fast.data.images import map_in_threads, read_orientation, require_bytes, resolve_path
from allspark_fast.data.info import IGNORE_INDEX, DatasetInfo
from allspark_fast.data.sources import Sources
from allspark_fast.errors import DataError

Result = TypeVar("Result")

_WARNINGS = ("train_and_val", "turned_image", "absent_class", "crop_padding")


@dataclass(frozen=True)
class Problem:
    """Something wrong with a dataset.

    Attributes:
        kind: ``file`` (missing, unreadable, outside the root, or a label with a value that is no class),
            ``size_mismatch``, ``missing_label``, ``black_and_white``, ``empty_list``, ``labeled_and_unlabeled``, or one
            of the warnings ``train_and_val``, ``turned_image``, ``absent_class`` and ``crop_padding``.
        file: file or list concerned, as the user named it.
        message: what was expected and how to fix it.
    """

    kind: str
    file: str
    message: str

    @property
    def is_warning(self) -> bool:
        """Whether training is possible all the same."""
        return self.kind in _WARNINGS

    def __str__(self) -> str:
        return f"{'warning' if self.is_warning else 'error'}: {self.file}: {self.message}"


class _Report(NamedTuple):
    """What reading an entry showed.

    Attributes:
        problems: of its files.
        size: (width, height) of the image, if it is readable.
        values: class indices in the label.
        turned: whether EXIF turns an image whose label has the size of the turned image.
    """

    problems: list[Problem]
    size: tuple[int, int] | None
    values: frozenset[int]
    turned: bool


class _ListChecks:
    """The checks of the entries of one list; collects nothing, so that threads can share it."""

    def __init__(self, dataset: SegmentationDataset, needs_labels: bool):
        self._dataset = dataset
        self._needs_labels = needs_labels

    def read(self, index: int) -> _Report:
        """Read the files of an entry."""
        entry, problems = self._dataset.entries[index], self._missing_label(index)
        image = self._try(problems, entry.image, partial(self._dataset.image, index))
        size = None if image is None else image.size
        if not self._needs_labels or entry.label is None:
            return _Report(problems, size, frozenset(), turned=False)
        label = self._try(problems, entry.label, partial(self._dataset.label, index))
        if label is None:
            return _Report(problems, size, frozenset(), turned=False)
        if size is not None and size != label.size:
            problems.append(
                Problem(
                    "size_mismatch",
                    entry.label,
                    f"is {label.width}x{label.height}, its image {entry.image} {size[0]}x{size[1]} pixels (EXIF"
                    " orientation applied); the sizes must be equal",
                )
            )
        turned = size == label.size and read_orientation(resolve_path(self._dataset.root, entry.image)) != 1
        return _Report(problems, size, frozenset(values_of(label)), turned)

    def find(self, index: int) -> list[Problem]:
        """Check that the files of an entry exist, without reading them."""
        entry, problems = self._dataset.entries[index], self._missing_label(index)
        for file in (entry.image, entry.label if self._needs_labels else None):
            if file is not None:
                self._try(problems, file, partial(self._require_bytes, file))
        return problems

    def _require_bytes(self, file: str) -> None:
        require_bytes(resolve_path(self._dataset.root, file))

    def _missing_label(self, index: int) -> list[Problem]:
        entry = self._dataset.entries[index]
        if not self._needs_labels or entry.label is not None:
            return []
        return [Problem("missing_label", entry.image, "has no label, but its list needs labels")]

    def _try(self, problems: list[Problem], file: str, read: Callable[[], Result]) -> Result | None:
        try:
            return read()
        except DataError as error:
            message = str(error).removeprefix(f"{self._dataset.root / file}: ").removeprefix(f"{file}: ")
            problems.append(Problem("file", file, message))
            return None


def _draw(entries: Sequence[Entry], sample: int | None) -> tuple[list[int], list[int]]:
    """Choose ``sample`` of the distinct entries, or all; return their indices, and those of the others."""
    indices = list({entry: index for index, entry in enumerate(entries)}.values())
    chosen = set(np.random.default_rng(0).permutation(indices)[:sample].tolist())
    return [index for index in indices if index in chosen], [index for index in indices if index not in chosen]


def _check_overlaps(lists: dict[str, SegmentationDataset]) -> Iterator[Problem]:
    labeled, unlabeled, val = ({posixpath.normpath(entry.image) for entry in x.entries} for x in lists.values())
    for file in sorted(labeled & unlabeled):
        yield Problem("labeled_and_unlabeled", file, "is in both lists: remove it from one of them")
    for file in sorted(val & (labeled | unlabeled)):
        yield Problem("train_and_val", file, "is trained on and also in val, which makes the score too good")


def _check_classes(info: DatasetInfo, values: Set[int], *, all_read: bool) -> Iterator[Problem]:
    """Compare the classes with the class indices in all labels of the labeled list that were read."""
    if info.values is None and IGNORE_INDEX in values and len(info.classes) > 1 and values <= {0, IGNORE_INDEX}:
        yield Problem(
            "black_and_white",
            "labeled",
            f"all labels read hold only 0 and 255, which is ignored, so no class but {info.classes[0]} would be"
            ' learned; for black-and-white masks add "values": [0, 255] to meta.json, or "values": [0, 1, ...] if 255'
            " is meant to be ignored",
        )
        return
    absent = [name for index, name in enumerate(info.classes) if index not in values]
    if absent and values and all_read:
        yield Problem("absent_class", "labeled", f"no label holds {', '.join(absent)}, which cannot be learned")


def check_sources(sources: Sources, crop: int, *, sample: int | None = None) -> list[Problem]:
    """Find everything that would break or spoil training on an opened dataset.

    Reads every file, or those of a sample; that files exist and are not empty, and how the lists fit together, is
    checked in any case. Rendered scenes have no problems.

    Args:
        sources: the opened dataset.
        crop: side of the training crops in pixels.
        sample: number of entries per list to read; None reads all.

    Returns:
        problems in the order of the lists.
    """
    opened = {"labeled": sources.labeled, "unlabeled": sources.unlabeled, "val": sources.val}
    lists = {name: source for name, source in opened.items() if isinstance(source, SegmentationDataset)}
    if not lists:
        return []
    problems = [
        Problem("empty_list", name, "holds no image; check its split file") for name in lists if not lists[name]
    ]
    problems.extend(_check_overlaps(lists))
    sizes: list[tuple[int, int]] = []
    for name, dataset in lists.items():
        checks = _ListChecks(dataset, needs_labels=name != "unlabeled")
        drawn, others = _draw(dataset.entries, sample)
        reports = map_in_threads(checks.read, drawn)
        for found in (*(report.problems for report in reports), *map_in_threads(checks.find, others)):
            problems.extend(found)
        turned = [dataset.entries[index].image for index, report in zip(drawn, reports, strict=True) if report.turned]
        if turned:
            # A label drawn on the pixels as stored has the size of the turned image for half of the orientations.
            problems.append(
                Problem(
                    "turned_image",
                    name,
                    f"EXIF turns {len(turned)} images with labels, {turned[0]} first; make sure that these labels were"
                    " drawn on the images as viewers show them",
                )
            )
        if name == "labeled":
            values = frozenset[int]().union(*(report.values for report in reports))
            problems.extend(_check_classes(sources.info, values, all_read=not others))
        if name != "val":
            sizes.extend(report.size for report in reports if report.size is not None)
    # The random resize usually goes up to twice the size.
    if sizes and all(2 * min(size) < crop for size in sizes):
        width, height = max(sizes)
        message = f"every crop holds padding, the largest image is {height}x{width}; a smaller crop wastes less"
        problems.append(Problem("crop_padding", f"crop {crop}x{crop}", message))
    return problems
