"""Check a dataset before training: files, sizes, label values, and how the lists fit together."""

import hashlib
import itertools
import os
import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL.ImageFile import ImageFile

from allspark_fast.data import datasets, images
from allspark_fast.data.datasets import Entry, SegmentationDataset, Sources
from allspark_fast.data.info import IGNORE_INDEX, VOC_PALETTE, Color, DatasetInfo
from allspark_fast.errors import DataError
from allspark_fast.text import one_line

Summary = dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """Something wrong with a file or list: what was expected, and how to fix it; a warning leaves training possible."""

    file: str
    message: str
    is_warning: bool = False

    def __str__(self) -> str:
        return f"{'warning' if self.is_warning else 'error'}: {self.file}: {self.message}"


def _warning(file: str, message: str) -> Problem:
    return Problem(file, message, is_warning=True)


@dataclass
class _Reading:
    """What the files of an entry showed: of the image as stored, and of the label."""

    problems: list[Problem] = field(default_factory=list)
    size: tuple[int, int] | None = None
    mode: str = ""
    values: Sequence[float] = ()
    pages: int = 1
    turned: bool = False
    mask: str = ""
    counts: Sequence[int] = ()
    colors: Mapping[Color, int] = field(default_factory=dict)


def _mode(image: ImageFile) -> str:
    return f"{image.mode}, {images.stored_form(image)[1].bit_length()} bits"


def _read(dataset: SegmentationDataset, needs_labels: bool, chosen: Set[int], index: int) -> _Reading:
    """Read the files of a chosen entry; of others, check that they exist."""
    root, entry, reading = dataset.root, dataset.entries[index], _Reading()

    def read_image(image: ImageFile) -> None:
        reading.mode, reading.pages = _mode(image), images.pages_of(image)
        reading.turned = images.orientation_of(image) != 1
        reading.size = images.to_rgb(image, dataset.pixel_range).size
        if image.mode.startswith("I;"):  # for which Pillow has no getextrema if they are big-endian
            reading.values = [float(np.asarray(image).min()), float(np.asarray(image).max())]
        elif image.mode != "P":
            reading.values = np.array(image.getextrema(), float).ravel().tolist()  # of every channel

    def read_label(image: ImageFile) -> None:
        reading.mask = f"{image.width}x{image.height}, {_mode(image)}"
        label = images.to_classes(image, dataset.info)
        reading.counts, reading.colors = label.histogram(), images.colors_of(image, np.asarray(image))
        datasets.require_equal_size(entry, reading.size or label.size, label.size)

    if needs_labels and entry.label is None:
        reading.problems.append(Problem(entry.image, "has no label, but its list needs labels"))
    labels = [(entry.label, read_label)] if needs_labels and entry.label is not None else []
    for file, note in [(entry.image, read_image), *labels]:
        try:
            path = datasets.resolve_path(root, file)
            images.decode(path, note) if index in chosen else images.require_bytes(path)
        except DataError as error:
            message = str(error).removeprefix(f"{root / file}: ").removeprefix(f"{file}: ")
            reading.problems.append(Problem(file, message))
    return reading


def _summary(readings: Collection[_Reading], classes: Sequence[str]) -> Summary:
    counts = np.array([reading.counts for reading in readings if reading.counts] or [[0] * 256])
    names = [*enumerate(classes), (IGNORE_INDEX, "ignored")]
    values: dict[str, list[float]] = {}
    for reading in readings:
        values.setdefault(reading.mode, []).extend(reading.values)
    return {
        "images": Counter(f"{x.size[0]}x{x.size[1]}, {x.mode}" for x in readings if x.size is not None),
        "masks": Counter(x.mask for x in readings if x.mask),
        "values": {mode: (min(found), max(found)) for mode, found in values.items() if found},
        "pixels": {name: int(counts[:, index].sum()) for index, name in names},
        "holding": {name: int((counts[:, index] > 0).sum()) for index, name in names},
    }


def _check_images(name: str, read: Mapping[Entry, _Reading], ranges: Mapping[str, Any]) -> Iterator[Problem]:
    """Name images of a list of which something is read otherwise than it may be meant."""
    # A label drawn on the pixels as stored has the size of the turned image for half of the orientations.
    if turned := [x.image for x, reading in read.items() if reading.turned and reading.counts and not reading.problems]:
        drawn = "make sure that these labels were drawn on the images as viewers show them"
        yield _warning(name, f"EXIF turns {len(turned)} images with labels, {turned[0]} first; {drawn}")
    if paged := [x.image for x, reading in read.items() if reading.pages > 1]:
        yield _warning(name, f"{len(paged)} images have several pages, {paged[0]} first; only the first page is read")
    for mode, (low, high) in ranges.items():
        full = 65535 if mode.startswith("I") else 255
        if 4 * high < full:
            levels = f"images of mode {mode} hold {low:g}..{high:g} of 0..{full}, so few gray levels are left"
            advice = f": --data.range 0 {2 ** int(high).bit_length() - 1} (or percentiles, 1% 99%) scales them"
            yield _warning(name, levels + advice * (high > 0))
    empty = [x.label for x, reading in read.items() if reading.counts and not any(reading.counts[:IGNORE_INDEX])]
    if empty and name == "val":
        yield _warning(name, f"{len(empty)} labels hold ignored pixels only, {empty[0]} first; they score nothing")


def _check_palettes(read: Mapping[Entry, _Reading], info: DatasetInfo) -> Iterator[Problem]:
    """Compare the palettes of labels with each other, and name colors that meta.json's has not."""
    uses: dict[Color, dict[int, list[str]]] = {}
    for entry, reading in read.items():
        for color, index in reading.colors.items():
            meant = min(index, 1) if info.values == "nonzero" else index
            uses.setdefault(color, {}).setdefault(meant, []).append(str(entry.label))
    swapped: dict[str, str] = {}
    for color, labels in uses.items():
        usual = max(labels, key=lambda index: len(labels[index]))
        for index in labels.keys() - {usual}:
            message = f"its palette gives the color {list(color)} to {index}, that of {labels[usual][0]} to {usual}"
            swapped |= dict.fromkeys(labels[index], f"{message}: one of the two has its classes swapped, draw it again")
    yield from map(Problem, swapped, swapped.values())
    known = info.label_colors().keys()
    unknown = [entry.label for entry, reading in read.items() if not reading.colors.keys() <= known]
    if unknown and info.palette != VOC_PALETTE:
        message = f"palettes of {len(unknown)} labels have colors that 'palette' in meta.json lacks, {unknown[0]} first"
        yield _warning("meta.json", f"{message}; their numbers count")


def _check_lists(lists: Mapping[str, SegmentationDataset], labeled_only: bool) -> Iterator[Problem]:
    """Name images that are listed more than once, under whatever name, and labels of several images."""
    root = next(iter(lists.values())).root
    listed = {name: Counter(_target(root, entry.image) for entry in x.entries) for name, x in lists.items()}
    for name, counts in listed.items():
        if repeats := counts - Counter(set(counts)):
            yield _warning(name, f"{repeats.total()} lines repeat an image, {next(iter(repeats))} first; each counts")
    labeled, unlabeled, val = map(set, listed.values())
    for file in sorted(labeled & unlabeled if not labeled_only else ()):
        yield Problem(file, "is in both lists: remove it from one of them")
    trained, flatters = labeled | unlabeled, "which makes the score too good"
    for file in sorted(val & trained):
        yield _warning(file, f"is trained on and also in val, {flatters}")
    for file, other in _copies(root, val - trained, trained):
        yield _warning(file, f"is in val, and its copy {other} is trained on, {flatters}")
    pairs = {entry for x in lists.values() for entry in x.entries if entry.label is not None}
    for label, count in Counter(_target(root, str(entry.label)) for entry in pairs).items():
        if count > 1:
            yield _warning(label, f"is the label of {count} images; correct the lists")


def _target(root: Path, file: str) -> str:
    """The path below the root that a file has, or that it links to."""
    path = root / file
    return os.path.relpath(path.resolve(), root.resolve()) if path.is_symlink() else posixpath.normpath(file)


def _copies(root: Path, some: Set[str], others: Set[str]) -> Iterator[tuple[str, str]]:
    """Yield the files that hold the same bytes as one of others, and that; only files of equal size are read."""
    inside = [file for file in some | others if not file.startswith(("..", "/")) and (root / file).is_file()]
    sizes = {file: (root / file).stat().st_size for file in inside}
    equal = {sizes[x] for x in some & sizes.keys()} & {sizes[x] for x in others & sizes.keys()} - {0}
    digests = {x: hashlib.sha256((root / x).read_bytes()).digest() for x, size in sizes.items() if size in equal}
    known = {digest: file for file, digest in digests.items() if file in others}
    return ((file, known[digests[file]]) for file in sorted(some & digests.keys()) if digests[file] in known)


def check_unused(root: Path, entries: Iterable[Entry]) -> tuple[list[Problem], list[str]]:
    """Name what lies in images/ and labels/ of a folder, if there are such, and is in no entry.

    Returns:
        problems with the probable reason, and the images that could be used.
    """
    there = {name: datasets.list_files(root / name) for name in ("images", "labels")}
    used = {root / posixpath.normpath(file) for entry in entries for file in (entry.image, entry.label) if file}
    stems = {datasets.stem_of(x, root / "images") for x in there["images"] if datasets.is_image(x) and x.is_file()}
    usable, left_out = list[str](), dict[tuple[str, str], list[Path]]()
    for name, file in ((name, file) for name, found in there.items() for file in found):
        if not file.is_file():
            why = "a broken link, or no file"
        elif not datasets.is_image(file):
            why = f"its suffix is none of {', '.join(datasets.IMAGE_SUFFIXES)}; convert images"
        elif name == "labels" and stems and file not in used and datasets.stem_of(file, root / name) not in stems:
            why = "give image and label the same name before the suffix"
        else:
            usable += [file.relative_to(root).as_posix()] * (name == "images" and file not in used)
            continue
        left_out.setdefault((name, why), []).append(file)
    problems = []
    for (name, why), part in left_out.items():
        count = f"{len(part)} {'file is' if len(part) == 1 else 'files are'} left out"
        likely = f"{_likely_image(part[0], root, there['images'])}; " if why.startswith("give") else ""
        problems.append(_warning(name, f"{count}, {part[0].relative_to(root).as_posix()!r} first: {likely}{why}"))
    return problems, usable


def _likely_image(label: Path, root: Path, images: Sequence[Path]) -> str:
    """Name the image whose name differs in case or accents alone, or is a part of the label's: a of a_mask, a.jpg."""

    def folded(path: Path) -> str:
        return unicodedata.normalize("NFC", path.stem).casefold()

    likely = [x for x in images if re.search(rf"(?<![^\W_]){re.escape(folded(x))}(?![^\W_])", folded(label))]
    if not likely:
        return "no image has that name"
    return f"{max(likely, key=lambda x: len(x.stem)).relative_to(root).as_posix()} is probably its image"


def _check_classes(read: Mapping[Entry, _Reading], info: DatasetInfo, *, all_read: bool) -> Iterator[Problem]:
    """Compare the classes with those in the labels of the labeled list that were read."""
    held = {x.label: {value for value, count in enumerate(found.counts) if count} for x, found in read.items()}
    values, ignored = set().union(*held.values()), "hold only 0 and 255, which is ignored"
    masks = [label for label, found in held.items() if IGNORE_INDEX in found and found <= {0, IGNORE_INDEX}]
    if masks and info.values is None and len(info.classes) > 1:
        if values <= {0, IGNORE_INDEX}:
            message = f"all labels read {ignored}, so no class but {info.classes[0]} would be learned; for"
            add = 'black-and-white masks add "values": [0, 255] to meta.json, or "values": [0, 1, ...] if 255 is meant'
            yield Problem("labeled", f"{message} {add} to be ignored")
            return
        advice = "if they are black-and-white masks, save them with the numbers of the others"
        yield _warning("labeled", f"{len(masks)} labels {ignored}, {masks[0]} first; {advice}")
    absent = [one_line(name) for index, name in enumerate(info.classes) if index not in values]
    if absent and values and all_read:
        yield _warning("labeled", f"no label holds {', '.join(absent)}, which cannot be learned")


def check_sources(
    sources: Sources, crop: int, *, sample: int | None = None, labeled_only: bool = False
) -> tuple[list[Problem], Summary]:
    """Find everything that would break or spoil training on an opened dataset; of scenes there is nothing to say.

    Args:
        sources: the opened dataset.
        crop: side of the training crops in pixels.
        sample: number of entries per list to read, None for all; files and lists are checked in any case.
        labeled_only: whether training does not read the unlabeled images, which may then be labeled ones as well.

    Returns:
        problems; and what was read, for JSON: of each list, images and masks by size, mode and bit depth, least and
        greatest value by mode, for every class its pixels and the number of masks that hold it; "in no list", images.
    """
    opened = zip(datasets.LISTS, sources[1:], strict=True)
    lists = {name: source for name, source in opened if isinstance(source, SegmentationDataset)}
    if not lists:
        return [], {}
    problems = [Problem(name, "holds no image; check its split file") for name, x in lists.items() if not x.entries]
    problems += _check_lists(lists, labeled_only)
    summary, masks, sizes = Summary(), dict[Entry, _Reading](), list[tuple[int, int]]()
    for name, dataset in lists.items():
        distinct = list({entry: index for index, entry in enumerate(dataset.entries)}.values())
        chosen = set(np.random.default_rng(0).permutation(distinct)[:sample].tolist())
        with ThreadPoolExecutor() as pool:
            readings = list(pool.map(partial(_read, dataset, name != "unlabeled", chosen), distinct))
        problems += itertools.chain(*(reading.problems for reading in readings))
        read = {dataset.entries[i]: x for i, x in zip(distinct, readings, strict=True) if i in chosen}
        summary[name] = _summary(read.values(), sources.info.classes)
        problems += _check_images(name, read, summary[name]["values"] if dataset.pixel_range is None else {})
        masks |= read
        if name == "labeled":
            problems += _check_classes(read, sources.info, all_read=len(chosen) == len(distinct))
        if name != "val":
            sizes += [reading.size for reading in readings if reading.size is not None]
    problems += _check_palettes(masks, sources.info)
    # The random resize usually goes up to twice the size.
    if sizes and all(2 * min(size) < crop for size in sizes):
        width, height = max(sizes)
        message = f"every crop holds padding, the largest image is {height}x{width}; a smaller crop wastes less"
        problems.append(_warning(f"crop {crop}x{crop}", message))
    entries = itertools.chain(*(x.entries for x in lists.values()))
    unused, summary["in no list"] = check_unused(dataset.root, entries)
    return problems + unused, summary
