"""Writers of a run's checkpoints, which all ranks call alike: of one file, or of a shard for each rank."""

import functools
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from allspark_fast.distributed import new_gloo_group, on_rank0
from allspark_fast.training.checkpoint import save_checkpoint
from allspark_fast.training.sharded_checkpoint import save_sharded_checkpoint
from allspark_fast.training.sharding import gather_state


class CheckpointWriter:
    """Writes each checkpoint as one file: tensors are gathered one after the other, and rank 0 writes.

    Args:
        folder: of checkpoints.
        keep: checkpoints to keep, at least 1.
        background: copy the state, and write the copy in a thread while training goes on.
    """

    def __init__(self, folder: Path, *, keep: int, background: bool) -> None:
        self.folder = folder
        self.keep = keep
        self._thread = ThreadPoolExecutor(1) if background else None
        self._pending: Future[Path] | None = None

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Save as ``save_checkpoint`` does, after what is still being written; all ranks have to call.

        Raises:
            OSError: this checkpoint, or the last one in the background, cannot be written.
            RuntimeError: the same, on other ranks than 0.
        """
        gathered = gather_state(dict(state))
        on_rank0(lambda: self._save(save_checkpoint, step, gathered))

    def wait(self) -> None:
        """Wait for what is being written in the background; all ranks have to call.

        Raises:
            OSError: it cannot be written.
            RuntimeError: the same, on other ranks than 0.
        """
        on_rank0(self._wait)

    def _save(self, write: Callable[..., Path], step: int, state: Mapping[str, Any]) -> None:
        self._wait()
        if self._thread is None:
            write(self.folder, step, state, keep=self.keep)
            return
        copied = pytree.tree_map(lambda x: x.to("cpu", copy=True) if isinstance(x, Tensor) else x, dict(state))
        self._pending = self._thread.submit(write, self.folder, step, copied, keep=self.keep)

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


class ShardedCheckpointWriter(CheckpointWriter):
    """Writes each checkpoint as a folder, into which every rank writes its shard.

    Args:
        folder: of checkpoints.
        keep: checkpoints to keep, at least 1.
        background: copy each rank's part of the state, and write the copy in a thread while training goes on.
        timeout: how long a rank waits for the others to write.
    """

    def __init__(self, folder: Path, *, keep: int, background: bool, timeout: timedelta) -> None:
        super().__init__(folder, keep=keep, background=background)
        # What the threads tell each other must not come between the collectives of training.
        group = new_gloo_group(timeout) if background else None
        self._write = functools.partial(save_sharded_checkpoint, group=group)

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Save as ``save_sharded_checkpoint`` does, after what is still being written; all ranks have to call.

        Raises:
            OSError: this checkpoint, or the last one in the background, cannot be written by some rank.
        """
        self._save(self._write, step, state)

    def wait(self) -> None:
        """Wait for what is being written in the background; all ranks have to call.

        Raises:
            OSError: some rank cannot write it.
        """
        self._wait()
