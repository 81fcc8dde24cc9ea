"""Fixtures of the operators' tests."""

import pytest

from tests.helpers.kernels import use_kernels


@pytest.fixture(params=["torch", "triton"])
def kernels(request):
    """Run a test by plain torch and by the Triton kernels."""
    with use_kernels(request.param):
        yield request.param
