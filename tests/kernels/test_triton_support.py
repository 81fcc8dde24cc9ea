"""Which implementation runs where, and that nothing needs triton."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from allspark_fast.kernels import triton_support
from allspark_fast.kernels.channel_attention import chunked
from allspark_fast.kernels.channel_attention import op as attention_op
from allspark_fast.kernels.semantic_memory import op as memory_op
from allspark_fast.kernels.semantic_memory import vectorized

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
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(triton_support, "_INSTALLED", True)
    with FakeTensorMode():
        assert (
            triton_support.prefers_triton("channel_attention", torch.empty(1, dtype=dtype, device="cuda")) is preferred
        )


def test_cpu_tensors_take_plain_torch() -> None:
    x = torch.ones(1)
    assert attention_op._implementation(x, "auto") is chunked
    assert memory_op._implementation("semantic_memory_enqueue", x, x) is vectorized


def test_everything_runs_without_triton() -> None:
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", WITHOUT_TRITON], cwd=root, check=True, timeout=120)
