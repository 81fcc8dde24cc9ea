"""Any words among a command's arguments: it says what is wrong with them or does what they ask, without a traceback."""

import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from allspark_fast.__main__ import main
from allspark_fast.cli import COMMANDS, selftest, train
from allspark_fast.training import compare
from allspark_fast.weights.spec import save_model
from tests.helpers.images import write_folder

# Right arguments of each command, and some of its options.
ARGUMENTS = {
    "train": ("scenes", "--data.crop --train.lr --run.output-dir --model.weights --train.method --no.such"),
    "compare": ("scenes --seeds 0", "--methods --seeds --labels --every-label --test --out --equal-time --data.scenes"),
    "check": ("folder --data.root data", "--data.root --data.val --data.labeled --data.std --eval.mode"),
    "evaluate": ("model.safetensors folder --data.root data", "--split --json --data.root --data.crop"),
    "predict": ("model.safetensors photo.png", "--out --confidence --overwrite --whole --window"),
    "convert": ("model.safetensors new.pth", "--classes --overwrite"),
    "export": ("model.safetensors new.pt2", "--overwrite"),
    "info": ("model.safetensors", "--help"),
    "selftest": ("", "--help"),
    "splits": ("data", "--val --list --seed --out"),
}
WORDS = [
    "", " ", "-", "--", "---", "-x", "--help", ".", "*", "**", "[", "a\0b", "é", "\udcff", "x" * 5000, "~",
    "0", "1", "-1", "1/2", "1/0", "0.5", "1e400", "nan", "True", "None", "[]", "{}", "1 2", "9" * 40,
    "data", "data/meta.json", "data/images", "model.safetensors", "model.safetensors/x", "photo.png", "/dev/null",
    "new", "new.safetensors", "new.pth", "new.onnx", "new.txt", "nowhere/new.pth", "scenes", "camvid", "pascal",
]  # fmt: skip


@st.composite
def command_lines(draw: st.DrawFn, command: str) -> list[str]:
    """Right arguments, one or two of them replaced by others or joined by others."""
    right, options = (text.split() for text in ARGUMENTS[command])
    words = list(right)
    for _ in range(draw(st.integers(1, 2))):
        place = draw(st.integers(0, len(words)))
        words[place : place + draw(st.integers(0, 1))] = [draw(st.sampled_from(WORDS + options))]
    return words


@pytest.fixture
def folder(tmp_path, tiny_spec, monkeypatch):
    """Weights, a photo and data; what takes long is left out."""
    given = tmp_path / "given"
    write_folder(given / "data", 1, classes=2, names=["one", "two"])
    save_model(tiny_spec.build(), tiny_spec, given / "model.safetensors")
    shutil.copy(given / "data/images/00.png", given / "photo.png")
    monkeypatch.delenv("ALLSPARK_DATA_DIR", raising=False)
    monkeypatch.setattr(train, "train", lambda *_: True)
    monkeypatch.setattr(compare, "compare", lambda *_, **__: [])
    monkeypatch.setattr(selftest, "check_kernels", lambda _: [])
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_words(command, data, folder, monkeypatch, capsys):
    words = data.draw(command_lines(command))
    shutil.rmtree(folder / "here", ignore_errors=True)
    monkeypatch.chdir(shutil.copytree(folder / "given", folder / "here"))
    try:
        status = main([command, *words])
    except SystemExit as stop:  # how argparse and tyro end
        status = stop.code
    out, err = capsys.readouterr()
    assert status in (0, 1, 2)
    if status == 1:
        # `check` prints what is wrong with the data as a list.
        assert "error: " in err or (command == "check" and "errors" in out)
    if status == 2:  # argparse and tyro head their messages differently
        assert err.strip()
