"""The self-test: all kernels pass here, and what is broken is found."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from allspark_fast.kernels import selftest
from allspark_fast.kernels.selftest import check_kernels, passed, results_table

CPU = torch.device("cpu")
OPS = {"channel_attention", "upsample_cross_entropy", "upsample_argmax", "depthwise_gelu"}
OPS |= {"channel_semantic_grouping", "semantic_memory_enqueue"}


@pytest.fixture
def plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no kernel runs, as on a CPU without the interpreter."""
    monkeypatch.setattr(selftest, "set_kernels", lambda _: "torch")
    monkeypatch.setattr(selftest, "is_interpreted", lambda: False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's of masked lanes
def test_all_kernels_pass_in_the_interpreter() -> None:
    results = check_kernels(CPU)
    table = results_table(results)
    assert passed(results), table
    assert table.count(" ok") == len(results)
    assert {(x.op, x.dtype) for x in results} == {(op, dtype) for op in OPS for dtype in ("float32", "float16")}


@pytest.mark.usefixtures("plain_torch")
def test_plain_torch_passes_and_leaves_the_generator_alone() -> None:
    before = torch.get_rng_state()
    results = check_kernels(CPU)
    assert passed(results), results_table(results)
    dtypes = ("float32", "float16", "bfloat16")
    assert {(x.op, x.dtype) for x in results} == {(op, dtype) for op in OPS for dtype in dtypes}
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("plain_torch")
def test_what_is_broken_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(op: str, broken: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        operator, *rest = selftest.CASES[op]
        monkeypatch.setitem(selftest.CASES, op, (broken(operator), *rest))

    def no_compiler(*_: object, **__: object) -> None:
        raise OSError("ptxas not found\nand a long trace")

    def nan_confidence(labels: Tensor, confidence: Tensor) -> tuple[Tensor, Tensor]:
        return labels, confidence * torch.nan

    replace("depthwise_gelu", lambda op: lambda *args, **kwargs: op(*args, **kwargs) * 1.02)
    replace("upsample_argmax", lambda op: lambda *args, **kwargs: nan_confidence(*op(*args, **kwargs)))
    replace("channel_semantic_grouping", lambda op: lambda x, y: (op(x, y) + 1) % y.shape[1])
    replace("semantic_memory_enqueue", lambda _: no_compiler)
    results = check_kernels(CPU)
    assert not passed(results)
    failures = {x.op: x.failure for x in results if x.dtype == "float32"}
    assert failures["channel_attention"] == failures["upsample_cross_entropy"] == ""
    for op in ("depthwise_gelu", "upsample_argmax", "channel_semantic_grouping"):
        assert failures[op].startswith("wrong by")
        assert failures[op].endswith("at most 1e-05 is allowed")
    assert failures["semantic_memory_enqueue"] == "OSError: ptxas not found"
    assert all(x.failure for x in results if failures[x.op]), results_table(results)
