"""The first shapes of ``python -m tests.faults.memory_safety``, which takes a thousand of each."""

import pytest

from tests.faults.memory_safety import OPS, check

# isort: split
from allspark_fast.kernels.channel_attention import kernel

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # how numpy announces a NaN


@pytest.mark.parametrize("op", OPS)
def test_random_shapes(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in filter(str.isupper, dir(kernel)):  # check() changes some of them
        monkeypatch.setattr(kernel, name, getattr(kernel, name))
    check(op, 5)
