import functools
import logging
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from allspark_fast.errors import InputError
from allspark_fast.training.checkpoint import load_latest_checkpoint, require_space, save_checkpoint
from allspark_fast.weights.files import read_weights, save_weights
from tests.helpers.malicious import Malicious
from tests.helpers.runs import differences

# Bits flipped in each kind of file; a small file has about 70,000.
FLIPS = 500
STATE = {"step": 3, "model": {"a": torch.arange(200.0), "b": torch.ones(3, dtype=torch.int64)}, "rng": [1, 2.5, None]}


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["step_00000003.pt", "a.safetensors", "a.pth"])
def test_no_flipped_bit_changes_what_a_file_gives(tmp_path, name):
    path = tmp_path / name
    if name.startswith("step"):
        save_checkpoint(tmp_path, 3, STATE, keep_last=1)
        read = functools.partial(load_latest_checkpoint, tmp_path)
    else:
        save_weights(nn.Sequential(nn.BatchNorm1d(40), nn.Linear(3, 5).bfloat16()), path)
        read = functools.partial(read_weights, path)
    whole, expected, refused = path.read_bytes(), read(), 0
    for bit in torch.randint(8 * len(whole), (FLIPS,)).tolist():
        path.write_bytes(whole)
        flip(path, bit)
        try:
            assert differences(read(), expected) == []  # padding and dates of an archive
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017 both outcomes are right
            refused += 1
    assert refused > FLIPS / 3


def legacy(path: Path, state: object = STATE, size: int | None = None) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:size])


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "cut by a byte": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "cut in half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "zeros": lambda path: path.write_bytes(bytes(5000)),
    "text": lambda path: path.write_text("this is not a checkpoint"),
    "foreign": lambda path: torch.save({"step": 9, "model": {}}, path),
    "a list": lambda path: torch.save([1, 2], path),
    "legacy": legacy,
    **{f"legacy cut to {size} bytes": functools.partial(legacy, size=size) for size in (1, 10, 200, 500, 700)},
    "zip": lambda path: zipfile.ZipFile(path, "w").close(),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "malicious": lambda path: torch.save({**torch.load(path), "model": Malicious()}, path),
    "malicious legacy": lambda path: legacy(path, {**torch.load(path), "model": Malicious()}),
    "malicious pickle": lambda path: path.write_bytes(pickle.dumps({**STATE, "model": Malicious()}, protocol=2)),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_the_one_before_is_used_and_said_so(tmp_path, caplog, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path, 3, STATE, keep_last=2)
    newest = save_checkpoint(tmp_path, 9, {**STATE, "step": 9}, keep_last=2)
    DAMAGES[kind](newest)
    with caplog.at_level(logging.WARNING):
        assert differences(load_latest_checkpoint(tmp_path), STATE) == []
    assert f"{newest} " in caplog.text
    assert "trying the one before" in caplog.text
    (tmp_path / "step_00000003.pt").write_bytes(b"")
    with pytest.raises(InputError, match="none of 2 checkpoints can be read"):
        load_latest_checkpoint(tmp_path)
    assert not Path("pwned").exists()


def test_a_checkpoint_of_another_model_is_passed_over(tmp_path, caplog):
    save_checkpoint(tmp_path, 3, STATE, keep_last=2)
    for step, model in ((8, {"a": torch.ones(4), "b": STATE["model"]["b"]}), (9, {"a": STATE["model"]["a"]})):
        save_checkpoint(tmp_path, step, {**STATE, "model": model}, keep_last=3)
    assert load_latest_checkpoint(tmp_path, STATE)["step"] == 3
    for step, name in ((8, "a"), (9, "b")):
        assert f"step_0000000{step}.pt is a checkpoint of another model: [\"['model']['{name}']\"" in caplog.text


def test_too_full_a_disk_is_told_before_work_starts(tmp_path):
    state = {"model": {"a": torch.empty(2**40, 2**10, device="meta")}, "step": 1}
    with pytest.raises(OSError, match=r"MB are free, but 3 more checkpoints take at least 13510798882\.1 MB"):
        require_space(tmp_path / "checkpoints", state, keep_last=2)
    for step in (1, 2):
        save_checkpoint(tmp_path / "checkpoints", step, STATE, keep_last=2)
    with pytest.raises(OSError, match="but 1 more checkpoints"):
        require_space(tmp_path / "checkpoints", state, keep_last=2)
    require_space(tmp_path / "checkpoints", STATE, keep_last=2)
