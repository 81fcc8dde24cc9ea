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
    if config.dataset == "scenes":
        return _open_scenes(config)
    root, info, splits = _locate(config, ("labeled", "unlabeled", "val"))
    datasets = {name: SegmentationDataset(root, entries, info=info) for name, entries in splits.items()}
    return Sources(info, datasets["labeled"], datasets["unlabeled"], datasets["val"])


def open_val(config: DataConfig) -> tuple[DatasetInfo, ImageSource]:
    """Open the validation images alone, and their classes; needs no training lists.

    Raises:
        DataError: as for ``open_sources``.
        InputError: as for ``open_sources``.
    """
    if config.dataset == "scenes":
        return SCENES, _open_scenes(config).val
    root, info, splits = _locate(config, ("val",))
    return info, SegmentationDataset(root, splits["val"], info=info)


def _open_scenes(config: DataConfig) -> Sources:
    labeled, unlabeled, val = config.scenes
    size = round(_SCENE_SCALE * config.crop)

    def scenes(start: int, count: int) -> ScenesDataset:
        return ScenesDataset(range(start, start + count), size, _SCENE_SEED)

    return Sources(SCENES, scenes(0, labeled), scenes(labeled, unlabeled), scenes(_FIRST_VAL_SCENE, val))


def _locate(config: DataConfig, names: Sequence[str]) -> tuple[Path, DatasetInfo, Mapping[str, list[Entry]]]:
    root = _root(config)
    info = DATASETS[config.dataset] if config.dataset in DATASETS else read_info(root)
    files = {name: getattr(config, name) for name in names}
    splits = {name: find_split(root, file) for name, file in files.items() if file is not None}
    if config.dataset == "folder":
        splits = _complete(root, splits)
    missing = [name for name in files if name not in splits]
    if missing:
        raise InputError(
            f"data.{missing[0]} is not set: expected a split file with one `image label` per line"
            " (`python -m allspark_fast splits` writes labeled.txt and unlabeled.txt)"
        )
    return root, info, splits


def _root(config: DataConfig) -> Path:
    if config.root is not None:
        root = config.root
    elif "ALLSPARK_DATA_DIR" in os.environ:
        folder = Path(os.environ["ALLSPARK_DATA_DIR"])
        root = folder / config.dataset if (folder / config.dataset).is_dir() else folder
    else:
        raise InputError(
            "data.root is not set: pass --data.root with the folder of the dataset, or set $ALLSPARK_DATA_DIR"
        )
    if not root.is_dir():
        raise DataError(f"data.root: there is no folder {root}")
    return root


def _complete(root: Path, splits: Mapping[str, list[Entry]]) -> dict[str, list[Entry]]:
    """Add the lists of a folder that were not given: remaining images with a label are labeled, others unlabeled."""
    taken = {entry.image for entries in splits.values() for entry in entries}
    rest = [entry for entry in scan_folder(root) if entry.image not in taken]
    labeled = [entry for entry in rest if entry.label is not None]
    unlabeled = [entry for entry in rest if entry.label is None]
    return {"labeled": labeled, "unlabeled": unlabeled, **splits}
