"""Tensors of more than 2^31 elements: no kernel computes an address by a 32-bit product of two sizes or indices."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# Compilation and the interpreter exclude each other in one process.
SCRIPT = """
import json, torch, triton
from bench.gpus import GPUS
from bench.launches import channel_attention_launches, semantic_memory_launches, upsample_launches
from triton.compiler import ASTSource
launches = {
    **channel_attention_launches("sm_90", torch.bfloat16, 289, 0.1),
    **channel_attention_launches("sm_90", torch.bfloat16, 676, 0.1),
    **semantic_memory_launches("sm_90", torch.bfloat16, 289),
    **upsample_launches("sm_90", torch.bfloat16),
}
found = []
for launch in launches:
    source = ASTSource(launch.kernel, dict(launch.signature), constexprs=dict(launch.constants))
    compiled = triton.compile(source, target=GPUS["sm_90"].target, options=dict(launch.options))
    found.append([launch.name, compiled.asm["ttir"]])
print(json.dumps(found))
"""
# What only changes the shape or the width of a number.
PASSES_ON = {"tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "arith.extsi", "arith.extui", "arith.trunci"}


def narrow_products(ttir: str) -> tuple[int, list[str]]:
    """How many addresses a kernel computes, and the 32-bit products in their offsets that may overflow.

    With one factor of a tile, its size or a place in it, a product stays below 2^31 as long as one axis has fewer than
    16 million entries; of two numbers that are known only when the kernel runs it need not.
    """
    lines = re.findall(r"%([\w#]+)(?::\d+)? = ([\w.]+) (.*)", ttir)
    defined = {name: (operation, re.findall(r"%([\w#]+)", rest), rest) for name, operation, rest in lines}
    offsets = [operands[1] for operation, operands, _ in defined.values() if operation == "tt.addptr"]
    pending, seen, found = list(offsets), set(), []
    while pending:
        name = pending.pop()
        if name in seen or name not in defined:
            continue
        seen.add(name)
        operation, operands, rest = defined[name]
        is_narrow = re.search(r": (tensor<[\dx]*xi32|i32)", rest)
        if operation == "arith.muli" and is_narrow and not any(is_of_tile(x, defined) for x in operands):
            found.append(f"%{name} = {operation} {rest}")
        if operation != "tt.load":
            pending += operands
    return len(offsets), found


def is_of_tile(name: str, defined: dict[str, tuple[str, list[str], str]]) -> bool:
    if name not in defined:
        return False
    operation, operands, _ = defined[name]
    if operation in PASSES_ON:
        return is_of_tile(operands[0], defined)
    return operation in ("arith.constant", "tt.make_range")


@pytest.mark.parametrize(
    ("product", "expected"),
    [
        ("%a = arith.muli %rows, %columns : i32 loc(#1)", 1),
        ("%a = arith.muli %rows, %c128 : i32 loc(#1)", 0),
        ("%b = arith.extsi %rows : i32 to i64\n%a = arith.muli %b, %columns : i64 loc(#1)", 0),
        ("%b = arith.muli %x, %y : tensor<64xi32>\n%a = arith.extsi %b : tensor<64xi32> to tensor<64xi64>", 1),
    ],
)
def test_narrow_products_are_found(product: str, expected: int) -> None:
    ttir = f"%c128 = arith.constant 128 : i32\n{product}\n%p = tt.addptr %x, %a : !tt.ptr<f32>, i32 loc(#2)"
    addresses, found = narrow_products(ttir)
    assert (addresses, len(found)) == (1, expected)


@pytest.mark.slow
def test_offsets_do_not_overflow() -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    kernels, wrong = set(), []
    for name, ttir in json.loads(result.stdout):
        kernels.add(name)
        addresses, found = narrow_products(ttir)
        assert addresses >= 2, ttir[:2000]
        wrong += [(name, product) for product in found]
    assert not wrong
    assert kernels == {
        *("probability", "merge", "gradient", "one_pass", "combine"),
        *("grouping", "route", "write"),
        *("cross_entropy", "cross_entropy_backward", "argmax"),
    }
