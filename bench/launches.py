"""Launches of the Triton kernels as the operators make them, recorded on fake tensors: nothing runs.

So that every kernel can be compiled with the arguments, alignments and tiles that the operator would use on a GPU that
need not be there. TRITON_INTERPRET must not be set in the process.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime import JITFunction

from allspark_fast.kernels.channel_attention import kernel as channel_attention
from allspark_fast.kernels.depthwise_gelu import kernel as depthwise_gelu
from allspark_fast.kernels.depthwise_gelu.configs import BACKWARD_TILES, FORWARD_TILES
from allspark_fast.kernels.semantic_memory import kernel as semantic_memory
from allspark_fast.kernels.upsample_argmax import kernel as upsample_argmax
from allspark_fast.kernels.upsample_cross_entropy import kernel as upsample_cross_entropy
from bench.gpus import GPUS, Gpu

_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
}


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


class Call(NamedTuple):
    """The arguments of a launch by name, and its grid."""

    arguments: Mapping[str, Any]
    grid: tuple[int, ...]


Launches = dict[Launch, Call]


def record_launches(function: Callable[..., object], *args: object) -> Launches:
    """The distinct kernels that ``function`` launches, each as called first; nothing runs on fake tensors."""
    launches: Launches = {}

    def run(kernel: JITFunction, *args: object, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> None:
        arguments = dict(zip(kernel.arg_names, args, strict=False))
        arguments |= {name: kwargs.pop(name) for name in kernel.arg_names if name in kwargs}
        launches.setdefault(_specialize(kernel, arguments, kwargs), Call(arguments, grid))

    with patch.object(JITFunction, "run", run):
        function(*args)
    return launches


def _specialize(kernel: JITFunction, arguments: Mapping[str, Any], options: Mapping[str, Any]) -> Launch:
    """What Triton's launcher would compile: None and 1 are constants, and a factor of 16 is known."""
    signature: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    aligned: list[int] = []
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        specialized = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialized and isinstance(value, int) and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name] = _TYPES[value.dtype]
            if value.storage_offset() * value.itemsize % 16 == 0:
                aligned.append(index)
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if specialized and value % 16 == 0:
                aligned.append(index)
        else:
            signature[parameter.name] = "fp32"
    return Launch(
        kernel, tuple(signature.items()), tuple(constants.items()), tuple(aligned), tuple(sorted(options.items()))
    )


@contextmanager
def _device_at_hand(gpu: Gpu) -> Iterator[None]:
    """Lets the operators choose their tiles as on ``gpu``."""
    hip = "hip" if gpu.target.backend == "hip" else None
    with (
        patch.object(torch.version, "hip", hip),
        patch.object(torch.cuda, "get_device_capability", lambda _: gpu.capability),
    ):
        yield


def channel_attention_launches(device: str, dtype: torch.dtype, tokens: int, dropout_p: float) -> Launches:
    """Kernels of a step with ``tokens`` tokens, 21 · 1024 keys and a group mask."""

    def step() -> None:
        query = torch.empty(2, 1, tokens, 1024, dtype=dtype, device="cuda")
        key = torch.empty(1, 1, tokens, 21 * 1024, dtype=dtype, device="cuda")
        mask = torch.empty(key.shape[3], dtype=torch.bool, device="cuda")
        seed = torch.empty((), dtype=torch.int64, device="cuda")
        output, statistics = channel_attention.forward(query, key, key, mask, 1e-5, dropout_p, seed)
        channel_attention.backward(output, query, key, key, statistics, mask, dropout_p, seed)

    with (
        FakeTensorMode(),
        _device_at_hand(GPUS[device]),
        patch.object(channel_attention, "_product", lambda *_, **__: None),
    ):
        return record_launches(step)


def semantic_memory_launches(device: str, dtype: torch.dtype, tokens: int) -> Launches:
    """Kernels of grouping and enqueue in a training step on Pascal."""

    def step() -> None:
        features = torch.empty(4, tokens, 512, dtype=dtype, device="cuda")
        queue = torch.empty(tokens, 21, 512, device="cuda").permute(1, 2, 0)
        class_map = torch.empty(4, 21, tokens, device="cuda")
        channel_class = semantic_memory.channel_semantic_grouping(features, class_map)
        pointers = torch.empty(21, dtype=torch.int64, device="cuda")
        semantic_memory.semantic_memory_enqueue(queue, pointers, features, channel_class)

    with FakeTensorMode(), _device_at_hand(GPUS[device]):
        return record_launches(step)


def upsample_launches(device: str, dtype: torch.dtype) -> Launches:
    """Kernels of loss and pseudo labels at a crop of 513, logits as our head returns them and as a convolution does."""

    def step() -> None:
        tokens = torch.empty(4, 129, 129, 21, dtype=dtype, device="cuda").permute(0, 3, 1, 2)
        target = torch.empty(4, 513, 513, dtype=torch.int64, device="cuda")
        for logits in (tokens, torch.empty(tokens.shape, dtype=dtype, device="cuda")):
            loss, lse = upsample_cross_entropy.forward(logits, target, 255)
            upsample_cross_entropy.backward(loss, logits, target, lse, 255)
            upsample_argmax.upsample_argmax(logits, (513, 513))

    with FakeTensorMode(), _device_at_hand(GPUS[device]):
        return record_launches(step)


def depthwise_gelu_launches(device: str, dtype: torch.dtype) -> Launches:
    """Kernels of a Mix-FFN in the first stage of MiT-B5 at a crop of 513, for all tiles to choose from."""
    size, hidden = (129, 129), 256

    def step() -> None:
        tokens = torch.empty(4, math.prod(size), hidden, dtype=dtype, device="cuda")
        weight, bias = torch.empty(hidden, 1, 3, 3, device="cuda"), torch.empty(hidden, device="cuda")
        for tile in FORWARD_TILES:
            depthwise_gelu.forward(tokens, weight, bias, size, tile)
        for tile in BACKWARD_TILES:
            depthwise_gelu.backward(tokens, tokens, weight, bias, size, tile)

    with FakeTensorMode(), _device_at_hand(GPUS[device]):
        return record_launches(step)
