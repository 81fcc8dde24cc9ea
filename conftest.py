"""Settings that count only before torch and triton are imported.

Where there is no GPU, Triton kernels run in its interpreter; the variable counts only before triton is imported. With
a GPU it stays unset: a process either interprets or compiles. Tests run side by side and start processes of their own:
with one thread each they do not wait for each other's.
"""

import os
from importlib.metadata import PackageNotFoundError, version

os.environ["OMP_NUM_THREADS"] = "1"  # counts only before torch is imported

import numpy as np
import torch
from packaging.version import Version


def _interpreter_needs_older_numpy() -> bool:
    try:
        return Version(version("triton")) < Version("3.7") and Version(np.__version__) >= Version("2.4")
    except PackageNotFoundError:
        return False


def _mend_interpreter() -> None:
    """Let the interpreter of triton 3.6 convert arrays of one entry to integers, which int() refuses from NumPy 2.4."""
    from triton.runtime import interpreter  # noqa: PLC0415 optional, and reads TRITON_INTERPRET when imported

    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor: type, scope: object) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched


if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if _interpreter_needs_older_numpy():
        _mend_interpreter()
