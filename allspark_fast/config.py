"""Every setting of a run, typed; the help of the command line is made of these docstrings."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

Method = Literal["allspark", "semi", "supervised"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Images, labels and crops.

    Attributes:
        dataset: rendered scenes; files of pascal, cityscapes, coco or camvid; or folder, any folder with images/ and
            labels/ (and meta.json for class names).
        root: folder of the data set; $ALLSPARK_DATA_DIR, or a folder of the data set's name in it, if not given.
        labeled: split file of labeled images, relative to the root or to where you are.
        unlabeled: split file of unlabeled images.
        val: split file of validation images.
        crop: side of the square training crops in pixels.
        scale: range of the random resize of training images.
        scenes: labeled, unlabeled and validation scenes, if the data set is scenes.
        mean: of each colour channel in 0..1, subtracted from images.
        std: of each colour channel, which images are divided by.
        workers: processes that load training images; on a CPU the rest of the cores train.
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
    workers: int = 2


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Encoder, bottleneck and head.

    Attributes:
        backbone: name of a Mix Transformer.
        embedding_dim: channels of the SegFormer head.
        num_heads: heads of the AllSpark bottleneck.
        memory_init: randn starts the Semantic Memory with noise (the public code), empty without anything.
        memory_sync: with several processes, rank0 keeps rank 0's memory (the public code), all everybody's channels.
        class_map: what sorts channels into classes: logits (the public code) or their softmax.
        weights: file to start from: an AllSpark checkpoint, mit_b*.pth or a Hugging Face SegFormer.
        reset: start classifier, memory or bottleneck afresh where the file does not fit.
    """

    backbone: Literal["mit_tiny", "mit_b0", "mit_b1", "mit_b2", "mit_b3", "mit_b4", "mit_b5"] = "mit_b5"
    embedding_dim: int = 768
    num_heads: int = 2
    memory_init: Literal["randn", "empty"] = "randn"
    memory_sync: Literal["rank0", "all"] = "rank0"
    class_map: Literal["logits", "softmax"] = "logits"
    weights: Path | None = None
    reset: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The optimisation.

    Attributes:
        method: allspark; semi, the same without the bottleneck; or supervised, on the labeled images only.
        epochs: passes over the unlabeled images.
        batch_size: labeled, and as many unlabeled, images of a step, over all processes.
        optimizer: sgd (momentum 0.9, the paper) or adamw.
        lr: learning rate of the backbone; decays to 0 by a polynomial of power 0.9.
        lr_multi: factor on it for all else.
        weight_decay: on every parameter.
        warmup_epochs: epochs before labeled features are rebuilt from the memory rather than from their batch.
        pseudo_from_epoch: first epoch in which pseudo labels count; until then unlabeled images only feed the memory.
            0 as in the paper; later for an encoder without pretraining, whose first pseudo labels are noise.
        loss: of the labeled images: ce, or ohem, which keeps the hard pixels.
        ohem_threshold: pixels whose true class is less probable than this are hard.
        ohem_min_kept: at least so many pixels of a batch count as hard.
        attend: in the pseudo-label pass, whether an image is rebuilt from its whole batch (the public code) or itself.
        pseudo_padding: train on the padding that crops add, with its pseudo label (the public code).
        ema: decay of an exponential moving average of the weights that is evaluated instead of them; 0 for none.
        amp: bfloat16 autocast on a GPU.
        seed: of weights, order, augmentation and dropout.
    """

    method: Method = "allspark"
    epochs: int = 80
    batch_size: int = 8
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.001
    lr_multi: float = 10.0
    weight_decay: float = 1e-4
    warmup_epochs: int = 5
    pseudo_from_epoch: int = 0
    loss: Literal["ce", "ohem"] = "ce"
    ohem_threshold: float = 0.7
    ohem_min_kept: int = 200_000
    attend: Literal["batch", "image"] = "batch"
    pseudo_padding: bool = True
    ema: float = 0.0
    amp: bool = True
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Validation.

    Attributes:
        mode: whole images, or windows of the crop's size that slide by two thirds of it (Cityscapes).
        every: epochs between two evaluations.
        workers: processes that load validation images.
    """

    mode: Literal["whole", "sliding"] = "whole"
    every: int = 1
    workers: int = 0


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run folder.

    Attributes:
        folder: where everything goes; runs/<recipe> if not given.
        log_every: steps between two lines of metrics.jsonl.
        save_every: steps between two checkpoints; there is also one after every evaluation.
        keep: newest checkpoints kept.
        device: cpu, cuda, or auto for what is there.
    """

    folder: Path | None = None
    log_every: int = 10
    save_every: int = 500
    keep: int = 2
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a run.

    Attributes:
        data: images, labels and crops.
        model: encoder, bottleneck and head.
        train: the optimisation.
        eval: validation.
        run: the run folder.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def to_json(self) -> str:
        """The settings as JSON, for config.json."""
        return json.dumps(dataclasses.asdict(self), indent=2, default=str)

    @classmethod
    def from_json(cls, text: str) -> "Config":
        """The settings that ``to_json`` wrote.

        Raises:
            ValueError: the text is no JSON or has other fields than this version.
        """
        return _from_plain(cls, json.loads(text), "config")


def changed_fields(old: Config, new: Config) -> list[str]:
    """Lines ``group.field: old -> new`` for all settings that differ."""
    groups = [(x.name, getattr(old, x.name), getattr(new, x.name)) for x in dataclasses.fields(Config)]
    return [
        f"{group}.{x.name}: {getattr(before, x.name)} -> {getattr(after, x.name)}"
        for group, before, after in groups
        for x in dataclasses.fields(before)
        if getattr(before, x.name) != getattr(after, x.name)
    ]


def _from_plain(kind: Any, value: Any, where: str) -> Any:
    """Dataclasses, paths and tuples out of what JSON makes of them."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        if not isinstance(value, dict) or set(value) != set(hints):
            different = sorted(set(value) ^ set(hints)) if isinstance(value, dict) else [value]
            raise ValueError(f"{where}: fields {different} are missing or unknown in this version")
        return kind(**{name: _from_plain(hint, value[name], f"{where}.{name}") for name, hint in hints.items()})
    if get_origin(kind) is UnionType:
        return None if value is None else _from_plain(get_args(kind)[0], value, where)
    if kind is Path:
        return Path(value)
    return tuple(value) if get_origin(kind) is tuple else value
