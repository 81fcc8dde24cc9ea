"""The self-test: all kernels pass here, and what is broken is found."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from allspark_fast.kernels import selftest
from allspark_fast.kernels.selftest import check_kernels, passed, results_table

CPU = torch.device("cpu")
OPS = {"channel_attention", "upsample_cross_entropy", "upsample_argmax", "depthwise_gelu"}
OPS |= {"channel_semantic_grouping", "semantic_memory_enqueue"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's of masked lanes
def test_all_kernels_pass_in_the_interpreter() -> None:
    results = check_kernels(CPU)
    table = results_table(results)
    assert passed(results), table
    assert table.count(" ok") == len(results)


def test_what_is_broken_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """By plain torch, as on a CPU without the interpreter."""
    monkeypatch.setattr(selftest, "set_kernels", lambda _: "torch")
    before = torch.get_rng_state()
    results = check_kernels(CPU)
    assert passed(results), results_table(results)
    assert {(x.op, x.dtype) for x in results} == {(op, str(x)[6:]) for op in OPS for x in selftest.TOLERANCE}
    assert torch.equal(torch.get_rng_state(), before)

    def no_compiler(*_: object, **__: object) -> None:
        raise OSError("ptxas not found\nand a long trace")

    def broken(op: Callable[..., Any], spoil: Callable[[Any], Any]) -> Callable[..., Any]:
        """Only in the dtypes that have kernels."""
        return lambda x, *rest, **options: (spoil if x.dtype != torch.float64 else lambda y: y)(op(x, *rest, **options))

    spoils = {
        "depthwise_gelu": lambda output: output * 1.02,
        "upsample_argmax": lambda outputs: (outputs[0], outputs[1] * torch.nan),
        "channel_semantic_grouping": lambda channel_class: (channel_class + 1) % 21,
        "semantic_memory_enqueue": no_compiler,
    }
    for name, spoil in spoils.items():
        op, *rest = selftest.CASES[name]
        monkeypatch.setitem(selftest.CASES, name, (broken(op, spoil), *rest))
    results = check_kernels(CPU)
    assert not passed(results)
    failures = {x.op: x.failure for x in results if x.dtype == "float32"}
    assert {op for op in OPS if failures[op]} == spoils.keys()
    assert failures.pop("semantic_memory_enqueue") == "OSError: ptxas not found"
    assert all(x.endswith("at most 1e-05 is allowed") for x in failures.values() if x)
