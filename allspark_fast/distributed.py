"""Several processes: joining them, and the collectives of a run; each does nothing in a single process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from allspark_fast.device import DeviceName, choose_device
from allspark_fast.errors import InputError, RunError


@contextmanager
def process_group(device: DeviceName, timeout_minutes: float) -> Iterator[torch.device]:
    """Join the processes that ``torchrun`` started, if it did, by NCCL or gloo, and yield the device of this one.

    The group is left only after success: after an error, the end of this process is what tells the others.

    Raises:
        RunError: another rank has ended, or kept this one waiting for longer than the timeout.
        InputError: this host has fewer GPUs than processes, or a restart by torchrun would hang.
    """
    chosen = choose_device(device)
    if "RANK" not in os.environ:
        yield chosen
        return
    backend, timeout = "cpu:gloo", timedelta(minutes=timeout_minutes)
    if chosen.type == "cuda":
        index, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if index >= gpus:
            raise InputError(f"process {index} of this host has no GPU, there are {gpus}: lower --nproc-per-node")
        torch.cuda.set_device(index)
        backend += ",cuda:nccl"
    prefix = _store_prefix()
    store, index, size = next(rendezvous("env://", timeout=timeout))
    store = dist.distributed_c10d.PrefixStore(prefix, store)
    dist.init_process_group(backend, timeout=timeout, store=store, rank=index, world_size=size)
    try:
        yield chosen
    except RuntimeError as error:
        if "gloo" not in str(error).lower() and not isinstance(error, dist.DistError):
            raise
        raise RunError(
            "another rank has ended or is stuck, its own message tells why; the same command goes on from the last "
            f"checkpoint ({str(error).splitlines()[0]})"
        ) from error
    dist.destroy_process_group()


def _store_prefix() -> str:
    """Tell the starts by ``torchrun --max-restarts`` apart: addresses of dead processes stay in its store."""
    # https://github.com/pytorch/pytorch/issues/135712; hosts do not count restarts together.
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return "0"
    hosts, restarts = (int(os.environ.get(x, "0")) for x in ("GROUP_WORLD_SIZE", "TORCHELASTIC_MAX_RESTARTS"))
    if hosts > 1 and restarts > 0:
        raise InputError(
            "torchrun --max-restarts on several hosts fails or hangs when it restarts, since torch hands the addresses "
            "of dead processes on: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun, or leave --max-restarts out"
        )
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def world_size() -> int:
    """Return the number of processes of the default group, 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the index of this process in the default group, 0 without one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def all_gather_cat(x: Tensor) -> Tensor:
    """Concatenate a tensor of equal shape (B, ...) on every rank along the batch, in order of ranks; no gradient."""
    if world_size() == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def broadcast(x: Tensor) -> None:
    """Overwrite a contiguous tensor with rank 0's."""
    if world_size() > 1:
        dist.broadcast(x, 0)


def all_reduce_mean(x: Tensor) -> Tensor:
    """Average a tensor over ranks, the same bits on each, with the gradient of the mean of all ranks' losses."""
    return x if world_size() == 1 else _AllReduceMean.apply(x)


class _AllReduceMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_reduce_sum(x).div_(world_size())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return all_reduce_mean(grad)


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum a tensor without gradient over ranks; the same bits on each."""
    if world_size() == 1:
        return x
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def all_reduce_any(flag: bool) -> bool:
    """Return whether a flag is set on any rank; only the CPU waits."""
    return flag if world_size() == 1 else bool(all_reduce_sum(torch.tensor(int(flag))))


@contextmanager
def failing_together() -> Iterator[None]:
    """Wait until all ranks have left this context; if one failed, it raises its error and the others RunError."""
    try:
        yield
    except BaseException:
        all_reduce_any(True)
        raise
    if all_reduce_any(False):
        raise RunError("another rank has failed, its message tells why")
