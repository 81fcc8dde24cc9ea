import dataclasses
import errno
import importlib
import re
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from allspark_fast.__main__ import main
from allspark_fast.cli import COMMANDS, selftest, train
from allspark_fast.config import Config
from allspark_fast.errors import InputError
from allspark_fast.kernels.selftest import Result
from allspark_fast.recipes import RECIPES

SETTINGS = [(group, setting) for group in dataclasses.fields(Config) for setting in dataclasses.fields(group.type)]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert f"python -m allspark_fast {name}" in printed
    if name in ("train", "check", "evaluate"):
        assert all(recipe in printed for recipe in RECIPES)
    if name == "train":
        assert 10 <= len(set(re.findall(r"--[a-z]+\.[\w-]+", printed))) < 15
        with pytest.raises(SystemExit):
            main(["train", "camvid", "--help-all"])
        printed = capsys.readouterr().out
        for group, setting in SETTINGS:
            assert f"--{group.name}.{setting.name.replace('_', '-')}" in printed
            assert f"\n        {setting.name}: " in group.type.__doc__


@pytest.mark.parametrize(("arguments", "status"), [([], 2), (["--help"], 0)])
def test_without_a_command_the_usage_is_printed(arguments, status, capsys):
    assert main(arguments) == status
    out, err = capsys.readouterr()
    printed, other = (err, out) if status else (out, err)
    assert not other
    assert all(line in printed for line in (*COMMANDS, *COMMANDS.values()))
    assert max(map(len, printed.splitlines())) <= 80


@pytest.mark.parametrize(
    ("command", "fail", "advice"),
    [
        ("train", lambda: torch.empty(2**50), "--train.gradient-accumulation-steps 2"),
        ("train", lambda: np.empty(2**50), "--model.activation-checkpointing True"),
        ("train", Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory")), "--model.activation-checkpointing"),
        ("export", Mock(side_effect=OSError(errno.ENOMEM, "Cannot allocate memory")), "end other"),
        ("train", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")), None),
    ],
)
def test_out_of_memory_is_told_with_what_takes_less(command, fail, advice, monkeypatch, capsys):
    monkeypatch.setattr(importlib.import_module(f"allspark_fast.cli.{command}"), "run", lambda _: fail())
    assert main([command]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error:")
    told = re.findall("^out of memory; what takes less: (.*)", printed, re.MULTILINE)
    assert told == [] if advice is None else advice in told[0]


@pytest.mark.parametrize(("error", "options"), [(ValueError("a bug"), []), (InputError("a typo"), ["--debug"])])
def test_unexpected_errors_keep_their_traceback(error, options, monkeypatch):
    """All do with --debug."""
    monkeypatch.setattr(train, "run", Mock(side_effect=error))
    with pytest.raises(ValueError, match=str(error)):
        main(["train", *options])


def test_info_of_weights(weights, tiny_spec, command):
    bottleneck = "AllSpark, 2 heads, memory initialized empty"
    parameters = f"{sum(x.numel() for x in tiny_spec.build().parameters()) / 1e6:.1f} M"
    printed = command("info", weights.parent)
    assert all(x in printed for x in ("mit_tiny", bottleneck, "apple, pear, plum", "64 pixels", parameters))


@pytest.mark.parametrize(
    ("capability", "kernels"),
    [(None, "Triton has no kernels for CPUs"), ((7, 5), "compute capability 7.5, the kernels need 8.0")],
)
def test_selftest_says_what_runs_and_fails_if_a_kernel_does(capability, kernels, monkeypatch, command):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    for failure, status in (("", 0), ("wrong by 1", 1)):
        results = [Result("enqueue", "float32", 0.0, failure)]
        monkeypatch.setattr(selftest, "check_kernels", lambda _, results=results: results)
        printed = command("selftest", status=status)
        assert "kernels: plain torch, because " in printed
        assert f"{kernels}\n" in printed
        assert printed.endswith(f"{failure or 'ok'}\n")
