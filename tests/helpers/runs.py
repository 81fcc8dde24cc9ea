"""Tiny runs: their settings, a death in the middle, and the comparison of what two of them left."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from allspark_fast.config import Config, DataConfig, EvalConfig, ModelConfig, RunConfig, TrainConfig
from allspark_fast.data.loader import SemiBatch
from allspark_fast.training.checkpoint import load_latest_checkpoint
from allspark_fast.training.log import read_metrics
from allspark_fast.training.trainer import Trainer


def tiny_config(method: str = "allspark", **train_options: object) -> Config:
    """Three epochs of four steps on eight scenes of 64 pixels."""
    options = {"epochs": 3, "batch_size": 2, "lr": 0.01, "warmup_epochs": 1, **train_options}
    return Config(
        data=DataConfig(crop=64, scenes=(3, 8, 2), workers=0),
        model=ModelConfig(backbone="mit_tiny", embedding_dim=16),
        train=TrainConfig(method=method, **options),
        eval=EvalConfig(every=2, workers=0),
        run=RunConfig(log_every=3, save_every=3),
    )


def tiny_arguments(folder: Path, settings: dict[str, Any]) -> list[str]:
    """Arguments of the train command for such a run, with other settings: ``{"train.epochs": 1}``."""
    tiny = {
        "data.scenes": "3 8 2", "data.crop": 64, "data.workers": 0, "model.backbone": "mit_tiny",
        "model.embedding-dim": 16, "train.batch-size": 2, "eval.workers": 0, "run.device": "cpu",
    }  # fmt: skip
    words = [word for name, value in {**tiny, **settings}.items() for word in (f"--{name}", *str(value).split())]
    return ["scenes", *words, "--run.output-dir", str(folder)]


def changed(config: Config, **groups: dict[str, Any]) -> Config:
    """A configuration with other settings: ``changed(config, train={"lr": 0.1})``."""
    return replace(config, **{name: replace(getattr(config, name), **fields) for name, fields in groups.items()})


def logged(folder: Path) -> list[dict]:
    """Records without what depends on the clock or on recording."""
    left_out = ("images_per_s", "recorded_step")
    return [{key: x for key, x in record.items() if key not in left_out} for record in read_metrics(folder)]


def differences(a: object, b: object) -> list[str]:
    """Names of all that differs between two states."""
    leaves = [dict(torch.utils._pytree.tree_flatten_with_path(state)[0]) for state in (a, b)]
    wrong = leaves[0].keys() ^ leaves[1].keys()
    for path in leaves[0].keys() & leaves[1].keys():
        x, y = (leaf[path] for leaf in leaves)
        if not (torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y):
            wrong.add(path)
    return sorted(map(str, wrong))


def assert_same_run(a: Path, b: Path) -> None:
    """Compare the newest checkpoints of two runs, and what they logged."""
    states = [load_latest_checkpoint(folder / "checkpoints") for folder in (a, b)]
    assert len(states[0]["model"]) > 100
    assert differences(*states) == []
    # As text, in which a NaN equals itself.
    assert str(logged(a)) == str(logged(b))


def run_and_die(trainer: Trainer, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train so many steps, then end as by kill -9."""
    take_step = trainer.train_step

    def dying_step(batch: SemiBatch, **options: bool) -> object:
        if trainer.step == steps:
            raise KeyboardInterrupt
        return take_step(batch, **options)

    monkeypatch.setattr(trainer, "train_step", dying_step)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
