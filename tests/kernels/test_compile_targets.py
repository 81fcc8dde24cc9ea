"""Every kernel, as it is launched, compiled for GPUs that need not be there: no spills, and within limits.

Compilation and the interpreter exclude each other in one process, so each target has its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = "import json; from bench.static import report; print(json.dumps(report({target!r}, full={full})))"
SHARED_KIB = {"sm_80": 163, "sm_86": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}


def check_compiled(target: str, *, full: bool) -> None:
    command = [sys.executable, "-c", SCRIPT.format(target=target, full=full)]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    root = Path(__file__).parents[2]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    records = json.loads(result.stdout)
    kernels = {"half_key", "half_rows", "row_statistics", "softmax", "gradient", "finish", "enqueue"}
    kernels |= {"cross_entropy", "cross_entropy_backward", "argmax"}
    kernels |= {"depthwise_gelu", "depthwise_gelu_backward"}
    assert {record["kernel"] for record in records} == kernels
    for record in records:
        assert record["spill_bytes"] == 0, record
        assert record["shared_bytes"] <= SHARED_KIB[target] * 1024, record


@pytest.mark.slow
@pytest.mark.parametrize("target", SHARED_KIB)
def test_training_step_in_bfloat16(target: str) -> None:
    check_compiled(target, full=False)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif("ALLSPARK_COMPILE_ALL" not in os.environ, reason="minutes: set ALLSPARK_COMPILE_ALL for all of it")
@pytest.mark.parametrize("target", SHARED_KIB)
def test_whole_table(target: str) -> None:
    """Every dtype, N = 256, 289, 676 and 1369, dropout on and off."""
    check_compiled(target, full=True)
