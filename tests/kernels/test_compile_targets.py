"""Every kernel, as a training step launches it, compiled for GPUs that need not be there.

No spills, within limits, and no address that is a 32-bit product of two sizes or indices: tensors may have more than
2^31 elements. Compilation and the interpreter exclude each other in one process: each target has its own.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = """
import json, sys
from bench.static import kernel_name, report, step_launches
launches = step_launches(sys.argv[1], full=False)
print(json.dumps([report(sys.argv[1], full=False), [[kernel_name(x), x.asm["ttir"]] for x in launches]]))
"""
SHARED_KIB = {"sm_80": 163, "sm_86": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}
KERNELS = {
    "half_key", "half_rows", "row_statistics", "softmax", "gradient", "finish", "enqueue", "cross_entropy",
    "cross_entropy_backward", "argmax", "depthwise_gelu", "depthwise_gelu_backward",
}  # fmt: skip
NAME = r"%([\w.#-]+)"
# What only changes the shape or the width of a number.
PASSES_ON = {"tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "arith.extsi", "arith.extui", "arith.trunci"}
# Products of two numbers of the launch that are no offsets of elements, by kernel and variable.
NO_OFFSETS = {("cross_entropy_backward", "b_behind")}  # twice a place along one axis


def narrow_products(ttir):
    """Variables that are 32-bit products of two numbers which are both known only when the kernel runs.

    With one factor of a tile, its size or a place in it, a product stays below 2^31 as long as one axis has fewer than
    16 million entries; of two others it need not.
    """
    lines = re.findall(rf'{NAME}(?::\d+)? = "?([\w.]+)"?(.*)', ttir)
    defined = {name: (operation, re.findall(NAME, rest)) for name, operation, rest in lines}

    def is_of_tile(name):
        operation, operands = defined.get(name, ("argument", []))
        if operation in PASSES_ON:
            return is_of_tile(operands[0])
        return operation in ("arith.constant", "tt.make_range")

    return {
        re.sub(r"_\d+$", "", name)
        for name, operation, rest in lines
        if operation == "arith.muli" and re.search(r": (tensor<[\dx]*xi32|i32)", rest)
        if not any(map(is_of_tile, re.findall(NAME, rest)))
    }


@pytest.mark.parametrize(
    ("ttir", "expected"),
    [
        ("%a_7 = arith.muli %rows, %columns : i32 loc(#1)", {"a"}),
        ("%a = arith.muli %rows, %c128 : i32 loc(#1)", set()),
        ("%b = arith.extsi %rows : i32 to i64\n%a = arith.muli %b, %columns : i64 loc(#1)", set()),
        ("%b = arith.muli %x, %y : tensor<64xi32>\n%a = arith.extsi %b : tensor<64xi32> to tensor<64xi64>", {"b"}),
        ("%t = tt.splat %c128 : i32 -> tensor<64xi32>\n%b = arith.muli %x, %t : tensor<64xi32>", set()),
    ],
)
def test_narrow_products_are_found(ttir, expected):
    assert narrow_products(f"%c128 = arith.constant 128 : i32\n{ttir}") == expected


@pytest.mark.slow
@pytest.mark.parametrize("target", SHARED_KIB)
def test_training_step_in_bfloat16(target):
    command, environment = [sys.executable, "-c", SCRIPT, target], {**os.environ, "TRITON_INTERPRET": "0"}
    root = Path(__file__).parents[2]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    records, kernels = json.loads(result.stdout)
    assert {record["kernel"] for record in records} == KERNELS
    for record in records:
        assert record["spill_bytes"] == 0, record
        assert record["shared_bytes"] <= SHARED_KIB[target] * 1024, record
    assert all("arith.muli" in ttir for _, ttir in kernels)
    assert {(name, product) for name, ttir in kernels for product in narrow_products(ttir)} <= NO_OFFSETS
