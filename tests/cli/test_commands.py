"""The command line as such, and ``info``."""

import errno
import importlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from allspark_fast.__main__ import main
from allspark_fast.cli import COMMANDS, info, selftest, train
from allspark_fast.recipes import RECIPES
from allspark_fast.weights.spec import ModelSpec, save_model


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert f"python -m allspark_fast {name}" in printed
    if name in ("train", "check", "evaluate"):
        assert all(recipe in printed for recipe in RECIPES)


@pytest.mark.parametrize(("arguments", "status"), [([], 2), (["trian"], 2), (["--help"], 0)])
def test_without_a_command_the_usage_is_printed(
    arguments: list[str], status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == status
    out, err = capsys.readouterr()
    printed, other = (err, out) if status else (out, err)
    assert not other
    assert all(f"  {line}" in printed for line in COMMANDS.values())


def test_info_of_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert torch.__version__.split("+")[0] in printed
    assert "kernels: plain torch, because Triton has no kernels for CPUs" in printed


def test_info_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, expected in (
        ((7, 5), "kernels: plain torch, because the GPU has compute capability 7.5, the kernels need 8.0"),
        ((9, 0), "kernels: Triton"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        assert info.kernels_on(torch.device("cuda", 0)) == expected


def test_selftest_fails_if_a_kernel_does(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for failure, status in (("", 0), ("wrong by 1", 1)):
        monkeypatch.setattr(selftest, "check_kernels", lambda _, failure=failure: [failure])
        monkeypatch.setattr(selftest, "passed", lambda results: not any(results))
        monkeypatch.setattr(selftest, "results_table", lambda results: f"table of {results}")
        assert main(["selftest"]) == status
        assert capsys.readouterr().out == f"table of [{failure!r}]\n"


def test_info_of_weights(tmp_path: Path, tiny_spec: ModelSpec, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_spec.build()
    model.decoder.allspark.attn.queue_filled[1] = True
    save_model(model, tiny_spec, tmp_path / "model.safetensors")
    assert main(["info", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for part in ("mit_tiny", "AllSpark, 2 heads", "apple, pear, plum", "64 pixels", "128 channels of 4 tokens"):
        assert part in printed
    assert "1 of 3 classes filled" in printed
    assert f"{sum(x.numel() for x in model.parameters()) / 1e6:.1f} M" in printed


@pytest.mark.parametrize(
    ("command", "allocate", "advice"),
    [
        ("train", lambda _: torch.empty(2**60), "--train.gradient-accumulation-steps 2"),
        ("predict", lambda _: bytearray(2**62), "--window"),
        ("export", lambda _: _raise(OSError(errno.ENOMEM, "Cannot allocate memory")), "ending other"),
        (
            "train",
            lambda _: _raise(torch.OutOfMemoryError("CUDA out of memory")),
            "--model.activation-checkpointing True",
        ),
    ],
)
def test_out_of_memory_is_told_with_what_takes_less(
    command: str,
    allocate: Callable[[list[str]], object],
    advice: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(importlib.import_module(f"allspark_fast.cli.{command}"), "run", allocate)
    assert main([command]) == 1
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first.startswith("error:")
    assert last.startswith("out of memory; what takes less: ")
    assert advice in last


def test_other_errors_say_nothing_of_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "run", lambda _: _raise(OSError(errno.ENOSPC, "No space left on device")))
    assert main(["train"]) == 1
    assert "memory" not in capsys.readouterr().err


def _raise(error: Exception) -> None:
    raise error
