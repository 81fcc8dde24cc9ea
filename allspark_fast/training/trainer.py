"""A run: training from data to checkpoints, evaluation, pictures, and exact resume."""

import functools
import itertools
import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from allspark_fast.config import Config
from allspark_fast.data.loader import EvalSample, SemiBatch
from allspark_fast.data.sources import TrainingData, find_data
from allspark_fast.device import limit_threads
from allspark_fast.distributed import all_gather_cat, all_reduce_any, failing_together, process_group, rank, world_size
from allspark_fast.errors import RunError
from allspark_fast.inference.evaluate import evaluate
from allspark_fast.inference.metrics import Scores, score_table
from allspark_fast.kernels.triton_support import set_kernels
from allspark_fast.signals import stop_signals
from allspark_fast.text import one_line, progress
from allspark_fast.training import checkpoint, setup
from allspark_fast.training.cuda_graph import GraphedSteps
from allspark_fast.training.diagnostics import find_problems, measure
from allspark_fast.training.log import MetricsLog, Record, draw_pictures, end_summary, start_summary
from allspark_fast.training.sharding import gather_state
from allspark_fast.training.step import train_step
from allspark_fast.weights.spec import ModelSpec, save_model

logger = logging.getLogger(__name__)

_PICTURED = 4
CPU = torch.device("cpu")


class Trainer:
    """A run: data, model and optimizer of a configuration, resumed from its folder if it was begun.

    Nothing is written into the folder, which is made if need be, before all else is known to be right.

    Raises:
        InputError: something is wrong with the data, the folder holds a run with other settings or data, or the weights
            do not fit.
        OSError: the folder cannot be written, or its disk is too full for the checkpoints.
    """

    def __init__(self, config: Config, folder: Path, device: torch.device = CPU) -> None:
        setup.check_batch(config.train)
        set_kernels(config.run.kernels)
        if config.train.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the GPU is first used
            torch.use_deterministic_algorithms(True)
        with failing_together():
            config = replace(config, data=find_data(config.data, folder))
            self.data = TrainingData(config, device)
            if rank() == 0:
                self.data.check()
        self.config, self.folder, self.device = config, folder, device
        self.checkpoints = folder / "checkpoints"
        self.schedule = config.schedule(self.data.steps_per_epoch)
        self.total_steps = self.schedule.total
        torch.manual_seed(config.train.seed)
        repays = device.type == "cuda" and self.total_steps > setup.REPAY_COMPILING
        resumed = bool(checkpoint.list_checkpoints(self.checkpoints))
        model = setup.build_model(config, self.data.info, repays=repays, resumed=resumed).to(device)
        if rank() > 0:  # weights are the same on all ranks, what is dropped is not
            torch.manual_seed(config.train.seed + rank())
        self.state = setup.build_state(model, config.train, self.total_steps)
        self.findings: Record = {}  # for the next line of the log
        self.train_step = self._choose_step()
        self.step, self.best, self.best_step, self.evaluation_due = 0, -1.0, 0, False
        self._unlabeled_loss, self._named = math.inf, set[str]()
        state = self._state()
        with failing_together():
            if rank() == 0:
                setup.check_schedule(config.train, self.schedule)
                self._lock = setup.claim_folder(folder, config, self.data.sources)
                checkpoint.require_space(self.checkpoints, state, keep_last=config.run.keep_last)
        if (saved := checkpoint.load_latest_checkpoint(self.checkpoints, state)) is not None:
            self._resume(saved)

    def _choose_step(self) -> Callable[..., object]:
        setting, sharded = self.config.train.cuda_graph, self.state.replica is not None
        automatic, on_gpu = setting == "auto", self.device.type == "cuda"
        if on_gpu and (setting == "on" or (automatic and not sharded)):
            return GraphedSteps(self.state, report=self.findings.update if automatic else None)
        if setting == "on" or (automatic and on_gpu):
            why = "FSDP2 cannot undo a failed recording" if on_gpu else f"nothing on the device {self.device} is"
            logger.warning("train.cuda_graph %s: no step is recorded, because %s", setting, why)
        return functools.partial(train_step, self.state)

    @functools.cached_property
    def spec(self) -> ModelSpec:
        """What must be known to use the weights."""
        return ModelSpec.of_run(self.config, self.data.info)

    @property
    def finished(self) -> bool:
        """Whether all steps are taken and the last one is evaluated."""
        return self.step >= self.total_steps and not self.evaluation_due

    def run(self) -> Scores | None:
        """Train to the end, evaluating and saving on the way.

        Returns:
            the last scores, or None if a signal asked to stop (``stop_signals``): the step in hand was finished, an
            evaluation broken off to be made by whoever resumes, and all was saved, on all ranks.

        Raises:
            RunError: too many steps had a loss or gradient that is not finite.
        """
        log = MetricsLog(self.folder, self.step, evaluated=not self.evaluation_due) if rank() == 0 else None
        if log is not None:
            about = self.config, self.data.sources, self.schedule, self.state.model, self.folder
            print(start_summary(*about, step=self.step))
        scores, stopping = None, False
        bar: tqdm[Any]
        # An error closes the bar, so that its message has a line for itself.
        with (
            stop_signals() as asked,
            logging_redirect_tqdm(),
            progress(total=self.total_steps, initial=self.step, unit="step", disable=rank() > 0) as bar,
        ):
            # Ranks step together, so with several none may end early.
            batches = self.data.batches(self.step, self.total_steps, asked if world_size() == 1 else lambda: False)
            self._logged, self._first = (time.perf_counter(), self.step), self.step + 1
            while not (self.finished or stopping):
                if not self.evaluation_due and (batch := next(batches, None)) is not None:
                    self._take_step(batch)
                    self._log_step(log, bar)
                stopping = all_reduce_any(asked())
                if evaluating := self.evaluation_due and not stopping:
                    with torch.compiler.set_stance("force_eager"):  # compiling for every size of image takes longer
                        scores = self._evaluate(log, asked, bar)
                    stopping = scores is None
                if evaluating or stopping or self.step % self.config.run.save_every == 0:
                    self._save()
        if log is not None:
            log.close()
        if isinstance(self.train_step, GraphedSteps):
            self.train_step.release()
        return scores if self.finished else None

    def _take_step(self, batch: SemiBatch) -> None:
        schedule = self.schedule
        use_memory, use_pseudo = self.step >= schedule.memory_from, self.step >= schedule.pseudo_from
        self.train_step(batch, use_memory=use_memory, use_pseudo=use_pseudo)
        self.step += 1
        self.evaluation_due = self.step == self.total_steps or self.step % schedule.evaluate_every == 0

    def _log_step(self, log: MetricsLog | None, bar: "tqdm[Any]") -> None:
        """Move the bar, and log the metrics since the last line if one is due, which waits for the device."""
        bar.update()
        if self.step == self._first:
            logger.info("the first step took %.1f s", time.perf_counter() - self._logged[0])
        if self.step % self.config.run.log_every > 0 and self.step < self.total_steps:
            return
        metrics = self.state.read_metrics()
        self._unlabeled_loss = metrics.get("loss_unlabeled", math.inf)
        before, step = self._logged
        now, _ = self._logged = time.perf_counter(), self.step
        images = (1 if self.config.train.method == "supervised" else 2) * self.config.train.batch_size
        images_per_s = images * (self.step - step) / (now - before)
        if log is not None:
            log.write({**self._position(), **metrics, "images_per_s": images_per_s, **self.findings})
        self.findings.clear()
        loss = metrics.get("loss", math.nan)
        bar.set_postfix_str(f"{images_per_s:.0f} images/s, loss {loss:.3f}", refresh=False)
        # A run may be shorter than max_skipped.
        limit = min(self.config.train.max_skipped, self.total_steps // 2)
        if metrics["skipped_steps"] > limit:
            raise RunError(
                f"{metrics['skipped_steps']} steps had a loss or gradient that is not finite by step {self.step}, more "
                f"than train.max_skipped or half of the run, {limit}: start again in another --run.output-dir with a "
                "lower train.lr or with train.amp False, and look at the starting weights if the first steps were "
                "among them"
            )

    def _evaluate(self, log: MetricsLog | None, asked: Callable[[], bool], bar: "tqdm[Any]") -> Scores | None:
        """Score, log, draw, and keep the best weights; None if it was asked to stop meanwhile, and is still due."""
        model = self.state.evaluated_model()
        samples = itertools.takewhile(lambda _: not asked(), self.data.validation(asked))
        names = [entry.image for entry in self.data.sources.val.entries[rank() :: world_size()]]
        pictured: list[tuple[str, EvalSample, Tensor]] = []

        def picture(index: int, sample: EvalSample, labels: Tensor) -> None:
            if index % -(-len(names) // _PICTURED) == 0:
                pictured.append((names[index], sample, labels))

        scores = evaluate(
            model,
            samples,
            len(self.data.info.classes),
            mode=self.config.eval.mode,
            crop=self.config.data.crop,
            device=self.device,
            batch_size=self.config.eval.batch_size,
            amp=self.config.train.amp,
            each=picture,
        )
        if all_reduce_any(asked()):
            return None
        self.evaluation_due = False
        labels, measured = measure(self.state, model, self.data.first_batch)
        problems: dict[str, str] = {}
        counting = self.config.train.method != "supervised" and self.step > self.schedule.pseudo_from
        if counting or self.step == self.total_steps:
            classes = [*map(one_line, self.data.info.classes)]
            problems = find_problems(measured, scores, classes, best=self.best, loss=self._unlabeled_loss)
        improved = scores.mean_iou > self.best
        if improved:
            self.best, self.best_step = scores.mean_iou, self.step
        with failing_together():
            if log is not None:
                mean_scores = {"miou": scores.mean_iou, "miou_present": scores.mean_iou_present}
                log.write({**self._position(), **mean_scores, "iou": scores.by_class["iou"].tolist(), **measured})
                for name in ("last", "best") if improved else ("last",):
                    save_model(model, self.spec, self.folder / f"{name}.safetensors")
                crops = self.data.first_batch.unlabeled_image[:_PICTURED]
                draw_pictures(log, (crops, labels), pictured, self.spec)
                bar.write(f"step {self.step}: mIoU {100 * scores.mean_iou:.1f}" + improved * ", the best so far")
                for problem in (x for x in problems if x not in self._named):
                    logger.warning("step %d: %s", self.step, problems[problem])
        self._named.update(problems)
        self._logged = time.perf_counter(), self.step
        return scores

    def _position(self) -> Record:
        return {"step": self.step, "epoch": self.step / self.data.steps_per_epoch}

    def _save(self) -> None:
        state = gather_state(self._state())
        with failing_together():
            if rank() == 0:
                checkpoint.save_checkpoint(self.checkpoints, self.step, state, keep_last=self.config.run.keep_last)

    def _state(self) -> dict[str, Any]:
        return {
            **self.state.state_dict(),
            "best": self.best,
            "best_step": self.best_step,
            "evaluation_due": self.evaluation_due,
            "spec": self.spec.to_json(),
            **{name: all_gather_cat(x) for name, x in checkpoint.random_states(self.device).items()},  # by rank
        }

    def _resume(self, state: dict[str, Any]) -> None:
        self.state.load_state_dict(state)
        self.step, self.best, self.best_step = int(state["step"]), state["best"], state["best_step"]
        self.evaluation_due = state["evaluation_due"]
        own, ranks = checkpoint.random_states(self.device), world_size()
        if (saved := state["rng"].numel() // own["rng"].numel()) == ranks:
            checkpoint.set_random_states({name: state[name].chunk(ranks)[rank()] for name in own if name in state})
        else:
            torch.manual_seed(self.config.train.seed + rank() + (self.step << 16))
            logger.info(f"the checkpoint is of {saved} processes, now there are {ranks}: dropout draws other numbers")
        logger.info(f"resumed at step {self.step} of {self.total_steps}")


def train(config: Config, folder: Path) -> bool:
    """Run a configuration in a folder, from its last checkpoint on, and print the table of classes; raises as Trainer.

    Returns:
        whether the run is finished, rather than stopped by a signal or by the end of torchrun.
    """
    with process_group(config.run.device, config.run.timeout) as device:
        if device.type == "cpu":
            limit_threads(config.data.workers)
        trainer = Trainer(config, folder, device)
        tell = print if rank() == 0 else logger.debug
        if trainer.finished:
            best = f"best mIoU {100 * trainer.best:.1f} (best.safetensors, step {trainer.best_step})"
            tell(f"{folder}: finished at step {trainer.step}, {best}")
            return True
        first, started = trainer.step, time.perf_counter()
        scores = trainer.run()
        if scores is None:
            tell(f"{folder}: stopped as asked at step {trainer.step}; the same command goes on from there")
            return False
        tell(score_table(scores, trainer.data.info))
        seconds, last = time.perf_counter() - started, (scores.mean_iou, trainer.step)
        tell(end_summary(folder, (trainer.best, trainer.best_step), last, steps=trainer.step - first, seconds=seconds))
        return True
