"""Same seed, same bits on a CPU, however many processes load the images; other seeds, other bits."""

import os
from pathlib import Path

import pytest
import torch

from allspark_fast.training.trainer import Trainer
from tests.helpers.runs import changed, different_states, tiny_config

pytestmark = pytest.mark.usefixtures("no_pictures")


def run(folder: Path, workers: int = 0, **options: object) -> Path:
    config = tiny_config(epochs=1, warmup_epochs=0, **options)
    Trainer(changed(config, data={"workers": workers}, eval={"workers": workers}), folder).run()
    return folder


@pytest.mark.slow
def test_workers_change_no_bit_and_seeds_do(tmp_path: Path) -> None:
    """One worker is in tests/training/test_trainer.py."""
    alone = run(tmp_path / "alone")
    assert different_states(alone, run(tmp_path / "two", workers=2)) == []
    assert any("'model'" in name for name in different_states(alone, run(tmp_path / "seeded", seed=1)))


def test_deterministic_operations_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is put back
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    try:
        folders = [run(tmp_path / name, deterministic=True) for name in "ab"]
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
    assert different_states(*folders) == []
