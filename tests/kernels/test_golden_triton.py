"""The numbers of the reference implementation once more, with the operators' kernels, interpreted."""

from importlib import import_module

import pytest
import torch

from allspark_fast.kernels.channel_attention import op as attention_op
from allspark_fast.kernels.semantic_memory import op as memory_op
from allspark_fast.kernels.upsample_cross_entropy import chunked
from allspark_fast.kernels.upsample_cross_entropy import op as upsample_op
from tests import test_golden
from tests.helpers.triton_checks import uninitialized_memory_is_nan

# isort: split
from allspark_fast.kernels.upsample_cross_entropy import kernel as upsample_kernel

BOTTLENECK = {"semantic_memory", "channel_attention"}
UPSAMPLE = {"upsample_cross_entropy"}
# By the first letters of a file: the operators whose kernels take part.
OPERATORS = {
    "a_": BOTTLENECK,
    "b_": BOTTLENECK,
    "c_": BOTTLENECK | UPSAMPLE,
    "d_": BOTTLENECK | UPSAMPLE,
    "x_": UPSAMPLE,
}


def _case(name):
    """Those that take the interpreter more than a few seconds are slow tests."""
    slow = not name.startswith("a_") or "n289" in name or "b1" not in name
    return pytest.param(name, marks=pytest.mark.slow if slow else ())


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # NumPy's of log(0) and 1 / 0
@pytest.mark.parametrize("name", [_case(name) for name in test_golden.FILES])
def test_numbers(name, monkeypatch):
    operators, ran = OPERATORS[name[:2]], set()

    def implementation(fallback, *tensors, **_):
        """The float64 tensors that estimate the noise have no kernels."""
        operator = fallback.__package__.split(".")[-1]
        if operator not in operators or any(x.dtype != torch.float32 for x in tensors):
            return fallback
        ran.add(operator)
        return import_module(f"{fallback.__package__}.kernel")

    for op in (attention_op, memory_op, upsample_op):
        monkeypatch.setattr(op, "implementation", implementation)
    if name.startswith("d_"):  # in three steps the loss takes the interpreter too long: argmax remains
        monkeypatch.setattr(upsample_kernel, "forward", chunked.forward)
        monkeypatch.setattr(upsample_kernel, "backward", chunked.backward)
    with uninitialized_memory_is_nan():
        (test_golden.test_trajectory if name.startswith("d_") else test_golden.test_parity)(name)
    assert ran == operators
