"""Every setting of a run, typed; the command line takes its help from these docstrings."""

import dataclasses
import json
from collections.abc import Collection
from dataclasses import MISSING, dataclass, field, replace
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from allspark_fast.errors import InputError
from allspark_fast.text import nearest

Method = Literal["allspark", "semi", "supervised"]
EvalMode = Literal["whole", "sliding"]
Augment = Literal["photo", "microscopy", "aerial", "none"]


class Within(NamedTuple):
    """The range of a setting, or of each of its numbers, both ends included; NaN is in none."""

    low: float
    high: float


Count = Annotated[int, Within(1, 10**9)]
Natural = Annotated[int, Within(0, 10**9)]
Workers = Annotated[int, Within(0, 1000)]
Share = Annotated[float, Within(0, 1)]


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Settings, whose ranges are checked."""

    def __post_init__(self) -> None:
        group = type(self).__name__.removesuffix("Config").lower()
        for name, kind in get_type_hints(type(self), include_extras=True).items():
            value = getattr(self, name)
            numbers = value if isinstance(value, tuple) else (value,)
            for low, high in getattr(kind, "__metadata__", ()):
                inside = value is None or all(low <= x <= high for x in numbers)
                _expect(inside, f"{group}.{name}", value, f"{low} to {high}")


@dataclass(frozen=True, kw_only=True)
class DataConfig(_Group):
    """Images, labels and crops.

    Attributes:
        dataset: rendered scenes; pascal, cityscapes, coco or camvid; or folder, your own images/, labels/, meta.json.
        root: folder of the data set; if not given, $ALLSPARK_DATA_DIR, or a folder of the data set's name in it.
        labeled: split file of labeled images, `image label` in each line; relative to the root or to where you are.
        unlabeled: split file of unlabeled images; labels that it names are never trained on.
        val: split file of validation images, `image label` in each line.
        crop: side of the square training crops in pixels.
        scale: least and greatest factor by which training images are randomly resized before they are cropped.
        augment: photo mirrors images and changes colors much (the paper); microscopy mirrors, turns by right angles and
            changes intensity; aerial mirrors, turns and changes colors a little; none only resizes and crops.
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
    crop: Annotated[int, Within(32, 10_000)] = 513  # below, the deepest map has no token left
    scale: Annotated[tuple[float, float], Within(0.01, 100)] = (0.5, 2.0)
    augment: Augment = "photo"
    scenes: Annotated[tuple[int, int, int], Within(1, 100_000)] = (8, 504, 100)
    mean: Annotated[tuple[float, float, float], Within(0, 1)] = (0.485, 0.456, 0.406)
    std: Annotated[tuple[float, float, float], Within(0.001, 10)] = (0.229, 0.224, 0.225)
    range: tuple[str, str] | None = None
    workers: Workers = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        _expect(self.scale[0] <= self.scale[1], "data.scale", self.scale, "low <= high")
        expected = "two numbers, or two percentiles such as 1% 99%, low < high"
        _expect(self.range is None or _is_range(*self.range), "data.range", self.range, expected)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(_Group):
    """Encoder, bottleneck and head.

    Attributes:
        backbone: mit_tiny, mit_b0 to mit_b5, or timm/NAME for an encoder of timm, such as timm/convnext_tiny.
        embedding_dim: channels of the SegFormer head.
        num_heads: heads of the AllSpark bottleneck.
        memory_init: randn starts the Semantic Memory with noise (the reference implementation), empty without channels.
        memory_sync: with several processes, whose channels last: rank0's (the reference implementation), or all.
        class_map: what sorts channels into classes: logits (the reference implementation) or their softmax.
        activation_checkpointing: compute blocks of a MiT again in backward: less memory, more time, the same numbers.
        weights: file to start from: an AllSpark checkpoint, mit_b*.pth, a Hugging Face SegFormer, a model of timm; or
            imagenet: the encoder's are fetched from the Hugging Face Hub (timm/tf_efficientnet_lite0: come with pip).
        reset: start classifier, memory or bottleneck from scratch where the file does not fit.
    """

    backbone: str = "mit_b5"
    embedding_dim: Annotated[int, Within(1, 10_000)] = 768
    num_heads: Annotated[int, Within(1, 100)] = 2
    memory_init: Literal["randn", "empty"] = "randn"
    memory_sync: Literal["rank0", "all"] = "rank0"
    class_map: Literal["logits", "softmax"] = "logits"
    activation_checkpointing: bool = False
    weights: Path | None = None
    reset: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainConfig(_Group):
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
        pseudo_from_epoch: first epoch in which pseudo labels count: 0 in the paper, later for an encoder from scratch.
        pseudo_from: part of the run before pseudo labels count, in place of pseudo_from_epoch.
        unlabeled_weight: factor on the loss of pseudo labels.
        teacher: what labels the unlabeled images: the student (the paper, or with ema 0), or ema, its average.
        conf_thresh: least confidence of pseudo labels that count; 0 for all (the paper).
        conf_mode: threshold: the same for all classes; class: at most each one's mean confidence, for hard classes.
        strong: show the student unlabeled crops with colors changed by data.augment; the teacher labels them unchanged.
        cutmix: probability that an unlabeled crop gets a box of another one, with its pseudo labels.
        copy_paste: probability that an unlabeled crop gets half of the classes of a labeled one, with their labels.
        dist_align: largest factor on probabilities of classes that are predicted less often than labeled; 0 for none.
        loss: of the labeled images: ce (cross-entropy), or ohem, which keeps the hard pixels.
        loss_mean: over valid pixels of all processes (global), or of each (rank, the reference implementation).
        ohem_threshold: pixels whose true class is less probable than this are hard.
        ohem_min_kept: at least this many pixels of a batch count as hard.
        kv_source: of keys and values in the pseudo-label pass: the batch (the reference implementation), or the image.
        pseudo_padding: train on the padding that crops add, with its pseudo label (the reference implementation).
        ema: decay of an exponential moving average of the weights that is evaluated instead of them; 0 for none.
        amp: bfloat16 autocast on a GPU.
        compile: torch.compile of the blocks of mit_*: on, off, or auto, on a GPU for runs of more than 5,000 steps.
        cuda_graph: record a step and replay it, many times faster: on, off, or auto, on GPUs unless fsdp shards the
            model (on records that too, and ends the run if it cannot), and only if the first replay equals ordinary
            steps.
        gradient_accumulation_steps: micro-batches that a batch is split into, to need less memory. BatchNorm, the means
            of losses, OHEM, the memory and kv_source=batch then see one of them at a time.
        sharding: with several processes, fsdp shards weights, gradients and optimizer state; replicate, auto do not.
        deterministic: on a GPU, use only operations that give the same bits every time, or stop at one that cannot.
        max_skipped: stop after more steps than this, or half of all, whose loss or gradient was not finite.
        seed: of weights, order, augmentation and dropout.
    """

    method: Method = "allspark"
    epochs: Count = 80
    steps: Annotated[int | None, Within(1, 10**9)] = None
    batch_size: Count = 8
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: Annotated[float, Within(0, 100)] = 0.001
    lr_multi: Annotated[float, Within(0, 1000)] = 10.0
    weight_decay: Annotated[float, Within(0, 10)] = 1e-4
    warmup_epochs: Natural = 5
    warmup: Annotated[float | None, Within(0, 1)] = None
    pseudo_from_epoch: Natural = 0
    pseudo_from: Annotated[float | None, Within(0, 1)] = None
    unlabeled_weight: Annotated[float, Within(0, 1000)] = 1.0
    teacher: Literal["student", "ema"] = "student"
    conf_thresh: Share = 0.0
    conf_mode: Literal["threshold", "class"] = "threshold"
    strong: bool = False
    cutmix: Share = 0.0
    copy_paste: Share = 0.0
    dist_align: Annotated[float, Within(0, 1000)] = 0.0
    loss: Literal["ce", "ohem"] = "ce"
    loss_mean: Literal["global", "rank"] = "global"
    ohem_threshold: Share = 0.7
    ohem_min_kept: Natural = 200_000
    kv_source: Literal["batch", "image"] = "batch"
    pseudo_padding: bool = True
    ema: Annotated[float, Within(0, 0.999999)] = 0.0  # at 1 the average would never move
    amp: bool = True
    compile: Literal["auto", "on", "off"] = "auto"
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    gradient_accumulation_steps: Count = 1
    sharding: Literal["auto", "fsdp", "replicate"] = "auto"
    deterministic: bool = False
    max_skipped: Natural = 50
    seed: Annotated[int, Within(0, 2**63 - 1)] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _expect(self.dist_align == 0 or self.dist_align >= 1, "train.dist_align", self.dist_align, "0, or 1 to 1000")
        threshold, by_class = self.conf_thresh, self.conf_mode == "class"
        _expect(threshold > 0 or not by_class, "train.conf_thresh", threshold, "more than 0 for train.conf_mode=class")


@dataclass(frozen=True, kw_only=True)
class EvalConfig(_Group):
    """Validation.

    Attributes:
        mode: whole images, or windows of the crop's size that slide by two thirds of it (Cityscapes).
        every: epochs between two evaluations.
        times: evaluations of the run, at equal distances, in place of every.
        batch_size: images of equal size evaluated together, in each process; more takes more memory.
        workers: processes that load validation images.
    """

    mode: EvalMode = "whole"
    every: Count = 1
    times: Annotated[int | None, Within(1, 10**9)] = None
    batch_size: Count = 4
    workers: Workers = 2


@dataclass(frozen=True, kw_only=True)
class RunConfig(_Group):
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
    log_every: Count = 10
    save_every: Count = 500
    keep_last: Annotated[int, Within(1, 10**6)] = 2
    device: Literal["auto", "cpu", "cuda"] = "auto"
    kernels: Literal["auto", "torch"] = "auto"
    timeout: Annotated[float, Within(0.001, 10**5)] = 10.0


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

    def __post_init__(self) -> None:
        useless = self.train.strong and self.data.augment == "none"
        _expect(not useless, "train.strong", True, "False beside data.augment=none, which changes no colors")

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


def changed_fields(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Return the old and the new value of all settings ``group.field`` that differ."""
    before, after = _settings(old), _settings(new)
    return {name: (value, after[name]) for name, value in before.items() if value != after[name]}


def _settings(config: Config) -> dict[str, Any]:
    groups = dataclasses.asdict(config)
    return {f"{group}.{name}": value for group, settings in groups.items() for name, value in settings.items()}


def _is_range(low: str, high: str) -> bool:
    least, most = (0.0, 100.0) if low.endswith("%") else (-1e38, 1e38)
    try:
        ordered = least <= float(low.removesuffix("%")) < float(high.removesuffix("%")) <= most
    except ValueError:
        return False
    return ordered and low.endswith("%") == high.endswith("%")


# Lengths in epochs, and the settings that take their place where these are not None.
IN_PLACE = {
    "train.epochs": "train.steps",
    "train.warmup_epochs": "train.warmup",
    "train.pseudo_from_epoch": "train.pseudo_from",
    "eval.every": "eval.times",
}


def prefer_given_lengths(config: Config, given: Collection[str]) -> Config:
    """Return settings without what stands in place of lengths in epochs that are ``given``, names ``group.field``.

    Raises:
        InputError: both kinds of a length are given.
    """
    for name, other in IN_PLACE.items():
        group, _, field_name = other.partition(".")
        settings = getattr(config, group)
        if name not in given or getattr(settings, field_name) is None:
            continue
        if other in given:
            raise InputError(f"{name} has no effect beside {other} = {getattr(settings, field_name)}: give one of them")
        config = replace(config, **{group: replace(settings, **{field_name: None})})
    return config


def _expect(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise InputError(f"{name} is {value}, expected {expected}")


RENAMED = {
    "model.checkpointing": "model.activation_checkpointing",
    "train.accumulate": "train.gradient_accumulation_steps",
    "train.attend": "train.kv_source",
    "run.folder": "run.output_dir",
    "run.keep": "run.keep_last",
}


def require_setting(name: str) -> None:
    """Raise InputError unless there is a setting ``group.field``; the message gives its new name or the nearest one."""
    if name in RENAMED:
        raise InputError(f"{name} was renamed: use {RENAMED[name]}")
    if name not in (known := _settings(Config())):
        raise InputError(f"there is no setting {name}{nearest(name, known)}; names are group.field, see --help-all")


def from_plain(kind: Any, value: Any, where: str) -> Any:
    """Return a value of a type from what JSON makes of it.

    Args:
        kind: a dataclass, ``X | None``, a tuple of fixed length, a Literal, Path, or one of Python's plain types.
        value: of ``json.loads``; fields with a default may be missing. Or already of the dataclass ``kind``.
        where: name of the value, for messages.

    Raises:
        InputError: a field is missing, unknown or of another type; the message names it.
    """
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if isinstance(value, kind):
            return value
        _expect(isinstance(value, dict), where, repr(value), "an object with fields")
        hints = get_type_hints(kind)
        for name in value if where.startswith("config.") else ():
            require_setting(f"{where}.{name}".removeprefix("config."))
        required = {x.name for x in dataclasses.fields(kind) if MISSING is x.default is x.default_factory}
        if different := sorted((set(value) - set(hints)) | (required - set(value))):
            raise InputError(f"{where}: fields {different} are missing or unknown in this version")
        return kind(**{name: from_plain(hints[name], x, f"{where}.{name}") for name, x in value.items()})
    kinds = get_args(kind)
    if get_origin(kind) is UnionType:
        return None if value is None else from_plain(kinds[0], value, where)
    if get_origin(kind) is tuple:
        _expect(isinstance(value, list) and len(value) == len(kinds), where, value, f"a list of {len(kinds)}")
        return tuple(from_plain(x, part, where) for x, part in zip(kinds, value, strict=True))
    if get_origin(kind) is Literal:
        _expect(value in kinds, where, value, f"one of {', '.join(kinds)}")
        return value
    is_written = isinstance(value, {Path: str, float: int | float}.get(kind, kind))
    _expect(is_written and (kind is bool or not isinstance(value, bool)), where, repr(value), kind.__name__)
    return Path(value) if kind is Path else value
