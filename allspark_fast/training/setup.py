"""What is settled before a run takes its first step: its folder, its batch, its model and state."""

import copy
import json
import logging
import os
import socket
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import IO

from allspark_fast.config import Config, EvalConfig, RunConfig, Schedule, TrainConfig, changed_fields
from allspark_fast.data.datasets import Sources
from allspark_fast.data.info import DatasetInfo
from allspark_fast.data.sources import RECORD_FILE, differences, read_record, record_data
from allspark_fast.distributed import world_size
from allspark_fast.errors import InputError
from allspark_fast.files import make_folder, remove_unfinished, write_text
from allspark_fast.model import Segmentor, compile_blocks
from allspark_fast.model.mit import MixTransformer
from allspark_fast.training.checkpoint import list_checkpoints
from allspark_fast.training.sharding import shard
from allspark_fast.training.step import TrainState
from allspark_fast.weights.files import load_weights
from allspark_fast.weights.spec import ModelSpec

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

# Steps of a run on a GPU that repays what compiling takes, by an estimate.
REPAY_COMPILING = 5000
# What may change between two sittings of a run, because it does not decide the numbers.
_FREE = {
    *(f"data.{name}" for name in ("root", "labeled", "unlabeled", "val", "workers")),  # what the lists hold is compared
    *(f"model.{name}" for name in ("activation_checkpointing", "weights")),  # the checkpoint holds what became of them
    *(f"train.{name}" for name in ("compile", "cuda_graph", "deterministic", "max_skipped", "sharding")),
    *(f"eval.{field.name}" for field in fields(EvalConfig) if field.name != "mode"),
    *(f"run.{field.name}" for field in fields(RunConfig)),
}


def claim_folder(folder: Path, config: Config, sources: Sources) -> IO[str] | None:
    """Lock a run folder, made if need be, and write its settings and data, which must be those of a run that is there.

    What does not decide the numbers may change, and a run may be given more epochs or steps. The lock is held for as
    long as the returned file is open, at most until the process ends. Windows has none. Raises InputError if another
    process trains there, or the folder holds a run with other settings or data, which are named.
    """
    make_folder(folder)
    lock = _lock(folder)
    remove_unfinished(folder)
    path, record = folder / "config.json", record_data(sources)
    # Settings that led nowhere, not even to a checkpoint, may be mended in the same folder.
    if path.is_file() and list_checkpoints(folder / "checkpoints"):
        if (before := read_record(folder)) is None:
            logger.warning("%s: without %s it is unknown whether classes and lists are the same", folder, RECORD_FILE)
        refused, allowed = [*differences(before or record, record)], list[str]()
        for name, (old, new) in changed_fields(Config.read(path), config).items():
            longer = name in ("train.epochs", "train.steps") and None not in (old, new) and new > old
            (allowed if longer or name in _FREE else refused).append(f"{name}: {old} -> {new}")
        if refused:
            raise InputError(
                f"{folder} holds a run with other settings or data ({'; '.join(refused)}): give another "
                "--run.output-dir, or what was there before"
            )
        if allowed:
            logger.info("changed since the last start of this run: %s", "; ".join(allowed))
    write_text(path, config.to_json())
    write_text(folder / RECORD_FILE, json.dumps(record))
    return lock


def _lock(folder: Path) -> IO[str] | None:
    if fcntl is None:
        return None
    file = (folder / "lock").open("a+", encoding="utf-8")
    try:
        # Not flock, which workers would inherit, and which many shared file systems do not know.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        owner = file.read()
        file.close()
        raise InputError(
            f"{folder}: {owner} is training there; wait for it, or give another --run.output-dir"
        ) from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def check_schedule(config: TrainConfig, schedule: Schedule) -> None:
    """Warn of what never comes into play in a run of this length."""
    parts = {"pseudo labels": ("pseudo_from", schedule.pseudo_from)} if config.method != "supervised" else {}
    if config.method == "allspark":
        parts["the Semantic Memory"] = "warmup", schedule.memory_from
    for name, (setting, start) in parts.items():
        if start >= schedule.total:
            logger.warning(
                f"{name}: never used, since that begins at step {start} and the run ends at {schedule.total}; "
                f"train longer, or set train.{setting} to a part of the run, such as 0.25"
            )


def check_batch(config: TrainConfig) -> None:
    """Log how the processes share the batch of a step, if they have to; InputError if they cannot do so equally."""
    ranks, micro_batches = world_size(), config.gradient_accumulation_steps
    parts = ranks * micro_batches
    share, rest = divmod(config.batch_size, parts)
    if rest:
        raise InputError(
            f"train.batch_size {config.batch_size} cannot be shared equally by {ranks} processes with {micro_batches} "
            f"micro-batches (train.gradient_accumulation_steps) each: set it to a multiple of {parts}"
        )
    if config.cutmix and config.method != "supervised" and share % 2:
        logger.warning(
            f"train.cutmix mixes pairs of crops, but a micro-batch has {share}: the last one is not mixed; with a "
            f"train.batch_size that is a multiple of {2 * parts} each has a partner"
        )
    if parts > 1:
        logger.info(
            f"a step takes {config.batch_size} + {config.batch_size} images: {ranks} processes, {micro_batches} "
            f"micro-batches each, of {share} + {share}; train.lr is that of the whole batch"
        )


def build_model(config: Config, info: DatasetInfo, *, repays: bool = False, resumed: bool = False) -> Segmentor:
    """Build the model of a configuration; without starting weights if a checkpoint overwrites them (``resumed``).

    Blocks are compiled if that is asked for, or pays in a run of this length (``repays``). Raises InputError if weights
    do not fit, or blocks are to be compiled, and the encoder has none.
    """
    model = config.model
    switches = {name: getattr(model, name) for name in ("memory_sync", "class_map", "activation_checkpointing")}
    segmentor = ModelSpec.of_run(config, info).build(**switches)
    if model.weights is not None and not resumed:
        report = load_weights(segmentor, model.weights, reset=model.reset, info=info)
        unused, fresh = len(report.dropped), len(report.fresh)
        logger.info(f"{model.weights}: loaded; {unused} of its tensors not used, {fresh} of the model start afresh")
    compiles = {"on": True, "auto": repays and isinstance(segmentor.backbone, MixTransformer), "off": False}
    if compiles[config.train.compile]:
        _keep_compiled_kernels()
        compile_blocks(segmentor, "inductor")
        logger.info("the encoder's blocks are compiled in the first steps, a minute or two (train.compile)")
    return segmentor


def build_state(model: Segmentor, config: TrainConfig, total_steps: int) -> TrainState:
    """Build all that steps change, from a model on its device, the same on all ranks; it may be sharded in place."""
    sharded = config.sharding == "fsdp" and world_size() > 1
    ema, replica = (copy.deepcopy(model).requires_grad_(False) if x else None for x in (config.ema > 0, sharded))
    for x in filter(None, (model, ema) if sharded else ()):
        shard(x)
    return TrainState(model, config, total_steps=total_steps, ema=ema, replica=replica)


def _keep_compiled_kernels() -> None:
    with suppress(OSError, RuntimeError):  # no home, or a read-only one: torch's temporary folder will do
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "allspark_fast" / "inductor"
        cache.mkdir(parents=True, exist_ok=True)
        if os.access(cache, os.W_OK):
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
