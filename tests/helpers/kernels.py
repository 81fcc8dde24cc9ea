"""Operators by plain torch, or by the Triton kernels in an exact and strict interpreter."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from hypothesis import strategies as st

from allspark_fast.kernels.triton_support import Kernels, set_kernels, why_no_triton

# The interpreter is slow, and not everywhere.
MOSTLY_TORCH = st.sampled_from(["torch"] * 5 + ["triton"] * (why_no_triton(torch.device("cpu")) is None))


@contextmanager
def use_kernels(kernels: Kernels) -> Iterator[None]:
    """Set the kernels of this process for a while; skips the test if the interpreter is needed and not there."""
    previous = set_kernels(kernels)
    try:
        if kernels == "triton":
            from tests.helpers.triton_checks import strict_interpreter  # noqa: PLC0415 skips

            with strict_interpreter():
                yield
        else:
            yield
    finally:
        set_kernels(previous)
