"""The public code's numbers once more, with every operator's kernels, interpreted, in the place of plain torch."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from allspark_fast.kernels.channel_attention import op as attention_op
from allspark_fast.kernels.semantic_memory import op as memory_op
from allspark_fast.kernels.triton_support import TRITON_OPS
from allspark_fast.kernels.upsample_argmax import op as argmax_op
from allspark_fast.kernels.upsample_cross_entropy import op as cross_entropy_op
from tests import test_golden
from tests.kernels.triton_checks import uninitialized_memory_is_nan

MEMORY = {"channel_semantic_grouping", "semantic_memory_enqueue"}
LOSS = {"upsample_cross_entropy"}
# By the first letters of a file: its test, and the operators that take part.
TESTS = {
    "a_": (test_golden.test_cross_attention, MEMORY | {"channel_attention"}),
    "b_allspark": (test_golden.test_bottleneck, MEMORY | {"channel_attention"}),
    "b_semidecoder": (test_golden.test_decoder, MEMORY | {"channel_attention"}),
    "c_": (test_golden.test_model, MEMORY | LOSS | {"channel_attention"}),
    "d_": (test_golden.test_trajectory, set(TRITON_OPS)),
    "x_": (test_golden.test_losses_and_metric, LOSS),
}


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """The operators whose kernels ran: of float32 tensors all, of the float64 ones that estimate the noise none."""
    names = set()

    def prefers_triton(name: str, x: Tensor) -> bool:
        if x.dtype == torch.float32:
            names.add(name)
        return x.dtype == torch.float32

    for op in (attention_op, memory_op, argmax_op, cross_entropy_op):
        monkeypatch.setattr(op, "prefers_triton", prefers_triton)
    with uninitialized_memory_is_nan():
        yield names


def _case(name: str) -> object:
    """Interpreting whole models takes a minute or two."""
    return pytest.param(name, marks=pytest.mark.slow if name.startswith(("c_", "d_")) else ())


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # how numpy announces log(0) and 1 / 0
@pytest.mark.parametrize("name", map(_case, test_golden.FILES))
def test_golden(name: str, ran: set[str]) -> None:
    ((test, operators),) = (entry for start, entry in TESTS.items() if name.startswith(start))
    test(name)
    assert ran == operators
