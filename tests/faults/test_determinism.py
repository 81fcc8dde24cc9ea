"""Same seed, same bits on a CPU, however many processes load the images; other seeds, other bits."""

import os
from pathlib import Path

import pytest
import torch

from allspark_fast.config import Config, DataConfig, EvalConfig, ModelConfig, RunConfig, TrainConfig
from allspark_fast.training.checkpoint import load_latest_checkpoint
from allspark_fast.training.trainer import Trainer


def final_weights(folder: Path, workers: int, seed: int = 0, deterministic: bool = False) -> dict[str, torch.Tensor]:
    config = Config(
        data=DataConfig(crop=64, scenes=(3, 8, 2), workers=workers),
        model=ModelConfig(backbone="mit_tiny", embedding_dim=16),
        train=TrainConfig(epochs=1, batch_size=2, lr=0.01, warmup_epochs=0, seed=seed, deterministic=deterministic),
        eval=EvalConfig(workers=workers),
        run=RunConfig(device="cpu"),
    )
    trainer = Trainer(config, folder)
    trainer.run()
    return load_latest_checkpoint(folder / "checkpoints")["model"]


@pytest.mark.slow
def test_workers_change_no_bit_and_seeds_do(tmp_path: Path) -> None:
    alone = final_weights(tmp_path / "a", workers=0)
    for name, workers in (("b", 1), ("c", 2)):
        others = final_weights(tmp_path / name, workers)
        assert alone.keys() == others.keys()
        assert all(torch.equal(x, others[key]) for key, x in alone.items())
    seeded = final_weights(tmp_path / "d", workers=0, seed=1)
    assert not torch.equal(alone["backbone.norm1.weight"], seeded["backbone.norm1.weight"])


def test_deterministic_operations_train(tmp_path: Path) -> None:
    try:
        weights = [final_weights(tmp_path / name, workers=0, deterministic=True) for name in "ab"]
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
        del os.environ["CUBLAS_WORKSPACE_CONFIG"]
    assert all(torch.equal(x, weights[1][key]) for key, x in weights[0].items())
