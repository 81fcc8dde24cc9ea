"""AllSpark (CVPR 2024) for semi-supervised semantic segmentation, exact and fast.

Start at ``allspark_fast.model`` (the bottleneck and whole models), ``allspark_fast.kernels`` (the operators) or
``python -m allspark_fast``.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("allspark-fast")
except PackageNotFoundError:  # used from a checkout, not installed
    __version__ = "0+unknown"
