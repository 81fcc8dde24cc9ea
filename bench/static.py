"""What the Triton kernels need on GPUs that need not be there: registers, spills, shared memory, occupancy.

The operators are called on fake tensors, so that nothing runs, and Triton compiles each kernel with the arguments,
alignments and tiles of the launch. TRITON_INTERPRET must not be set in the process.
"""

import itertools
import math
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

from allspark_fast.kernels.channel_attention import kernel as channel_attention
from allspark_fast.kernels.depthwise_gelu import kernel as depthwise_gelu
from allspark_fast.kernels.semantic_memory import kernel as semantic_memory
from allspark_fast.kernels.upsample_argmax import kernel as upsample_argmax
from allspark_fast.kernels.upsample_cross_entropy import kernel as upsample_cross_entropy

COLUMNS = {
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
}
# In the order of preference in which a kernel that holds several is described.
_MATRIX_INSTRUCTIONS = ("wgmma", "tcgen05.mma", "mma.sync", "v_mfma")
_BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_KIB = 1024


class Gpu(NamedTuple):
    """A compiler's target, and what bounds the blocks on one processor (SM or CU); shared memory in bytes."""

    target: GPUTarget
    capability: tuple[int, int]
    shared_per_block: int
    shared_per_processor: int
    warps_per_processor: int


def _nvidia(major: int, minor: int, shared_kib: int, warps: int) -> Gpu:
    """The system takes 1 KiB of each SM's shared memory for a block."""
    target = GPUTarget("cuda", 10 * major + minor, 32)
    return Gpu(target, (major, minor), (shared_kib - 1) * _KIB, shared_kib * _KIB, warps)


GPUS = {
    "sm_80": _nvidia(8, 0, 164, 64),
    "sm_86": _nvidia(8, 6, 100, 48),
    "sm_90": _nvidia(9, 0, 228, 64),
    "sm_100": _nvidia(10, 0, 228, 64),
    "gfx942": Gpu(GPUTarget("hip", "gfx942", 64), (9, 4), 64 * _KIB, 64 * _KIB, 32),
}
# Kernels with the arguments, by name, of their first launch.
Launches = dict[CompiledKernel, Mapping[str, Any]]


class _Driver(NamedTuple):
    """Triton's driver of a GPU that need not be there: enough to compile."""

    target: GPUTarget

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target.arch)  # the key under which a kernel keeps what is compiled

    def get_current_stream(self, _: object) -> int:
        return 0


def compile_launches(function: Callable[[], object], device: str) -> Launches:
    """Compile the distinct kernels that ``function`` launches.

    Args:
        function: runs on fake tensors, so that it needs no GPU.
        device: name in ``GPUS`` of the one that ``function`` and the compiler find.
    """
    gpu, launches = GPUS[device], Launches()
    run = JITFunction.run

    def compile_only(kernel: JITFunction, *args: object, grid: object, warmup: bool, **kwargs: Any) -> None:
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        launches.setdefault(run(kernel, *args, grid=grid, warmup=True, **kwargs), arguments)

    with (
        FakeTensorMode(),
        patch.object(JITFunction, "run", compile_only),
        patch.object(driver, "_active", _Driver(gpu.target)),
        patch.object(FakeTensor, "data_ptr", lambda x: x.storage_offset() * x.itemsize),
        patch.object(torch.version, "hip", "hip" if gpu.target.backend == "hip" else None),
        patch.object(torch.cuda, "get_device_capability", lambda _: gpu.capability),
    ):
        function()
    return launches


def channel_attention_launches(device: str, dtype: torch.dtype, tokens: int, dropout_p: float) -> Launches:
    """Compile the kernels of a step on ``tokens`` tokens, 21 · 1024 keys and a group mask."""

    def step() -> None:
        query = torch.empty(4, 1, tokens, 1024, dtype=dtype, device="cuda")
        key = torch.empty(1, 1, tokens, 21 * 1024, dtype=dtype, device="cuda")
        mask = torch.empty(key.shape[3], dtype=torch.bool, device="cuda")
        seed = torch.empty((), dtype=torch.int64, device="cuda")
        output, statistics = channel_attention.forward(query, key, key, mask, 1e-5, dropout_p, seed)
        channel_attention.backward(output, query, key, key, statistics, mask, dropout_p, seed)

    def no_product(*_: Tensor, out: Tensor, **__: object) -> Tensor:
        return out

    # Products are the library's. Of those in another dtype than their operands' torch has no fake results.
    with patch.multiple(torch, bmm=no_product, baddbmm=no_product):
        return compile_launches(step, device)


def semantic_memory_launches(device: str, dtype: torch.dtype, tokens: int) -> Launches:
    """Compile the kernels of grouping and enqueue in a training step on Pascal."""

    def step() -> None:
        features = torch.empty(4, tokens, 512, dtype=dtype, device="cuda")
        queue = torch.empty(tokens, 21, 512, device="cuda").permute(1, 2, 0)
        class_map = torch.empty(4, 21, tokens, device="cuda")
        channel_class = semantic_memory.channel_semantic_grouping(features, class_map)
        pointers = torch.empty(21, dtype=torch.int64, device="cuda")
        semantic_memory.semantic_memory_enqueue(queue, pointers, features, channel_class)

    return compile_launches(step, device)


def upsample_launches(device: str, dtype: torch.dtype) -> Launches:
    """Compile the kernels of loss and pseudo labels at a crop of 513, for logits with classes last and first."""

    def step() -> None:
        tokens = torch.empty(4, 129, 129, 21, dtype=dtype, device="cuda").permute(0, 3, 1, 2)
        target = torch.empty(4, 513, 513, dtype=torch.int64, device="cuda")
        for logits in (tokens, torch.empty(tokens.shape, dtype=dtype, device="cuda")):
            loss, lse = upsample_cross_entropy.forward(logits, target, 255)
            upsample_cross_entropy.backward(loss, logits, target, lse, 255)
            upsample_argmax.upsample_argmax(logits, (513, 513))

    return compile_launches(step, device)


def depthwise_gelu_launches(device: str, dtype: torch.dtype) -> Launches:
    """Compile the kernels of a Mix-FFN in the first stage of MiT-B5 at a crop of 513."""
    size, hidden = (129, 129), 256

    def step() -> None:
        tokens = torch.empty(4, math.prod(size), hidden, dtype=dtype, device="cuda")
        weight, bias = torch.empty(hidden, 1, 3, 3, device="cuda"), torch.empty(hidden, device="cuda")
        depthwise_gelu.forward(tokens, weight, bias, size)
        depthwise_gelu.backward(tokens, tokens, weight, bias, size)

    return compile_launches(step, device)


def report(devices: Iterable[str], *, full: bool) -> Iterator[dict[str, Any]]:
    """Compile the kernels of a training step and describe each.

    Args:
        devices: names in ``GPUS``.
        full: every dtype, 256, 289, 676 and 1369 tokens, dropout on and off; otherwise bfloat16, up to 676, dropout.

    Yields:
        flat records: kernel, target, dtype, tokens (the smallest number that it serves), dropout, config, registers,
        spill_bytes, shared_bytes, ctas_per_sm (blocks that fit on an SM or CU) and mma (the matrix instruction).
    """
    dtypes, sizes, dropouts = [torch.bfloat16], [256, 289, 676], [0.1]
    if full:
        dtypes, sizes, dropouts = [*dtypes, torch.float16, torch.float32], [*sizes, 1369], [0.0, *dropouts]
    for device in devices:
        seen: set[CompiledKernel] = set()
        for dtype in dtypes:
            parts = [channel_attention_launches(device, dtype, *x) for x in itertools.product(sizes, dropouts)]
            parts += [semantic_memory_launches(device, dtype, 289), upsample_launches(device, dtype)]
            for part in [*parts, depthwise_gelu_launches(device, dtype)]:
                yield from (describe(kernel, part[kernel], device) for kernel in part if kernel not in seen)
                seen.update(part)


def kernel_name(kernel: CompiledKernel) -> str:
    """Return the name without its affixes."""
    return kernel.name.strip("_").removesuffix("_kernel")


def describe(kernel: CompiledKernel, arguments: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Return the record of a kernel; ``report`` names the fields."""
    gpu, metadata = GPUS[device], kernel.metadata
    registers, spill_bytes = (_amd_registers if gpu.target.backend == "hip" else _nvidia_registers)(kernel, device)
    assembly = kernel.asm.get("ptx") or kernel.asm["amdgcn"]
    blocks = [f"{name.removeprefix('BLOCK_')}{x}" for name, x in arguments.items() if name.startswith("BLOCK_")]
    return {
        "kernel": kernel_name(kernel),
        "target": device,
        "dtype": next(iter(kernel.src.signature.values())).strip("*"),
        "tokens": arguments.get("N"),
        "dropout": arguments.get("seed") is not None,
        "config": " ".join([*blocks, f"stages={metadata.num_stages}", f"warps={metadata.num_warps}"]),
        "registers": registers,
        "spill_bytes": spill_bytes,
        "shared_bytes": metadata.shared,
        "ctas_per_sm": _occupancy(registers, metadata.shared, metadata.num_warps, gpu),
        "mma": next((name for name in _MATRIX_INSTRUCTIONS if name in assembly), "fma"),
    }


def _nvidia_registers(kernel: CompiledKernel, device: str) -> tuple[int, int]:
    """Registers of a thread, and bytes that it spills, as ptxas tells."""
    arch = GPUS[device].target.arch
    ptxas = _BINARIES / ("ptxas-blackwell" if arch >= 100 else "ptxas")
    suffix = "a" if arch >= 90 else ""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(kernel.asm["ptx"])
        command = [str(ptxas), "-v", f"--gpu-name={device}{suffix}", str(source), "-o", f"{source}.cubin"]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    return int(re.findall(r"Used (\d+) registers", log)[0]), sum(int(x) for pair in spills for x in pair)


def _amd_registers(kernel: CompiledKernel, device: str) -> tuple[int, int]:
    """Vector registers of the unified file, and spilled ones in bytes for one lane."""
    fields = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count):\s*(\d+)", kernel.asm["amdgcn"]))
    return int(fields["vgpr_count"]), 4 * int(fields["vgpr_spill_count"])


def _occupancy(registers: int, shared: int, warps: int, gpu: Gpu) -> int:
    """Blocks that fit on one processor (SM or CU) at a time."""
    if shared > gpu.shared_per_block:
        return 0
    if gpu.target.backend == "hip":  # four SIMDs, each with 512 registers a lane and at most 8 waves
        by_registers = min(8, 512 // max(8, -(-registers // 8) * 8)) * 4 // warps
        return min(by_registers, gpu.shared_per_processor // max(1, shared))
    by_registers = 65536 // (32 * -(-registers // 8) * 8) // warps
    by_shared = gpu.shared_per_processor // (shared + _KIB)  # the system takes 1 KiB of each block
    return min(by_registers, gpu.warps_per_processor // warps, by_shared)
