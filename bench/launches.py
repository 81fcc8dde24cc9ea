"""Kernel launches of a training step on a GPU, counted on fake tensors: nothing runs, and no GPU is needed.

torch asks for a driver before it differentiates fake tensors of a GPU, so these are on the CPU: autocast, LayerNorm,
self-attention and Mix-FFN are told to do what they do on a GPU. What libraries launch beside their products, such as
conversions of layouts, is not seen.
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

# Read from torch's sources; all others launch once.
_LAUNCHES = {
    "_scaled_dot_product_flash_attention_backward": 3,
    "eye": 2,
    "native_batch_norm": 2,
    "native_batch_norm_backward": 2,
    "native_layer_norm_backward": 2,
    "upsample_bilinear2d_backward": 2,
}
# Tensors that a launch over lists takes, by the number of lists, and chunks of 65,536 entries (MultiTensorApply.cuh).
_TENSORS, _CHUNKS = (110, 64, 48, 36, 30), 320


class LaunchCounter(TorchDispatchMode):
    """Counts launches by operator: those of ours by running their bodies on fake tensors of a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and count."""
        name = func.name().partition("::")[2].partition(".")[0]
        # Fused optimizers have no fake.
        result = None if name.startswith("_fused") else func(*args, **(kwargs or {}))
        self.launches[name] += self._count(func, name, args, result)
        return result

    def _count(self, func: OpOverload, name: str, args: Any, result: Any) -> int:
        if func.namespace == "allspark_fast":
            return _inside(func, args)
        if func.namespace != "aten" or "empty" in name or name in ("_unsafe_view", "promote_types"):
            return 0
        if any(x.alias_info and not x.alias_info.is_write for x in func._schema.returns):
            return 0  # a view
        if name.startswith(("_foreach", "_fused")):
            lists = [x for x in args if isinstance(x, (list, tuple)) and x and isinstance(x[0], Tensor)]
            chunks = sum(math.ceil(x.numel() / 65536) for x in lists[0])
            return max(math.ceil(len(lists[0]) / _TENSORS[len(lists) - 1]), math.ceil(chunks / _CHUNKS))
        if name == "convolution":
            return 1 + (args[2] is not None)
        return sum(args[-1]) if name == "convolution_backward" else _LAUNCHES.get(name, 1)


def _inside(func: OpOverload, args: Any) -> int:
    """Run the body of one of our operators as on a GPU, and count its launches."""
    counter = LaunchCounter()

    def launch(*_: Any, out: Tensor | None = None, **__: Any) -> Tensor | None:
        counter.launches["kernel"] += 1
        return out

    def on_gpu(x: Tensor) -> Tensor:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")

    with (
        patch.object(KernelInterface, "__getitem__", lambda *_: launch),
        # torch has no fake products in another dtype than their operands'.
        patch.multiple(torch, bmm=launch, baddbmm=launch),
        patch.multiple(torch.cuda, device_of=nullcontext, get_device_capability=lambda _: (9, 0)),
        counter,
    ):
        OPDEFS[func._schema.name]._init_fn(*pytree.tree_map_only(Tensor, on_gpu, args))
    return counter.launches.total()


def _layer_norm(x: Tensor, shape: Any, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return torch.layer_norm(x.float(), shape, weight, bias, eps)


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]


def count_launches(size: str, **options: Any) -> Counter[str]:
    """Count the launches of a training step with the memory, by operator; ``options`` are those of TrainConfig."""
    counter = LaunchCounter()
    with (
        FakeTensorMode(),
        patch.object(FakeTensor, "is_cuda", True),
        patch.multiple(F, layer_norm=_layer_norm, scaled_dot_product_attention=_attention),
        patch.object(torch.nn.utils.clip_grad, "_has_foreach_support", lambda *_: True),
        patch.object(nn.init, "trunc_normal_"),  # looks at numbers
    ):
        model, batch = SIZES[size].build_model(), SIZES[size].random_batch()
        state = TrainState(model, TrainConfig(**options), total_steps=10**6)
        with counter:
            train_step(state, batch, use_memory=True)
    return counter.launches
