"""Compiles the Triton kernels as they are launched, for GPUs that need not be there, and reports what they need.

Launches are recorded on fake tensors, so that every kernel is compiled with the arguments, alignments and tiles that
the operator would use. TRITON_INTERPRET must not be set in the process.
"""

import itertools
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from allspark_fast.kernels.channel_attention import kernel as channel_attention
from allspark_fast.kernels.semantic_memory import kernel as semantic_memory
from allspark_fast.kernels.upsample_argmax import kernel as upsample_argmax
from allspark_fast.kernels.upsample_cross_entropy import kernel as upsample_cross_entropy


class Device(NamedTuple):
    """What the compiler and the occupancy of a GPU depend on; shared memory in bytes."""

    target: GPUTarget
    capability: tuple[int, int]
    shared_per_block: int
    shared_per_processor: int
    warps_per_processor: int


_KIB = 1024
DEVICES = {
    "sm_80": Device(GPUTarget("cuda", 80, 32), (8, 0), 163 * _KIB, 164 * _KIB, 64),
    "sm_86": Device(GPUTarget("cuda", 86, 32), (8, 6), 99 * _KIB, 100 * _KIB, 48),
    "sm_90": Device(GPUTarget("cuda", 90, 32), (9, 0), 227 * _KIB, 228 * _KIB, 64),
    "sm_100": Device(GPUTarget("cuda", 100, 32), (10, 0), 227 * _KIB, 228 * _KIB, 64),
    "gfx942": Device(GPUTarget("hip", "gfx942", 64), (9, 4), 64 * _KIB, 64 * _KIB, 32),
}
_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
}
STATIC_COLUMNS = {
    "kernel": ("kernel", 1),
    "dtype": ("dtype", 1),
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


class Launch(NamedTuple):
    """One kernel specialised as by a launch."""

    kernel: JITFunction
    signature: tuple[tuple[str, Any], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        """The kernel's name without its affixes."""
        return self.kernel.__name__.strip("_").removesuffix("_kernel")

    @property
    def config(self) -> str:
        """Tile sizes, warps and stages."""
        blocks = [f"{name.removeprefix('BLOCK_')}{x}" for name, x in self.constants if name.startswith("BLOCK_")]
        return " ".join([*blocks, *(f"{name.removeprefix('num_')}={x}" for name, x in self.options)])


def record_launches(function: Callable[..., object], *args: object) -> list[Launch]:
    """The distinct kernels that ``function`` launches; nothing runs if the arguments are fake tensors."""
    launches: dict[Launch, None] = {}

    def run(kernel: JITFunction, *args: object, grid: object, warmup: bool, **kwargs: Any) -> None:
        launches[_specialize(kernel, args, kwargs)] = None

    with patch.object(JITFunction, "run", run):
        function(*args)
    return list(launches)


def _specialize(kernel: JITFunction, args: tuple[object, ...], kwargs: dict[str, Any]) -> Launch:
    """What Triton's launcher would compile: None and 1 are constants, and a factor of 16 is known."""
    names = [parameter.name for parameter in kernel.params]
    values = {**dict(zip(names, args, strict=False)), **{name: kwargs.pop(name) for name in names if name in kwargs}}
    signature: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    aligned: list[int] = []
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        specialized = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialized and isinstance(value, int) and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name] = _TYPES[value.dtype]
            if value.storage_offset() * value.itemsize % 16 == 0:
                aligned.append(index)
        elif isinstance(value, TensorDescriptor):
            signature[parameter.name] = _descriptor_type(value)
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if specialized and value % 16 == 0:
                aligned.append(index)
        else:
            signature[parameter.name] = "fp32"
    return Launch(
        kernel, tuple(signature.items()), tuple(constants.items()), tuple(aligned), tuple(sorted(kwargs.items()))
    )


def _descriptor_type(x: TensorDescriptor) -> str:
    return f"tensordesc<{_TYPES[x.base.dtype].strip('*')}{list(x.block_shape)}>"


def compile_launch(launch: Launch, device: str) -> dict[str, Any]:
    """Compile for ``device`` and report registers, spills, shared memory, occupancy and the matrix instruction."""
    source = ASTSource(
        launch.kernel,
        dict(launch.signature),
        constexprs=dict(launch.constants),
        attrs={(index,): [["tt.divisibility", 16]] for index in launch.aligned},
    )
    compiled = triton.compile(source, target=DEVICES[device].target, options=dict(launch.options))
    resources = _amd_resources if DEVICES[device].target.backend == "hip" else _nvidia_resources
    registers, spill_bytes = resources(compiled, device)
    assembly = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    return {
        "kernel": launch.name,
        "target": device,
        "dtype": dict(launch.signature)[launch.kernel.arg_names[0]].strip("*"),
        "dropout": dict(launch.signature).get("seed") == "*i64",
        "config": launch.config,
        "registers": registers,
        "spill_bytes": spill_bytes,
        "shared_bytes": compiled.metadata.shared,
        "ctas_per_sm": _occupancy(registers, compiled.metadata.shared, compiled.metadata.num_warps, DEVICES[device]),
        "mma": next((name for name in _MATRIX_INSTRUCTIONS if name in assembly), "fma"),
    }


def _nvidia_resources(compiled: CompiledKernel, device: str) -> tuple[int, int]:
    arch = DEVICES[device].target.arch
    ptxas = _BINARIES / ("ptxas-blackwell" if arch >= 100 else "ptxas")
    suffix = "a" if arch >= 90 else ""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(compiled.asm["ptx"])
        command = [ptxas, "-v", f"--gpu-name={device}{suffix}", source, "-o", Path(folder, "kernel.cubin")]
        log = subprocess.run([str(x) for x in command], capture_output=True, text=True, check=True).stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    return int(re.findall(r"Used (\d+) registers", log)[0]), sum(int(x) for pair in spills for x in pair)


def _amd_resources(compiled: CompiledKernel, device: str) -> tuple[int, int]:
    """Vector registers of the unified file, and spilled ones in bytes for one lane."""
    fields = dict(re.findall(r"\.(vgpr_count|agpr_count|vgpr_spill_count):\s*(\d+)", compiled.asm["amdgcn"]))
    return int(fields["vgpr_count"]), 4 * int(fields["vgpr_spill_count"])


def _occupancy(registers: int, shared: int, warps: int, device: Device) -> int:
    """Blocks that fit on one processor (SM or CU) at a time."""
    if shared > device.shared_per_block:
        return 0
    if device.target.backend == "hip":  # four SIMDs, each with 512 registers a lane and at most 8 waves
        by_registers = min(8, 512 // max(8, -(-registers // 8) * 8)) * 4 // warps
        return min(by_registers, device.shared_per_processor // max(1, shared))
    by_registers = 65536 // (32 * -(-registers // 8) * 8) // warps
    by_shared = device.shared_per_processor // (shared + _KIB)  # the system takes 1 KiB of each block
    return min(by_registers, device.warps_per_processor // warps, by_shared)


@contextmanager
def _device_at_hand(device: Device) -> Iterator[None]:
    """Lets the operators choose their tiles as on ``device``."""
    hip = "hip" if device.target.backend == "hip" else None
    with (
        patch.object(torch.version, "hip", hip),
        patch.object(torch.cuda, "get_device_capability", lambda _: device.capability),
    ):
        yield


def channel_attention_launches(device: str, dtype: torch.dtype, tokens: int, dropout_p: float) -> list[Launch]:
    """Kernels of a step with ``tokens`` tokens, 21 · 1024 keys and a group mask, for all tiles to choose from."""

    def step() -> None:
        query = torch.empty(4, 1, tokens, 1024, device="cuda")
        key = torch.empty(1, 1, tokens, 21 * 1024, dtype=dtype, device="cuda")
        scale, mean = torch.empty(4, 1, 1, 1, device="cuda"), torch.empty(1, 1, tokens, 1, device="cuda")
        mask = torch.empty(key.shape[3], dtype=torch.bool, device="cuda")
        seed = torch.empty((), dtype=torch.int64, device="cuda")
        output, lse = channel_attention.forward(query, key, key, scale, mean, mask, dropout_p, seed)
        channel_attention.backward(output, query, key, key, scale, mean, output, lse, mask, dropout_p, seed)

    def with_all(_: str, __: object, choices: Sequence[Any], run: Callable[[Any], object]) -> Any:
        for tiles in choices:
            run(tiles)
        return choices[0]

    with (
        FakeTensorMode(),
        _device_at_hand(DEVICES[device]),
        patch.object(channel_attention, "_select", with_all),
    ):
        return record_launches(step)


def semantic_memory_launches(device: str, dtype: torch.dtype, tokens: int) -> list[Launch]:
    """Kernels of grouping and enqueue in a training step on Pascal."""

    def step() -> None:
        features = torch.empty(4, tokens, 512, dtype=dtype, device="cuda")
        queue = torch.empty(tokens, 21, 512, device="cuda").permute(1, 2, 0)
        class_map = torch.empty(4, 21, tokens, device="cuda")
        channel_class = semantic_memory.channel_semantic_grouping(features, class_map)
        pointers = torch.empty(21, dtype=torch.int64, device="cuda")
        semantic_memory.semantic_memory_enqueue(queue, pointers, features, channel_class)

    with FakeTensorMode(), _device_at_hand(DEVICES[device]):
        return record_launches(step)


def upsample_launches(device: str, dtype: torch.dtype) -> list[Launch]:
    """Kernels of loss and pseudo labels at a crop of 513, logits as our head returns them and as a convolution does."""

    def step() -> None:
        tokens = torch.empty(4, 129, 129, 21, dtype=dtype, device="cuda").permute(0, 3, 1, 2)
        target = torch.empty(4, 513, 513, dtype=torch.int64, device="cuda")
        for logits in (tokens, torch.empty(tokens.shape, dtype=dtype, device="cuda")):
            loss, lse = upsample_cross_entropy.forward(logits, target, 255)
            upsample_cross_entropy.backward(loss, logits, target, lse, 255)
            upsample_argmax.upsample_argmax(logits, (513, 513))

    with FakeTensorMode(), _device_at_hand(DEVICES[device]):
        return record_launches(step)


def report(devices: Iterable[str], *, full: bool) -> Iterator[dict[str, Any]]:
    """Compile the kernels of a training step and describe each.

    Args:
        devices: names in ``DEVICES``.
        full: every dtype, 256, 289, 676 and 1369 tokens, dropout on and off; otherwise bfloat16, up to 676, dropout.

    Yields:
        flat records: kernel, target, dtype, dropout, config, registers, spill_bytes, shared_bytes, ctas_per_sm, mma.
    """
    dtypes, sizes, dropouts = [torch.bfloat16], [256, 289, 676], [0.1]
    if full:
        dtypes, sizes, dropouts = [*dtypes, torch.float16, torch.float32], [*sizes, 1369], [0.0, *dropouts]
    for device in devices:
        launches: dict[Launch, None] = {}
        for dtype in dtypes:
            for tokens, dropout_p in itertools.product(sizes, dropouts):
                launches |= dict.fromkeys(channel_attention_launches(device, dtype, tokens, dropout_p))
            launches |= dict.fromkeys(semantic_memory_launches(device, dtype, 289))
            launches |= dict.fromkeys(upsample_launches(device, dtype))
        for launch in launches:
            yield compile_launch(launch, device)
