"""Which implementation runs where, and that nothing needs triton."""

import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from allspark_fast.kernels.channel_attention import channel_attention
from allspark_fast.kernels.depthwise_gelu import depthwise_gelu
from allspark_fast.kernels.semantic_memory import channel_semantic_grouping, semantic_memory_enqueue
from allspark_fast.kernels.triton_support import prefers_triton, set_kernels
from allspark_fast.kernels.upsample_argmax import upsample_argmax
from allspark_fast.kernels.upsample_cross_entropy import upsample_cross_entropy

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from allspark_fast.model.cross_attention import CrossAttention
attention = CrossAttention(8, 3, 16)
x = torch.randn(2, 16, 8, requires_grad=True)
torch.cat(attention(x, x, torch.randn(2, 3, 16), use_memory=True)).sum().backward()
assert x.grad.isfinite().all()
"""
# By the module and the function of the kernels.
CALLS: dict[tuple[str, str], Callable[[Tensor], object]] = {
    ("channel_attention", "forward"): lambda x: channel_attention(*3 * [x[None]]),
    ("depthwise_gelu", "forward"): lambda x: depthwise_gelu(x, torch.ones(6, 1, 3, 3), torch.ones(6), (1, 20)),
    ("semantic_memory", "channel_semantic_grouping"): lambda x: channel_semantic_grouping(x, x.mT),
    ("semantic_memory", "semantic_memory_enqueue"): lambda x: semantic_memory_enqueue(
        torch.zeros(3, 4, 20), torch.zeros(3).long(), x, torch.zeros(1, 6).long()
    ),
    ("upsample_argmax", "upsample_argmax"): lambda x: upsample_argmax(x[None], (30, 30)),
    ("upsample_cross_entropy", "forward"): lambda x: upsample_cross_entropy(x[None], torch.zeros(1, 9, 9).long()),
}


class KernelRanError(Exception):
    """Raised in place of a launch."""


@pytest.fixture(autouse=True)
def _auto() -> None:
    yield
    set_kernels("auto")


@pytest.mark.parametrize(("folder", "function"), CALLS)
def test_the_process_wide_switch(folder: str, function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    kernel = import_module(f"allspark_fast.kernels.{folder}.kernel")

    def ran(*_: object) -> None:
        raise KernelRanError

    monkeypatch.setattr(kernel, function, ran)
    call = CALLS[folder, function]
    call(torch.ones(1, 20, 6))  # plain torch on the CPU
    assert set_kernels("triton") == "auto"
    with pytest.raises(KernelRanError):
        call(torch.ones(1, 20, 6))
    assert set_kernels("torch") == "triton"
    call(torch.ones(1, 20, 6))


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
def test_triton_is_preferred_from_sm_80(
    capability: tuple[int, int], dtype: torch.dtype, preferred: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    with FakeTensorMode():
        x = torch.empty(1, dtype=dtype, device="cuda")
    assert prefers_triton(x) is preferred
    assert not prefers_triton(x, torch.ones(1))
    set_kernels("torch")
    assert not prefers_triton(x)


def test_unknown_kernels_are_refused() -> None:
    with pytest.raises(ValueError, match="kernels must be auto, triton or torch, got 'cuda'"):
        set_kernels("cuda")


def test_everything_runs_without_triton() -> None:
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", WITHOUT_TRITON], cwd=root, check=True, timeout=120)
