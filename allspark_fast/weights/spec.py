"""Trained models as files: weights with what one must know to use them."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from allspark_fast.config import Config, EvalMode, from_plain
from allspark_fast.data.info import DatasetInfo, parse_meta
from allspark_fast.errors import InputError
from allspark_fast.files import make_folder, write_atomically
from allspark_fast.model import AllSparkOptions, Segmentor, build_segmentor
from allspark_fast.model.options import MemoryInit
from allspark_fast.weights.files import load_state_dict, read_metadata, read_state_dict, save_weights

# The key of the metadata of .safetensors files, and the version of what stands there.
_KEY = "allspark_fast"
_VERSION = 1
# What a folder may hold: a run, a model saved for the Hugging Face Hub, an older one of others.
_FILES = ("best.safetensors", "model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What must be known to use weights; it travels with them, as JSON in the metadata of the file.

    Attributes:
        backbone: name of the encoder, see build_segmentor.
        allspark: whether there is the AllSpark bottleneck.
        embedding_dim: channels of the head.
        num_heads: heads of the bottleneck.
        memory_init: see AllSparkOptions.
        crop: side of the training crops in pixels, and of sliding windows.
        mode: how the model was validated, see predict_labels.
        mean: of each color channel in 0..1, subtracted from images.
        std: of each color channel, which images are divided by.
        range: pixel values that became black and white, see read_image.
        info: names and colors of the classes.
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
        return cls(
            backbone=config.model.backbone,
            allspark=config.train.method == "allspark",
            embedding_dim=config.model.embedding_dim,
            num_heads=config.model.num_heads,
            memory_init=config.model.memory_init,
            crop=config.data.crop,
            mode=config.eval.mode,
            mean=config.data.mean,
            std=config.data.std,
            range=config.data.range,
            info=info,
        )

    def to_json(self) -> str:
        """Return version, fields, and the classes in the form of a ``meta.json``."""
        fields = dataclasses.asdict(self) | {"version": _VERSION, "dataset": self.info.name}
        del fields["info"]
        colors = self.info.palette[: len(self.info.classes)]
        return json.dumps(fields | {"classes": self.info.classes, "palette": colors})

    @classmethod
    def from_json(cls, text: str) -> "ModelSpec":
        """Read what ``to_json`` wrote.

        Raises:
            InputError: the text is damaged, or of another version; the message names the field.
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
                f"damaged description of the model, or newer than this allspark-fast ({detail})"
            ) from error

    def build(self) -> Segmentor:
        """Build the model, with random weights; raises as ``build_segmentor``."""
        return build_segmentor(
            self.backbone,
            len(self.info.classes),
            (self.crop, self.crop),
            allspark=AllSparkOptions(num_heads=self.num_heads, memory_init=self.memory_init) if self.allspark else None,
            embedding_dim=self.embedding_dim,
        )

    def restore(self, state: Mapping[str, Tensor], path: Path) -> Segmentor:
        """Return the model, in eval mode, with what ``read_state_dict`` read from ``path``.

        Raises:
            InputError: there is no such model, or the weights are those of another, or of a part of it.
        """
        try:
            model = self.build()
        except ValueError as error:
            raise InputError(f"{path}: no such model: {error}") from error
        if fresh := load_state_dict(model, state, path).fresh:
            raise InputError(f"{path} lacks weights of its model: {', '.join(fresh[:3])}")
        return model.eval()


def find_weights(path: str | Path) -> Path:
    """Return the file of weights that is meant: ``path`` itself, or what is in the folder, of a run for example.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    for name in _FILES:
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(f"{path}: none of {', '.join(_FILES)} in this folder; a run writes the first")


def read_spec(path: str | Path) -> ModelSpec | None:
    """Read what a file of weights says about its model; None if it says nothing.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: the file is damaged, or of another version.
    """
    text = read_metadata(path).get(_KEY)
    try:
        return None if text is None else ModelSpec.from_json(text)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def load_model(path: str | Path) -> tuple[Segmentor, ModelSpec]:
    """Load a trained model in eval mode on the CPU, and what must be known to use it.

    Args:
        path: ``.safetensors`` of ``save_model``, a run folder, or a folder that was saved for the Hugging Face Hub.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: the file is damaged, or does not say what its model is.
    """
    path = find_weights(path)
    spec = read_spec(path)
    if spec is None:
        raise InputError(
            f"{path} does not say what its model is (classes, colors, sizes): if it holds weights, "
            f"`python -m allspark_fast convert {path} model.safetensors` finds that out and writes it down"
        )
    return spec.restore(read_state_dict(path), path), spec


def save_model(model: Segmentor, spec: ModelSpec, path: str | Path) -> None:
    """Write a model that ``load_model`` loads, whole or not at all.

    Args:
        model: what to save.
        spec: what must be known to use it.
        path: ``.safetensors``; or a folder, which gets ``model.safetensors``, ``config.json`` and, if it has no
            README.md, a model card, ready for the Hugging Face Hub.

    Raises:
        InputError: the path is that of a file of weights of another kind.
    """
    path = Path(path)
    if path.suffix in (".pth", ".pt", ".bin"):
        raise InputError(f"{path}: must be .safetensors or a folder; `convert` writes the public code's .pth")
    if path.suffix == ".safetensors":
        metadata = {_KEY: spec.to_json()}
        write_atomically(path, lambda temporary: save_weights(model, temporary, metadata))
        return
    make_folder(path)
    save_model(model, spec, path / "model.safetensors")
    # The Hub counts downloads by this file, and shows it; what loading reads is in the weights.
    write_atomically(path / "config.json", lambda temporary: temporary.write_text(spec.to_json(), encoding="utf-8"))
    card = path / "README.md"
    if not card.exists():
        write_atomically(card, lambda temporary: temporary.write_text(model_card(spec), encoding="utf-8"))


def describe_model(model: Segmentor, spec: ModelSpec) -> dict[str, str]:
    """Return what a model is, as text by property."""
    rows = {"encoder": spec.backbone, "bottleneck": "none, plain SegFormer"}
    if model.decoder.allspark is not None:
        memory = model.decoder.allspark.attn
        classes, slots, tokens = memory.kv_queue.shape
        filled = classes if memory.queue_filled is None else int(memory.queue_filled.sum())
        rows["bottleneck"] = f"AllSpark, {spec.num_heads} heads"
        rows["memory"] = (
            f"{slots} channels of {tokens} tokens for each class, initialized {spec.memory_init}; "
            f"{filled} of {classes} classes filled"
        )
    return rows | {
        "head": f"{spec.embedding_dim} channels",
        "parameters": f"{sum(x.numel() for x in model.parameters()) / 1e6:.1f} M",
        "crop": f"{spec.crop} pixels, validated on {'whole images' if spec.mode == 'whole' else 'sliding windows'}",
        "colors": f"mean {spec.mean}, std {spec.std}",
        "classes": f"{len(spec.info.classes)} of {spec.info.name}: {', '.join(spec.info.classes)}",
    }


def model_card(spec: ModelSpec) -> str:
    """Return the README.md of a model on the Hugging Face Hub."""
    what = "SegFormer with the AllSpark bottleneck" if spec.allspark else "SegFormer"
    validated = "whole images" if spec.mode == "whole" else "sliding windows of that size"
    classes = ", ".join(f"{index} {name}" for index, name in enumerate(spec.info.classes))
    return f"""---
library_name: allspark-fast
pipeline_tag: image-segmentation
tags: [semantic-segmentation, semi-supervised, allspark]
---

# Semantic segmentation: {spec.info.name}

{what}, encoder {spec.backbone}, trained on crops of {spec.crop} pixels and validated on {validated}.

```python
from allspark_fast.data.images import read_image
from allspark_fast.weights.hub import PretrainedSegmentor
from allspark_fast.inference.predict import Predictor

model = PretrainedSegmentor.from_pretrained("OWNER/NAME")  # or the path of this folder
[(labels, confidence)] = Predictor(model, model.spec)([read_image("photo.jpg", model.spec.range)])
```

Or, for the folder that holds this file: `python -m allspark_fast predict FOLDER photo.jpg`.

Classes ({len(spec.info.classes)}): {classes}.

## License

Say here under which terms these weights may be used. If their encoder started from NVIDIA's MiT weights (`mit_b*.pth`,
SegFormer on Hugging Face), as those of the public AllSpark code do, they are for non-commercial use under the NVIDIA
Source Code License for SegFormer. The data set that they were trained on has terms of its own.
"""
