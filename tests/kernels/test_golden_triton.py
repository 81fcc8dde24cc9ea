"""The numbers of the reference implementation once more, with the operators' kernels, interpreted."""

import functools
from importlib import import_module
from types import ModuleType

import pytest
import torch
from torch import Tensor

from allspark_fast.kernels.channel_attention import op as attention_op
from allspark_fast.kernels.semantic_memory import op as memory_op
from allspark_fast.kernels.upsample_argmax import op as argmax_op
from allspark_fast.kernels.upsample_cross_entropy import op as cross_entropy_op
from tests import test_golden
from tests.helpers.triton_checks import uninitialized_memory_is_nan

BOTTLENECK = {"semantic_memory", "channel_attention"}
# By the first letters of a file: the operators whose kernels take part. The loss, which takes the interpreter longest,
# is left out of the three steps of a trajectory.
OPERATORS = {
    "a_": BOTTLENECK,
    "b_": BOTTLENECK,
    "c_": {*BOTTLENECK, "upsample_cross_entropy"},
    "d_": {*BOTTLENECK, "upsample_argmax"},
    "x_": {"upsample_cross_entropy"},
}


def _case(name: str) -> object:
    """Those that take the interpreter more than a few seconds are slow tests."""
    slow = not name.startswith("a_") or "n289" in name or "b1" not in name
    return pytest.param(name, marks=pytest.mark.slow if slow else ())


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # NumPy's of log(0) and 1 / 0
@pytest.mark.parametrize("name", [_case(name) for name in test_golden.FILES])
def test_numbers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operators, ran = OPERATORS[name[:2]], set()

    def prefers_triton(operator: str, *tensors: Tensor) -> bool:
        """The float64 tensors that estimate the noise have no kernels."""
        runs = operator in operators and all(x.dtype == torch.float32 for x in tensors)
        ran.update({operator} if runs else ())
        return runs

    def implementation(fallback: ModuleType, *tensors: Tensor) -> ModuleType:
        runs = prefers_triton(fallback.__package__.split(".")[-1], *tensors)
        return import_module(f"{fallback.__package__}.kernel") if runs else fallback

    monkeypatch.setattr(attention_op, "prefers_triton", functools.partial(prefers_triton, "channel_attention"))
    for op in (memory_op, argmax_op, cross_entropy_op):
        monkeypatch.setattr(op, "implementation", implementation)
    with uninitialized_memory_is_nan():
        (test_golden.test_trajectory if name.startswith("d_") else test_golden.test_parity)(name)
    assert ran == operators
