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
# By the first letters of a file: its test, and the operators whose kernels take part. The loss, which takes the
# interpreter longest, is left out of the three steps of a trajectory.
TESTS = {
    "a_": (test_golden.test_cross_attention, BOTTLENECK),
    "b_allspark": (test_golden.test_bottleneck, BOTTLENECK),
    "b_semidecoder": (test_golden.test_decoder, BOTTLENECK),
    "c_": (test_golden.test_model, {*BOTTLENECK, "upsample_cross_entropy"}),
    "d_": (test_golden.test_trajectory, {*BOTTLENECK, "upsample_argmax"}),
    "x_": (test_golden.test_losses_and_metric, {"upsample_cross_entropy"}),
}


def _case(name: str) -> object:
    """Those that take the interpreter more than a few seconds are slow tests."""
    slow = name.startswith(("a_n289c8h2k21", "c_", "d_", "x_"))
    return pytest.param(name, marks=pytest.mark.slow if slow else ())


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # NumPy's of log(0) and 1 / 0
@pytest.mark.parametrize("name", [_case(name) for name in test_golden.FILES])
def test_golden(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ((test, operators),) = (entry for start, entry in TESTS.items() if name.startswith(start))
    ran = set()

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
        test(name)
    assert ran == operators
