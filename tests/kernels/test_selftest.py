"""The self-test: all passes here, and what is broken is found."""

import pytest
import torch
from torch import Tensor

from allspark_fast.kernels import selftest
from allspark_fast.kernels.selftest import check_kernels, passed, results_table
from allspark_fast.kernels.triton_support import TRITON_OPS
from tests.helpers.triton_checks import exact_bfloat16

# isort: split
from allspark_fast.kernels.channel_attention import kernel
from allspark_fast.kernels.semantic_memory import kernel as memory_kernel

CPU = torch.device("cpu")


def test_every_kernel_has_a_case() -> None:
    assert {case.op for case in selftest.CASES} == set(TRITON_OPS)


def test_plain_torch_is_checked_where_no_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("allspark_fast.kernels.triton_support._INTERPRETED", False)
    monkeypatch.setattr(kernel, "forward", None)
    results = check_kernels(CPU)
    assert passed(results), results_table(results)
    assert {result.dtype for result in results} == {"float32", "float16", "bfloat16"}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_all_kernels_pass_in_the_interpreter(dtype: torch.dtype) -> None:
    with exact_bfloat16():
        results = check_kernels(CPU, [dtype])
    table = results_table(results)
    assert passed(results), table
    assert len(results) == len(selftest.CASES) == table.count(" ok")


def test_the_interpreter_leaves_out_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "CASES", selftest.CASES[-1:])
    assert {result.dtype for result in check_kernels(CPU)} == {"float32", "float16"}


@pytest.mark.parametrize("value", [1.001, float("nan")])
def test_wrong_numbers_are_found(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = kernel.forward
    monkeypatch.setattr(kernel, "forward", lambda *args: (forward(*args)[0] * value, forward(*args)[1]))
    monkeypatch.setattr(selftest, "CASES", selftest.CASES[:1])
    (result,) = check_kernels(CPU, [torch.float32])
    assert result.failure.startswith("wrong by")
    assert "at most 1e-05 is allowed" in results_table([result])


def test_a_wrong_class_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    grouping = memory_kernel.channel_semantic_grouping

    def off_by_one(features: Tensor, class_map: Tensor) -> Tensor:
        return (grouping(features, class_map) + 1) % class_map.shape[1]

    monkeypatch.setattr(memory_kernel, "channel_semantic_grouping", off_by_one)
    monkeypatch.setattr(selftest, "CASES", [case for case in selftest.CASES if "grouping" in case.op])
    assert not passed(check_kernels(CPU, [torch.float32]))


def test_what_a_compiler_raises_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*_: object) -> None:
        raise OSError("ptxas not found\nand a long trace")

    monkeypatch.setattr(memory_kernel, "semantic_memory_enqueue", no_compiler)
    monkeypatch.setattr(selftest, "CASES", selftest.CASES[-1:])
    (result,) = check_kernels(CPU, [torch.float32])
    assert result.failure == "OSError: ptxas not found"
    assert not passed([result])


def test_the_random_generator_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("allspark_fast.kernels.triton_support._INTERPRETED", False)
    before = torch.get_rng_state()
    check_kernels(CPU, [torch.float32])
    assert torch.equal(torch.get_rng_state(), before)
