"""The documentation works: Python blocks and commands run as they stand; other commands, settings and links exist."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from torch.distributed.run import get_args_parser

from allspark_fast.__main__ import main
from allspark_fast.cli.recipe import parse_config
from allspark_fast.config import Config
from bench.__main__ import build_parser
from tests.helpers.public_code import public_checkpoint

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text("utf-8")
    for pattern in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "docs/*.md", "bench/results/*.md")
    for path in sorted(ROOT.glob(pattern))
}
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PROSE = {page: FENCED.sub("", text) for page, text in PAGES.items()}
# Commands that start like this are not run.
NOT_RUN = {
    "pip install": "needs the network; .ci/run installs",
    "python train.py pascal": "needs Pascal VOC and weights",
    "python -m allspark_fast evaluate pascal.safetensors": "needs Pascal VOC",
    "python -m allspark_fast compare": "takes minutes; tests/training/test_compare.py runs it",
}
# Commands that would take minutes are run with these settings.
TINY = "--data.crop 65 --data.workers 0 --train.batch-size 2"
SMALLER = {
    "python train.py": f"{TINY} --data.scenes 3 4 2 --train.epochs 1",
    "python train.py --config mine.yaml --train.seed 1": f"{TINY} --data.scenes 3 4 2 --train.steps 1",
    "python -m allspark_fast train folder --data.root my_data": f"{TINY} --train.steps 1",
}


def blocks(page: str, *languages: str) -> list[str]:
    return [block for tag, block in FENCED.findall(PAGES[page]) if tag in languages]


def commands_in(text: str) -> list[str]:
    """Lines of a shell, without comments, variables, and what starts them on other machines."""
    lines = [re.sub(r"(^|\s+)#.*", "", line).strip() for line in text.replace("\\\n", " ").splitlines()]
    parts = [part for line in lines for part in line.split(" && ") if part]
    return [re.sub(r"^([A-Z_]+=\S+ )+|^srun .*?(?=torchrun )", "", part) for part in parts]


def spans() -> set[str]:
    """What stands in single backquotes in sentences and tables; it may go on in the next line."""
    paragraphs = "\n\n".join(PROSE.values()).split("\n\n")
    assert all(paragraph.count("`") % 2 == 0 for paragraph in paragraphs)
    return {" ".join(span.split()) for paragraph in paragraphs for span in re.findall(r"`([^`]+)`", paragraph)}


def commands_to_run(page: str) -> list[str]:
    """Commands of bash blocks, and those of this package in the first cells of tables."""
    cells = re.findall(r"^\| `(python [^`]+)`", PAGES[page], re.MULTILINE)
    return [command for text in [*blocks(page, "bash"), *cells] for command in commands_in(text)]


def all_commands() -> list[str]:
    """Commands of blocks, sentences and tables; settings with a value count as those of a training."""
    shown = [command for page in PAGES for block in blocks(page, "", "bash") for command in commands_in(block)]
    shown += [command for span in spans() for command in commands_in(span)]
    shown = [f"python train.py {x}" if re.match(r"--[a-z]+\.\S+ ", x) else x for x in shown]
    return sorted({x for x in shown if re.match(r"python .|pytest .|torchrun .* train\.py", x)})


TO_RUN = {page: commands for page in PAGES if (commands := commands_to_run(page))}
PYTHON = [block for page in PAGES for block in blocks(page, "python")]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with train.py, the folder of docs/quickstart.md, and the photographs of README."""
    (tmp_path / "train.py").symlink_to(ROOT / "train.py")
    for folder in ("my_data/images", "my_data/labels", "more_photos", "others/deep"):
        (tmp_path / folder).mkdir(parents=True)
    for i in range(9):
        image, mask = Image.new("RGB", (120, 90), "gray"), Image.new("L", (120, 90))
        for target, color in ((image, "gold"), (mask, 255)):
            ImageDraw.Draw(target).ellipse((8 * i, 10, 8 * i + 40, 60), fill=color)
        image.save(tmp_path / f"my_data/images/im{i:02}.png")
        if i < 6:
            mask.save(tmp_path / f"my_data/labels/im{i:02}.png")
    for file in ("photo.jpg", "more_photos/one.png", "others/deep/two.png"):
        image.save(tmp_path / file)
    (meta,) = re.findall(r"meta\.json +(\{.*\})", PAGES["docs/quickstart.md"])
    (tmp_path / "my_data/meta.json").write_text(meta)
    public_checkpoint(tmp_path / "allspark_pascal.pth")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("number", range(len(PYTHON)))
@pytest.mark.usefixtures("place")
def test_python_block_runs(number):
    smaller = "train_steps=1, train_batch_size=2, data_scenes=(3, 4, 2), data_crop=65, data_workers=0"
    code = PYTHON[number].replace("train_steps=1000", smaller)
    exec(compile(code, f"Python block {number}", "exec"), {})


def test_there_are_blocks_and_commands():
    """The patterns above still match, and nothing is left out in vain."""
    commands = [command for page in TO_RUN for command in TO_RUN[page]]
    assert len(PYTHON) == 2
    assert sum("train_steps=1000" in code for code in PYTHON) == 1
    assert len(commands) >= 25
    assert set(SMALLER) < set(commands)
    assert all(any(command.startswith(start) for command in commands) for start in NOT_RUN)
    assert sum(command.startswith(("torchrun ", "python -m allspark_fast compare ")) for command in all_commands()) >= 3


@pytest.mark.parametrize("command", all_commands())
def test_commands_exist(command, tmp_path, monkeypatch):
    """What they name: options and settings, benchmarks and their sizes, modules, files of tests."""
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("train: {lr: 1e-3}")
    program, *words = shlex.split(command.partition(" > ")[0].replace(" --print-config", ""))
    if program == "torchrun":
        options = get_args_parser().parse_args(words)
        program, words = "python", [options.training_script, *options.training_script_args]
    if program == "pytest":
        assert all((ROOT / word).exists() for word in words if word.startswith("tests"))
    elif words[0] == "train.py":
        parse_config(words[1:], "train")
    elif words[:2] == ["-m", "bench"]:
        build_parser().parse_args(words[2:])
    elif words[:2] == ["-m", "allspark_fast"]:
        settings = words[3:]
        if words[2] not in ("train", "check"):
            parser = importlib.import_module(f"allspark_fast.cli.{words[2]}").PARSER
            settings = parser.parse_known_args(settings)[1]
            assert not settings or words[2] in ("evaluate", "compare")
        parse_config(settings, words[2])
    else:
        assert find_spec(words[1]) is not None


def test_settings_exist():
    setting = re.compile(r"^(data|model|train|eval|run)\.(?!json|safetensors)(\w{3,})")
    for group, field in {x for span in spans() for x in setting.findall(span)}:
        assert hasattr(getattr(Config(), group), field), f"{group}.{field}"


@pytest.mark.parametrize("page", PAGES)
def test_links_and_named_files_exist(page):
    for target, _, anchor in re.findall(r"\]\((?!http)([^)#]*)(#([^)]*))?\)", PROSE[page]):
        linked = (ROOT / page).parent / target if target else ROOT / page
        assert linked.exists(), target
        headings = re.findall(r"^#+ (.*)$", linked.read_text("utf-8"), re.MULTILINE) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", x).lower().replace(" ", "-") for x in headings]
    for file in re.findall(r"`((?:allspark_fast|bench|docs|examples|kernels|tests)/[\w/.]+)`", PROSE[page]):
        assert (ROOT / file).exists(), file


def test_the_quickstart_prints_what_it_shows(place, capsys):
    for command in TO_RUN["docs/quickstart.md"][:2]:
        assert main(shlex.split(command)[3:]) == 0
    assert capsys.readouterr().out in blocks("docs/quickstart.md", "")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("page", TO_RUN)
def test_commands_run(page, place):
    python = f'python() {{ "{sys.executable}" "$@"; }}\n'
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    for command in TO_RUN[page]:
        if not command.startswith(tuple(NOT_RUN)):
            script = f"{python}{command} {SMALLER.get(command, '')}"
            done = subprocess.run(
                ["bash", "-c", script], cwd=place, env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
