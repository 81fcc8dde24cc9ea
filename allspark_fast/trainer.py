"""A run: training from data to checkpoints, evaluation, pictures, and exact resume."""

import logging
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from allspark_fast.checkpoint import load_latest_checkpoint, save_checkpoint, write_atomically
from allspark_fast.config import Config, changed_fields
from allspark_fast.data.info import IGNORE_INDEX
from allspark_fast.data.loader import SemiBatch, SemiLoader, evaluation_loader
from allspark_fast.data.sources import check_sources, open_sources
from allspark_fast.data.transforms import CropTransform
from allspark_fast.evaluate import evaluate, predict_labels
from allspark_fast.metrics import Scores
from allspark_fast.model import Segmentor, build_segmentor
from allspark_fast.report import MetricsLog, draw_curves, draw_predictions, score_table
from allspark_fast.step import Losses, build_optimizer, poly_lr, pseudo_pass, train_step
from allspark_fast.weights import load_weights, save_weights

logger = logging.getLogger(__name__)

# Entries of each list that are read before training starts; `python -m allspark_fast check` reads all.
_CHECKED = 16
_PICTURED = 4


class Trainer:
    """A run: data, model and optimizer of a configuration, resumed from its folder if it was begun.

    Args:
        config: the settings.
        folder: the run folder; made if need be.

    Raises:
        DataError: something is wrong with the data.
        ValueError: the folder holds a run with other settings, or the weights do not fit.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        self.config = config
        self.folder = folder
        _refuse_bad_data(config)
        _claim_folder(folder, config)
        self.device = _device(config.run.device)
        if self.device.type == "cpu":
            # Threads that wait for a core which a loading process has are slower than fewer threads.
            torch.set_num_threads(max(1, (os.cpu_count() or 1) - config.data.workers))
        torch.manual_seed(config.train.seed)
        self.sources = open_sources(config.data)
        self.loader = self._build_loader(hidden_labels=False)
        self.total_steps = config.train.epochs * self.loader.steps_per_epoch
        self.model = build_model(config, len(self.sources.info.classes)).to(self.device)
        self.optimizer = build_optimizer(self.model, config.train)
        self.ema = _build_ema(self.model, config.train.ema)
        self.step = 0
        self.best = -1.0
        # Sums of the losses since the last line of the log, read only when that is written.
        self.window = torch.zeros(len(Losses._fields), device=self.device)
        self.window_steps = 0
        self._resume()

    @property
    def finished(self) -> bool:
        """Whether all steps are taken."""
        return self.step >= self.total_steps

    @property
    def evaluated_model(self) -> nn.Module:
        """The averaged weights if there are any, else the model."""
        return self.model if self.ema is None else self.ema.module

    def run(self) -> Scores:
        """Train to the end, evaluating and saving on the way, and return the last scores."""
        log = MetricsLog(self.folder, self.step)
        scores: Scores | None = None
        bar = tqdm(total=self.total_steps, initial=self.step, unit="step", dynamic_ncols=True)
        started = time.perf_counter()
        for batch in self.loader.iterate(self.step, self.total_steps):
            self._take_step(batch)
            bar.update()
            if self.step % self.config.run.log_every == 0 or self.finished:
                seconds, started = time.perf_counter() - started, time.perf_counter()
                bar.set_postfix(self._log_losses(log, seconds))
            if self._evaluation_is_due():
                scores = self._evaluate(log)
                bar.write(f"step {self.step}: mIoU {100 * scores.mean_iou:.1f}")
                started = time.perf_counter()
            elif self.step % self.config.run.save_every == 0:
                self._save()
        bar.close()
        log.close()
        return scores or self._score()

    def _take_step(self, batch: SemiBatch) -> None:
        train = self.config.train
        epoch = self.step // self.loader.steps_per_epoch
        losses = train_step(
            self.model,
            self.optimizer,
            batch.to(self.device, non_blocking=True),
            train,
            lr=poly_lr(self.step, self.total_steps, train.lr),
            use_memory=epoch >= train.warmup_epochs,
            use_pseudo=epoch >= train.pseudo_from_epoch,
        )
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        self.window += torch.stack(losses)
        self.window_steps += 1
        self.step += 1

    def _log_losses(self, log: MetricsLog, seconds: float) -> dict[str, str]:
        """Write the mean losses since the last line; this is where the device is waited for."""
        total, labeled, unlabeled = (self.window / self.window_steps).tolist()
        if not total < float("inf"):
            raise RuntimeError(
                f"the loss is {total} by step {self.step}: lower train.lr, or look for images that are not finite"
            )
        images = 2 * self.config.train.batch_size * self.window_steps
        log.write(
            {
                "step": self.step,
                "epoch": self.step / self.loader.steps_per_epoch,
                "lr": poly_lr(self.step - 1, self.total_steps, self.config.train.lr),
                "loss": total,
                "loss_labeled": labeled,
                "loss_unlabeled": unlabeled,
                "images_per_s": images / seconds,
            }
        )
        self.window.zero_()
        self.window_steps = 0
        return {"labeled": f"{labeled:.3f}", "unlabeled": f"{unlabeled:.3f}", "images/s": f"{images / seconds:.0f}"}

    def _evaluation_is_due(self) -> bool:
        return self.finished or self.step % (self.config.eval.every * self.loader.steps_per_epoch) == 0

    def _evaluate(self, log: MetricsLog) -> Scores:
        """Score, log, draw, and save: the best weights first, then the checkpoint that makes all of it final."""
        scores = self._score()
        images, labels = self._pseudo_labels()
        valid = labels["truth"] != IGNORE_INDEX
        accuracy = (labels["pseudo label"] == labels["truth"])[valid].float().mean().item()
        log.write(
            {
                "step": self.step,
                "epoch": self.step / self.loader.steps_per_epoch,
                "miou": scores.mean_iou,
                "miou_present": scores.mean_iou_present,
                "iou": scores.iou.tolist(),
                "pseudo_label_accuracy": accuracy,
            }
        )
        draw_curves(self.folder, log.records)
        data = self.config.data
        draw_predictions(self.folder / "predictions.png", images, labels, self.sources.info, data.mean, data.std)
        if scores.mean_iou > self.best:
            self.best = scores.mean_iou
            model = self.evaluated_model
            assert isinstance(model, Segmentor)
            write_atomically(self.folder / "best.safetensors", lambda temporary: save_weights(model, temporary))
        self._save()
        return scores

    def _save(self) -> None:
        save_checkpoint(self.folder / "checkpoints", self.step, self._state(), keep=self.config.run.keep)

    def _score(self) -> Scores:
        config = self.config
        samples = evaluation_loader(
            self.sources.val, mean=config.data.mean, std=config.data.std, num_workers=config.eval.workers
        )
        model = self.evaluated_model
        assert isinstance(model, Segmentor)
        classes = len(self.sources.info.classes)
        return evaluate(model, samples, classes, mode=config.eval.mode, crop=config.data.crop, device=self.device)

    @torch.no_grad()
    def _pseudo_labels(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Unlabeled crops of the first step, their hidden labels, pseudo labels and predictions."""
        loader = self._build_loader(hidden_labels=True, workers=0)
        batch = next(loader.iterate(0, 1)).to(self.device)
        _, pseudo_label = pseudo_pass(self.model, batch, self.config.train)
        model = self.evaluated_model.eval()
        assert isinstance(model, Segmentor)
        assert batch.unlabeled_label is not None
        labels = {
            "truth": batch.unlabeled_label,
            "pseudo label": pseudo_label,
            "prediction": predict_labels(model, batch.unlabeled_image),
        }
        return batch.unlabeled_image[:_PICTURED], {name: x[:_PICTURED] for name, x in labels.items()}

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
            hidden_labels=hidden_labels,
        )

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "best": self.best,
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "window": self.window,
            "window_steps": self.window_steps,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if self.device.type == "cuda" else None,
        }

    def _resume(self) -> None:
        state = load_latest_checkpoint(self.folder / "checkpoints")
        if state is None:
            return
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.step, self.best = state["step"], state["best"]
        self.window, self.window_steps = state["window"].to(self.device), state["window_steps"]
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"])
        logger.info("resumed at step %d of %d", self.step, self.total_steps)


def build_model(config: Config, num_classes: int) -> Segmentor:
    """The model of a configuration, with its starting weights if it names any."""
    model = build_segmentor(
        config.model.backbone,
        num_classes,
        (config.data.crop, config.data.crop),
        allspark=config.train.method == "allspark",
        embedding_dim=config.model.embedding_dim,
        num_heads=config.model.num_heads,
        memory_init=config.model.memory_init,
        memory_sync=config.model.memory_sync,
        class_map=config.model.class_map,
    )
    if config.model.weights is not None:
        report = load_weights(model, config.model.weights, reset=config.model.reset)
        logger.info("%s: dropped %s, fresh %s", config.model.weights, report.dropped, report.fresh)
    return model


def train(config: Config, folder: Path) -> None:
    """Run a configuration in a folder, from its last checkpoint on, and print the table of classes.

    Raises:
        DataError: something is wrong with the data.
        ValueError: the folder holds a run with other settings, or the weights do not fit.
    """
    trainer = Trainer(config, folder)
    if trainer.finished:
        print(f"{folder}: finished at step {trainer.step}, best mIoU {100 * trainer.best:.1f}")
        return
    sources = trainer.sources
    print(
        f"{config.train.method} on {config.data.dataset}: {len(sources.labeled.entries)} labeled, "
        f"{len(sources.unlabeled.entries)} unlabeled, {len(sources.val.entries)} validation images; "
        f"{sum(p.numel() for p in trainer.model.parameters()) / 1e6:.1f} M parameters; "
        f"{trainer.total_steps} steps on {trainer.device}; everything goes to {folder}"
    )
    scores = trainer.run()
    print(score_table(scores, sources.info))


def _claim_folder(folder: Path, config: Config) -> None:
    """Write config.json, or compare with that of the run that is there; where things lie and run may change."""
    config = replace(config, run=replace(config.run, folder=None, device="auto"))
    path = folder / "config.json"
    # Settings that led nowhere, not even to a checkpoint, may be mended in the same folder.
    if not (path.is_file() and any((folder / "checkpoints").glob("step_*.pt"))):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda temporary: temporary.write_text(config.to_json(), encoding="utf-8"))
        return
    changed = changed_fields(Config.from_json(path.read_text(encoding="utf-8")), config)
    if changed:
        raise ValueError(
            f"{folder} holds a run with other settings ({'; '.join(changed)}): "
            "give another --run.folder, or the settings of before"
        )


def _refuse_bad_data(config: Config) -> None:
    errors = [problem for problem in check_sources(config.data, sample=_CHECKED) if not problem.is_warning]
    if errors:
        listed = "\n".join(map(str, errors))
        raise ValueError(f"{len(errors)} problems in the data; `python -m allspark_fast check` lists all:\n{listed}")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.device is cuda, but no GPU is there: use cpu or auto")
    return torch.device(name)


def _build_ema(model: Segmentor, decay: float) -> AveragedModel | None:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)) if decay > 0 else None
