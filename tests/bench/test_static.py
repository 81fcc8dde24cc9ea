"""What the report of a compiled kernel holds; tests/kernels/test_compile_targets.py compiles all of them."""

from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

from bench.static import describe


def test_a_kernel_for_amd():
    assembly = "  .vgpr_count: 129\n  .vgpr_spill_count: 3\n  .agpr_count: 0\n"
    kernel = SimpleNamespace(
        name="_merge_kernel",
        metadata=SimpleNamespace(shared=10_000, num_warps=4, num_stages=2),
        src=SimpleNamespace(signature={"x": "*bf16"}),
        asm={"amdgcn": assembly},
    )
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
