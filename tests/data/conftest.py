from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from allspark_fast.data.datasets import Entry


@pytest.fixture
def camvid(data_dir: Path) -> Path:
    """The CamVid images, where the machine has them."""
    if not (data_dir / "camvid").is_dir():
        pytest.skip(f"no camvid/ in {data_dir}")
    return data_dir / "camvid"


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., list[Entry]]:
    """Writes images/NN.png and labels/NN.png below tmp_path; labels hold the classes 0..classes-1."""

    def make(count: int, size: tuple[int, int] = (40, 50), classes: int = 3) -> list[Entry]:
        rng = np.random.default_rng(0)
        entries = []
        for folder in ("images", "labels"):
            (tmp_path / folder).mkdir(exist_ok=True)
        for index in range(count):
            entry = Entry(f"images/{index:02d}.png", f"labels/{index:02d}.png")
            Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(tmp_path / entry.image)
            Image.fromarray(rng.integers(0, classes, size, np.uint8)).save(tmp_path / entry.label)
            entries.append(entry)
        return entries

    return make
