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
from allspark_fast.data.datasets import Sources, split_file
from allspark_fast.data.sources import data_root
from allspark_fast.errors import DataError, InputError

logger = logging.getLogger(__name__)

RECORD_FILE = "data.json"
_LISTS = ("labeled", "unlabeled", "val")
# The working directory in which the run started; and classes and lists by name, which decide its numbers.
Record = dict[str, Any]


def record_data(sources: Sources) -> Record:
    """Return what is recorded of the data of a run, as JSON would give it back."""
    info, *lists = sources
    meaning = {name: getattr(info, name) for name in ("classes", "ignore_index", "palette")}
    meaning["values"] = info.values or list(info.class_values())
    lines = {
        name: [" ".join(posixpath.normpath(path) for path in (x.image, x.label) if path) for x in source.entries]
        for name, source in zip(_LISTS, lists, strict=True)
    }
    return json.loads(json.dumps({"start": os.getcwd(), **meaning, **lines}))


def read_record(folder: Path) -> Record | None:
    """Return what lies in the folder of a run: nothing, if an earlier version began it; InputError if it is damaged."""
    path = folder / RECORD_FILE
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {**record, "start": Path(record["start"])}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no record of a run's data ({error!r}); put it back or remove it") from error


def find_data(config: DataConfig, folder: Path) -> DataConfig:
    """Return the settings of a run, with relative paths that lead nowhere from here taken from where it started.

    Raises:
        DataError: there is no root there either; the message names both.
    """
    if config.dataset == "scenes" or (record := read_record(folder)) is None:
        return config
    found, root = {}, config.root
    if root is not None and not (root.is_absolute() or root.is_dir()):
        found["root"] = record["start"] / root
        if not found["root"].is_dir():
            raise DataError(
                f"data.root: there is no folder {root.absolute()}, nor, where the run started, {found['root']}: give "
                "another --data.root"
            )
    root = data_root(replace(config, **found))
    for name in _LISTS:
        file = getattr(config, name)
        if file is not None and split_file(root, file) is None and (record["start"] / file).is_file():
            found[name] = record["start"] / file
    for name, path in found.items():
        logger.info("data.%s: taken from where the run started, %s", name, path)
    return replace(config, **found)


def differences(old: Record, new: Record) -> Iterator[str]:
    """Name the classes and lists that differ between two records."""
    for name, now in new.items():
        before = old.get(name)
        if name == "start" or before == now:
            continue
        if name in _LISTS:
            counts: list[Counter[str]] = [Counter(before), Counter(now)]
            removed, added = counts[0] - counts[1], counts[1] - counts[0]
            count = f"{added.total()} added, {removed.total()} removed"
            first = next(iter(added + removed), "none: their order differs")
            yield f"the list data.{name} has other entries: {count}, first {first}"
        elif isinstance(before, list) and isinstance(now, list):
            pairs = enumerate(zip_longest(before, now))
            yield next(f"{name}[{index}]: {a} -> {b}" for index, (a, b) in pairs if a != b)
        else:
            yield f"{name}: {before} -> {now}"
