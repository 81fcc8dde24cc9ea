"""Compiles the Triton kernels as they are launched, for GPUs that need not be there, and reports what they need."""

import itertools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.compiler import ASTSource, CompiledKernel

from bench.gpus import GPUS, KIB, Gpu
from bench.launch_work import work_of
from bench.launches import (
    Call,
    Launch,
    Launches,
    channel_attention_launches,
    depthwise_gelu_launches,
    semantic_memory_launches,
    upsample_launches,
)

STATIC_COLUMNS = {
    "kernel": ("kernel", 1),
    "dtype": ("dtype", 1),
    "N": ("tokens", 1),
    "dropout": ("dropout", 1),
    "config": ("config", 1),
    "registers": ("registers", 1),
    "spill bytes": ("spill_bytes", 1),
    "shared bytes": ("shared_bytes", 1),
    "blocks per SM": ("ctas_per_sm", 1),
    "matrix instruction": ("mma", 1),
    "instructions": ("mix", 1),
    "bound": ("bound", 1),
    "at least µs": ("least_seconds", 1e6),
}
# In the order of preference in which a kernel that holds several is described.
_MATRIX_INSTRUCTIONS = ("wgmma", "tcgen05.mma", "mma.sync", "v_mfma")
# What an instruction of the assembly is for: the first pattern that it starts with.
_INSTRUCTIONS = {
    "matrix": r"[HIQ]G?MMA|UTC\w*MMA|v_mfma",
    "global": r"LDG|STG|UTMA|ATOM|RED|global_|buffer_|flat_",
    "shared": r"LDS|STS|LDTM|STTM|ds_",
    "special": r"MUFU|v_(exp|log|rcp|rsq|sqrt)",
    "float": r"F|HADD|HMUL|HFMA|v_\w*f(16|32)",
    "integer": r"U?(IMAD|IADD|LOP3|SHF|ISETP|LEA|PRMT|VIADD|IMNMX|SEL)|v_\w*[iub](16|32|64)",
}
_BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class _Resources(NamedTuple):
    """What a compiled kernel takes, and its assembly."""

    registers: int
    spill_bytes: int
    assembly: str


def compile_launch(launch: Launch, call: Call, device: str) -> dict[str, Any]:
    """Compile for ``device`` and describe; ``report`` names the fields."""
    gpu = GPUS[device]
    source = ASTSource(
        launch.kernel,
        dict(launch.signature),
        constexprs=dict(launch.constants),
        attrs={(index,): [["tt.divisibility", 16]] for index in launch.aligned},
    )
    compiled = triton.compile(source, target=gpu.target, options=dict(launch.options))
    resources = (_amd_resources if gpu.target.backend == "hip" else _nvidia_resources)(compiled, device)
    shared = compiled.metadata.shared
    portable = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    bound, least_seconds = work_of(launch.name, call).bound(device)
    return {
        "kernel": launch.name,
        "target": device,
        "dtype": dict(launch.signature)[launch.kernel.arg_names[0]].strip("*"),
        "tokens": call.arguments.get("N"),
        "dropout": dict(launch.signature).get("row_key") == "*i32",
        "config": launch.config,
        "registers": resources.registers,
        "spill_bytes": resources.spill_bytes,
        "shared_bytes": shared,
        "ctas_per_sm": _occupancy(resources.registers, shared, compiled.metadata.num_warps, gpu),
        "mma": next((name for name in _MATRIX_INSTRUCTIONS if name in portable), "fma"),
        "mix": ", ".join(f"{count} {kind}" for kind, count in instruction_mix(resources.assembly).items()),
        "bound": bound,
        "least_seconds": least_seconds,
    }


def instruction_mix(assembly: str) -> dict[str, int]:
    """How many instructions of each kind stand in a kernel's assembly, as nvdisasm or the AMD compiler prints it."""
    opcodes = re.findall(
        r"^\s+(?:/\*[0-9a-f]{4,}\*/\s+)?(?:@!?U?P\w+\s+)?([A-Za-z][\w.]*)\b(?!:)", assembly, re.MULTILINE
    )
    kinds = (next((kind for kind, start in _INSTRUCTIONS.items() if re.match(start, x)), "other") for x in opcodes)
    counts = Counter(kinds)
    return {kind: counts[kind] for kind in [*_INSTRUCTIONS, "other"]}


def _nvidia_resources(compiled: CompiledKernel, device: str) -> _Resources:
    arch = GPUS[device].target.arch
    ptxas = _BINARIES / ("ptxas-blackwell" if arch >= 100 else "ptxas")
    suffix = "a" if arch >= 90 else ""
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(compiled.asm["ptx"])
        log = _output(ptxas, "-v", f"--gpu-name={device}{suffix}", source, "-o", binary).stderr
        assembly = _output(_BINARIES / "nvdisasm", "-c", binary).stdout
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = int(re.findall(r"Used (\d+) registers", log)[0])
    return _Resources(registers, sum(int(x) for pair in spills for x in pair), assembly)


def _output(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(x) for x in command], capture_output=True, text=True, check=True)


def _amd_resources(compiled: CompiledKernel, device: str) -> _Resources:
    """Vector registers of the unified file, and spilled ones in bytes for one lane."""
    assembly = compiled.asm["amdgcn"]
    fields = dict(re.findall(r"\.(vgpr_count|agpr_count|vgpr_spill_count):\s*(\d+)", assembly))
    return _Resources(int(fields["vgpr_count"]), 4 * int(fields["vgpr_spill_count"]), assembly)


def _occupancy(registers: int, shared: int, warps: int, gpu: Gpu) -> int:
    """Blocks that fit on one processor (SM or CU) at a time."""
    if shared > gpu.shared_per_block:
        return 0
    if gpu.target.backend == "hip":  # four SIMDs, each with 512 registers a lane and at most 8 waves
        by_registers = min(8, 512 // max(8, -(-registers // 8) * 8)) * 4 // warps
        return min(by_registers, gpu.shared_per_processor // max(1, shared))
    by_registers = 65536 // (32 * -(-registers // 8) * 8) // warps
    by_shared = gpu.shared_per_processor // (shared + KIB)  # the system takes 1 KiB of each block
    return min(by_registers, gpu.warps_per_processor // warps, by_shared)


def report(devices: Iterable[str], *, full: bool) -> Iterator[dict[str, Any]]:
    """Compile the kernels of a training step and describe each.

    Args:
        devices: names in ``GPUS``.
        full: every dtype, 256, 289, 676 and 1369 tokens, dropout on and off; otherwise bfloat16, up to 676, dropout.

    Yields:
        flat records: kernel, target, dtype, tokens (the smallest number that it serves), dropout, config, registers,
        spill_bytes, shared_bytes, ctas_per_sm, mma, mix (instructions by kind as they stand there, however often they
        run), bound (what takes longest at the GPU's peaks) and least_seconds (how long).
    """
    dtypes, sizes, dropouts = [torch.bfloat16], [256, 289, 676], [0.1]
    if full:
        dtypes, sizes, dropouts = [*dtypes, torch.float16, torch.float32], [*sizes, 1369], [0.0, *dropouts]
    for device in devices:
        launches: Launches = {}
        for part in _parts(device, dtypes, sizes, dropouts):
            launches = launches | {launch: call for launch, call in part.items() if launch not in launches}
        for launch, call in launches.items():
            yield compile_launch(launch, call, device)


def _parts(
    device: str, dtypes: Sequence[torch.dtype], sizes: Sequence[int], dropouts: Sequence[float]
) -> Iterator[Launches]:
    for dtype in dtypes:
        for tokens, dropout_p in itertools.product(sizes, dropouts):
            yield channel_attention_launches(device, dtype, tokens, dropout_p)
        yield semantic_memory_launches(device, dtype, 289)
        yield upsample_launches(device, dtype)
        yield depthwise_gelu_launches(device, dtype)
