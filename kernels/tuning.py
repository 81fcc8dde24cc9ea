"""Chooses among a few configurations of a kernel by timing them once on the GPU at hand, and remembers the choice.

The choices of a GPU are in ``$XDG_CACHE_HOME/allspark_fast`` (or ``~/.cache/allspark_fast``), a JSON file for its name
and the version of Triton, from the size of the problem to the configuration: copied to another machine they hold there.
``ALLSPARK_TUNING=0`` times nothing and looks at no file: the first configuration is taken everywhere, as it is under
``torch.use_deterministic_algorithms``, since configurations round differently.
"""

import functools
import json
import logging
import math
import os
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

logger = logging.getLogger(__name__)

_Config = TypeVar("_Config")
_ROUNDS = 5
_fixed_index: int | None = None


def cache_folder() -> Path:
    """Where results of this machine are remembered."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "allspark_fast"


@contextmanager
def fixed(index: int) -> Iterator[None]:
    """Take the configuration at ``index``, or the last, as long as the context lasts: to check every one."""
    global _fixed_index  # noqa: PLW0603 backward runs in a thread of autograd's
    _fixed_index = index
    try:
        yield
    finally:
        _fixed_index = None


def fastest(
    problem: str, configs: Sequence[_Config], run: Callable[[_Config], object], device: torch.device
) -> _Config:
    """The configuration with which ``run`` takes the least time.

    Timed at the first call for a problem, which waits for the device; while a CUDA graph is recorded, when nothing can
    be timed, and where no GPU is, it is the first one. One that fails is named in a warning and left out.

    Args:
        problem: what the choice depends on, besides the GPU and what is offered.
        configs: at least one; told apart by their ``repr``.
        run: may be called any number of times.
        device: where it runs.
    """
    if _fixed_index is not None:
        return configs[min(_fixed_index, len(configs) - 1)]
    untimed = os.environ.get("ALLSPARK_TUNING") == "0" or torch.are_deterministic_algorithms_enabled()
    if len(configs) == 1 or device.type != "cuda" or untimed:
        return configs[0]
    path = _path(torch.cuda.get_device_name(device))
    choices = _choices(path)
    # Problems of one size may offer different configurations, which must not take turns in one entry.
    entry = f"{problem}: {configs[0]!r} or {len(configs) - 1} more"
    known = next((config for config in configs if repr(config) == choices.get(entry)), None)
    if known is not None:
        return known
    if torch.cuda.is_current_stream_capturing():
        return configs[0]
    seconds = [_seconds_or_never(run, config) for config in configs]
    chosen = configs[seconds.index(min(seconds))]
    if min(seconds) < math.inf:
        choices[entry] = repr(chosen)
        _write(path, choices)
    return chosen


def _seconds_or_never(run: Callable[[_Config], object], config: _Config) -> float:
    """Infinity for a configuration that fails; if all do, the caller will see why."""
    try:
        return _seconds(run, config)
    except Exception as error:  # whatever a compiler or a driver raises
        logger.warning("%r is left out, it fails here: %s", config, error)
        return math.inf


def _seconds(run: Callable[[_Config], object], config: _Config) -> float:
    """The median time of a few rounds, after one that compiles."""
    run(config)
    rounds = []
    for _ in range(_ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run(config)
        end.record()
        end.synchronize()
        rounds.append(start.elapsed_time(end))
    return statistics.median(rounds)


def _path(device_name: str) -> Path:
    import triton  # noqa: PLC0415 optional

    return cache_folder() / f"tiles_{re.sub('[^A-Za-z0-9]+', '-', device_name)}_triton-{triton.__version__}.json"


@functools.cache
def _choices(path: Path) -> dict[str, str]:
    """The choices of this process and of the file, which is read once."""
    return _read(path)


def _read(path: Path) -> dict[str, str]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    except (OSError, ValueError, TypeError) as error:
        logger.warning("%s cannot be read (%s): kernels are tuned again", path, error)
        return {}


def _write(path: Path, choices: dict[str, str]) -> None:
    """Write the choices, and keep what other processes have written meanwhile."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(_read(path) | choices, indent=1), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        logger.warning("%s cannot be written (%s): kernels will be tuned again next time", path, error)
