"""What the Triton kernels need on GPUs that need not be there: registers, spills and shared memory.

The operators are called on fake tensors, so that nothing runs, and Triton compiles each kernel with the arguments,
alignments and tiles of the launch. TRITON_INTERPRET must not be set in the process.
"""

import itertools
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

from allspark_fast.kernels.channel_attention import kernel as channel_attention
from allspark_fast.kernels.channel_attention.inputs import Inputs
from allspark_fast.kernels.depthwise_gelu import kernel as depthwise_gelu
from allspark_fast.kernels.semantic_memory import kernel as semantic_memory
from allspark_fast.kernels.upsample_cross_entropy import kernel as upsample

# Kernels with the arguments, by name, of their first launch.
Launches = dict[CompiledKernel, Mapping[str, Any]]


def report(device: str, *, full: bool = True) -> list[dict[str, Any]]:
    """Compile the kernels of a training step for sm_... or gfx... and describe each distinct one in a flat record.

    ``full`` is every dtype, 256, 289, 676 and 1369 tokens, dropout on and off; otherwise bfloat16, up to 676, dropout.
    """
    records = [describe(kernel, arguments, device) for kernel, arguments in step_launches(device, full=full).items()]
    return [record for i, record in enumerate(records) if record not in records[:i]]


def step_launches(device: str, *, full: bool) -> Launches:
    """Compile the distinct kernels of a training step on Pascal with MiT-B5; arguments as ``report``'s."""
    dtypes, tokens, dropouts = [torch.bfloat16], [256, 289, 676], [0.1]
    if full:
        dtypes, tokens, dropouts = [*dtypes, torch.float16, torch.float32], [*tokens, 1369], [0.0, *dropouts]
    target = GPUTarget("hip", device, 64) if device.startswith("gfx") else GPUTarget("cuda", int(device[3:]), 32)
    launches, run = Launches(), JITFunction.run

    def compile_only(kernel: JITFunction, *args: object, grid: object, warmup: bool, **kwargs: Any) -> None:
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        launches.setdefault(run(kernel, *args, grid=grid, warmup=True, **kwargs), arguments)

    compiler_driver = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: str(target.arch),  # the key under which a kernel keeps what is compiled
        get_current_stream=lambda _: 0,
    )
    with (
        FakeTensorMode(),
        torch.device("cuda"),
        patch.object(JITFunction, "run", compile_only),
        patch.object(driver, "_active", compiler_driver),
        patch.object(FakeTensor, "data_ptr", lambda x: x.storage_offset() * x.itemsize),
    ):
        for dtype in dtypes:
            for number, dropout_p in itertools.product(tokens, dropouts):
                _launch_channel_attention(dtype, number, dropout_p)
            _launch_others(dtype)
    return launches


def _launch_channel_attention(dtype: torch.dtype, tokens: int, dropout_p: float) -> None:
    """With 21 · 1024 keys and a group mask."""
    query, key = (torch.empty(batch, 1, tokens, n, dtype=dtype) for batch, n in ((4, 1024), (1, 21 * 1024)))
    mask = torch.empty(key.shape[3], dtype=torch.bool)
    seed = torch.empty((), dtype=torch.int64) if dropout_p > 0 else None
    inputs = Inputs(query, key, key, mask, dropout_p, seed)

    def no_product(*_: Tensor, out: Tensor, **__: object) -> Tensor:
        return out

    # Products are the library's. Of those in another dtype than their operands' torch has no fake results.
    with patch.multiple(torch, bmm=no_product, baddbmm=no_product):
        output, statistics = channel_attention.forward(inputs, 1e-5)
        channel_attention.backward(output, statistics, inputs)


def _launch_others(dtype: torch.dtype) -> None:
    """At a crop of 513; for logits with classes last and first, and the Mix-FFN of the first stage."""
    features, queue = torch.empty(4, 289, 512, dtype=dtype), torch.empty(289, 21, 512).permute(1, 2, 0)
    channel_class = torch.empty(4, 512, dtype=torch.int64)
    semantic_memory.semantic_memory_enqueue(queue, torch.empty(21, dtype=torch.int64), features, channel_class)
    target = torch.empty(4, 513, 513, dtype=torch.int64)
    classes_last = torch.empty(4, 129, 129, 21, dtype=dtype).permute(0, 3, 1, 2)
    for logits in (classes_last, torch.empty(classes_last.shape, dtype=dtype)):
        loss, lse = upsample.forward(logits, target, 255)
        upsample.backward(loss, logits, target, lse, 255)
        upsample.upsample_argmax(logits, (513, 513))
    tokens, weight, bias = torch.empty(4, 129 * 129, 256, dtype=dtype), torch.empty(256, 1, 3, 3), torch.empty(256)
    depthwise_gelu.forward(tokens, weight, bias, (129, 129))
    depthwise_gelu.backward(tokens, tokens, weight, bias, (129, 129))


def kernel_name(kernel: CompiledKernel) -> str:
    """Return the name without its affixes."""
    return kernel.name.strip("_").removesuffix("_kernel")


def describe(kernel: CompiledKernel, arguments: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Return the record of a kernel compiled for a device."""
    metadata = kernel.metadata
    registers, spill_bytes = (_amd_registers if "amdgcn" in kernel.asm else _nvidia_registers)(kernel, device)
    blocks = [f"{name.removeprefix('BLOCK_')}{x}" for name, x in arguments.items() if name.startswith("BLOCK_")]
    return {
        "op": "static",
        "size": device,
        "kernel": kernel_name(kernel),
        "target": device,
        "dtype": next(iter(kernel.src.signature.values())).strip("*"),
        "config": " ".join([*blocks, f"stages={metadata.num_stages}", f"warps={metadata.num_warps}"]),
        "registers": registers,
        "spill_bytes": spill_bytes,
        "shared_bytes": metadata.shared,
    }


def _nvidia_registers(kernel: CompiledKernel, device: str) -> tuple[int, int]:
    """Registers of a thread, and bytes that it spills, as ptxas tells."""
    arch = int(device[3:])
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
