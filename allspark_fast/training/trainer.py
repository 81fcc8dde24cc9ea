"""A run: training from data to checkpoints, evaluation, pictures, and exact resume."""

import functools
import itertools
import logging
import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from allspark_fast.config import Config
from allspark_fast.data.info import IGNORE_INDEX
from allspark_fast.data.loader import SemiBatch, SemiLoader, evaluation_loader
from allspark_fast.data.seeding import mix_seed
from allspark_fast.data.sources import open_sources
from allspark_fast.data.transforms import CropTransform
from allspark_fast.device import choose_device, use_deterministic_operations
from allspark_fast.distributed import all_gather_cat, all_reduce_any, on_rank0, process_group, rank, world_size
from allspark_fast.inference.evaluate import evaluate, predict_labels
from allspark_fast.inference.metrics import Scores
from allspark_fast.inference.scores import score_table
from allspark_fast.signals import stop_signals
from allspark_fast.training.checkpoint import load_latest_checkpoint, require_room
from allspark_fast.training.checkpoint_writer import CheckpointWriter, ShardedCheckpointWriter
from allspark_fast.training.cuda_graph import GraphedSteps
from allspark_fast.training.diagnostics import memory_record, pseudo_label_record
from allspark_fast.training.kernel_policy import select_kernels
from allspark_fast.training.log import MetricsLog, Record
from allspark_fast.training.pictures import draw_curves, draw_predictions
from allspark_fast.training.setup import (
    build_model,
    build_state,
    claim_folder,
    describe_batch,
    lock_folder,
    refuse_bad_data,
)
from allspark_fast.training.sharded_checkpoint import read_any_checkpoint
from allspark_fast.training.step import TrainState, pseudo_pass, train_step
from allspark_fast.weights.spec import ModelSpec, save_model

logger = logging.getLogger(__name__)

_PICTURED = 4
# Drawing takes a second.
_SECONDS_BETWEEN_CURVES = 60


class Trainer:
    """A run: data, model and optimizer of a configuration, resumed from its folder if it was begun.

    Args:
        config: the settings.
        folder: the run folder; made if need be.

    Raises:
        DataError: something is wrong with the data.
        OSError: the folder cannot be written, or its disk is too full for the checkpoints.
        ValueError: the folder holds a run with other settings, or the weights do not fit.
        RuntimeError: a Triton kernel fails where ``run.kernels`` is strict.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        self.config = config
        self.folder = folder
        shares = describe_batch(config.train)
        if world_size() * config.train.gradient_accumulation_steps > 1:
            logger.info(shares)
        if config.train.deterministic:
            use_deterministic_operations()
        refuse_bad_data(config)
        on_rank0(self._claim_folder)
        self.device = choose_device(config.run.device)
        if self.device.type == "cpu":
            # Threads that wait for a core which a loading process has are slower than fewer threads. OMP_NUM_THREADS,
            # or whoever set torch's number, may have asked for still fewer.
            cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            torch.set_num_threads(min(torch.get_num_threads(), max(1, cores - config.data.workers)))
        on_gpu = self.device.type == "cuda"
        self.replaced_kernels = select_kernels(config.run.kernels, self.device) if on_gpu else {}
        torch.manual_seed(config.train.seed)
        self.sources = open_sources(config.data)
        self.loader = self._build_loader(hidden_labels=False)
        self.total_steps = config.train.epochs * self.loader.steps_per_epoch
        self.state = self._build_state()
        graphed = self.device.type == "cuda" and world_size() == 1 and config.train.cuda_graph
        self.train_step = GraphedSteps(self.state) if graphed else functools.partial(train_step, self.state)
        self._writer = self._build_writer()
        self.step = 0
        self.best = -1.0
        self.evaluation_due = False
        self._curves_drawn = time.monotonic()
        self._resume()
        state = self._state()
        on_rank0(lambda: require_room(folder / "checkpoints", state, keep=config.run.keep_last))

    def _claim_folder(self) -> None:
        self._lock = lock_folder(self.folder)
        claim_folder(self.folder, self.config)

    def _build_state(self) -> TrainState:
        model = build_model(self.config, len(self.sources.info.classes)).to(self.device)
        if rank() > 0:
            # Weights are the same on all ranks, what is dropped is not.
            torch.manual_seed(mix_seed(self.config.train.seed, rank()))
        return build_state(model, self.config.train, self.total_steps)

    @property
    def finished(self) -> bool:
        """Whether all steps are taken and the last one is evaluated."""
        return self.step >= self.total_steps and not self.evaluation_due

    @property
    def _labeled_only(self) -> bool:
        return self.config.train.method == "supervised"

    def run(self) -> Scores | None:
        """Train to the end, evaluating and saving on the way, and return the last scores.

        Returns None if it was asked to stop (``stop_signals``): the step in hand was finished, an evaluation broken off
        to be made by whoever resumes, and all was saved, on all ranks.
        """
        total, done = self.total_steps, self.step
        # An error closes the bar, so that its message has a line for itself.
        with (
            stop_signals() as asked,
            tqdm(total=total, initial=done, unit="step", dynamic_ncols=True, disable=rank() > 0) as bar,
        ):
            return self._run(asked, bar)

    def _run(self, asked: Callable[[], bool], bar: "tqdm[Any]") -> Scores | None:
        log = MetricsLog(self.folder, self.step, evaluated=not self.evaluation_due) if rank() == 0 else None
        if log is not None and self.replaced_kernels:
            log.write({"step": self.step, "replaced_kernels": self.replaced_kernels})
        scores: Scores | None = None
        batches = self.loader.iterate(self.step, self.total_steps)
        started, logged = time.perf_counter(), self.step
        stopping = False
        while not stopping and not self.finished:
            if not self.evaluation_due:
                self._take_step(next(batches))
                stopping = all_reduce_any(asked())
                bar.update()
                if self.step % self.config.run.log_every == 0 or self.step == self.total_steps:
                    images = self.config.train.batch_size * (1 if self._labeled_only else 2) * (self.step - logged)
                    bar.set_postfix(self._log_losses(log, images / (time.perf_counter() - started)))
                    started, logged = time.perf_counter(), self.step
            if self.evaluation_due and not stopping:
                scores = self._evaluate(log, asked)
                stopping = scores is None
                if rank() == 0 and scores is not None:  # also a disabled bar writes
                    bar.write(f"step {self.step}: mIoU {100 * scores.mean_iou:.1f}")
                started, logged = time.perf_counter(), self.step
            elif stopping or self.step % self.config.run.save_every == 0:
                self._save()
        self._writer.wait()
        if log is not None:
            log.close()
        if not self.finished:
            return None
        return scores or self._score()

    def _take_step(self, batch: SemiBatch) -> None:
        train = self.config.train
        epoch = self.step // self.loader.steps_per_epoch
        self.train_step(
            batch.to(self.device, non_blocking=True),
            use_memory=epoch >= train.warmup_epochs,
            use_pseudo=epoch >= train.pseudo_from_epoch,
        )
        self.step += 1
        period = self.config.eval.every * self.loader.steps_per_epoch
        self.evaluation_due = self.step == self.total_steps or self.step % period == 0

    def _log_losses(self, log: MetricsLog | None, images_per_s: float) -> dict[str, str]:
        """Write the metrics since the last line, and draw them now and then; this is where the device is waited for."""
        metrics = self.state.read_metrics()
        position = {"step": self.step, "epoch": self.step / self.loader.steps_per_epoch}
        if log is not None:
            log.write({**position, **metrics, "images_per_s": images_per_s})
            if time.monotonic() - self._curves_drawn >= _SECONDS_BETWEEN_CURVES:
                self._draw_curves(log)
        # A run may be shorter than max_skipped.
        limit = min(self.config.train.max_skipped, self.total_steps // 2)
        if metrics["skipped_steps"] > limit:
            raise RuntimeError(
                f"{metrics['skipped_steps']} steps had a loss or gradient that is not finite by step {self.step}, more "
                f"than train.max_skipped or half of the run, {limit}: start again in another --run.output-dir with a "
                "lower train.lr or with train.amp False, and look at the starting weights if the first steps were among "
                "them"
            )
        return {"images/s": f"{images_per_s:.0f}"} | {
            name.removeprefix("loss_"): f"{x:.3f}" for name, x in metrics.items() if name.startswith("loss_")
        }

    def _evaluate(self, log: MetricsLog | None, asked: Callable[[], bool]) -> Scores | None:
        """Score, log, draw, and save: the best weights first, then the checkpoint that makes all of it final.

        Returns None if it was asked to stop meanwhile: then all that is saved is that the evaluation is due.
        """
        scores = self._score(asked)
        if all_reduce_any(asked()):
            self._save()
            return None
        self.evaluation_due = False
        images, labels, measured = self._pseudo_labels()
        model = self.state.evaluated_model()
        best, self.best = self.best, max(self.best, scores.mean_iou)

        def report() -> None:
            assert log is not None
            log.write(
                {
                    "step": self.step,
                    "epoch": self.step / self.loader.steps_per_epoch,
                    "miou": scores.mean_iou,
                    "miou_present": scores.mean_iou_present,
                    "iou": scores.iou.tolist(),
                    **measured,
                    **memory_record(self.state.received, log.records),
                }
            )
            self._draw_curves(log)
            data, picture = self.config.data, self.folder / "predictions.png"
            draw_predictions(picture, images, labels, self.sources.info, data.mean, data.std)
            log.add_picture(picture, self.step)
            if self.best > best:
                save_model(model, ModelSpec.of_run(self.config, self.sources.info), self.folder / "best.safetensors")

        on_rank0(report)
        self._save()
        return scores

    def _draw_curves(self, log: MetricsLog) -> None:
        draw_curves(self.folder, log.records, self.sources.info)
        self._curves_drawn = time.monotonic()

    def _save(self) -> None:
        self._writer.save(self.step, self._state())

    def _build_writer(self) -> CheckpointWriter:
        run, folder = self.config.run, self.folder / "checkpoints"
        if not run.sharded_checkpoints:
            return CheckpointWriter(folder, keep=run.keep_last, background=run.save_in_background)
        timeout = timedelta(minutes=run.timeout)
        return ShardedCheckpointWriter(folder, keep=run.keep_last, background=run.save_in_background, timeout=timeout)

    def _score(self, asked: Callable[[], bool] = lambda: False) -> Scores:
        """Scores of the validation images, or of those before a signal asked to stop."""
        config = self.config
        samples = evaluation_loader(
            self.sources.val,
            mean=config.data.mean,
            std=config.data.std,
            num_workers=config.eval.workers,
            pin_memory=self.device.type == "cuda",
            rank=rank(),
            world_size=world_size(),
        )
        model = self.state.evaluated_model()
        classes = len(self.sources.info.classes)
        with torch.compiler.set_stance("force_eager"):  # compiling for every size of image would take longer
            seen = itertools.takewhile(lambda _: not asked(), samples)
            return evaluate(
                model,
                seen,
                classes,
                mode=config.eval.mode,
                crop=config.data.crop,
                device=self.device,
                batch_size=config.eval.batch_size,
                amp=config.train.amp,
            )

    @torch.no_grad()
    def _pseudo_labels(self) -> tuple[Tensor, dict[str, Tensor], Record]:
        """Unlabeled crops of the first step, their hidden and pseudo labels and predictions; and what all measure."""
        loader = self._build_loader(hidden_labels=True, workers=0)
        batch = next(loader.iterate(0, 1)).to(self.device)
        with torch.compiler.set_stance("force_eager"):
            class_logits, pseudo_label = pseudo_pass(self.state.model, batch, self.config.train)
            prediction, _ = predict_labels(self.state.evaluated_model().eval(), batch.unlabeled_image)
        measured = pseudo_label_record(class_logits, pseudo_label, batch)
        assert batch.unlabeled_label is not None
        known = {"truth": batch.unlabeled_label} if (batch.unlabeled_label != IGNORE_INDEX).any() else {}
        labels = {**known, "pseudo label": pseudo_label, "prediction": prediction}
        pictured = {name: x[:_PICTURED] for name, x in labels.items()}
        return batch.unlabeled_image[:_PICTURED], pictured, measured

    def _build_loader(self, *, hidden_labels: bool, workers: int | None = None) -> SemiLoader:
        data, train = self.config.data, self.config.train
        labeled, unlabeled = (
            CropTransform(data.crop, photometric=photometric, mean=data.mean, std=data.std, scale_range=data.scale)
            for photometric in (True, False)
        )
        return SemiLoader(
            self.sources.labeled,
            self.sources.unlabeled,
            labeled,
            unlabeled,
            batch_size=train.batch_size,
            seed=train.seed,
            num_workers=data.workers if workers is None else workers,
            pin_memory=self.device.type == "cuda",
            labeled_only=self._labeled_only and not hidden_labels,
            hidden_labels=hidden_labels,
            rank=rank(),
            world_size=world_size(),
        )

    def _state(self) -> dict[str, Any]:
        return {
            **self.state.state_dict(),
            "best": self.best,
            "evaluation_due": self.evaluation_due,
            # One after the other, for all ranks.
            "rng": all_gather_cat(torch.get_rng_state()),
            "cuda_rng": all_gather_cat(torch.cuda.get_rng_state()) if self.device.type == "cuda" else None,
        }

    def _resume(self) -> None:
        read = functools.partial(read_any_checkpoint, state=self._state())
        state = load_latest_checkpoint(self.folder / "checkpoints", read)
        if state is None:
            return
        self.state.load_state_dict(state)
        self.step, self.best = int(state["step"]), state["best"]
        self.evaluation_due = state.get("evaluation_due", False)  # earlier versions evaluated before they saved
        saved = state["rng"].numel() // torch.get_rng_state().numel()
        if saved == world_size():
            # Copies, because torch crashes on a part of a larger tensor.
            torch.set_rng_state(state["rng"].chunk(saved)[rank()].clone())
            if state["cuda_rng"] is not None and self.device.type == "cuda":
                torch.cuda.set_rng_state(state["cuda_rng"].chunk(saved)[rank()].clone())
        else:
            torch.manual_seed(mix_seed(self.config.train.seed, rank(), self.step))
            logger.info(
                "the checkpoint is of %d processes, now there are %d: other channels drop out than would have",
                saved,
                world_size(),
            )
        logger.info("resumed at step %d of %d", self.step, self.total_steps)


def train(config: Config, folder: Path) -> bool:
    """Run a configuration in a folder, from its last checkpoint on, and print the table of classes.

    Under ``torchrun``, this process is one of those that train together.

    Returns:
        whether the run is finished, rather than stopped by a signal or by the end of torchrun.

    Raises:
        DataError: something is wrong with the data.
        ValueError: the folder holds a run with other settings, or the weights do not fit.
    """
    with process_group(config.run.device, timedelta(minutes=config.run.timeout)):
        trainer = Trainer(config, folder)
        tell = print if rank() == 0 else logger.debug
        if trainer.finished:
            tell(f"{folder}: finished at step {trainer.step}, best mIoU {100 * trainer.best:.1f}")
            return True
        sources = trainer.sources
        tell(
            f"{config.train.method} on {config.data.dataset}: {len(sources.labeled.entries)} labeled, "
            f"{len(sources.unlabeled.entries)} unlabeled, {len(sources.val.entries)} validation images; "
            f"{sum(p.numel() for p in trainer.state.model.parameters()) / 1e6:.1f} M parameters; "
            f"{trainer.total_steps} steps on {trainer.device}; everything goes to {folder}"
        )
        scores = trainer.run()
        if scores is None:
            tell(f"{folder}: stopped as asked at step {trainer.step}; the same command goes on from there")
            return False
        tell(score_table(scores, sources.info))
        return True
