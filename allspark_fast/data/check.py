"""Check a dataset before training: files, sizes, label values, and how the lists fit together."""

import posixpath
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from allspark_fast.data.datasets import SegmentationDataset, Sources, require_equal_size, stem_of
from allspark_fast.data.images import (
    IMAGE_SUFFIXES,
    decode,
    list_files,
    map_in_threads,
    orientation_of,
    require_bytes,
    resolve_path,
)
from allspark_fast.data.info import IGNORE_INDEX, DatasetInfo
from allspark_fast.data.labels import values_of
from allspark_fast.errors import DataError

Result = TypeVar("Result")


@dataclass(frozen=True)
class Problem:
    """Something wrong with a dataset.

    Attributes:
        file: file or list concerned, as the user named it.
        message: what was expected and how to fix it.
        is_warning: whether training is possible all the same.
    """

    file: str
    message: str
    is_warning: bool = False

    def __str__(self) -> str:
        return f"{'warning' if self.is_warning else 'error'}: {self.file}: {self.message}"


class _Reading(NamedTuple):
    """What the files of an entry showed; ``turned`` is its image, if EXIF turns it and it has a label."""

    problems: list[Problem]
    size: tuple[int, int] | None = None
    values: Set[int] = frozenset()
    turned: str | None = None


def _read(dataset: SegmentationDataset, needs_labels: bool, chosen: Set[int], index: int) -> _Reading:
    """Read the files of a chosen entry; of others, check that they exist."""
    root, entry, problems = dataset.root, dataset.entries[index], list[Problem]()

    def attempt(file: str, read: Callable[[int], Result]) -> Result | None:
        try:
            if index in chosen:
                return read(index)
            require_bytes(resolve_path(root, file))
        except DataError as error:
            problems.append(Problem(file, str(error).removeprefix(f"{root / file}: ").removeprefix(f"{file}: ")))
        return None

    image = attempt(entry.image, dataset.image)
    if not needs_labels or entry.label is None:
        if needs_labels:
            problems.insert(0, Problem(entry.image, "has no label, but its list needs labels"))
        return _Reading(problems, None if image is None else image.size)
    label = attempt(entry.label, dataset.label)
    if label is None or image is None:
        return _Reading(problems, None if image is None else image.size, frozenset((label and values_of(label)) or ()))
    turned = image.size == label.size and decode(resolve_path(root, entry.image), orientation_of) != 1
    attempt(entry.label, lambda _: require_equal_size(entry, image.size, label.size))
    return _Reading(problems, image.size, frozenset(values_of(label)), entry.image if turned else None)


def _check_overlaps(lists: dict[str, SegmentationDataset], labeled_only: bool) -> Iterator[Problem]:
    labeled, unlabeled, val = ({posixpath.normpath(entry.image) for entry in x.entries} for x in lists.values())
    for file in sorted(labeled & unlabeled if not labeled_only else ()):
        yield Problem(file, "is in both lists: remove it from one of them")
    for file in sorted(val & (labeled | unlabeled)):
        yield Problem(file, "is trained on and also in val, which makes the score too good", is_warning=True)


def check_unused(root: Path) -> list[Problem]:
    """Name the files below images/ and labels/ of a folder that nothing uses, with the probable reason.

    Args:
        root: folder of a dataset; if it has no images/, there is nothing to say.
    """
    problems, used, others = list[Problem](), dict[str, dict[str, Path]](), dict[str, Path]()
    for folder in ("images", "labels"):
        stems = {file: stem_of(file, root / folder) for file in list_files(root / folder)}
        used[folder] = {stem: file for file, stem in stems.items() if file.suffix.lower() in IMAGE_SUFFIXES}
        left_out = [file for file in stems if file.suffix.lower() not in IMAGE_SUFFIXES]
        reason = f"its suffix is none of {', '.join(IMAGE_SUFFIXES)}; convert images"
        problems.extend(_left_out(root, folder, left_out, reason))
        if folder == "images":
            others = {_fold(stem): file for file, stem in stems.items()}
    unmatched = [stem for stem in used["labels"] if stem not in used["images"]]
    if used["images"] and unmatched:
        likely = _likely_image(_fold(unmatched[0]), others)
        reason = "no image has that name" if likely is None else f"{likely.relative_to(root)} is probably its image"
        reason += "; give image and label the same name before the suffix"
        problems.extend(_left_out(root, "labels", [used["labels"][stem] for stem in unmatched], reason))
    return problems


def _left_out(root: Path, folder: str, files: Sequence[Path], reason: str) -> Iterator[Problem]:
    if files:
        count = f"{len(files)} {'file is' if len(files) == 1 else 'files are'} left out"
        yield Problem(folder, f"{count}, {files[0].relative_to(root).as_posix()!r} first: {reason}", is_warning=True)


def _fold(name: str) -> str:
    """A name without what differs between systems: upper and lower case, and how accents are composed."""
    return unicodedata.normalize("NFC", name).casefold()


def _likely_image(label: str, images: Mapping[str, Path]) -> Path | None:
    """Find the image whose name a label's begins with: a.jpg for a_mask and a.jpg.png."""
    while label:
        if label in images:
            return images[label]
        label = re.sub(r"[^._-]*$", "", label)[:-1]
    return None


def _check_classes(info: DatasetInfo, values: Set[int], *, all_read: bool) -> Iterator[Problem]:
    """Compare the classes with the class indices in all labels of the labeled list that were read."""
    absent = [name for index, name in enumerate(info.classes) if index not in values]
    if info.values is None and IGNORE_INDEX in values and len(info.classes) > 1 and values <= {0, IGNORE_INDEX}:
        yield Problem(
            "labeled",
            f"all labels read hold only 0 and 255, which is ignored, so no class but {info.classes[0]} would be"
            ' learned; for black-and-white masks add "values": [0, 255] to meta.json, or "values": [0, 1, ...] if 255'
            " is meant to be ignored",
        )
    elif absent and values and all_read:
        yield Problem("labeled", f"no label holds {', '.join(absent)}, which cannot be learned", is_warning=True)


def check_sources(
    sources: Sources, crop: int, *, sample: int | None = None, labeled_only: bool = False
) -> list[Problem]:
    """Find everything that would break or spoil training on an opened dataset.

    Reads every file, or those of a sample; that files exist and are not empty, and how the lists fit together, is
    checked in any case. Rendered scenes have no problems.

    Args:
        sources: the opened dataset.
        crop: side of the training crops in pixels.
        sample: number of entries per list to read; None reads all.
        labeled_only: whether training does not read the unlabeled images, which may then be labeled ones as well.

    Returns:
        problems in the order of the lists, then files that nothing uses.
    """
    opened = {"labeled": sources.labeled, "unlabeled": sources.unlabeled, "val": sources.val}
    lists = {name: source for name, source in opened.items() if isinstance(source, SegmentationDataset)}
    if not lists:
        return []
    empty = [name for name, dataset in lists.items() if not dataset.entries]
    problems = [Problem(name, "holds no image; check its split file") for name in empty]
    problems.extend(_check_overlaps(lists, labeled_only))
    sizes: list[tuple[int, int]] = []
    for name, dataset in lists.items():
        distinct = list({entry: index for index, entry in enumerate(dataset.entries)}.values())
        chosen = set(np.random.default_rng(0).permutation(distinct)[:sample].tolist())
        readings = map_in_threads(partial(_read, dataset, name != "unlabeled", chosen), distinct)
        problems.extend(problem for reading in readings for problem in reading.problems)
        turned = [reading.turned for reading in readings if reading.turned is not None]
        if turned:
            # A label drawn on the pixels as stored has the size of the turned image for half of the orientations.
            message = (
                f"EXIF turns {len(turned)} images with labels, {turned[0]} first; make sure that these labels were"
                " drawn on the images as viewers show them"
            )
            problems.append(Problem(name, message, is_warning=True))
        if name == "labeled":
            values = frozenset[int]().union(*(reading.values for reading in readings))
            problems.extend(_check_classes(sources.info, values, all_read=len(chosen) == len(distinct)))
        if name != "val":
            sizes.extend(reading.size for reading in readings if reading.size is not None)
    # The random resize usually goes up to twice the size.
    if sizes and all(2 * min(size) < crop for size in sizes):
        width, height = max(sizes)
        message = f"every crop holds padding, the largest image is {height}x{width}; a smaller crop wastes less"
        problems.append(Problem(f"crop {crop}x{crop}", message, is_warning=True))
    for root in dict.fromkeys(dataset.root for dataset in lists.values()):
        problems.extend(check_unused(root))
    return problems
