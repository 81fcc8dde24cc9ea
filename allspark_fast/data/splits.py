"""Splits of a list of entries into a labeled and an unlabeled part."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from allspark_fast.data.datasets import Entry, SegmentationDataset, split_line
from allspark_fast.data.images import map_in_threads
from allspark_fast.data.info import IGNORE_INDEX
from allspark_fast.data.labels import values_of
from allspark_fast.data.seeding import mix_seed
from allspark_fast.errors import DataError, InputError

Classes = Mapping[Entry, Collection[int]]


class Split(NamedTuple):
    """A labeled and an unlabeled part.

    Attributes:
        labeled: entries to train on with their labels, in the order of the list that was split.
        unlabeled: all others, in the same order; they keep their label paths for measurements.
        uncovered: classes that occur in the list but in no labeled entry.
    """

    labeled: list[Entry]
    unlabeled: list[Entry]
    uncovered: list[int]


def parse_amount(text: str, total: int) -> int:
    """Parse how many entries to label: a fraction like ``1/16``, a share like ``0.125``, or a count like ``100``.

    Args:
        text: what the user wrote.
        total: number of entries that could be labeled.

    Returns:
        count in 1..total; fractions are rounded to the nearest, but at least to 1.

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


def read_classes(dataset: SegmentationDataset) -> Classes:
    """Read the classes present in the label of every entry that has one."""

    def present(index: int) -> frozenset[int]:
        label = dataset.label(index)
        assert label is not None
        return frozenset(values_of(label)) - {IGNORE_INDEX}

    indices = {entry: index for index, entry in enumerate(dataset.entries) if entry.label is not None}
    return dict(zip(indices, map_in_threads(present, indices.values()), strict=True))


def _cover_first(order: Sequence[int], present: Sequence[Collection[int]]) -> list[int]:
    """Move a greedy cover to the front of ``order``: each time the first entry that adds the most classes."""
    rest, cover = list(order), []
    missing = {label for position in order for label in present[position]}
    while missing:
        best = max(rest, key=lambda position: len(missing.intersection(present[position])))
        rest.remove(best)
        cover.append(best)
        missing.difference_update(present[best])
    return cover + rest


def make_split(entries: Sequence[Entry], count: int, seed: int, classes: Classes) -> Split:
    """Choose the labeled part: seeded, nested, and with every class if ``count`` allows.

    The seed determines one order of the list, with a greedy cover of all classes first; the labeled part is its
    beginning. So with one seed, a smaller labeled part is contained in a larger one.

    Args:
        entries: list to split; entries without a label can only be unlabeled.
        count: number of labeled entries, at least 1.
        seed: seed of the choice.
        classes: those present in the label of each entry.

    Raises:
        DataError: fewer than ``count`` entries have a label.
    """
    candidates = [position for position, entry in enumerate(entries) if entry.label is not None]
    if len(candidates) < count:
        raise DataError(f"{count} labeled entries were requested, but only {len(candidates)} have a label")
    present = [classes.get(entry, ()) for entry in entries]
    order = np.random.default_rng(mix_seed(seed)).permutation(candidates).tolist()
    chosen = set(_cover_first(order, present)[:count])
    return Split(
        [entry for position, entry in enumerate(entries) if position in chosen],
        [entry for position, entry in enumerate(entries) if position not in chosen],
        sorted({x for position in candidates for x in present[position]} - {x for i in chosen for x in present[i]}),
    )


def write_split(folder: str | Path, split: Split, val: Sequence[Entry] = ()) -> None:
    """Write the split files ``labeled.txt``, ``unlabeled.txt`` and, unless it is empty, ``val.txt`` into a folder.

    Creates the folder if it does not exist.

    Raises:
        DataError: a split file cannot hold one of the paths; nothing is written.
    """
    folder = Path(folder)
    lists = {"labeled": split.labeled, "unlabeled": split.unlabeled, **({"val": val} if val else {})}
    texts = {name: "".join(f"{split_line(entry)}\n" for entry in entries) for name, entries in lists.items()}
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
