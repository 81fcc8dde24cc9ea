"""What is settled before a run takes its first step: data, folder, device, model."""

import copy
import logging
import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import IO

from allspark_fast.config import Config, RunConfig, TrainConfig, changed_fields
from allspark_fast.data.sources import check_sources
from allspark_fast.distributed import world_size
from allspark_fast.files import make_folder, write_atomically
from allspark_fast.model import AllSparkOptions, Segmentor, build_segmentor
from allspark_fast.model.mit import compile_blocks
from allspark_fast.training.checkpoint import newest_first
from allspark_fast.training.sharding import shard
from allspark_fast.training.step import TrainState
from allspark_fast.weights.files import load_weights

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

# Entries of each list that are read before training starts; `python -m allspark_fast check` reads all.
_CHECKED = 16
_LISTED = 20


def refuse_bad_data(config: Config) -> None:
    """Read some entries of every list, and look whether the files of all are there.

    Raises:
        ValueError: some cannot be used; the first of these are listed.
    """
    # Supervised training counts the unlabeled images, but does not read them.
    harmless = {"labeled_and_unlabeled"} if config.train.method == "supervised" else set()
    problems = check_sources(config.data, sample=_CHECKED)
    errors = [problem for problem in problems if not problem.is_warning and problem.kind not in harmless]
    if errors:
        more = [f"and {len(errors) - _LISTED} more"] if len(errors) > _LISTED else []
        listed = "\n".join([*map(str, errors[:_LISTED]), *more])
        raise ValueError(f"{len(errors)} problems in the data; `python -m allspark_fast check` lists all:\n{listed}")


def claim_folder(folder: Path, config: Config) -> None:
    """Write config.json, or compare with that of the run that is there.

    Where and on how many ranks it runs may change, and the kind of its checkpoints.

    Raises:
        NotADirectoryError: it is a file.
        ValueError: the folder holds a run with other settings; they are listed.
    """
    free = ("output_dir", "device", "kernels", "timeout", "sharded_checkpoints")
    run = replace(config.run, **{name: getattr(RunConfig, name) for name in free})
    config = replace(config, run=run, train=replace(config.train, sharding=TrainConfig.sharding))
    path = folder / "config.json"
    # Settings that led nowhere, not even to a checkpoint, may be mended in the same folder.
    if not (path.is_file() and newest_first(folder / "checkpoints")):
        make_folder(folder)
        write_atomically(path, lambda temporary: temporary.write_text(config.to_json(), encoding="utf-8"))
        return
    changed = changed_fields(Config.read(path), config)
    if changed:
        raise ValueError(
            f"{folder} holds a run with other settings ({'; '.join(changed)}): "
            "give another --run.output-dir, or the settings of before"
        )


def lock_folder(folder: Path) -> IO[str] | None:
    """Keep other processes from training in a folder, made if need be, for as long as the returned file is open.

    The operating system drops the lock when the process ends, in whatever way, so none is ever left behind. Nothing is
    locked on Windows.

    Raises:
        ValueError: another process trains there.
    """
    make_folder(folder)
    if fcntl is None:
        return None
    file = (folder / "lock").open("a+", encoding="utf-8")
    try:
        # Not flock, which loading processes would inherit, and which many shared file systems do not know.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        owner = file.read()
        file.close()
        raise ValueError(
            f"{folder}: {owner} is training there; wait for it, or give another --run.output-dir"
        ) from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def describe_batch(config: TrainConfig) -> str:
    """How the processes share the batch of a step.

    Raises:
        ValueError: they cannot share it equally.
    """
    parts = world_size() * config.gradient_accumulation_steps
    if config.batch_size % parts:
        raise ValueError(
            f"train.batch_size {config.batch_size} cannot be shared equally by {world_size()} processes with "
            f"{config.gradient_accumulation_steps} micro-batches (train.gradient_accumulation_steps) each: "
            f"set it to a multiple of {parts}"
        )
    return (
        f"a step takes {config.batch_size} labeled and as many unlabeled images: {world_size()} processes, "
        f"{config.gradient_accumulation_steps} micro-batches each, of {config.batch_size // parts} + "
        f"{config.batch_size // parts}; the learning rate {config.lr:g} is that of the whole batch, "
        "for any number of processes"
    )


def build_model(config: Config, num_classes: int) -> Segmentor:
    """The model of a configuration, with its starting weights if it names any."""
    model = build_segmentor(
        config.model.backbone,
        num_classes,
        (config.data.crop, config.data.crop),
        allspark=_bottleneck_options(config) if config.train.method == "allspark" else None,
        embedding_dim=config.model.embedding_dim,
        activation_checkpointing=config.model.activation_checkpointing,
    )
    path = config.model.weights
    if path is not None:
        report = load_weights(model, path, reset=config.model.reset)
        unused, fresh = len(report.dropped), len(report.fresh)
        logger.info("%s: loaded; %d of its tensors not used, %d of the model start afresh", path, unused, fresh)
    return model


def _bottleneck_options(config: Config) -> AllSparkOptions:
    model = config.model
    return AllSparkOptions(
        num_heads=model.num_heads,
        memory_init=model.memory_init,
        memory_sync=model.memory_sync,
        class_map=model.class_map,
    )


def build_state(model: Segmentor, config: TrainConfig, total_steps: int) -> TrainState:
    """All that a step changes; with several processes, ``train.sharding`` says how they hold it.

    Args:
        model: on its device, the same on all ranks; sharded in place if need be.
        config: the optimisation.
        total_steps: steps of the whole run.

    Raises:
        ValueError: the model is to be compiled, but its encoder has no blocks to compile.
    """
    sharded = config.sharding == "fsdp" and world_size() > 1
    ema = copy.deepcopy(model).requires_grad_(False) if config.ema > 0 else None
    if config.compile:
        compile_blocks(model, "inductor")
    if not sharded:
        return TrainState(model, config, total_steps=total_steps, ema=ema)
    replica = copy.deepcopy(model).requires_grad_(False)
    for x in (model, ema):
        if x is not None:
            shard(x, amp=config.amp)
    return TrainState(model, config, total_steps=total_steps, ema=ema, replica=replica)
