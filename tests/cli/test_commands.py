"""The command line as such: help, mistakes, ``info`` and ``selftest``."""

import dataclasses
import errno
import importlib
import re
from pathlib import Path

import pytest
import torch

from allspark_fast.__main__ import main
from allspark_fast.cli import COMMANDS, selftest, train
from allspark_fast.config import Config
from allspark_fast.errors import InputError
from allspark_fast.recipes import RECIPES
from allspark_fast.weights.spec import ModelSpec, save_model

SETTINGS = [(group, setting) for group in dataclasses.fields(Config) for setting in dataclasses.fields(group.type)]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert f"python -m allspark_fast {name}" in printed
    if name in ("train", "check", "evaluate"):
        assert all(recipe in printed for recipe in RECIPES)
    if name == "train":
        assert all(f"--{group.name}.{x.name.replace('_', '-')}" in printed for group, x in SETTINGS)


@pytest.mark.parametrize(("group", "setting"), SETTINGS)
def test_every_setting_has_a_description(group: dataclasses.Field, setting: dataclasses.Field) -> None:
    assert f"\n        {setting.name}: " in group.type.__doc__


@pytest.mark.parametrize(("arguments", "status"), [([], 2), (["trian"], 2), (["--help"], 0)])
def test_without_a_command_the_usage_is_printed(
    arguments: list[str], status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == status
    out, err = capsys.readouterr()
    printed, other = (err, out) if status else (out, err)
    assert not other
    assert all(f"  {line}" in printed for line in COMMANDS.values())


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train imagenet", "there is no recipe 'imagenet'; recipes are scenes, camvid, folder, pascal"),
        ("train --train.epoch 3", "--train.epochs"),
        ("train --train.method fixmatch", "supervised"),
        ("train pascal --data.root nowhere", "there is no folder /"),
        ("train --data.scenes 3 8 2 --train.batch-size 9", "8 unlabeled images do not fill a batch of 9"),
        ("train --model.weights nowhere.pth", "nowhere.pth: no such file"),
        ("train --run.device cuda", "use cpu or auto"),
        ("check pascal --data.root .", "split file splits/pascal/1_8/labeled.txt: not found"),
        ("evaluate nowhere", "nowhere: not a run folder (no config.json)"),
    ],
)
def test_mistakes_are_named(
    command: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "cuda" in command and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.chdir(tmp_path)
    try:
        status = main(command.split())
    except SystemExit as stop:  # how argparse and tyro end
        status = stop.code
    assert status in (1, 2)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "error", "advice"),
    [
        ("train", RuntimeError("DefaultCPUAllocator: can't allocate memory"), "--train.gradient-accumulation-steps 2"),
        ("train", torch.OutOfMemoryError("CUDA out of memory"), "--model.activation-checkpointing True"),
        ("predict", MemoryError("no room"), "--window"),
        ("export", OSError(errno.ENOMEM, "Cannot allocate memory"), "end other"),
        ("train", OSError(errno.ENOSPC, "No space left on device"), None),
    ],
)
def test_out_of_memory_is_told_with_what_takes_less(
    command: str,
    error: Exception,
    advice: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(_: list[str]) -> None:
        raise error

    monkeypatch.setattr(importlib.import_module(f"allspark_fast.cli.{command}"), "run", run)
    assert main([command]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error:")
    told = re.findall("^out of memory; what takes less: (.*)", printed, re.MULTILINE)
    assert told == [] if advice is None else advice in told[0]


@pytest.mark.parametrize(("error", "options"), [(ValueError("a bug"), []), (InputError("a typo"), ["--debug"])])
def test_unexpected_errors_keep_their_traceback(
    error: Exception, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All do with --debug."""

    def run(_: list[str]) -> None:
        raise error

    monkeypatch.setattr(train, "run", run)
    with pytest.raises(ValueError, match=str(error)):
        main(["train", *options])


def test_info_of_weights(tmp_path: Path, tiny_spec: ModelSpec, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_spec.build()
    model.decoder.allspark.attn.queue_filled[1] = True
    save_model(model, tiny_spec, tmp_path / "model.safetensors")
    assert main(["info", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    parameters = f"{sum(x.numel() for x in model.parameters()) / 1e6:.1f} M"
    memory = "memory of 128 channels of 4 tokens a class, initialized empty, 1 of 3 classes filled"
    for part in ("mit_tiny", "AllSpark, 2 heads", "apple, pear, plum", "64 pixels", parameters, memory):
        assert part in printed


@pytest.mark.parametrize(
    ("capability", "kernels"),
    [
        (None, "plain torch, because Triton has no kernels for CPUs"),
        ((7, 5), "plain torch, because the GPU has compute capability 7.5, the kernels need 8.0"),
        ((9, 0), "Triton"),
    ],
)
def test_selftest_says_what_runs_and_fails_if_a_kernel_does(
    capability: tuple[int, int] | None,
    kernels: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(selftest, "passed", lambda results: not any(results))
    monkeypatch.setattr(selftest, "results_table", lambda results: f"table of {results}")
    for failure, status in (("", 0), ("wrong by 1", 1)):
        monkeypatch.setattr(selftest, "check_kernels", lambda _, failure=failure: [failure])
        assert main(["selftest"]) == status
        printed = capsys.readouterr().out
        assert f"kernels: {kernels}\n" in printed
        assert printed.endswith(f"table of [{failure!r}]\n")
