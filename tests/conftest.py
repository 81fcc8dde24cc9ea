"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def _alike() -> None:
    """Every test starts from the same seed, with one thread: more only wait for each other on small tensors."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of $ALLSPARK_DATA_DIR, which holds real images."""
    if "ALLSPARK_DATA_DIR" not in os.environ:
        pytest.skip("needs real images: set ALLSPARK_DATA_DIR")
    return Path(os.environ["ALLSPARK_DATA_DIR"])
