"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of $ALLSPARK_DATA_DIR, which holds real images."""
    if "ALLSPARK_DATA_DIR" not in os.environ:
        pytest.skip("needs real images: set ALLSPARK_DATA_DIR")
    return Path(os.environ["ALLSPARK_DATA_DIR"])
