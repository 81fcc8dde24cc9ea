import os
from pathlib import Path

import pytest

from allspark_fast.config import DataConfig
from allspark_fast.data.check import check_sources
from allspark_fast.data.datasets import SegmentationDataset, read_split, scan_folder
from allspark_fast.data.info import DATASETS, read_info
from allspark_fast.data.sources import open_sources
from allspark_fast.data.splits import classes_of, make_split, read_contents, spread


def test_real_images():
    root = Path(os.environ.get("ALLSPARK_DATA_DIR", "nowhere"), "camvid")
    if not root.is_dir():
        pytest.skip("needs camvid/ in $ALLSPARK_DATA_DIR")
    assert read_info(root) == DATASETS["camvid"]
    splits = {name: read_split(root / f"splits/{name}.txt") for name in ("train", "val", "test")}
    assert {name: len(entries) for name, entries in splits.items()} == {"train": 367, "val": 101, "test": 233}
    assert {entry for entries in splits.values() for entry in entries} == set(scan_folder(root))
    lists = {name: f"splits/1_8/seed0/{name}.txt" for name in ("labeled", "unlabeled")}
    sources = open_sources(DataConfig(dataset="camvid", root=root, **lists, val="splits/val.txt"))
    assert check_sources(sources, 320, sample=25)[0] == []
    train = splits["train"][::4]
    contents = read_contents(SegmentationDataset(root, train))
    split = make_split(train, spread(train, 0, contents), (), 11)
    assert (classes_of(split.labeled, contents)[:11] > 0).all()
