"""Check a dataset before training: files, sizes, label values, and how the lists fit together."""

import posixpath
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from allspark_fast.data.datasets import SegmentationDataset, Sources, require_equal_size
from allspark_fast.data.images import (
    IMAGE_SUFFIXES,
    list_files,
    list_images,
    map_in_threads,
    read_orientation,
    require_bytes,
    resolve_path,
    values_of,
)
from allspark_fast.data.info import IGNORE_INDEX, DatasetInfo
from allspark_fast.errors import DataError


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


@dataclass
class _Reading:
    """What the files of an entry showed; ``turned`` is its image, if EXIF turns it and it has a label."""

    problems: list[Problem] = field(default_factory=list)
    size: tuple[int, int] | None = None
    values: Set[int] = frozenset()
    turned: str | None = None


@contextmanager
def _noted(problems: list[Problem], root: Path, file: str) -> Iterator[None]:
    """Add a problem if the file cannot be used."""
    try:
        yield
    except DataError as error:
        message = str(error).removeprefix(f"{root / file}: ").removeprefix(f"{file}: ")
        problems.append(Problem(file, message))


def _read(dataset: SegmentationDataset, needs_labels: bool, chosen: Set[int], index: int) -> _Reading:
    """Read the files of a chosen entry; of others, check that they exist."""
    root, entry, reading = dataset.root, dataset.entries[index], _Reading()
    if needs_labels and entry.label is None:
        reading.problems.append(Problem(entry.image, "has no label, but its list needs labels"))
    with _noted(reading.problems, root, entry.image):
        if index in chosen:
            reading.size = dataset.image(index).size
        else:
            require_bytes(resolve_path(root, entry.image))
    if not needs_labels or entry.label is None:
        return reading
    with _noted(reading.problems, root, entry.label):
        if index not in chosen:
            require_bytes(resolve_path(root, entry.label))
            return reading
        label = dataset.label(index)
        assert label is not None
        reading.values = frozenset(values_of(label))
        if reading.size is not None:
            require_equal_size(entry, reading.size, label.size)
            if read_orientation(resolve_path(root, entry.image)) != 1:
                reading.turned = entry.image
    return reading


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
    problems = []
    for folder in ("images", "labels"):
        files = [x.relative_to(root) for x in list_files(root / folder) if x.suffix.lower() not in IMAGE_SUFFIXES]
        if files:
            message = f"{_files_left_out(files)}: its suffix is none of {', '.join(IMAGE_SUFFIXES)}; convert images"
            problems.append(Problem(folder, message, is_warning=True))
    images = {_stem(file, root / "images") for file in list_images(root / "images")}
    labels = [file for file in list_images(root / "labels") if _stem(file, root / "labels") not in images]
    if images and labels:
        unmatched = [file.relative_to(root) for file in labels]
        folded = {_fold(_stem(x, root / "images")): x.relative_to(root) for x in list_files(root / "images")}
        likely = _likely_image(_fold(_stem(labels[0], root / "labels")), folded)
        reason = "no image has that name" if likely is None else f"{likely} is probably its image"
        message = f"{_files_left_out(unmatched)}: {reason}; give image and label the same name before the suffix"
        problems.append(Problem("labels", message, is_warning=True))
    return problems


def _files_left_out(files: Sequence[Path]) -> str:
    return f"{len(files)} {'file is' if len(files) == 1 else 'files are'} left out, {files[0].as_posix()!r} first"


def _stem(file: Path, folder: Path) -> str:
    return file.relative_to(folder).with_suffix("").as_posix()


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
