"""What data a run reads: opened, recorded, found again from elsewhere, checked, and delivered as batches."""

import functools
import json
import logging
import os
import posixpath
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from allspark_fast.config import Config, DataConfig
from allspark_fast.data.check import Problem, check_sources
from allspark_fast.data.datasets import (
    LISTS,
    ImageSource,
    SegmentationDataset,
    Sources,
    find_split,
    scan_folder,
    split_file,
)
from allspark_fast.data.info import DATASETS, DatasetInfo, read_info
from allspark_fast.data.loader import EvalSample, SemiBatch, SemiLoader, evaluation_loader, require_shared_memory
from allspark_fast.data.scenes import SCENES, ScenesDataset
from allspark_fast.data.transforms import CropTransform
from allspark_fast.distributed import rank, world_size
from allspark_fast.errors import DataError, InputError
from allspark_fast.text import first_of

logger = logging.getLogger(__name__)

RECORD_FILE = "data.json"
Record = dict[str, Any]

# Scenes are larger than the crop, as photographs are.
_SCENE_SCALE = 1.25
_SCENE_SEED = 0
_FIRST_VAL_SCENE = 1_000_000
_FIRST_TEST_SCENE = 2_000_000
# Entries of each list that are read before training starts; `python -m allspark_fast check` reads all.
_CHECKED = 16
_LISTED = 20


def open_sources(config: DataConfig) -> Sources:
    """Open the dataset of a configuration; reads the split files once, and no images.

    Raises:
        DataError: a folder or file is missing or malformed; the message names it.
        InputError: a setting is missing that tells where they are.
    """
    info, lists = _open(config, *LISTS)
    return Sources(info, *lists)


def open_val(config: DataConfig, *, held_out: bool = False) -> tuple[DatasetInfo, ImageSource]:
    """Open the validation images alone, and their classes; needs no training lists, raises as ``open_sources``.

    Of rendered scenes, ``held_out`` are as many others, which no run sees.
    """
    info, (val,) = _open(config, "test" if held_out and config.dataset == "scenes" else "val")
    return info, val


def _open(config: DataConfig, *names: str) -> tuple[DatasetInfo, list[ImageSource]]:
    if config.dataset == "scenes":
        labeled, unlabeled, val = config.scenes
        scenes = {
            "labeled": range(labeled),
            "unlabeled": range(labeled, labeled + unlabeled),
            "val": range(_FIRST_VAL_SCENE, _FIRST_VAL_SCENE + val),
            "test": range(_FIRST_TEST_SCENE, _FIRST_TEST_SCENE + val),
        }
        return SCENES, [ScenesDataset(scenes[name], round(_SCENE_SCALE * config.crop), _SCENE_SEED) for name in names]
    root = data_root(config)
    info = DATASETS[config.dataset] if config.dataset in DATASETS else read_info(root)
    lists = {name: find_split(root, file) for name in names if (file := getattr(config, name)) is not None}
    if config.dataset == "folder" and len(lists) < len(names):
        # The images of the folder that no list holds: those with a label are labeled, others unlabeled.
        taken = {entry.image for entries in lists.values() for entry in entries}
        rest = [entry for entry in scan_folder(root) if entry.image not in taken]
        lists.setdefault("labeled", [entry for entry in rest if entry.label is not None])
        lists.setdefault("unlabeled", [entry for entry in rest if entry.label is None])
    if missing := [name for name in names if name not in lists]:
        raise InputError(
            f"data.{missing[0]} is not set: expected a split file with one `image label` per line"
            " (`python -m allspark_fast splits` writes labeled.txt and unlabeled.txt)"
        )
    return info, [SegmentationDataset(root, lists[name], info=info, pixel_range=config.range) for name in names]


def data_root(config: DataConfig) -> Path:
    """Return the folder of a configuration's data set; raises InputError if there is none."""
    root = config.root
    if root is None:
        if "ALLSPARK_DATA_DIR" not in os.environ:
            raise InputError(
                "data.root is not set: pass --data.root with the folder of the dataset, or set $ALLSPARK_DATA_DIR"
            )
        folder = Path(os.environ["ALLSPARK_DATA_DIR"])
        root = folder / config.dataset if (folder / config.dataset).is_dir() else folder
    if not root.is_dir():
        raise DataError(f"data.root: there is no folder {root.absolute()}: give another --data.root")
    return root


def record_data(sources: Sources) -> Record:
    """Return the working directory, and classes and lists, which decide the numbers of a run, as JSON gives them."""
    info, *lists = sources
    meaning = {name: getattr(info, name) for name in ("classes", "ignore_index", "palette")}
    meaning["values"] = info.values or list(info.class_values())
    lines = {
        name: [" ".join(posixpath.normpath(path) for path in (x.image, x.label) if path) for x in source.entries]
        for name, source in zip(LISTS, lists, strict=True)
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
        DataError: there is no root here, nor there; the message names both.
    """
    if config.dataset == "scenes" or (record := read_record(folder)) is None:
        return config
    found, start = {}, record["start"]
    if config.root is not None and not config.root.is_dir() and (start / config.root).is_dir():
        found["root"] = start / config.root
    elif config.root is not None and not config.root.is_dir():
        before = "" if config.root.is_absolute() else f", nor {start / config.root}, from where the run started"
        raise DataError(f"data.root: there is no folder {config.root.absolute()}{before}: give another --data.root")
    root = data_root(replace(config, **found))
    for name in LISTS:
        file = getattr(config, name)
        if file is not None and split_file(root, file) is None and (start / file).is_file():
            found[name] = start / file
    for name, path in found.items():
        logger.info("data.%s: taken from where the run started, %s", name, path)
    return replace(config, **found)


def differences(old: Record, new: Record) -> Iterator[str]:
    """Name the classes and lists that differ between two records."""
    for name in [name for name, now in new.items() if name != "start" and now != old.get(name)]:
        before, now = old.get(name), new[name]
        if name in LISTS:
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


def _list_problems(problems: Sequence[Problem]) -> str:
    some = first_of([*map(str, problems)], _LISTED, "\n")
    return f"{len(problems)} problems in the data; `python -m allspark_fast check` lists all:\n{some}"


class TrainingData:
    """Labeled, unlabeled and validation images of a configuration, on a device; each rank gets its part of them.

    Raises:
        DataError: a folder or file is missing or malformed, or there are too few images.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self._config, self._device, self.sources = config, device, open_sources(config.data)
        self.info = self.sources.info
        data, train = config.data, config.train
        crop = functools.partial(
            CropTransform, data.crop, augment=data.augment, mean=data.mean, std=data.std, scale_range=data.scale
        )
        self._placed: dict[str, Any] = {"pin_memory": device.type == "cuda", "rank": rank(), "world_size": world_size()}
        self._loader = SemiLoader(
            self.sources.labeled,
            self.sources.unlabeled,
            crop(photometric=True, copy_paste=train.copy_paste),
            crop(photometric=False, strong=train.strong, cutmix=train.cutmix),
            batch_size=train.batch_size,
            seed=train.seed,
            num_workers=data.workers,
            labeled_only=train.method == "supervised",
            **self._placed,
        )
        self.steps_per_epoch = self._loader.steps_per_epoch

    def check(self) -> None:
        """Read some entries of every list, check that the files of all exist, and log what looks wrong.

        Raises:
            DataError: some cannot be used; the first of these are listed.
            RunError: there is too little shared memory to validate.
        """
        crop, labeled_only = self._config.data.crop, self._loader.labeled_only
        problems, _ = check_sources(self.sources, crop, sample=_CHECKED, labeled_only=labeled_only)
        if warnings := [problem for problem in problems if problem.is_warning]:
            logger.warning("%s", _list_problems(warnings))
        if errors := [problem for problem in problems if not problem.is_warning]:
            raise DataError(_list_problems(errors))
        if workers := self._config.eval.workers:
            # Each reads two images ahead, of 12 bytes a pixel and one of the label.
            width, height = self.sources.val.image(0).size
            require_shared_memory(2 * workers * 13 * width * height)

    def batches(
        self, start_step: int, stop_step: int, asked: Callable[[], bool] = lambda: False
    ) -> Iterator[SemiBatch]:
        """Yield the batches of steps, see SemiLoader.iterate."""
        for batch in self._loader.iterate(start_step, stop_step, asked):
            yield batch.to(self._device, non_blocking=True)

    @functools.cached_property
    def first_batch(self) -> SemiBatch:
        """The crops of the first step, with the labels that training does not see."""
        loader = replace(self._loader, num_workers=0, labeled_only=False, hidden_labels=True)
        return next(loader.iterate(0, 1)).to(self._device)

    def validation(self, asked: Callable[[], bool] = lambda: False) -> Iterator[EvalSample]:
        """Yield the validation images, see evaluation_loader."""
        data, workers = self._config.data, self._config.eval.workers
        options = {"mean": data.mean, "std": data.std, "num_workers": workers, "asked": asked, **self._placed}
        return evaluation_loader(self.sources.val, **options)
