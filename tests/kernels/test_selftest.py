"""The self-test: all kernels pass here, and what is broken is found."""

import pytest
import torch

from allspark_fast.kernels import selftest
from allspark_fast.kernels.selftest import CASES, check_kernels

CPU = torch.device("cpu")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's of masked lanes
def test_all_kernels_pass_in_the_interpreter():
    assert not [result for result in check_kernels(CPU) if result.failure]


def test_what_is_broken_is_found(monkeypatch):
    """By plain torch, as on a CPU without the interpreter."""
    monkeypatch.setattr(selftest, "set_kernels", lambda _: "torch")
    before, ops = torch.get_rng_state(), list(CASES)
    results = check_kernels(CPU)
    assert not [result for result in results if result.failure]
    assert [(x.op, x.dtype) for x in results] == [(op, str(x)[6:]) for op in ops for x in selftest.TOLERANCE]
    assert torch.equal(torch.get_rng_state(), before)

    def no_compiler(*_, **__):
        raise OSError("ptxas not found\nand a long trace")

    def broken(op, spoil):
        """Only in the dtypes that have kernels."""
        return lambda x, *rest, **options: (spoil if x.dtype != torch.float64 else lambda y: y)(op(x, *rest, **options))

    spoils = {
        "depthwise_gelu": lambda output: output * 1.02,
        "upsample_argmax": lambda outputs: ((outputs[0] + 1) % 21, outputs[1] * torch.nan),
        "semantic_memory_enqueue": no_compiler,
    }
    for name, spoil in spoils.items():
        op, *rest = CASES[name]
        monkeypatch.setitem(CASES, name, (broken(op, spoil), *rest))
    failures = {x.op: x.failure for x in check_kernels(CPU) if x.failure and x.dtype == "float32"}
    assert failures.keys() == spoils.keys()
    assert failures.pop("semantic_memory_enqueue") == "OSError: ptxas not found"
    assert all(x.endswith("at most 1e-05 is allowed") for x in failures.values())
