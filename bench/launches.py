"""Kernel launches of a training step on a GPU, counted on fake tensors: nothing runs, and no GPU is needed.

torch asks for a driver before it differentiates fake tensors of a GPU, so these are on the CPU and act as on a GPU.
What libraries launch beside their products, such as conversions of layouts, is not seen.
"""

import math
from collections import Counter
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import KernelInterface

from allspark_fast.config import TrainConfig
from allspark_fast.training.step import TrainState, train_step
from bench.bench_train_step import SIZES
from bench.harness import Record

# By torch's sources: these launch twice; a launch over lists takes so many tensors, by the number of lists, in at most
# 320 chunks of 65,536 entries.
_TWICE = ("eye", "native_batch_norm", "native_batch_norm_backward", "native_layer_norm_backward")
_TENSORS = (110, 64, 48, 36, 30)
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention


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
    """Count the launches of a training step with the memory, by operator; ``options`` are those of TrainConfig."""
    counter = LaunchCounter()
    layer_norm = torch.autocast("cpu", enabled=False)(lambda x, *rest: torch.layer_norm(x.float(), *rest))
    with (
        FakeTensorMode(),
        patch.object(FakeTensor, "is_cuda", True),
        patch.multiple(F, layer_norm=layer_norm, scaled_dot_product_attention=lambda *x: _FLASH(*x)[0]),
        patch.object(torch.nn.utils.clip_grad, "_has_foreach_support", lambda *_: True),
        patch.object(nn.init, "trunc_normal_"),  # looks at numbers
    ):
        state = TrainState(SIZES[size].build_model(), TrainConfig(**options), total_steps=10**6)
        batch = SIZES[size].random_batch()
        with counter:
            train_step(state, batch, use_memory=True)
    return counter.launches


def report(size: str) -> list[Record]:
    """Return the counts of all operators, and of the 30 with the most launches."""
    counts = count_launches(size)
    rows = [("all", counts.total()), *counts.most_common(30)]
    return [{"op": "launches", "size": size, "operator": name, "launches": count} for name, count in rows]
