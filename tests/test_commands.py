"""The command line as such, and ``info``."""

from pathlib import Path

import pytest
import torch

from allspark_fast.__main__ import main
from allspark_fast.commands import COMMANDS, info
from allspark_fast.pretrained import ModelSpec, save_model


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    assert f"python -m allspark_fast {name}" in capsys.readouterr().out


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
    assert "kernels: plain torch, because Triton has none for CPUs" in printed


def test_info_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = (7, 5)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert info._kernels(torch.device("cuda", 0)).endswith("compute capability 7.5, the kernels need 8.0")
    capability = (9, 0)
    assert info._kernels(torch.device("cuda", 0)) == "kernels: Triton"


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
