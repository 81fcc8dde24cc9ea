"""Puts the repository root on the import path, so that tests run without an installation and can import bench.

Where there is no GPU, Triton kernels run in its interpreter; the variable counts only before triton is imported. With
a GPU it stays unset: a process either interprets or compiles. Tests run side by side and start processes of their own:
with one thread each they do not wait for each other's.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # counts only before torch is imported

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
