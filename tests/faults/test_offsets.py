"""Tensors of more than 2^31 elements: every kernel addresses in 64 bits where an argument can be that large."""

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
from bench.static_report import DEVICES, ASTSource
from bench.static_report import channel_attention_launches, semantic_memory_launches, upsample_launches
launches = dict.fromkeys(channel_attention_launches("sm_90", torch.bfloat16, 289, 0.1))
launches |= dict.fromkeys(channel_attention_launches("sm_90", torch.bfloat16, 676, 0.1))
launches |= dict.fromkeys(semantic_memory_launches("sm_90", torch.bfloat16, 289))
launches |= dict.fromkeys(upsample_launches("sm_90", torch.bfloat16))
found = []
for launch in launches:
    source = ASTSource(launch.kernel, dict(launch.signature), constexprs=dict(launch.constants))
    compiled = triton.compile(source, target=DEVICES["sm_90"].target, options=dict(launch.options))
    found.append([launch.name, compiled.asm["ttir"]])
print(json.dumps(found))
"""
# Vectors over channels or classes, never over batch or tokens, read at the index of one program.
SMALL = {"column_mask", "seed", "queue_ptr", "channel_class"}


def first_offsets(ttir: str) -> dict[str, set[str]]:
    """Types of the offsets that are added to each pointer argument itself."""
    bases = {name: name for name in re.findall(r"%(\w+): !tt\.ptr<", ttir.split("{")[1])}
    offsets: dict[str, set[str]] = {}
    for result, operation, base, kind in re.findall(
        r"%(\w+) = tt\.(splat|addptr) %(\w+)(?:, %\w+)? : (.*?)(?: loc|$)", ttir, re.MULTILINE
    ):
        if base not in bases:
            continue
        if operation == "splat":
            bases[result] = bases[base]
        else:
            offsets.setdefault(bases[base], set()).add(re.findall(r"i(32|64)>?$", kind)[0])
    return offsets


@pytest.mark.slow
def test_large_arguments_have_64_bit_offsets() -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    kernels = set()
    for name, ttir in json.loads(result.stdout):
        kernels.add(name)
        offsets = first_offsets(ttir)
        assert offsets, ttir[:2000]
        for argument, widths in offsets.items():
            assert widths == {"64"} or argument in SMALL, (name, argument, widths)
    assert kernels == {
        *("probability", "merge", "gradient", "one_pass", "combine"),
        *("grouping", "route", "write"),
        *("cross_entropy", "cross_entropy_backward", "argmax"),
    }
