"""Fixtures of the operators' tests."""

from collections.abc import Iterator

import pytest

from allspark_fast.kernels.triton_support import set_kernels


@pytest.fixture(params=["torch", "triton"])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a test with plain torch, and with the Triton kernels in an exact and strict interpreter."""
    previous = set_kernels(request.param)
    try:
        if request.param == "triton":
            # Skips the test where triton is not installed, or compiles for a GPU.
            from tests.helpers.triton_checks import strict_interpreter  # noqa: PLC0415

            with strict_interpreter():
                yield request.param
        else:
            yield request.param
    finally:
        set_kernels(previous)
