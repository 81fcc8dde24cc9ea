"""One training step of each method, what it changes, and the schedule: the mathematics of training, without a run."""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.utils import _pytree as pytree

from allspark_fast.config import TrainConfig
from allspark_fast.data.info import IGNORE_INDEX
from allspark_fast.data.loader import SemiBatch
from allspark_fast.distributed import all_reduce_mean, world_size
from allspark_fast.kernels.upsample_cross_entropy import upsample_cross_entropy
from allspark_fast.model import Segmentor
from allspark_fast.training.half_weights import HalfWeights
from allspark_fast.training.pseudo_labels import (
    ClassStatistics,
    confident,
    mix_images,
    mix_labels,
    pseudo_pass,
    update_shares,
    update_statistics,
)
from allspark_fast.training.sharding import average_gradients, shard_like, to_local
from allspark_fast.training.side_stream import beside_encoder


class Losses(NamedTuple):
    """Losses of a step, scalars on the device; ``total`` is the mean of the two parts, or the labeled one alone."""

    total: Tensor
    labeled: Tensor
    unlabeled: Tensor


_LOGGED = ("loss", "loss_labeled", "loss_unlabeled")
_COUNTERS = ("step", "skipped", "loss_sums", "received")
# Of BatchNorm: unlike the memory, the other buffers, they belong to the weights. An average that labels takes them from
# the crops it labels, since the student sees other views (docs/results.md).
_STATISTICS = ("running_mean", "running_var")


class TrainState:
    """All that a step changes: model, averaged weights, optimizer, and counters that stay on the device.

    Args:
        model: on the device where it trains.
        config: the optimization.
        total_steps: steps of the whole run, for the schedule.
        ema: a copy of the model that becomes the moving average of its weights; sharded if the model is.
        replica: a whole copy of a sharded model, to evaluate.
    """

    def __init__(
        self,
        model: Segmentor,
        config: TrainConfig,
        *,
        total_steps: int,
        ema: Segmentor | None = None,
        replica: Segmentor | None = None,
    ) -> None:
        device = next(model.parameters()).device
        self.amp = config.amp and next(model.parameters()).is_cuda
        self.model, self.ema, self.replica = model, ema, replica
        self.config, self.total_steps = config, total_steps
        # FSDP gathers the weights of a sharded model anew, and autocast casts them.
        self.half_weights = HalfWeights(*((model, self.teacher) if self.amp and replica is None else ()))
        self.optimizer, self.moments = build_optimizer(model, config)
        self.step, self.skipped = torch.zeros(2, dtype=torch.int64, device=device)
        # Sums of the losses since they were last read, then the number of steps in them: those that were not skipped.
        self.loss_sums = torch.zeros(len(Losses._fields) + 1, dtype=torch.float64, device=device)
        self.classes = ClassStatistics.start(model.decoder.decoder.linear_pred.out_channels, device)
        bottleneck = model.decoder.allspark
        # Channels that each class of the memory received, counted there; (0,) without a memory.
        self.received = self.step.new_zeros(0) if bottleneck is None else bottleneck.attn.received

    @property
    def teacher(self) -> Segmentor:
        """The model that labels the unlabeled images; without any, the model."""
        labels = self.config.teacher == "ema" and self.config.method != "supervised"
        return self.ema if labels and self.ema is not None else self.model

    @torch.no_grad()
    def evaluated_model(self) -> Segmentor:
        """Return the average, BatchNorm statistics included, with the model's memory; the model if there is none.

        If they are sharded, all ranks have to call this and get the whole model.
        """
        weights = self.model if self.ema is None else self.ema
        evaluated = weights if self.replica is None else self.replica
        if evaluated is not weights:
            for parameter, source in zip(evaluated.parameters(), weights.parameters(), strict=True):
                parameter.copy_(source.full_tensor() if isinstance(source, DTensor) else source)
        if evaluated is not self.model:
            buffers = zip(evaluated.named_buffers(), weights.buffers(), self.model.buffers(), strict=True)
            for (name, buffer), own, present in buffers:
                buffer.copy_(own if name.endswith(_STATISTICS) else present)
        return evaluated

    def read_metrics(self) -> dict[str, float]:
        """Read learning rate, skipped steps, and mean losses since the last call, if any; this waits for the device."""
        lr = poly_lr(self.step - 1, self.total_steps, self.config.lr)
        rate, skipped, *sums, steps = torch.cat([torch.stack([lr, self.skipped.double()]), self.loss_sums]).tolist()
        self.loss_sums.zero_()
        losses = {name: x / steps for name, x in zip(_LOGGED, sums, strict=True)} if steps else {}
        if self.config.method == "supervised":
            losses.pop("loss_unlabeled", None)
        return {"lr": rate, **losses, "skipped_steps": int(skipped)}

    def state_dict(self) -> dict[str, Any]:
        """Return what ``load_state_dict`` needs to resume exactly; a sharded model's tensors are sharded too."""
        models = {"model": self.model.state_dict(), "ema": None if self.ema is None else self.ema.state_dict()}
        counters = {name: getattr(self, name) for name in _COUNTERS}
        return {**models, "optimizer": self.moments, **counters, "classes": self.classes._asdict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a ``state_dict`` of whole tensors, on any device and any number of ranks.

        All is copied into the existing tensors, which a recorded step goes on reading and writing.
        """

        def copy(own: Tensor | None, saved: Tensor | None) -> None:
            if own is not None and saved is not None:
                own.copy_(shard_like(saved, own))

        own = self.state_dict()
        pytree.tree_map_(copy, own, {name: state[name] for name in own})


def train_step(state: TrainState, batch: SemiBatch, *, use_memory: bool, use_pseudo: bool = True) -> Losses:
    """Take one training step without waiting for the device; with several ranks, all must take it.

    Where the loss or a gradient is not finite on any, weights, their average and the optimizer stay as they were, and
    the step counts as skipped.

    Args:
        state: updated in place; the model's memory and BatchNorm statistics too.
        batch: as many labeled as unlabeled images.
        use_memory: whether warm-up is over.
        use_pseudo: whether the loss on pseudo labels counts.

    Returns:
        the losses before the update, means over micro-batches and ranks.

    Raises:
        RuntimeError: autocast is on already, which would keep casts of weights that the step changes.
    """
    device, phase = batch.image.device.type, {"use_memory": use_memory, "use_pseudo": use_pseudo}
    if torch.is_autocast_enabled(device):
        raise RuntimeError("train_step enters autocast itself: call it outside of torch.autocast")
    state.model.zero_grad()
    parts = []
    with state.half_weights.installed():
        for micro_batch in batch.split(state.config.gradient_accumulation_steps):
            with torch.autocast(device, torch.bfloat16, enabled=state.amp):
                losses = compute_losses(state.model, micro_batch, state.config, state.teacher, state.classes, **phase)
            (losses.total / state.config.gradient_accumulation_steps).backward()
            state.half_weights.collect_gradients()
            parts.append(torch.stack(losses).detach())
    return _update(state, torch.stack(parts).mean(0))


@torch.no_grad()
def _update(state: TrainState, own_losses: Tensor) -> Losses:
    """Update weights, average and counters without a branch on what is finite; return the mean losses of all ranks."""
    gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
    average_gradients(gradients)
    # One all-reduce of a few numbers, so that all ranks decide alike.
    norm = get_total_norm([to_local(gradient) for gradient in gradients])
    *mean_losses, mean_norm = all_reduce_mean(torch.cat([own_losses, norm[None]]))
    losses = Losses._make(mean_losses)
    finite = (losses.total + mean_norm).isfinite()
    lr = poly_lr(state.step, state.total_steps, state.config.lr)
    for group in state.optimizer.param_groups:
        group["lr"].copy_(lr * group["lr_scale"])
    # The interface of gradient scalers: fused optimizers skip the update where this is 1.
    state.optimizer.found_inf = finite.logical_not().float()  # type: ignore[attr-defined]
    updated = [x for group in state.optimizer.param_groups for x in group["params"]]
    for part, parameter in zip(updated, state.model.parameters(), strict=True):
        part.grad = None if parameter.grad is None else to_local(parameter.grad)
    state.optimizer.step()
    if state.ema is not None:
        if isinstance(state.ema, FSDPModule):
            state.ema.reshard()  # a forward pass without a backward pass leaves it gathered
        names = () if state.teacher is state.ema else _STATISTICS
        _move_average(state.ema, state.model, (1 - state.config.ema) * finite, names)
    state.step += 1
    state.skipped += finite.logical_not()
    state.loss_sums += torch.stack([*losses, torch.ones_like(losses.total)]).where(finite, 0)
    return losses


def _move_average(average: Segmentor, model: Segmentor, weight: Tensor, buffers: tuple[str, ...]) -> None:
    """Move the weights of the average and buffers of these names: average += weight · (model - average)."""
    averaged, current = (
        [*map(to_local, x.parameters()), *(buffer for name, buffer in x.named_buffers() if name.endswith(buffers))]
        for x in (average, model)
    )
    difference = torch._foreach_sub(current, averaged)
    torch._foreach_mul_(difference, weight)
    torch._foreach_add_(averaged, difference)


def compute_losses(
    model: Segmentor,
    batch: SemiBatch,
    config: TrainConfig,
    teacher: Segmentor | None = None,
    classes: ClassStatistics | None = None,
    *,
    use_memory: bool,
    use_pseudo: bool = True,
) -> Losses:
    """Run the forward pass of a method; arguments as ``train_step``'s.

    The model is in training mode afterwards. The unlabeled images are labeled by the teacher, or the model without one;
    statistics of classes are updated in place.
    """
    if config.method == "supervised":
        loss = _labeled_loss(model.train()(batch.image), batch.label, config)
        (loss,) = _weigh_ranks([loss], [batch.label != IGNORE_INDEX], config)
        return Losses(loss, loss, torch.zeros_like(loss))
    classes = classes or ClassStatistics.start(model.decoder.decoder.linear_pred.out_channels, batch.image.device)
    with beside_encoder(model):
        class_logits, target, valid = _label_crops(teacher or model, batch, config, classes, mixed=use_pseudo)
    model.train()
    # Before pseudo labels count, changed crops would only spoil the statistics of BatchNorm and the memory.
    images = torch.cat([batch.image, mix_images(batch) if use_pseudo else batch.unlabeled_image])
    memory = {"class_logits": class_logits, "use_memory": use_memory} if config.method == "allspark" else {}
    labeled, unlabeled = model(images, **memory).chunk(2)
    labeled_loss = _labeled_loss(labeled, batch.label, config)
    unlabeled_loss = upsample_cross_entropy(unlabeled, target, ignore_index=IGNORE_INDEX)
    # The mean over the pixels that count becomes their sum divided by all valid ones, as in FixMatch.
    unlabeled_loss = unlabeled_loss * ((target != IGNORE_INDEX).sum() / valid.sum().clamp(min=1))
    losses = [labeled_loss, unlabeled_loss]
    labeled_loss, unlabeled_loss = _weigh_ranks(losses, [batch.label != IGNORE_INDEX, valid], config)
    total = (labeled_loss + config.unlabeled_weight * unlabeled_loss) / 2 if use_pseudo else labeled_loss
    return Losses(total, labeled_loss, unlabeled_loss)


def _label_crops(
    teacher: Segmentor, batch: SemiBatch, config: TrainConfig, classes: ClassStatistics, *, mixed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits of the unlabeled crops, labels that count, and the mask of pixels that the loss is divided by."""
    alignment, adapt = classes.alignment(config.dist_align), config.teacher == "ema" and config.ema > 0
    class_logits, pseudo_label, confidence = pseudo_pass(teacher, batch, config, alignment=alignment, adapt=adapt)
    if config.dist_align > 0:
        update_shares(classes, batch, class_logits)
    counts = confident(pseudo_label, confidence, classes, config)
    update_statistics(classes, batch.label, pseudo_label, counts, confidence)
    target, valid = pseudo_label.where(counts, IGNORE_INDEX), pseudo_label != IGNORE_INDEX
    return mix_labels(batch, class_logits, target, valid) if mixed else (class_logits, target, valid)


def _labeled_loss(logits: Tensor, label: Tensor, config: TrainConfig) -> Tensor:
    threshold = config.ohem_threshold if config.loss == "ohem" else None
    return upsample_cross_entropy(
        logits, label, ignore_index=IGNORE_INDEX, ohem_threshold=threshold, ohem_min_kept=config.ohem_min_kept
    )


def _weigh_ranks(losses: list[Tensor], masks: list[Tensor], config: TrainConfig) -> list[Tensor]:
    """Scale means over this rank's valid pixels so that their mean over ranks is that over the pixels of all ranks."""
    if world_size() == 1 or config.loss_mean == "rank":
        return losses
    valid = torch.stack([mask.sum() for mask in masks]).float()
    weights = valid / all_reduce_mean(valid).clamp(min=1 / world_size())
    return [loss * weight for loss, weight in zip(losses, weights, strict=True)]


@torch.no_grad()
def build_optimizer(model: Segmentor, config: TrainConfig) -> tuple[torch.optim.Optimizer, list[dict[str, Tensor]]]:
    """Build SGD with momentum 0.9 or AdamW: ``lr`` for the backbone, ``lr * lr_multi`` for the rest, decay on all.

    Fused, because only fused optimizers read the learning rate, and whether to skip the step, on the device. Of a
    sharded model it updates this rank's shards as plain tensors: fused SGD takes no DTensors.

    Returns:
        the optimizer, and what it keeps of each parameter: moments, sharded as that is, and of AdamW a count of steps.
    """
    adamw = config.optimizer == "adamw"
    kind: Any = torch.optim.AdamW if adamw else functools.partial(torch.optim.SGD, momentum=0.9)
    groups: list[dict[str, Any]] = [
        {"params": [to_local(x) for x in part.parameters()], "lr_scale": scale}
        for part, scale in ((model.backbone, 1.0), (model.decoder, config.lr_multi))
    ]
    optimizer: torch.optim.Optimizer = kind(groups, lr=config.lr, weight_decay=config.weight_decay, fused=True)
    device = next(model.parameters()).device
    for group in optimizer.param_groups:
        group["lr"] = torch.zeros((), device=device)
    # Made here: a first step that is skipped would leave SGD's momentum without a value, and checkpoints are copied
    # into existing tensors.
    names, kept = ("exp_avg", "exp_avg_sq") if adamw else ("momentum_buffer",), []
    for x, parameter in zip((x for group in groups for x in group["params"]), model.parameters(), strict=True):
        count = {"step": torch.zeros((), device=device)} if adamw else {}
        kept.append({**count, **{name: torch.zeros_like(parameter) for name in names}})
        optimizer.state[x] = {name: to_local(moment) for name, moment in kept[-1].items()}
    return optimizer, kept


def poly_lr(step: Tensor, total_steps: int, base_lr: float) -> Tensor:
    """Return the learning rate of a step under polynomial decay of power 0.9, float64.

    The reference implementation sets the rate after each step, from that step's number, so the first two share a rate.
    """
    return base_lr * (1 - (step - 1).clamp(min=0).double() / total_steps) ** 0.9
