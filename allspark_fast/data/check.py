"""Check a dataset before training: files, sizes, label values, and how the lists fit together."""

import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL.ImageFile import ImageFile

from allspark_fast.data.datasets import (
    Entry,
    SegmentationDataset,
    Sources,
    is_image_path,
    require_equal_size,
    stem_of,
)
from allspark_fast.data.files import (
    IMAGE_SUFFIXES,
    list_files,
    list_images,
    map_in_threads,
    require_bytes,
    resolve_path,
)
from allspark_fast.data.images import (
    PixelRange,
    colors_of,
    decode,
    orientation_of,
    pages_of,
    stored_form,
    to_classes,
    to_rgb,
)
from allspark_fast.data.info import IGNORE_INDEX, VOC_PALETTE, Color, DatasetInfo
from allspark_fast.errors import DataError

Summary = dict[str, Any]


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
    """What the files of an entry showed: of the image as stored, and of the label."""

    problems: list[Problem] = field(default_factory=list)
    size: tuple[int, int] | None = None
    mode: str = ""
    extrema: tuple[float, float] | None = None
    pages: int = 1
    turned: bool = False
    mask: str = ""
    counts: Sequence[int] = ()
    colors: Mapping[Color, int] = field(default_factory=dict)

    def read_image(self, image: ImageFile, pixel_range: PixelRange | None) -> None:
        """Note what an opened image holds."""
        self.mode = f"{image.mode}, {stored_form(image)[1].bit_length()} bits"
        self.pages, self.turned = pages_of(image), orientation_of(image) != 1
        self.size = to_rgb(image, pixel_range).size
        if image.mode != "P":
            bands = np.array(image.getextrema(), float)  # of the whole image, or of every channel
            self.extrema = float(bands.min()), float(bands.max())

    def read_label(self, image: ImageFile, entry: Entry, info: DatasetInfo | None) -> None:
        """Note what an opened label holds, and compare its size with that of the image, if that is known."""
        self.mask = f"{image.width}x{image.height}, {image.mode}, {stored_form(image)[1].bit_length()} bits"
        label = to_classes(image, info)
        self.counts, self.colors = label.histogram(), colors_of(image, np.asarray(image))
        require_equal_size(entry, self.size or label.size, label.size)


def _read(dataset: SegmentationDataset, needs_labels: bool, chosen: Set[int], index: int) -> _Reading:
    """Read the files of a chosen entry; of others, check that they exist."""
    root, entry, reading = dataset.root, dataset.entries[index], _Reading()

    def read(file: str, note: Callable[[ImageFile], None]) -> None:
        try:
            path = resolve_path(root, file)
            if index in chosen:
                decode(path, note)
            else:
                require_bytes(path)
        except DataError as error:
            message = str(error).removeprefix(f"{root / file}: ").removeprefix(f"{file}: ")
            reading.problems.append(Problem(file, message))

    if needs_labels and entry.label is None:
        reading.problems.append(Problem(entry.image, "has no label, but its list needs labels"))
    read(entry.image, partial(reading.read_image, pixel_range=dataset.pixel_range))
    if needs_labels and entry.label is not None:
        read(entry.label, partial(reading.read_label, entry=entry, info=dataset.info))
    return reading


def _ranges(readings: Iterable[_Reading]) -> dict[str, tuple[float, float]]:
    """Return the least and the greatest value by mode."""
    ranges: dict[str, tuple[float, float]] = {}
    for reading in readings:
        if reading.extrema is not None:
            low, high = ranges.get(reading.mode, reading.extrema)
            ranges[reading.mode] = min(low, reading.extrema[0]), max(high, reading.extrema[1])
    return ranges


def _check_pixels(name: str, read: Mapping[Entry, _Reading], pixel_range: PixelRange | None) -> Iterator[Problem]:
    """Name images of a list that may be read otherwise than meant."""
    turned = [x for x, reading in read.items() if reading.turned and reading.counts and not reading.problems]
    # A label drawn on the pixels as stored has the size of the turned image for half of the orientations.
    turns = "; make sure that these labels were drawn on the images as viewers show them"
    paged = [x for x, reading in read.items() if reading.pages > 1]
    for found, before, after in (
        (turned, "EXIF turns", f"images with labels, {{}} first{turns}"),
        (paged, "only the first page is read of", "images with several, {} first"),
    ):
        if found:
            yield Problem(name, f"{before} {len(found)} {after.format(found[0].image)}", is_warning=True)
    for mode, (low, high) in _ranges(read.values()).items():
        full = 65535 if mode.startswith("I") else 255
        if pixel_range is None and 4 * high < full:
            yield Problem(
                name,
                f"images of mode {mode} hold {low:g}..{high:g} of 0..{full}, so few gray levels are left: --data.range"
                f" 0 {2 ** int(high).bit_length() - 1} (or percentiles, 1% 99%) scales them",
                is_warning=True,
            )


def _check_palettes(read: Mapping[Entry, _Reading], info: DatasetInfo) -> Iterator[Problem]:
    """Compare the palettes of labels with each other, and name colors that meta.json's has not."""
    known = None if info.palette == VOC_PALETTE else info.label_colors().keys()
    seen: dict[Color, tuple[str | None, int]] = {}
    others = [entry for entry, reading in read.items() if known is not None and not reading.colors.keys() <= known]
    for entry, reading in read.items():
        for color, index in reading.colors.items():
            first, expected = seen.setdefault(color, (entry.label, index))
            if index != expected:
                message = f"its palette gives the color {list(color)} to {index}, that of {first} to {expected}"
                yield Problem(str(entry.label), f"{message}: one of the two has its classes swapped, draw it again")
                break
    if others:
        message = f"palettes of {len(others)} labels have colors that 'palette' in meta.json lacks, {others[0].label}"
        yield Problem("meta.json", f"{message} first; their numbers count", is_warning=True)


def _summary(readings: Collection[_Reading], classes: Sequence[str]) -> Summary:
    counts = np.array([reading.counts for reading in readings if reading.counts] or [[0] * 256])
    names = [*enumerate(classes), (IGNORE_INDEX, "ignored")]
    return {
        "images": Counter(f"{x.size[0]}x{x.size[1]}, {x.mode}" for x in readings if x.size is not None),
        "masks": Counter(x.mask for x in readings if x.mask),
        "values": _ranges(readings),
        "pixels": {name: int(counts[:, index].sum()) for index, name in names},
        "holding": {name: int((counts[:, index] > 0).sum()) for index, name in names},
    }


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
    files = {name: list_files(root / name) for name in ("images", "labels")}
    suffixes = f"its suffix is none of {', '.join(IMAGE_SUFFIXES)}; convert images"
    left_out = [(name, [x for x in part if not is_image_path(x.name)], suffixes) for name, part in files.items()]
    images = {stem_of(file, root / "images") for file in files["images"] if is_image_path(file.name)}
    labels = [file for file in files["labels"] if is_image_path(file.name)]
    unmatched = [file for file in labels if stem_of(file, root / "labels") not in images]
    if images and unmatched:
        likely = {_fold(stem_of(file, root / "images")): file.relative_to(root) for file in files["images"]}
        image = _likely_image(_fold(stem_of(unmatched[0], root / "labels")), likely)
        reason = "no image has that name" if image is None else f"{image} is probably its image"
        left_out.append(("labels", unmatched, f"{reason}; give image and label the same name before the suffix"))
    return [
        Problem(
            name,
            f"{len(part)} {'file is' if len(part) == 1 else 'files are'} left out,"
            f" {part[0].relative_to(root).as_posix()!r} first: {reason}",
            is_warning=True,
        )
        for name, part, reason in left_out
        if part
    ]


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
) -> tuple[list[Problem], Summary]:
    """Find everything that would break or spoil training on an opened dataset.

    Reads every file, or those of a sample; that files exist and are not empty, and how the lists fit together, is
    checked in any case. Of rendered scenes there is nothing to say.

    Args:
        sources: the opened dataset.
        crop: side of the training crops in pixels.
        sample: number of entries per list to read; None reads all.
        labeled_only: whether training does not read the unlabeled images, which may then be labeled ones as well.

    Returns:
        problems in the order of the lists, then files that nothing uses; and what was read, for JSON: of each list,
        images and masks by size, mode and bit depth, least and greatest value by mode, and for every class its pixels
        and the number of masks that hold it; and the images that are "in no list".
    """
    opened = {"labeled": sources.labeled, "unlabeled": sources.unlabeled, "val": sources.val}
    lists = {name: source for name, source in opened.items() if isinstance(source, SegmentationDataset)}
    if not lists:
        return [], {}
    problems = [Problem(name, "holds no image; check its split file") for name, x in lists.items() if not x.entries]
    problems.extend(_check_overlaps(lists, labeled_only))
    summary, masks, sizes = Summary(), dict[Entry, _Reading](), list[tuple[int, int]]()
    for name, dataset in lists.items():
        distinct = list({entry: index for index, entry in enumerate(dataset.entries)}.values())
        chosen = set(np.random.default_rng(0).permutation(distinct)[:sample].tolist())
        readings = map_in_threads(partial(_read, dataset, name != "unlabeled", chosen), distinct)
        problems.extend(problem for reading in readings for problem in reading.problems)
        read = {dataset.entries[i]: x for i, x in zip(distinct, readings, strict=True) if i in chosen}
        problems.extend(_check_pixels(name, read, dataset.pixel_range))
        summary[name] = _summary(read.values(), sources.info.classes)
        masks |= read
        if name == "labeled":
            values = {value for reading in readings for value, count in enumerate(reading.counts) if count}
            problems.extend(_check_classes(sources.info, values, all_read=len(chosen) == len(distinct)))
        if name != "val":
            sizes.extend(reading.size for reading in readings if reading.size is not None)
    problems.extend(_check_palettes(masks, sources.info))
    # The random resize usually goes up to twice the size.
    if sizes and all(2 * min(size) < crop for size in sizes):
        width, height = max(sizes)
        message = f"every crop holds padding, the largest image is {height}x{width}; a smaller crop wastes less"
        problems.append(Problem(f"crop {crop}x{crop}", message, is_warning=True))
    problems.extend(check_unused(dataset.root))
    listed = {posixpath.normpath(entry.image) for dataset in lists.values() for entry in dataset.entries}
    there = [file.relative_to(dataset.root).as_posix() for file in list_images(dataset.root / "images")]
    summary["in no list"] = [file for file in there if file not in listed]
    return problems, summary
