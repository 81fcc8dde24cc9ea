"""The choice among configurations: timed once, remembered, and fixed where it is told to be."""

import json
from pathlib import Path

import pytest
import torch

from allspark_fast.kernels import tuning
from allspark_fast.kernels.tuning import fastest

pytest.importorskip("triton")
CONFIGS = ["slow", "fast", "middle"]
SECONDS = {"slow": 3.0, "fast": 1.0, "middle": 2.0}
CUDA = torch.device("cuda")


@pytest.fixture
def timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A machine with a GPU and an empty cache; lists the configurations that are timed."""
    timed = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200 (one)")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tuning, "_seconds", lambda _, config: timed.append(config) or SECONDS[config])
    return timed


def choose(configs: list[str] = CONFIGS, problem: str = "forward", device: torch.device = CUDA) -> str:
    return fastest(problem, configs, lambda _: None, device)


def forget() -> None:
    """As in a new process."""
    tuning._choices.cache_clear()


def test_the_fastest_is_found_once(timed: list[str]) -> None:
    assert [choose() for _ in range(3)] == ["fast"] * 3
    assert timed == CONFIGS
    assert choose(problem="backward") == "fast"
    assert timed == 2 * CONFIGS


def test_the_choice_outlives_the_process(timed: list[str], tmp_path: Path) -> None:
    choose()
    forget()
    assert choose() == "fast"
    assert timed == CONFIGS
    [file] = (tmp_path / "allspark_fast").iterdir()
    assert file.name.startswith("tiles_NVIDIA-H200-one-_triton-")
    file.write_text(file.read_text().replace(repr("fast"), repr("middle")))
    forget()
    assert choose() == "middle"


def test_a_choice_that_is_not_offered_is_made_again(timed: list[str], tmp_path: Path) -> None:
    choose()
    [file] = (tmp_path / "allspark_fast").iterdir()
    file.write_text(file.read_text().replace(repr("fast"), repr("gone")))
    forget()
    assert choose() == "fast"
    assert timed == 2 * CONFIGS


def test_sizes_that_offer_other_configurations_do_not_take_turns(timed: list[str]) -> None:
    for _ in range(2):
        assert choose() == "fast"
        assert choose(["slow", "middle"]) == "middle"
    assert timed == [*CONFIGS, "slow", "middle"]


@pytest.mark.parametrize("text", ["", "no json", "[1]"])
def test_an_unreadable_file_is_told_and_replaced(
    text: str, timed: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    choose()
    [file] = (tmp_path / "allspark_fast").iterdir()
    file.write_text(text)
    forget()
    assert choose() == "fast"
    assert f"{file} cannot be read" in caplog.text
    assert list(json.loads(file.read_text()).values()) == [repr("fast")]


def test_a_folder_that_cannot_be_written_is_told(
    timed: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "allspark_fast").write_text("a file")
    assert choose() == "fast"
    assert "cannot be written" in caplog.text


def test_a_configuration_that_fails_is_told_and_left_out(
    timed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def seconds(_: object, config: str) -> float:
        if config in failing:
            raise RuntimeError("out of resource")
        return SECONDS[config]

    monkeypatch.setattr(tuning, "_seconds", seconds)
    failing = {"fast"}
    assert choose() == "middle"
    assert "'fast' is left out, it fails here: out of resource" in caplog.text
    failing = set(CONFIGS)
    assert choose(problem="backward") == "slow"
    [file] = (tmp_path / "allspark_fast").iterdir()
    assert "backward" not in file.read_text()


def test_processes_keep_the_choices_of_each_other(timed: list[str], tmp_path: Path) -> None:
    choose()
    [file] = (tmp_path / "allspark_fast").iterdir()
    file.write_text(json.dumps({"of another process": "1"}))
    choose(problem="backward")
    assert len(json.loads(file.read_text())) == 3


def test_any_configuration_can_be_fixed(timed: list[str]) -> None:
    for index, expected in enumerate([*CONFIGS, "middle"]):
        with tuning.fixed(index):
            assert choose() == expected
    assert not timed
    assert choose() == "fast"


def test_where_nothing_is_timed(timed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(device=torch.device("cpu")) == "slow"
    assert choose(["only"]) == "only"
    monkeypatch.setenv("ALLSPARK_TUNING", "0")
    assert choose() == "slow"
    monkeypatch.delenv("ALLSPARK_TUNING")
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert choose() == "slow"
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose() == "slow"
    assert not timed


@pytest.mark.gpu
def test_times_of_real_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    sizes = [4096, 64]
    matrices = {size: torch.randn(size, size, device="cuda") for size in sizes}
    assert fastest("product", sizes, lambda size: matrices[size] @ matrices[size], CUDA) == 64
