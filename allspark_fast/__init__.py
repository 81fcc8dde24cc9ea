"""AllSpark (CVPR 2024) for semi-supervised semantic segmentation, exact and fast.

``train`` trains a recipe, ``load`` loads what it made, ``AllSpark`` is the bottleneck for your own model, and
``build_segmentor`` builds a whole model. The operators are in ``allspark_fast.kernels``.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from allspark_fast.api import load, train
    from allspark_fast.model import AllSpark, build_segmentor

try:
    __version__ = version("allspark-fast")
except PackageNotFoundError:  # used from a checkout, not installed
    __version__ = "0+unknown"

__all__ = ["AllSpark", "build_segmentor", "load", "train"]
_HOME = {"AllSpark": "model", "build_segmentor": "model", "load": "api", "train": "api"}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that importing the package costs nothing."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; its names are {', '.join(__all__)}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
