"""Trained models as files: weights with what one must know to use them, written beside them or inferred."""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from allspark_fast.config import Config, DataConfig, EvalMode, from_plain
from allspark_fast.data.info import DATASETS, VOC_PALETTE, DatasetInfo, parse_meta, read_info
from allspark_fast.errors import InputError
from allspark_fast.model import AllSparkOptions, Segmentor, build_segmentor
from allspark_fast.model.mit import MIT_CONFIGS, STRIDES
from allspark_fast.model.options import MemoryInit
from allspark_fast.text import one_line
from allspark_fast.weights.files import load_state_dict, read_weights, save_weights

_VERSION = 1
# Of a run, and of a model of the Hugging Face Hub.
_FILES = ("best.safetensors", "model.safetensors")
# The data sets of the public code: the number of classes tells which one a checkpoint is of.
_PUBLIC = {len(DATASETS[name].classes): DATASETS[name] for name in ("pascal", "cityscapes", "coco")}


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What must be known to use weights; it travels with them, as JSON in the metadata of the file.

    Attributes:
        allspark: whether there is the AllSpark bottleneck.
        crop: side of the training crops in pixels, and of sliding windows.
        mode: how the model was validated, see predict_labels.
        mean: of each color channel in 0..1, subtracted from images.
        std: of each color channel, which images are divided by.
        range: pixel values that became black and white, see read_image.
    """

    backbone: str
    allspark: bool
    embedding_dim: int
    num_heads: int
    memory_init: MemoryInit
    crop: int
    mode: EvalMode
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    range: tuple[str, str] | None = None
    info: DatasetInfo

    @classmethod
    def of_run(cls, config: Config, info: DatasetInfo) -> "ModelSpec":
        """Return the specification of a configuration's model, trained on the classes of ``info``."""
        model, data = config.model, config.data
        return cls(
            **{name: getattr(model, name) for name in ("backbone", "embedding_dim", "num_heads", "memory_init")},
            **{name: getattr(data, name) for name in ("crop", "mean", "std", "range")},
            allspark=config.train.method == "allspark",
            mode=config.eval.mode,
            info=info,
        )

    def to_json(self) -> str:
        """Return version, fields, and the classes in the form of a ``meta.json``."""
        fields = dataclasses.asdict(self) | {"version": _VERSION, "dataset": self.info.name}
        del fields["info"]
        colors = self.info.palette[: len(self.info.classes)]
        return json.dumps(fields | {"classes": self.info.classes, "palette": colors})

    @classmethod
    def from_json(cls, text: str, path: Path) -> "ModelSpec":
        """Read what ``to_json`` wrote, as the description in ``path``.

        Raises:
            InputError: the text is damaged, or of another version; the message names the file and the field.
        """
        try:
            fields = json.loads(text)
            if (version := fields.pop("version")) != _VERSION:
                raise InputError(f"version is {version!r}, expected {_VERSION}")
            meta = {name: fields.pop(name) for name in ("classes", "palette")}
            info = parse_meta(meta, from_plain(str, fields.pop("dataset"), "dataset"))
            return from_plain(cls, {"range": None, **fields, "info": info}, "model")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            detail = f"no {error}" if isinstance(error, KeyError) else error
            raise InputError(
                f"{path}: damaged description of the model, or of another version of allspark-fast ({detail})"
            ) from error

    def build(self, *, activation_checkpointing: bool = False, **switches: Any) -> Segmentor:
        """Build the model, with random weights; for training, with other fields of AllSparkOptions."""
        options = AllSparkOptions(num_heads=self.num_heads, memory_init=self.memory_init, **switches)
        return build_segmentor(
            self.backbone,
            len(self.info.classes),
            (self.crop, self.crop),
            allspark=options if self.allspark else None,
            embedding_dim=self.embedding_dim,
            activation_checkpointing=activation_checkpointing,
        )


def find_weights(path: str | Path) -> Path:
    """Return a file of weights itself, or that of a run folder or a folder of the Hugging Face Hub, if it has one."""
    path = Path(path)
    found = [path] if not path.is_dir() else [path / name for name in _FILES if (path / name).is_file()]
    if not found:
        raise FileNotFoundError(
            f"{path}: none of {', '.join(_FILES)} in this folder; a run writes the first at its first evaluation, and "
            "until then there are its checkpoints/step_*.pt"
        )
    return found[0]


def load_model(path: str | Path, *, infer: bool = False, classes: str | None = None) -> tuple[Segmentor, ModelSpec]:
    """Load a trained model in eval mode on the CPU, and what must be known to use it.

    Args:
        path: ``.safetensors`` of ``save_model``, a checkpoint of a run, or a folder that ``find_weights`` takes.
        infer: take weights without a description too, those of the public code: see ``infer_spec``.
        classes: a data set of DATASETS, or a ``meta.json``, that names the classes otherwise.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: the file is damaged, does not say what its model is, or holds another model, or a part of it.
    """
    path = find_weights(path)
    state, description = read_weights(path)
    if description is not None:
        spec = ModelSpec.from_json(description, path)
    elif infer:
        spec = infer_spec(state, path)
    else:
        raise InputError(
            f"{path} does not say what its model is (classes, colors, sizes): if it holds weights, "
            f"`python -m allspark_fast convert {path} model.safetensors` finds that out and writes it down"
        )
    if classes is not None:
        is_known, count = classes in DATASETS, len(spec.info.classes)
        if not (is_known or (Path(classes).name == "meta.json" and Path(classes).is_file())):
            raise FileNotFoundError(f"{classes}: no meta.json, and no data set (known: {', '.join(DATASETS)})")
        info = DATASETS[classes] if is_known else read_info(Path(classes).parent)
        if len(info.classes) != count:
            raise InputError(f"{path}: has {count} classes, but {info.name} names {len(info.classes)}")
        spec = dataclasses.replace(spec, info=info)
    try:
        model = spec.build()
    except ValueError as error:
        raise InputError(f"{path}: no such model: {error}") from error
    if fresh := load_state_dict(model, state, path).fresh:
        raise InputError(f"{path} lacks weights of its model: {', '.join(fresh[:3])}")
    return model.eval(), spec


def infer_spec(state: Mapping[str, Tensor], path: Path) -> ModelSpec:
    """Infer what a model of these weights from ``path`` must be; InputError if it is none that we have.

    The crop is the smallest with as many tokens as the memory has: that of the public code (513, 801). Classes of a
    ``.pth`` are those of the data set of the public code with as many, or else "class 0" and so on.
    """
    if "decoder.decoder.linear_pred.weight" not in state:
        raise InputError(
            f"{path}: holds no decoder, so it labels nothing; training starts from an encoder as it is: "
            f"--model.weights {path}"
        )
    count = len(state["decoder.decoder.linear_pred.weight"])
    info = DatasetInfo(path.stem, tuple(f"class {index}" for index in range(count)), VOC_PALETTE)
    if path.suffix == ".pth":
        info = _PUBLIC.get(count, info)
    backbone = _infer_backbone(state, path)
    crop, num_heads = DataConfig().crop, 1
    if allspark := "decoder.allspark.attn.kv_queue" in state:
        tokens = state["decoder.allspark.attn.kv_queue"].shape[2]
        side = math.isqrt(tokens)
        if side**2 != tokens:
            raise InputError(f"{path}: its memory has {tokens} tokens, expected a square number, for square crops")
        crop = (side - 1) * STRIDES[-1] + 1
        num_heads = len(state["decoder.allspark.attn.q_u.weight"]) // MIT_CONFIGS[backbone].embed_dims[-1]
    return ModelSpec(
        backbone=backbone,
        allspark=allspark,
        embedding_dim=len(state["decoder.decoder.linear_fuse.conv.weight"]),
        num_heads=num_heads,
        memory_init="empty" if "decoder.allspark.attn.queue_filled" in state else "randn",
        crop=crop,
        mode="sliding" if info.name == "cityscapes" else "whole",
        mean=DataConfig().mean,
        std=DataConfig().std,
        info=info,
    )


def _infer_backbone(state: Mapping[str, Tensor], path: Path) -> str:
    # Loading compares all other shapes.
    widths = tuple(len(state.get(f"backbone.patch_embed{stage}.proj.bias", ())) for stage in range(1, 5))
    blocks = {match[0] for name in state if (match := re.match(r"backbone\.block(\d)\.\d+\.", name))}
    depths = tuple(sum(name.startswith(f"backbone.block{stage}.") for name in blocks) for stage in range(1, 5))
    for name, config in MIT_CONFIGS.items():
        if (config.embed_dims, config.depths) == (widths, depths):
            return name
    raise InputError(f"{path}: no Mix Transformer here has widths {widths} and depths {depths}")


def save_model(model: Segmentor, spec: ModelSpec, path: str | Path) -> None:
    """Write a model, whole or not at all; ``load_model`` loads ``.safetensors``, others as ``save_weights``."""
    save_weights(model, path, spec.to_json())


def describe_model(model: Segmentor, spec: ModelSpec) -> dict[str, str]:
    """Return what a model is, as text by property."""
    bottleneck = f"AllSpark, {spec.num_heads} heads, memory initialized {spec.memory_init}"
    return {
        "encoder": spec.backbone,
        "bottleneck": bottleneck if spec.allspark else "none, plain SegFormer",
        "head": f"{spec.embedding_dim} channels",
        "parameters": f"{sum(x.numel() for x in model.parameters()) / 1e6:.1f} M",
        "crop": f"{spec.crop} pixels, validated on {'whole images' if spec.mode == 'whole' else 'sliding windows'}",
        "colors": f"mean {spec.mean}, std {spec.std}",
        "classes": f"{len(spec.info.classes)} of {spec.info.name}: {', '.join(map(one_line, spec.info.classes))}",
    }
