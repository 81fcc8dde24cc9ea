"""Weights of any origin as models of ours: what a file does not say is inferred from the shapes of its tensors."""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from allspark_fast.config import DataConfig
from allspark_fast.data.info import DATASETS, VOC_PALETTE, DatasetInfo, read_info
from allspark_fast.errors import InputError
from allspark_fast.model import Segmentor
from allspark_fast.model.mit import MIT_CONFIGS, STRIDES
from allspark_fast.weights.files import read_weights
from allspark_fast.weights.spec import ModelSpec, find_weights

# The data sets of the public code: the number of classes tells which one a checkpoint is of.
_PUBLIC = {len(DATASETS[name].classes): DATASETS[name] for name in ("pascal", "cityscapes", "coco")}


def read_model(path: str | Path, classes: str | None = None) -> tuple[Segmentor, ModelSpec]:
    """Load weights of any origin as a model in eval mode on the CPU.

    Args:
        path: a checkpoint of the public code, or weights of ours, with or without a description.
        classes: a data set of DATASETS, or a ``meta.json``, that names them. None takes what the file says, or else,
            for ``.pth``, the data set of the public code with so many classes, or else "class 0" and so on.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: the file is damaged, holds an encoder only, another architecture, or other classes.
    """
    path = find_weights(path)
    state, description = read_weights(path)
    spec = infer_spec(state, path) if description is None else ModelSpec.from_json(description, path)
    if classes is not None:
        is_known, count = classes in DATASETS, len(spec.info.classes)
        if not (is_known or (Path(classes).name == "meta.json" and Path(classes).is_file())):
            raise FileNotFoundError(f"{classes}: no meta.json, and no data set (known: {', '.join(DATASETS)})")
        info = DATASETS[classes] if is_known else read_info(Path(classes).parent)
        if len(info.classes) != count:
            raise InputError(f"{path}: has {count} classes, but {info.name} names {len(info.classes)}")
        spec = dataclasses.replace(spec, info=info)
    return spec.restore(state, path), spec


def infer_spec(state: Mapping[str, Tensor], path: Path) -> ModelSpec:
    """Infer what a model of these weights from ``path`` must be, under this project's names.

    The crop is the smallest with as many tokens as the memory has, which is that of the public code (513, 801).

    Raises:
        InputError: this is no model that we have.
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
    """Return the Mix Transformer of these widths and depths; loading compares all other shapes."""
    widths = tuple(len(state.get(f"backbone.patch_embed{stage}.proj.bias", ())) for stage in range(1, 5))
    blocks = {match[0] for name in state if (match := re.match(r"backbone\.block(\d)\.\d+\.", name))}
    depths = tuple(sum(name.startswith(f"backbone.block{stage}.") for name in blocks) for stage in range(1, 5))
    for name, config in MIT_CONFIGS.items():
        if (config.embed_dims, config.depths) == (widths, depths):
            return name
    raise InputError(f"{path}: no Mix Transformer here has widths {widths} and depths {depths}")
