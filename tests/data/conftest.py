from pathlib import Path

import pytest


@pytest.fixture
def camvid(data_dir: Path) -> Path:
    """The CamVid images, where the machine has them."""
    if not (data_dir / "camvid").is_dir():
        pytest.skip(f"no camvid/ in {data_dir}")
    return data_dir / "camvid"
