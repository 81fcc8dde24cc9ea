"""What data a run trains on: recorded in its folder, found again from elsewhere, compared when the run goes on."""

import json
import logging
import os
import posixpath
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from allspark_fast.config import DataConfig
from allspark_fast.data.datasets import SegmentationDataset, Sources, split_file
from allspark_fast.data.sources import data_root
from allspark_fast.errors import DataError, InputError
from allspark_fast.files import write_atomically

logger = logging.getLogger(__name__)

_LISTS = ("labeled", "unlabeled", "val")
# Of each setting of a path that was found, the absolute path; and all of the data but pixels that decides the numbers.
_PATHS, _CONTENTS = "paths", "contents"
Record = dict[str, dict[str, Any]]


def record_data(config: DataConfig, sources: Sources) -> Record:
    """Return what is recorded of the data of a run, as JSON would give it back."""
    info = sources.info
    paths: dict[str, Path | None] = {}
    if isinstance(sources.val, SegmentationDataset):
        root = paths["root"] = sources.val.root
        paths |= {name: split_file(root, file) for name in _LISTS if (file := getattr(config, name)) is not None}
    lists = {
        f"data.{name}": [_line(entry.image, entry.label) for entry in getattr(sources, name).entries] for name in _LISTS
    }
    contents = {name: getattr(info, name) for name in ("classes", "values", "ignore_index", "palette")} | lists
    record = {
        _PATHS: {name: os.path.abspath(path) for name, path in paths.items() if path is not None},
        _CONTENTS: contents,
    }
    return json.loads(json.dumps(record))


def _line(image: str, label: str | None) -> str:
    return " ".join(posixpath.normpath(path) for path in (image, label) if path is not None)


def write_record(folder: Path, record: Record) -> None:
    """Write it into the folder of the run."""
    write_atomically(folder / "data.json", lambda temporary: temporary.write_text(json.dumps(record), encoding="utf-8"))


def read_record(folder: Path) -> Record | None:
    """Read what ``write_record`` wrote; None if there is nothing, as in runs of earlier versions.

    Raises:
        InputError: the file is damaged.
    """
    path = folder / "data.json"
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(record[part], dict) for part in (_PATHS, _CONTENTS)):
            raise ValueError(f"expected objects {_PATHS!r} and {_CONTENTS!r}")
        return record
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no record of a run's data ({error}); put it back or remove it") from error


def find_data(config: DataConfig, folder: Path) -> DataConfig:
    """Return the settings of a run, with relative paths that lead nowhere from here replaced by where they led to.

    Raises:
        DataError: the root is not there either; the message names both places.
        InputError: see ``read_record``.
    """
    record = read_record(folder)
    if config.dataset == "scenes" or record is None:
        return config
    before = {name: Path(path) for name, path in record[_PATHS].items()}
    found: dict[str, Any] = {}
    try:
        root = data_root(config)
    except InputError as error:
        if "root" not in before or (config.root is not None and config.root.is_absolute()):
            raise
        root = found["root"] = before["root"]
        if not root.is_dir():
            raise DataError(
                f"{error}, nor is there {root}, where the run found it; give another --data.root"
            ) from error
    for name in _LISTS:
        file = getattr(config, name)
        is_lost = file is not None and not file.is_absolute() and split_file(root, file) is None
        if is_lost and name in before and before[name].is_file():
            found[name] = before[name]
    for name, path in found.items():
        logger.info("data.%s: taken from where the run found it, %s", name, path)
    return replace(config, **found)


def differences(old: Record, new: Record) -> Iterator[str]:
    """Name what decides the numbers and differs between two records."""
    for name, now in new[_CONTENTS].items():
        before = old[_CONTENTS].get(name)
        if before == now:
            continue
        if name.startswith("data."):
            yield f"the list {name} has {_list_difference(before, now)}"
        elif isinstance(before, list) and isinstance(now, list):
            pairs = enumerate(zip_longest(before, now))
            yield next(f"{name}[{index}]: {a} -> {b}" for index, (a, b) in pairs if a != b)
        else:
            yield f"{name}: {before} -> {now}"


def _list_difference(before: Any, now: Any) -> str:
    counts = [Counter(map(str, lines or ())) for lines in (before, now)]
    removed, added = counts[0] - counts[1], counts[1] - counts[0]
    if not (added or removed):
        return "its entries in another order"
    return f"other entries: {added.total()} added, {removed.total()} removed, first {next(iter(added + removed))}"
