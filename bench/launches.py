"""Kernel launches of a training step on a GPU, counted on fake tensors: nothing runs, and no GPU is needed.

torch asks for a driver before it differentiates fake tensors of a GPU, so these are on the CPU and act as on a GPU.
What libraries launch beside their products, such as conversions of layouts, is not seen. Of compiled blocks, inductor
generates the code for an H200. On a GPU it may also pad products, which it decides by timing.
"""

import copy
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn
from torch._dynamo.device_interface import CudaInterface
from torch._dynamo.variables import ConstantVariable, TensorVariable
from torch._guards import detect_fake_mode
from torch._inductor import compile_fx
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._library.custom_ops import OPDEFS
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import KernelInterface

from allspark_fast.config import TrainConfig
from allspark_fast.model import compile_blocks
from allspark_fast.training.step import TrainState, train_step
from bench.bench_train_step import SIZES
from bench.harness import Record

# By torch's sources: these launch twice; a launch over lists takes so many tensors, by the number of lists, in at most
# 320 chunks of 65,536 entries.
_TWICE = ("eye", "native_batch_norm", "native_batch_norm_backward", "native_layer_norm_backward")
_TENSORS = (110, 64, 48, 36, 30)
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention
_GPU = torch.device("cuda", 0)
_H200 = SimpleNamespace(
    major=9,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
)


class LaunchCounter(TorchDispatchMode):
    """Counts launches by operator: those of ours by running their bodies on fake tensors of a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and count."""
        if func.namespace == "aten":
            with self:  # inside our operators, those made of others arrive whole
                result = func.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        name = func.name().partition("::")[2].partition(".")[0]
        # Fused optimizers have no fake.
        result = None if name.startswith("_fused") else func(*args, **(kwargs or {}))
        if count := _count(func, name, args):
            self.launches[name] += count
        return result

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let torch.compile do its work, which it leaves under other modes."""
        return True

    def compile(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        """Stand for inductor as a backend: what is compiled counts its launches, and has fake results."""
        return compile_fx.compile_fx(graph, inputs, inner_compile=self._compile)  # type: ignore[arg-type]

    def _compile(self, graph: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Callable[[list[Any]], Any]:
        fake_mode = detect_fake_mode(inputs)
        assert fake_mode is not None
        with _disable_current_modes(), fake_mode:
            launches = _generated_launches(graph, inputs, **options)

        def run(arguments: list[Any]) -> Any:
            before = self.launches.copy()
            results = graph(*arguments)
            self.launches = before + launches
            return results

        run._boxed_call = True  # type: ignore[attr-defined]
        return run


def _to_gpu(tree: Any) -> Any:
    return pytree.tree_map_only(
        Tensor, lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=_GPU), tree
    )


def _generated_launches(graph: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Counter[str]:
    """Generate the code of a graph traced on a CPU as for a GPU, and count what it launches."""
    graph = copy.deepcopy(graph)
    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.update_kwarg("device", _GPU)
        node.meta["val"] = _to_gpu(node.meta.get("val"))
    with (
        V.set_debug_handler(DebugContext()),
        patch.object(driver, "_active", SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))),
        patch.object(CudaInterface, "get_device_properties", lambda *_: _H200),
        patch.object(CudaInterface, "is_bf16_supported", lambda **_: True),
        patch.multiple(torch.cuda, device=nullcontext, get_device_capability=lambda *_: (9, 0)),
        patch("torch._inductor.scheduler.has_triton", lambda: True),
        # Not loaded: that would compile the kernels.
        patch.object(GraphLowering, "compile_to_module", lambda x: SimpleNamespace(call=x.codegen()[0].value)),
        patch.object(compile_fx, "CompiledFxGraph", lambda code, *_: code),
    ):
        code: Any = compile_fx.fx_codegen_and_compile(graph, _to_gpu(inputs), inputs_to_check=(), **options)
    launches = Counter(generated=len(re.findall(r"\w\.run\(", code)))
    called, found = Counter(re.findall(r"(?:extern_kernels|torch\.ops\.\w+)\.(\w+)[.\w]*\(", code)), Counter[str]()
    for node in graph.graph.nodes:
        name = node.target.name().partition("::")[2].partition(".")[0] if isinstance(node.target, OpOverload) else ""
        if name in called:
            found[name] += 1
            launches[name] += _count(node.target, name, fx.map_arg(node.args, lambda x: x.meta["val"]))
    assert found == called
    return launches


def _count(func: OpOverload, name: str, args: Any) -> int:
    if func.namespace == "allspark_fast":
        return _inside(func, args)
    view = any(x.alias_info and not x.alias_info.is_write for x in func._schema.returns)
    if view or func.namespace != "aten" or "empty" in name or name in ("_unsafe_view", "promote_types"):
        return 0
    if name.startswith(("_foreach", "_fused")):
        lists = [x for x in args if isinstance(x, (list, tuple)) and x and isinstance(x[0], Tensor)]
        chunks = sum(math.ceil(x.numel() / 65536) for x in lists[0])
        return max(math.ceil(len(lists[0]) / _TENSORS[len(lists) - 1]), math.ceil(chunks / 320))
    if name == "convolution":
        return 1 + (args[2] is not None)
    if name == "convolution_backward":
        return sum(args[-1])
    return 3 if name.endswith("attention_backward") else 1 + (name in _TWICE)


def _inside(func: OpOverload, args: Any) -> int:
    """Run the body of one of our operators as on a GPU, and count its launches."""
    counter = LaunchCounter()

    def launch(*_: Any, out: Tensor | None = None, **__: Any) -> Tensor | None:
        counter.launches["kernel"] += 1
        return out

    with (
        patch.object(KernelInterface, "__getitem__", lambda *_: launch),
        # torch has no fake products in another dtype than their operands'.
        patch.multiple(torch, bmm=launch, baddbmm=launch),
        patch.multiple(torch.cuda, device_of=nullcontext, get_device_capability=lambda _: (9, 0)),
        counter,
    ):
        OPDEFS[func._schema.name]._init_fn(
            *pytree.tree_map_only(Tensor, lambda x: torch.empty_like(x, device="cuda"), args)
        )
    return counter.launches.total()


def count_launches(size: str, **options: Any) -> Counter[str]:
    """Count the launches of a training step with the memory, by operator; ``options`` are those of TrainConfig.

    With ``compile`` on, those of the kernels that inductor generates for the blocks count as "generated".
    """
    counter = LaunchCounter()
    layer_norm = torch.autocast("cpu", enabled=False)(lambda x, *rest: torch.layer_norm(x.float(), *rest))
    with (
        FakeTensorMode(),
        patch.object(FakeTensor, "is_cuda", True),
        patch.multiple(F, layer_norm=layer_norm, scaled_dot_product_attention=lambda *x: _FLASH(*x)[0]),
        patch.object(torch.nn.utils.clip_grad, "_has_foreach_support", lambda *_: True),
        patch.object(nn.init, "trunc_normal_"),  # looks at numbers
        # Without a driver torch takes cuDNN to know no bfloat16, and maps would leave convolutions in another layout.
        patch.object(torch._C, "_select_conv_backend", lambda *_, **__: torch._C._ConvBackend.Cudnn),  # type: ignore
        patch.object(TensorVariable, "method_attr_is_cuda", lambda *_: ConstantVariable.create(True)),
    ):
        config = TrainConfig(**options)
        state = TrainState(SIZES[size].build_model(), config, total_steps=10**6)
        if config.compile == "on":
            compile_blocks(state.model, counter.compile)
        batch = SIZES[size].random_batch()
        with counter:
            train_step(state, batch, use_memory=True)
    return counter.launches


def report(size: str) -> Iterator[Record]:
    """Yield the counts of all operators, and of the 30 with the most launches; then those with blocks compiled."""
    for op, setting in (("launches", "off"), ("launches with compiled blocks", "on")):
        counts = count_launches(size, compile=setting)
        for name, count in [("all", counts.total()), *counts.most_common(30)]:
            yield {"op": op, "size": size, "operator": name, "launches": count}
