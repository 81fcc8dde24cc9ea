"""What the documents say to type works: every Python block and every command, copied as it stands."""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from torch.distributed.run import get_args_parser

from allspark_fast.__main__ import main
from allspark_fast.cli.recipe import parse_config
from allspark_fast.config import Config
from allspark_fast.weights.spec import ModelSpec, save_model
from bench import study
from bench.__main__ import build_parser
from tests.helpers.public_code import public_checkpoint

ROOT = Path(__file__).parents[1]
DOCUMENTS = {path.name: path.read_text("utf-8") for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
RESULTS = [path.read_text("utf-8") for path in (ROOT / "bench/results").glob("*.md")]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(text: str, language: str) -> list[str]:
    return [block for tag, block in FENCED.findall(text) if tag == language]


PYTHON = [block for text in DOCUMENTS.values() for block in blocks(text, "python")]
# Commands that start like this are not run, and why.
NOT_RUN = {
    "pip install": "needs the network; .ci/run installs",
    "pytest": "would run this test",
    "python train.py pascal": "needs Pascal VOC and weights",
    "python train.py --train.method": "takes minutes; tests/training/test_trainer.py trains every method",
}
TOO_LONG = {
    "python train.py": "takes minutes; made small here",
    "python -m allspark_fast train folder --data.root my_data": "is for a GPU; the smoke run stands for it",
}


def commands_of(document: str) -> list[str]:
    """Lines of ```bash blocks, and commands of this package in table cells, without their comments."""
    text = DOCUMENTS[document]
    lines = [line for block in blocks(text, "bash") for line in block.splitlines()]
    lines += re.findall(r"^\| `(python [^`]+)`", text, re.MULTILINE)
    stripped = [re.sub(r"\s+#.*", "", line).strip() for line in lines]
    return [part for line in stripped if line for part in line.split(" && ")]


def is_run(command: str) -> bool:
    return command not in TOO_LONG and not command.startswith(tuple(NOT_RUN))


COMMANDS_OF = {document: commands for document in DOCUMENTS if (commands := commands_of(document))}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with train.py, the folder of docs/your-data.md, and the photographs and weights of README."""
    (tmp_path / "train.py").symlink_to(ROOT / "train.py")
    for folder in ("my_data/images", "my_data/labels", "more_photos", "others/deep"):
        (tmp_path / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(9):
        image = Image.fromarray(rng.integers(0, 120, (90, 120, 3), np.uint8))
        mask = Image.new("L", image.size)
        for target, color in ((image, (230, 200, 60)), (mask, 255)):
            ImageDraw.Draw(target).ellipse((8 * i, 10, 8 * i + 40, 60), fill=color)
        mode, suffix = [("RGB", "jpg"), ("L", "jpg"), ("RGBA", "png"), ("P", "png"), ("1", "png")][i % 5]
        image.convert(mode).save(tmp_path / f"my_data/images/im{i:02}.{suffix}")
        if i < 6:
            mask.save(tmp_path / f"my_data/labels/im{i:02}.png")
    image.save(tmp_path / "photo.jpg")
    image.save(tmp_path / "more_photos/one.png")
    image.save(tmp_path / "others/deep/two.png")
    (meta,) = re.findall(r"meta\.json +(\{.*\})", DOCUMENTS["your-data.md"])
    (tmp_path / "my_data/meta.json").write_text(meta)
    public_checkpoint(tmp_path / "allspark_pascal.pth")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python_block_runs(number: int, place: Path, tiny_spec: ModelSpec) -> None:
    (place / "runs/scenes").mkdir(parents=True)
    save_model(tiny_spec.build(), tiny_spec, place / "runs/scenes/best.safetensors")
    exec(compile(PYTHON[number], f"Python block {number}", "exec"), {})


def test_there_are_blocks_and_commands() -> None:
    assert len(PYTHON) == 3
    assert {"README.md", "your-data.md"} <= set(COMMANDS_OF)
    assert sum(is_run(command) for commands in COMMANDS_OF.values() for command in commands) >= 12
    everything = [command for commands in COMMANDS_OF.values() for command in commands]
    assert all(command in everything for command in TOO_LONG)
    assert all(any(command.startswith(start) for command in everything) for start in NOT_RUN)
    parsed = all_commands()
    assert set(everything) < {*parsed, *(command for command in everything if command.startswith("pip "))}
    assert sum(command.startswith("torchrun ") for command in parsed) >= 4
    assert sum(command.startswith("python -m bench.study ") for command in parsed) >= 3


def spans() -> set[str]:
    """What stands in single backquotes in sentences and tables; it may go on in the next line."""
    paragraphs = "\n\n".join(FENCED.sub("", text) for text in (*DOCUMENTS.values(), *RESULTS)).split("\n\n")
    assert all(paragraph.count("`") % 2 == 0 for paragraph in paragraphs)
    return {" ".join(span.split()) for paragraph in paragraphs for span in re.findall(r"`([^`]+)`", paragraph)}


def all_commands() -> list[str]:
    """Commands of every kind of block and of sentences and tables, without what is set or started before them."""
    lines = [command for commands in COMMANDS_OF.values() for command in commands]
    for block in (block for text in DOCUMENTS.values() for block in blocks(text, "")):
        lines += [re.sub(r"\s+#.*", "", line) for line in block.replace("\\\n", " ").splitlines()]
    stripped = {re.sub(r"^([A-Z_]+=\S+ )+|^srun .*?(?=torchrun )", "", line) for line in [*lines, *spans()]}
    return sorted(x for x in stripped if re.match(r"python .|pytest .|torchrun .* train\.py", x))


@pytest.mark.parametrize("command", all_commands())
def test_commands_exist(command: str) -> None:
    """What they name: options and settings, benchmarks and their sizes, modules, files of tests."""
    program, *words = shlex.split(command)
    if program == "torchrun":
        options = get_args_parser().parse_args(words)
        assert options.training_script == "train.py"
        parse_config(options.training_script_args, "train")
    elif words[0] == "train.py":
        parse_config(words[1:], "train")
    elif words[:2] == ["-m", "bench"]:
        build_parser().parse_args(["tiny" if word == "SIZE" else word for word in words[2:]])
    elif words[:2] == ["-m", "bench.study"]:
        parse_config(study.build_parser().parse_known_args(words[2:])[1], "train")
    elif words[:2] == ["-m", "allspark_fast"]:
        parse_arguments(*words[2:])
    elif program == "pytest":
        assert all((ROOT / word).exists() for word in words if word.startswith("tests"))
        if "-k" in words:
            named = rf"class Test{words[-1]}|def test_\w*{words[-1]}"
            assert re.search(named, "".join((ROOT / word).read_text("utf-8") for word in words if word.endswith(".py")))
    else:
        assert find_spec(words[1]) is not None


def parse_arguments(name: str, *arguments: str) -> None:
    """Of a command of this package."""
    settings = list(arguments)
    if name not in ("train", "check"):
        command = importlib.import_module(f"allspark_fast.cli.{name}")
        _, settings = command.build_parser().parse_known_args(settings)
        assert not settings or (name == "evaluate" and not settings[0].startswith("-"))
    if settings:
        parse_config(settings, name)


@pytest.mark.parametrize("span", sorted(x for x in spans() if re.match(r"--[a-z]+\.", x) and "group.field" not in x))
def test_settings_exist(span: str) -> None:
    """With the value that they are shown with, or each of several, or none."""
    name, *values = span.split()
    group, field = name.removeprefix("--").replace("-", "_").split(".")
    assert hasattr(getattr(Config(), group), field)
    for value in values[0].split("|") if values else ():
        parse_config([name, value, *values[1:]], "train")


def test_own_data_before_the_training(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    splits, check = COMMANDS_OF["your-data.md"][:2]
    assert main(shlex.split(splits)[3:]) == 0
    assert "4 labeled, 3 unlabeled, 2 for validation" in capsys.readouterr().out
    assert main(shlex.split(check)[3:]) == 0
    meta = place / "my_data/meta.json"
    meta.write_text(json.dumps({"classes": json.loads(meta.read_text())["classes"]}))
    assert main(shlex.split(check)[3:]) == 1
    assert 'add "values": [0, 255] to meta.json' in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("document", COMMANDS_OF)
def test_commands_run(document: str, place: Path) -> None:
    python = f'python() {{ "{sys.executable}" "$@"; }}\n'
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    small = "python train.py --data.scenes 3 4 2 --data.crop 64 --data.workers 0 --train.epochs 1 --train.batch-size 2"
    start = ["python -m allspark_fast splits my_data --val 1/3", small] if document == "README.md" else []
    for command in [*start, *filter(is_run, COMMANDS_OF[document])]:
        done = subprocess.run(
            ["bash", "-c", python + command], cwd=place, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        if command.endswith("--run.output-dir runs/smoke"):
            shutil.copytree(place / "runs/smoke", place / "runs/folder")
    if document == "your-data.md":
        assert len(list((place / "predictions/smoke/labels").iterdir())) == 9
