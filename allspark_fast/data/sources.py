"""Opening of the dataset that a configuration names: classes, and labeled, unlabeled and validation images."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from allspark_fast.config import DataConfig
from allspark_fast.data.datasets import Entry, ImageSource, SegmentationDataset, find_split, scan_folder
from allspark_fast.data.info import DATASETS, DatasetInfo, read_info
from allspark_fast.data.scenes import SCENES, ScenesDataset
from allspark_fast.errors import DataError, InputError

# Scenes are larger than the crop, as photographs are.
_SCENE_SCALE = 1.25
_SCENE_SEED = 0
_FIRST_VAL_SCENE = 1_000_000


@dataclass(frozen=True)
class Sources:
    """An opened dataset.

    Attributes:
        info: classes and colors.
        labeled: training images with labels.
        unlabeled: training images whose labels are not used.
        val: validation images with labels.
    """

    info: DatasetInfo
    labeled: ImageSource
    unlabeled: ImageSource
    val: ImageSource


def open_sources(config: DataConfig) -> Sources:
    """Open the dataset of a configuration; reads the split files once, and no images.

    Raises:
        DataError: a folder or file is missing or malformed; the message names it.
        InputError: a setting is missing that tells where they are.
    """
    info, (labeled, unlabeled, val) = _open(config, ("labeled", "unlabeled", "val"))
    return Sources(info, labeled, unlabeled, val)


def open_val(config: DataConfig) -> tuple[DatasetInfo, ImageSource]:
    """Open the validation images alone, and their classes; needs no training lists, raises as ``open_sources``."""
    info, (val,) = _open(config, ("val",))
    return info, val


def _open(config: DataConfig, names: Sequence[str]) -> tuple[DatasetInfo, list[ImageSource]]:
    if config.dataset == "scenes":
        labeled, unlabeled, val = config.scenes
        scenes = {
            "labeled": range(labeled),
            "unlabeled": range(labeled, labeled + unlabeled),
            "val": range(_FIRST_VAL_SCENE, _FIRST_VAL_SCENE + val),
        }
        return SCENES, [ScenesDataset(scenes[name], round(_SCENE_SCALE * config.crop), _SCENE_SEED) for name in names]
    root = _root(config)
    info = DATASETS[config.dataset] if config.dataset in DATASETS else read_info(root)
    files = {name: getattr(config, name) for name in names}
    lists = {name: find_split(root, file) for name, file in files.items() if file is not None}
    if config.dataset == "folder" and len(lists) < len(files):
        lists = _rest(root, lists) | lists
    missing = [name for name in files if name not in lists]
    if missing:
        raise InputError(
            f"data.{missing[0]} is not set: expected a split file with one `image label` per line"
            " (`python -m allspark_fast splits` writes labeled.txt and unlabeled.txt)"
        )
    return info, [SegmentationDataset(root, lists[name], info=info) for name in names]


def _root(config: DataConfig) -> Path:
    root = config.root
    if root is None and "ALLSPARK_DATA_DIR" not in os.environ:
        raise InputError(
            "data.root is not set: pass --data.root with the folder of the dataset, or set $ALLSPARK_DATA_DIR"
        )
    if root is None:
        folder = Path(os.environ["ALLSPARK_DATA_DIR"])
        root = folder / config.dataset if (folder / config.dataset).is_dir() else folder
    if not root.is_dir():
        raise DataError(f"data.root: there is no folder {root}")
    return root


def _rest(root: Path, lists: Mapping[str, list[Entry]]) -> dict[str, list[Entry]]:
    """Sort the images of a folder that no list holds: those with a label are labeled, others unlabeled."""
    taken = {entry.image for entries in lists.values() for entry in entries}
    rest = [entry for entry in scan_folder(root) if entry.image not in taken]
    return {"labeled": [x for x in rest if x.label is not None], "unlabeled": [x for x in rest if x.label is None]}
