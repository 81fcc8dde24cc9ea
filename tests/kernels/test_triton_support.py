"""Which implementation runs where; tests/test_package.py: without triton."""

from functools import partial
from importlib import import_module

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from allspark_fast.kernels.channel_attention import chunked
from allspark_fast.kernels.selftest import CASES
from allspark_fast.kernels.triton_support import implementation, set_kernels


@pytest.fixture(autouse=True)
def _auto():
    yield
    set_kernels("auto")


@pytest.mark.parametrize("op", CASES)
def test_the_process_wide_switch(op, monkeypatch):
    pytest.importorskip("triton")
    package = "upsample_cross_entropy" if op == "upsample_argmax" else op.removesuffix("_enqueue")
    kernel = import_module(f"allspark_fast.kernels.{package}.kernel")

    def ran(*_):
        raise NotImplementedError("in place of a launch")

    monkeypatch.setattr(kernel, op if hasattr(kernel, op) else "forward", ran)
    operator, shapes, options = CASES[op]
    call = partial(operator, *(torch.ones(shape) for shape in shapes), **options)
    call()  # plain torch on the CPU
    assert set_kernels("triton") == "auto"
    with pytest.raises(NotImplementedError, match="in place of a launch"):
        call()
    assert set_kernels("torch") == "triton"
    call()


@pytest.mark.parametrize(
    ("capability", "dtype", "preferred"),
    [
        ((8, 0), torch.bfloat16, True),
        ((8, 9), torch.float32, True),
        ((12, 0), torch.float16, True),
        ((7, 5), torch.float16, False),
        ((9, 0), torch.float64, False),
    ],
)
def test_triton_is_preferred_from_sm_80(capability, dtype, preferred, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    with FakeTensorMode():
        x = torch.empty(1, dtype=dtype, device="cuda")
    assert (implementation(chunked, x) is not chunked) is preferred
    assert implementation(chunked, x, torch.ones(1)) is chunked
    set_kernels("torch")
    assert implementation(chunked, x) is chunked


def test_unknown_kernels_are_refused():
    with pytest.raises(ValueError, match="kernels must be auto, triton or torch, got 'cuda'"):
        set_kernels("cuda")
