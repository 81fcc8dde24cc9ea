"""The few collectives that the model needs; each does nothing in a single process."""

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes of the default group, 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_batch(x: Tensor) -> Tensor:
    """Concatenate a tensor of equal shape (B, ...) on every rank along the batch, in order of ranks."""
    if world_size() == 1:
        return x
    gathered = x.new_empty((world_size() * x.shape[0], *x.shape[1:]))
    dist.all_gather_into_tensor(gathered, x.contiguous())
    return gathered


@torch.no_grad()
def broadcast_from_rank0(x: Tensor) -> None:
    """Overwrite a contiguous tensor with rank 0's."""
    if world_size() > 1:
        dist.broadcast(x, 0)
