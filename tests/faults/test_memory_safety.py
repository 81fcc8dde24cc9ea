"""The first shape of ``python -m tests.faults.memory_safety``, which takes a thousand of each operator."""

import pytest

from tests.faults.memory_safety import OPS, check


@pytest.mark.parametrize("op", OPS)
def test_random_shapes(op):
    check(op, 1)
