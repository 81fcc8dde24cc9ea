"""The command line of a training: help, suggestions, errors."""

import dataclasses
from pathlib import Path

import pytest
import torch

from allspark_fast.__main__ import main
from allspark_fast.config import Config, DataConfig, ModelConfig, TrainConfig
from allspark_fast.errors import DataError
from allspark_fast.training.trainer import Trainer


class TestCommandLine:
    """Mistakes are named; help explains."""

    def test_help_documents_every_field(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as done:
            main(["train", "--help"])
        assert done.value.code == 0
        text = capsys.readouterr().out
        for group in dataclasses.fields(Config):
            for setting in dataclasses.fields(group.default_factory):
                assert f"--{group.name}.{setting.name.replace('_', '-')}" in text

    def test_every_field_has_a_description(self) -> None:
        for group in dataclasses.fields(Config):
            for setting in dataclasses.fields(group.default_factory):
                assert f"\n        {setting.name}: " in group.default_factory.__doc__

    def test_a_typo_gets_a_suggestion(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            main(["train", "--train.epoch", "3"])
        assert "--train.epochs" in capsys.readouterr().err

    def test_a_wrong_value_names_the_choices(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            main(["train", "--train.method", "fixmatch"])
        assert "supervised" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["train", "imagenet"], "there is no recipe 'imagenet'; recipes are scenes, camvid, folder, pascal"),
            (["train", "pascal", "--data.root", "nowhere"], "there is no folder nowhere"),
            (["evaluate", "nowhere"], "nowhere: not a run folder, it holds no config.json"),
            (["check", "pascal", "--data.root", "."], "split file splits/pascal/1_8/labeled.txt: not found"),
            (["train", "--run.device", "cuda"], "use cpu or auto"),
            (["train", "--model.weights", "nowhere.pth"], "nowhere.pth: no such file"),
        ],
    )
    def test_errors(
        self,
        arguments: list[str],
        message: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        if "cuda" in arguments and torch.cuda.is_available():
            pytest.skip("there is a GPU")
        monkeypatch.chdir(tmp_path)
        assert main(arguments) == 1
        assert message in capsys.readouterr().err

    def test_a_bad_batch_size_is_found_before_training(self, tmp_path: Path) -> None:
        config = Config(
            data=DataConfig(crop=64, scenes=(3, 8, 2)),
            model=ModelConfig(backbone="mit_tiny"),
            train=TrainConfig(batch_size=9),
        )
        with pytest.raises(DataError, match="8 unlabeled images do not fill a batch of 9"):
            Trainer(config, tmp_path)
