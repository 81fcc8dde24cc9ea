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
from bench.launches import (
    channel_attention_launches, depthwise_gelu_launches, semantic_memory_launches, upsample_launches
)
from triton.compiler import ASTSource
launches = {
    **channel_attention_launches("sm_90", torch.bfloat16, 289, 0.1),
    **semantic_memory_launches("sm_90", torch.bfloat16, 289),
    **upsample_launches("sm_90", torch.bfloat16),
    **depthwise_gelu_launches("sm_90", torch.bfloat16),
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
NAME = r"%([\w.#]+)"


def narrow_products(ttir: str) -> tuple[int, list[str]]:
    """How many addresses a kernel computes, and the 32-bit products in their offsets that may overflow.

    With one factor of a tile, its size or a place in it, a product stays below 2^31 as long as one axis has fewer than
    16 million entries; of two numbers that are known only when the kernel runs it need not.
    """
    lines = re.findall(rf'{NAME}(?::\d+)? = "?([\w.]+)"?(.*)', ttir)
    defined = {name: (operation, re.findall(NAME, rest), rest) for name, operation, rest in lines}
    defined |= {name: ("scf.for", operands, "") for name, operands in carried_by_loops(ttir).items()}
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


def carried_by_loops(ttir: str) -> dict[str, list[str]]:
    """What counters, arguments and results of loops come from."""
    assert set(re.findall(r"scf\.\w+", ttir)) <= {"scf.for", "scf.yield"}, "another way of control: follow it here"
    sources: dict[str, list[str]] = {}
    open_loops: list[tuple[str, list[str]]] = []
    for line in ttir.splitlines():
        if "scf.for" in line:
            head, _, rest = line.partition("scf.for")
            bounds, _, carried = rest.partition("iter_args")
            counter, *limits = re.findall(NAME, bounds)
            arguments = dict(re.findall(rf"{NAME} = {NAME}", carried))
            sources |= {counter: limits, **{name: [start] for name, start in arguments.items()}}
            if arguments:
                open_loops.append((re.findall(NAME, head)[0], list(arguments)))
        elif "scf.yield" in line:
            result, names = open_loops.pop()
            values = re.findall(NAME, line)
            for index, (name, value) in enumerate(zip(names, values, strict=True)):
                sources[name].append(value)
                sources[f"{result}#{index}" if len(names) > 1 else result] = [name]
    return sources


def is_of_tile(name: str, defined: dict[str, tuple[str, list[str], str]]) -> bool:
    if name not in defined:
        return False
    operation, operands, _ = defined[name]
    if operation in PASSES_ON:
        return is_of_tile(operands[0], defined)
    return operation in ("arith.constant", "tt.make_range")


LOOP = """%r:2 = scf.for %i = %c0 to %n step %c1 iter_args(%s = %c128, %q = {start}) -> (i32, i32) : i32 {{
    %b = arith.muli %q, %y : i32
    scf.yield %s, {next} : i32, i32
}}
%a = arith.addi %r#1, %c128 : i32"""


@pytest.mark.parametrize(
    ("product", "expected"),
    [
        ("%a = arith.muli %rows, %columns : i32 loc(#1)", 1),
        ("%a = arith.muli %rows, %c128 : i32 loc(#1)", 0),
        ("%b = arith.extsi %rows : i32 to i64\n%a = arith.muli %b, %columns : i64 loc(#1)", 0),
        (f"%z = arith.muli %x, %y : i32\n{LOOP.format(start='%z', next='%q')}", 1),
        (LOOP.format(start="%c128", next="%b"), 1),
        (LOOP.format(start="%c128", next="%q"), 0),
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
        wrong += [(name, x) for x in found]
    assert not wrong
    assert kernels == {
        *("hash_keys", "key_statistics", "half_key", "pack", "row_statistics", "rstd", "softmax", "finish"),
        *("row_sums", "norm_gradient", "gradient"),
        *("grouping", "route", "write"),
        *("cross_entropy", "cross_entropy_backward", "argmax"),
        *("depthwise_gelu", "depthwise_gelu_backward", "depthwise_transposed"),
    }
