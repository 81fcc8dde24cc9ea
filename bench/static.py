"""What the Triton kernels need on GPUs that need not be there: registers, spills, shared memory, occupancy.

The operators are called on fake tensors, so that nothing runs, and Triton compiles each kernel with the arguments,
alignments and tiles of the launch. TRITON_INTERPRET must not be set in the process.
"""

import itertools
import math
import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

from allspark_fast.kernels.channel_attention import kernel as channel_attention
from allspark_fast.kernels.depthwise_gelu import kernel as depthwise_gelu
from allspark_fast.kernels.semantic_memory import kernel as semantic_memory
from allspark_fast.kernels.upsample_argmax import kernel as upsample_argmax
from allspark_fast.kernels.upsample_cross_entropy import kernel as upsample_cross_entropy

# In the order of preference in which a kernel that holds several is described.
_MATRIX_INSTRUCTIONS = ("wgmma", "tcgen05.mma", "mma.sync", "v_mfma")


class Gpu(NamedTuple):
    """A compiler's target, and the shared memory and warps of one processor (SM or CU)."""

    target: GPUTarget
    capability: tuple[int, int]
    shared_kib: int
    warps: int


GPUS = {
    "sm_80": Gpu(GPUTarget("cuda", 80, 32), (8, 0), 164, 64),
    "sm_86": Gpu(GPUTarget("cuda", 86, 32), (8, 6), 100, 48),
    "sm_90": Gpu(GPUTarget("cuda", 90, 32), (9, 0), 228, 64),
    "sm_100": Gpu(GPUTarget("cuda", 100, 32), (10, 0), 228, 64),
    "gfx942": Gpu(GPUTarget("hip", "gfx942", 64), (9, 4), 64, 32),
}
# Kernels with the arguments, by name, of their first launch.
Launches = dict[CompiledKernel, Mapping[str, Any]]


def compile_launches(function: Callable[[], object], device: str) -> Launches:
    """Compile the distinct kernels that ``function`` launches on fake tensors, for a device of ``GPUS``."""
    gpu, launches = GPUS[device], Launches()
    run = JITFunction.run

    def compile_only(kernel: JITFunction, *args: object, grid: object, warmup: bool, **kwargs: Any) -> None:
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        launches.setdefault(run(kernel, *args, grid=grid, warmup=True, **kwargs), arguments)

    compiler_driver = SimpleNamespace(
        get_current_target=lambda: gpu.target,
        get_current_device=lambda: str(gpu.target.arch),  # the key under which a kernel keeps what is compiled
        get_current_stream=lambda _: 0,
    )
    with (
        FakeTensorMode(),
        patch.object(JITFunction, "run", compile_only),
        patch.object(driver, "_active", compiler_driver),
        patch.object(FakeTensor, "data_ptr", lambda x: x.storage_offset() * x.itemsize),
        patch.object(torch.version, "hip", "hip" if gpu.target.backend == "hip" else None),
        patch.object(torch.cuda, "get_device_capability", lambda _: gpu.capability),
    ):
        function()
    return launches


def step_launches(
    device: str, dtypes: Sequence[torch.dtype], tokens: Sequence[int], dropouts: Sequence[float]
) -> Launches:
    """Compile the kernels of a training step on Pascal with MiT-B5; tokens and dropouts are channel attention's."""

    def step() -> None:
        for dtype in dtypes:
            for number, dropout_p in itertools.product(tokens, dropouts):
                _launch_channel_attention(dtype, number, dropout_p)
            _launch_semantic_memory(dtype)
            _launch_upsampling(dtype)
            _launch_depthwise_gelu(dtype)

    return compile_launches(step, device)


def _launch_channel_attention(dtype: torch.dtype, tokens: int, dropout_p: float) -> None:
    """With 21 · 1024 keys and a group mask."""
    query = torch.empty(4, 1, tokens, 1024, dtype=dtype, device="cuda")
    key = torch.empty(1, 1, tokens, 21 * 1024, dtype=dtype, device="cuda")
    mask = torch.empty(key.shape[3], dtype=torch.bool, device="cuda")
    seed = torch.empty((), dtype=torch.int64, device="cuda")

    def no_product(*_: Tensor, out: Tensor, **__: object) -> Tensor:
        return out

    # Products are the library's. Of those in another dtype than their operands' torch has no fake results.
    with patch.multiple(torch, bmm=no_product, baddbmm=no_product):
        output, statistics = channel_attention.forward(query, key, key, mask, 1e-5, dropout_p, seed)
        channel_attention.backward(output, query, key, key, statistics, mask, dropout_p, seed)


def _launch_semantic_memory(dtype: torch.dtype) -> None:
    features = torch.empty(4, 289, 512, dtype=dtype, device="cuda")
    queue = torch.empty(289, 21, 512, device="cuda").permute(1, 2, 0)
    channel_class = torch.empty(4, 512, dtype=torch.int64, device="cuda")
    pointers = torch.empty(21, dtype=torch.int64, device="cuda")
    semantic_memory.semantic_memory_enqueue(queue, pointers, features, channel_class)


def _launch_upsampling(dtype: torch.dtype) -> None:
    """Loss and pseudo labels at a crop of 513, for logits with classes last and first."""
    tokens = torch.empty(4, 129, 129, 21, dtype=dtype, device="cuda").permute(0, 3, 1, 2)
    target = torch.empty(4, 513, 513, dtype=torch.int64, device="cuda")
    for logits in (tokens, torch.empty(tokens.shape, dtype=dtype, device="cuda")):
        loss, lse = upsample_cross_entropy.forward(logits, target, 255)
        upsample_cross_entropy.backward(loss, logits, target, lse, 255)
        upsample_argmax.upsample_argmax(logits, (513, 513))


def _launch_depthwise_gelu(dtype: torch.dtype) -> None:
    """The Mix-FFN of the first stage at a crop of 513."""
    size, hidden = (129, 129), 256
    tokens = torch.empty(4, math.prod(size), hidden, dtype=dtype, device="cuda")
    weight, bias = torch.empty(hidden, 1, 3, 3, device="cuda"), torch.empty(hidden, device="cuda")
    depthwise_gelu.forward(tokens, weight, bias, size)
    depthwise_gelu.backward(tokens, tokens, weight, bias, size)


def report(device: str, *, full: bool) -> list[dict[str, Any]]:
    """Compile the kernels of a training step and describe each distinct one in a flat record.

    ``full`` is every dtype, 256, 289, 676 and 1369 tokens, dropout on and off; otherwise bfloat16, up to 676, dropout.
    """
    dtypes, tokens, dropouts = [torch.bfloat16], [256, 289, 676], [0.1]
    if full:
        dtypes, tokens, dropouts = [*dtypes, torch.float16, torch.float32], [*tokens, 1369], [0.0, *dropouts]
    records: list[dict[str, Any]] = []
    for kernel, arguments in step_launches(device, dtypes, tokens, dropouts).items():
        record = describe(kernel, arguments, device)
        if record not in records:
            records.append(record)
    return records


def kernel_name(kernel: CompiledKernel) -> str:
    """Return the name without its affixes."""
    return kernel.name.strip("_").removesuffix("_kernel")


def describe(kernel: CompiledKernel, arguments: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Return the record of a kernel; ``ctas_per_sm`` are the blocks that fit on an SM or CU, at most."""
    gpu, metadata = GPUS[device], kernel.metadata
    registers, spill_bytes = (_amd_registers if gpu.target.backend == "hip" else _nvidia_registers)(kernel, device)
    assembly = kernel.asm.get("ptx") or kernel.asm["amdgcn"]
    blocks = [f"{name.removeprefix('BLOCK_')}{x}" for name, x in arguments.items() if name.startswith("BLOCK_")]
    return {
        "kernel": kernel_name(kernel),
        "target": device,
        "dtype": next(iter(kernel.src.signature.values())).strip("*"),
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
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(kernel.asm["ptx"])
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={sm_arch_from_capability(arch)}", source]
        command += ["-o", f"{source}.cubin"]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    return int(re.findall(r"Used (\d+) registers", log)[0]), sum(int(x) for pair in spills for x in pair)


def _amd_registers(kernel: CompiledKernel, _: str) -> tuple[int, int]:
    """Vector registers of the unified file, and spilled ones in bytes for one lane."""
    fields = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count):\s*(\d+)", kernel.asm["amdgcn"]))
    return int(fields["vgpr_count"]), 4 * int(fields["vgpr_spill_count"])


def _occupancy(registers: int, shared: int, warps: int, gpu: Gpu) -> int:
    """Blocks that fit on one processor at a time; each of its four schedulers has 512 registers a lane."""
    by_registers = 4 * (512 // (8 * max(1, -(-registers // 8)))) // warps
    reserved = 0 if gpu.target.backend == "hip" else 1024  # the system takes 1 KiB of each block
    return min(by_registers, 1024 * gpu.shared_kib // max(1, shared + reserved), gpu.warps // warps)
