"""Sharded models (FSDP2): how to make one, and how its state becomes whole tensors and shards again."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils import _pytree as pytree

from allspark_fast.distributed import all_reduce_mean, rank, world_size
from allspark_fast.model import Segmentor
from allspark_fast.model.mit import Block


def shard(model: Segmentor) -> None:
    """Shard a model's parameters in place over all ranks: each block of a MiT on its own, then the rest together."""
    # Nothing writes into the logits.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(next(model.parameters()).device.type, (world_size(),))
    model.to(memory_format=torch.contiguous_format)  # the only one that FSDP takes
    for module in (*(x for x in model.modules() if isinstance(x, Block)), model):
        fully_shard(module, mesh=mesh)


def to_local(x: Tensor) -> Tensor:
    """Return this rank's shard of a tensor, which is all of it unless it is sharded."""
    return x.to_local() if isinstance(x, DTensor) else x


def gather_state(state: dict[str, Any]) -> dict[str, Any]:
    """Gather sharded tensors one after the other; only rank 0 keeps them, on the CPU. All ranks have to call this."""

    def gather(x: DTensor) -> Tensor | None:
        full = x.full_tensor()
        return full.cpu() if rank() == 0 else None

    return pytree.tree_map_only(DTensor, gather, state)


def shard_like(x: Tensor, parameter: Tensor) -> Tensor:
    """Shard a whole tensor like a parameter of its shape; leave others as they are."""
    if isinstance(x, DTensor) or not isinstance(parameter, DTensor) or x.shape != parameter.shape:
        return x
    # Every rank holds the whole tensor, so nothing is sent.
    return distribute_tensor(x.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None)


@torch.no_grad()
def average_gradients(gradients: Sequence[Tensor]) -> None:
    """Average gradients over ranks, in place and in one all-reduce, except those that FSDP has averaged."""
    plain = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    if world_size() == 1 or not plain:
        return
    averaged = all_reduce_mean(torch.cat([gradient.flatten() for gradient in plain]))
    parts = averaged.split([gradient.numel() for gradient in plain])
    torch._foreach_copy_(plain, [part.view(x.shape) for part, x in zip(parts, plain, strict=True)])
