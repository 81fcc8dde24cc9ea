"""Splits of a list of entries into labeled, unlabeled and validation images."""

import posixpath
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from allspark_fast.data.datasets import Entry, SegmentationDataset, read_split, resolve_path, split_line
from allspark_fast.data.images import decode, mean_color
from allspark_fast.data.info import IGNORE_INDEX
from allspark_fast.errors import DataError, InputError

# Entries that compete for the next place of an order: more spread the classes better, and take longer.
_POOL = 32
# Fewer validation images, or images of a class, leave scores to chance.
_FEW_IMAGES, _FEW_OF_CLASS = 30, 5
# Beside the lists of a folder, the paths of its lists of validation images that lie elsewhere.
_NOTED = "val_lists"


class Split(NamedTuple):
    """Entries in the order of the list that was split; unlabeled ones keep their labels, for measurements."""

    labeled: list[Entry]
    unlabeled: list[Entry]
    val: list[Entry]


class Contents(NamedTuple):
    """Of an image with a label, the share of each class in its valid pixels (256,), and the mean color (3,)."""

    classes: NDArray[Any]
    color: NDArray[Any]


def parse_amount(text: str, total: int) -> int:
    """Parse how many of ``total`` entries to label: a fraction ``1/16``, a share ``0.125``, or a count ``100``.

    Fractions are rounded to the nearest count, but at least to 1.

    Raises:
        InputError: ``text`` is none of the three, zero, or more than there is.
    """
    try:
        numerator, _, denominator = text.partition("/")
        amount = float(numerator) / float(denominator or 1)
    except (ValueError, ZeroDivisionError):
        amount = 0.0
    is_count = text.strip().isdecimal()
    if not 0 < amount <= (total if is_count else 1):
        raise InputError(f"{text!r}: expected a fraction such as 1/16, a share such as 0.125 or a count up to {total}")
    return int(amount) if is_count else max(round(amount * total), 1)


def read_contents(dataset: SegmentationDataset) -> dict[Entry, Contents]:
    """Read the images and labels of all entries that have a label; raises DataError, which names the file."""

    def read(index: int) -> Contents:
        label = dataset.label(index)
        assert label is not None
        counts = np.array(label.histogram(), float)
        counts[IGNORE_INDEX] = 0
        color = decode(resolve_path(dataset.root, dataset.entries[index].image), mean_color)
        return Contents(counts / max(counts.sum(), 1), color)

    indices = {entry: index for index, entry in enumerate(dataset.entries) if entry.label is not None}
    with ThreadPoolExecutor() as pool:
        return dict(zip(indices, pool.map(read, indices.values()), strict=True))


def classes_of(entries: Collection[Entry], contents: Mapping[Entry, Contents]) -> NDArray[Any]:
    """Return in how many labels of some entries each class occurs, (256,) int64."""
    return sum((contents[entry].classes > 0 for entry in entries if entry.label is not None), np.zeros(256, np.int64))


def _features(contents: Sequence[Contents]) -> NDArray[Any]:
    """Return what the parts of a split should have alike, (N, F): its mean is 0, classes and colors count alike."""
    classes = np.array([x.classes for x in contents])
    classes = classes[:, classes.any(axis=0)]
    # Squared distances of means are then chi-square distances of the shares.
    parts = classes / np.sqrt(classes.mean(axis=0)), np.array([x.color for x in contents])
    table = np.hstack([part / np.sqrt(part.var(axis=0).sum() or 1) for part in parts])
    return table - table.mean(axis=0)


def spread(entries: Sequence[Entry], seed: int, contents: Mapping[Entry, Contents]) -> list[int]:
    """Order the entries that have a label, so that every part of the order has the classes and colors of the whole.

    A random order, which the seed determines, with two changes. A greedy cover of all classes comes first: each time
    the first entry that adds the most classes. Then each place goes to the one of the next 32 that brings the mean of
    the order so far nearest to that of the whole: by the pixel shares of the classes (chi-square distance) and by the
    mean color, each over its variance. Returns positions in ``entries``.
    """
    labeled = [position for position, entry in enumerate(entries) if entry.label is not None]
    if not labeled:
        return []
    found = [contents[entries[position]] for position in labeled]
    holds, table = np.array([x.classes > 0 for x in found]), _features(found)
    chosen, rest = list[int](), np.random.default_rng(seed % 2**64).permutation(len(labeled)).tolist()
    missing = holds.any(axis=0)
    while missing.any():
        best = int((holds[rest] & missing).sum(axis=1).argmax())
        missing &= ~holds[rest[best]]
        chosen.append(rest.pop(best))
    total = table[chosen].sum(axis=0)
    while rest:
        best = int(((total + table[rest[:_POOL]]) ** 2).sum(axis=1).argmin())
        total += table[rest[best]]
        chosen.append(rest.pop(best))
    return [labeled[index] for index in chosen]


def make_split(entries: Sequence[Entry], order: Sequence[int], val: Collection[int], count: int) -> Split:
    """Split a list: the first ``count`` positions of an order (``spread``) that are not in ``val`` are labeled.

    So, of one order, a smaller labeled part is contained in a larger one.

    Raises:
        DataError: fewer than ``count`` entries have a label.
    """
    aside = set(val)
    rest = [position for position in order if position not in aside]
    if len(rest) < count:
        raise DataError(f"{count} labeled entries were requested, but only {len(rest)} have a label")
    labeled = set(rest[:count])
    unlabeled = set(range(len(entries))) - labeled - aside
    return Split._make([entries[i] for i in sorted(part)] for part in (labeled, unlabeled, aside))


def doubts_about(
    split: Split, contents: Mapping[Entry, Contents], names: Sequence[str], *, is_fold: bool = False
) -> list[str]:
    """Say what a split cannot teach or tell; ``names`` are those of the classes. Means over folds tell more."""
    labeled, unlabeled, val = (classes_of(part, contents)[: len(names)] for part in split)
    there, enough = labeled + unlabeled + val > 0, min(_FEW_OF_CLASS, len(split.val))
    absent, rare = ([names[i] for i in np.flatnonzero(there & few).tolist()] for few in (labeled == 0, val < enough))
    few = f"{len(split.val)} validation images are too few to tell methods apart (aim at {_FEW_IMAGES});"
    doubts = {
        f"in no labeled image: {', '.join(absent)}": absent,
        f"{few} label more, or compare means over --folds 4": 0 < len(split.val) < _FEW_IMAGES and not is_fold,
        f"in fewer than {enough} validation images, so their IoU is mostly chance: {', '.join(rare)}": rare,
    }
    return [doubt for doubt, holds in doubts.items() if holds]


def write_lists(lists: Mapping[Path, Sequence[Entry]], *, overwrite: bool) -> None:
    """Write split files, and the folders for them.

    Raises:
        DataError: a split file cannot hold one of the paths; nothing is written.
        InputError: one of the files is there and is not to be overwritten; nothing is written.
    """
    texts = {file: "".join(f"{split_line(entry)}\n" for entry in entries) for file, entries in lists.items()}
    if not overwrite and (there := [file for file in texts if file.exists()]):
        raise InputError(f"{there[0]} exists: --overwrite replaces the lists, --out FOLDER writes others")
    for file, text in texts.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")


def note_val_list(root: Path, file: Path) -> None:
    """Note where a list of validation images of a folder lies, for ``read_val_lists``; raises OSError if it cannot."""
    place, home = file.resolve(), root.resolve()
    if place.parent != home / "splits":
        place = place.relative_to(home) if place.is_relative_to(home) else place  # both may be moved
        (root / "splits").mkdir(exist_ok=True)
        text = "".join(f"{line}\n" for line in dict.fromkeys([*_noted(root), str(place)]))
        (root / "splits" / _NOTED).write_text(text, encoding="utf-8")


def read_val_lists(root: Path, out: Path, *, replaced: Path | None = None) -> dict[Path, set[str]]:
    """Return the images, by file, of all other lists of validation images in a folder, noted for it, or in ``out``."""
    places = [root / "splits" / "val.txt", out / "val.txt", *(root / line for line in _noted(root))]
    files = {file.resolve(): file for file in places if file.is_file()}
    if replaced is not None:
        files.pop(replaced.resolve(), None)
    return {file: {posixpath.normpath(entry.image) for entry in read_split(file)} for file in files.values()}


def _noted(root: Path) -> list[str]:
    file = root / "splits" / _NOTED
    return file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
