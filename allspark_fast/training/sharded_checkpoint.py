"""Checkpoints as folders of shards, of which every rank writes its own through torch.distributed.checkpoint (DCP).

``step_<step>/`` holds safetensors, with what DCP must know to read them on another number of ranks, and
``manifest.json``: plain values, and size and SHA-256 of every shard. Nothing in it is ever unpickled. It is written
under another name and renamed: a folder of that name is whole.
"""

import dataclasses
import hashlib
import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.utils import _pytree as pytree

from allspark_fast.distributed import all_reduce_any, rank, world_size
from allspark_fast.files import flush_file, flush_folder, not_written, reason
from allspark_fast.training.checkpoint import prune, read_checkpoint

# Kept in every manifest: no other folder is taken for a checkpoint, nor one whose contents have changed their meaning.
_FORMAT = "allspark_fast sharded checkpoint 1"
_MANIFEST = "manifest.json"
# What follows the number of ranks and the device, not the model.
_RANDOM = ("rng", "cuda_rng")

# That a single process writes alone is meant.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def save_sharded_checkpoint(
    folder: Path, step: int, state: Mapping[str, Any], *, keep: int, group: dist.ProcessGroup | None = None
) -> Path:
    """Write ``step_<step>/`` and remove all but the newest ``keep`` checkpoints, and what a crash left half written.

    All ranks have to call. Of a tensor that is sharded each writes its part, all others are written by rank 0.

    Args:
        folder: of checkpoints, which all ranks share; made if need be.
        step: number of steps taken.
        state: tensors and values of JSON, in dictionaries whose keys are text or numbers, lists and tuples.
        keep: checkpoints to keep, at least 1.
        group: to agree in, if not the default one.

    Raises:
        OSError: a rank cannot write, on all of them; the checkpoints that were there stay.
    """
    path = folder / f"step_{step:08d}"
    named, _ = _flatten(state)
    # Safetensors know no strides, such as the memory's.
    tensors = {name: x.contiguous() for name, x in named.items() if isinstance(x, Tensor)}
    plain = {name: x for name, x in named.items() if not isinstance(x, Tensor)}
    writer = _ShardWriter(path, plain, keep)
    # The memory of rank 0 is the one that counts.
    planner = DefaultSavePlanner(dedup_save_to_lowest_rank=True)
    try:
        save(tensors, storage_writer=writer, planner=planner, process_group=group, no_dist=world_size() == 1)
    except CheckpointException as error:
        if rank() == 0:
            shutil.rmtree(writer.path, ignore_errors=True)
        raise not_written(path, _reasons(error)) from error
    return path


class _ShardWriter(HuggingFaceStorageWriter):
    """DCP's writer of safetensors, which keeps no checksums, with a manifest; errors of any rank reach all."""

    def __init__(self, target: Path, plain: dict[str, Any], keep: int) -> None:
        super().__init__(str(target.with_name(f".{target.name}.tmp")), save_distributed=True)
        self.target = target
        self.plain = plain
        self.keep = keep

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's shard, and tell rank 0 its name, size and hash with each of its tensors."""
        results = super().write_data(plan, planner).wait()
        shards = {}
        for name in {result.storage_data.relative_path for result in results}:
            shard = Path(self.path, name)
            flush_file(shard)
            shards[name] = (name, shard.stat().st_size, _sha256(shard))
        told: Future[list[WriteResult]] = Future()
        told.set_result([dataclasses.replace(x, storage_data=shards[x.storage_data.relative_path]) for x in results])
        return told

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On rank 0, when all shards are on the disk: what makes them a checkpoint."""
        folder = Path(self.path)
        shards = {name: (size, digest) for name, size, digest in {x.storage_data for part in results for x in part}}
        for name, (size, _) in shards.items():
            if not (folder / name).is_file() or (folder / name).stat().st_size != size:
                raise OSError(f"rank 0 does not see {folder / name} of another rank; all ranks must share this folder")
        for left in {x.name for x in folder.iterdir()} - shards.keys():  # by a run on more ranks that was killed
            (folder / left).unlink()
        content = {"format": _FORMAT, "plain": self.plain, "shards": shards}
        (folder / _MANIFEST).write_text(json.dumps({**content, "sha256": _digest(content)}, indent=1), "utf-8")
        flush_file(folder / _MANIFEST)
        flush_folder(folder)
        if self.target.exists():  # damaged, or the run would not have come to this step again
            shutil.rmtree(self.target)
        folder.rename(self.target)
        flush_folder(self.target.parent)
        prune(self.target.parent, keep=self.keep)


def read_any_checkpoint(path: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    """Read a file or a folder of shards, whichever it is; arguments and errors as ``read_sharded_checkpoint``'s."""
    if not path.suffix:
        return read_sharded_checkpoint(path, state)
    found = read_checkpoint(path)
    sizes = {name: x.shape for name, x in _flatten(found)[0].items() if isinstance(x, Tensor)}
    _refuse_another_model(path, sizes, _flatten(state)[0])
    return found


def read_sharded_checkpoint(path: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    """Read a folder of shards, on any number of ranks, all of which have to call; each checks some of the hashes.

    Args:
        path: of the folder.
        state: of the same structure and shapes as what was saved. Its tensors are overwritten, each rank reading what
            it holds of them, but for random states of another number of ranks.

    Returns:
        the state that was saved: tensors of ``state``, sharded where those are, and whole ones on the CPU in place of
        those that were left.

    Raises:
        ValueError: the folder is damaged or no checkpoint of such a state, on all ranks; nothing is overwritten.
    """
    problem = None
    try:
        manifest = _read_manifest(path)
        _check_shards(path, manifest["shards"])
    except (OSError, ValueError) as error:
        problem = f"{path} cannot be read, it is damaged or no checkpoint of a run ({reason(error)})"
    if all_reduce_any(problem is not None):
        raise ValueError(problem or f"{path} cannot be read, another rank says why")
    named, structure = _flatten(state)
    reader = HuggingFaceStorageReader(str(path))
    stored = cast(dict[str, TensorStorageMetadata], reader.read_metadata().state_dict_metadata)
    plain = manifest["plain"]
    if different := named.keys() ^ (stored.keys() | plain.keys()):
        raise _another_model(path, f"{sorted(different)[:3]} are missing or unknown")
    _refuse_another_model(path, {name: of.size for name, of in stored.items()}, named)
    tensors = {}
    for name, of in stored.items():
        x = named[name]
        fits = isinstance(x, Tensor) and x.shape == of.size
        tensors[name] = x if fits else torch.empty(of.size, dtype=of.properties.dtype)
    try:
        load(tensors, storage_reader=reader, no_dist=world_size() == 1)
    except CheckpointException as error:
        raise ValueError(f"{path} cannot be read ({_reasons(error)})") from error
    return pytree.tree_unflatten([tensors[x] if x in tensors else plain[x] for x in named], structure)


def _refuse_another_model(path: Path, sizes: Mapping[str, torch.Size], own: Mapping[str, Any]) -> None:
    """Check names and sizes of the tensors of a checkpoint; plain values may come and go with versions of torch."""
    expected = {name: x.shape for name, x in own.items() if isinstance(x, Tensor) and name not in _RANDOM}
    if different := expected.keys() ^ (sizes.keys() - set(_RANDOM)):
        raise _another_model(path, f"{sorted(different)[:3]} are missing or unknown")
    for name, size in expected.items():
        if sizes[name] != size:
            raise _another_model(path, f"{name} has the shape {tuple(sizes[name])}, expected {tuple(size)}")


def _another_model(path: Path, why: str) -> ValueError:
    return ValueError(f"{path} is a checkpoint of another model: {why}")


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest = json.loads((path / _MANIFEST).read_text("utf-8"))
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != _FORMAT:
        raise ValueError(f"the format of {_MANIFEST} is {found!r}, expected {_FORMAT!r}")
    if manifest.pop("sha256", None) != _digest(manifest):
        raise ValueError(f"the checksum of {_MANIFEST} is wrong")
    return manifest


def _check_shards(path: Path, shards: dict[str, tuple[int, str]]) -> None:
    """Check that there are no other shards than these, and of this rank's portion of them size and hash."""
    if different := {x.name for x in path.glob("*.safetensors")} ^ shards.keys():
        raise ValueError(f"{sorted(different)} are missing or not in {_MANIFEST}")
    for name, (size, digest) in sorted(shards.items())[rank() :: world_size()]:
        found = (path / name).stat().st_size
        if found != size:
            raise ValueError(f"{name} has {found} bytes, expected {size}")
        if _sha256(path / name) != digest:
            raise ValueError(f"the checksum of {name} is wrong")


def _flatten(state: Mapping[str, Any]) -> tuple[dict[str, Any], pytree.TreeSpec]:
    """Leaves by dotted names, and what is needed to put them back."""
    leaves, structure = pytree.tree_flatten_with_path(state)
    return {".".join(str(key).strip("[]'") for key in path): x for path, x in leaves}, structure


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _reasons(error: CheckpointException) -> str:
    """What failed on which rank, without DCP's tracebacks."""
    return "; ".join(f"rank {index}: {reason(failure)}" for index, (failure, _) in error.failures.items())
