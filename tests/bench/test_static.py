"""What the report of a compiled kernel holds; tests/kernels/test_compile_targets.py compiles all of them."""

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton")

from bench.static import describe

PTX = """
.version 7.8
.target sm_80
.address_size 64
.visible .entry kernel() { ret; }
"""


def compiled(signature: dict[str, str], shared: int, warps: int, **asm: str) -> Any:
    metadata = SimpleNamespace(shared=shared, num_warps=warps, num_stages=2)
    return SimpleNamespace(name="_merge_kernel", metadata=metadata, src=SimpleNamespace(signature=signature), asm=asm)


def test_a_kernel_for_amd() -> None:
    assembly = "  .vgpr_count: 129\n  .vgpr_spill_count: 3\n  .agpr_count: 0\n"
    kernel = compiled({"x": "*bf16"}, shared=10_000, warps=4, amdgcn=assembly)
    arguments = {"x": None, "BLOCK_R": 64, "BLOCK_L": 128}
    assert describe(kernel, arguments, "gfx942") == {
        "op": "static",
        "size": "gfx942",
        "kernel": "merge",
        "target": "gfx942",
        "dtype": "bf16",
        "config": "R64 L128 stages=2 warps=4",
        "registers": 129,
        "spill_bytes": 12,
        "shared_bytes": 10_000,
    }


def test_a_kernel_for_nvidia() -> None:
    record = describe(compiled({"x": "*fp32"}, shared=0, warps=4, ptx=PTX), {}, "sm_80")
    assert record["spill_bytes"] == 0
    assert 1 <= record["registers"] <= 32
