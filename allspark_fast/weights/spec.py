"""Trained models as files: weights with what one must know to use them."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from allspark_fast.config import Config
from allspark_fast.data.info import DatasetInfo, parse_meta
from allspark_fast.files import make_folder, write_atomically
from allspark_fast.model import AllSparkOptions, Segmentor, build_segmentor
from allspark_fast.model.options import MemoryInit
from allspark_fast.weights.files import load_weights, read_metadata, save_weights

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
        memory_init: see SemanticMemory.
        crop: side of the training crops in pixels, and of sliding windows.
        mode: how the model was validated, see predict_labels.
        mean: of each colour channel in 0..1, subtracted from images.
        std: of each colour channel, which images are divided by.
        info: names and colours of the classes.
    """

    backbone: str
    allspark: bool
    embedding_dim: int
    num_heads: int
    memory_init: MemoryInit
    crop: int
    mode: Literal["whole", "sliding"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    info: DatasetInfo

    @classmethod
    def of_run(cls, config: Config, info: DatasetInfo) -> "ModelSpec":
        """The model of a configuration, trained on the classes of ``info``."""
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
            info=info,
        )

    def to_json(self) -> str:
        """Version, fields and the classes in the form of a ``meta.json``."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        info = fields.pop("info")
        palette = info.palette[: len(info.classes)]
        meta = {"dataset": info.name, "classes": info.classes, "palette": palette}
        return json.dumps({"version": _VERSION, **fields, **meta})

    @classmethod
    def from_json(cls, text: str) -> "ModelSpec":
        """What ``to_json`` wrote.

        Raises:
            ValueError: the text is damaged, or of another version.
        """
        try:
            fields = json.loads(text)
            if (version := fields.pop("version")) != _VERSION:
                raise ValueError(f"version {version!r}, expected {_VERSION}")
            meta = {name: fields.pop(name) for name in ("classes", "palette")}
            info = parse_meta(meta, _text(fields.pop("dataset")))
            return cls(info=info, **{name: _PARSERS[name](value) for name, value in fields.items()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"what it says of its model is damaged, or newer than this allspark-fast ({error!r})"
            ) from error

    def build(self) -> Segmentor:
        """A model with random weights."""
        return build_segmentor(
            self.backbone,
            len(self.info.classes),
            (self.crop, self.crop),
            allspark=AllSparkOptions(num_heads=self.num_heads, memory_init=self.memory_init) if self.allspark else None,
            embedding_dim=self.embedding_dim,
        )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a text, found {value!r}")
    return value


def _positive(value: Any) -> int:
    if not isinstance(value, int) or value < 1:
        raise TypeError(f"expected a positive integer, found {value!r}")
    return value


def _three(value: Any) -> tuple[float, float, float]:
    red, green, blue = map(float, value)
    return red, green, blue


def _mode(value: Any) -> Literal["whole", "sliding"]:
    if value not in ("whole", "sliding"):
        raise ValueError(f"expected whole or sliding, found {value!r}")
    return cast(Literal["whole", "sliding"], value)


_PARSERS: dict[str, Any] = {
    "backbone": _text,
    "allspark": bool,
    "embedding_dim": _positive,
    "num_heads": _positive,
    "memory_init": _text,
    "crop": _positive,
    "mode": _mode,
    "mean": _three,
    "std": _three,
}


def find_weights(path: str | Path) -> Path:
    """The file of weights that is meant: ``path`` itself, or what is in the folder, of a run for example.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    for name in _FILES:
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(f"{path}: there is none of {', '.join(_FILES)} in this folder; a run writes the first")


def read_spec(path: str | Path) -> ModelSpec | None:
    """What a file of weights says about its model; None if it says nothing.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or of another version.
    """
    text = read_metadata(path).get(_KEY)
    try:
        return None if text is None else ModelSpec.from_json(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def load_model(path: str | Path) -> tuple[Segmentor, ModelSpec]:
    """Load a trained model in eval mode on the CPU, and what must be known to use it.

    Args:
        path: ``.safetensors`` of ``save_model``, a run folder, or a folder that was saved for the Hugging Face Hub.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or does not say what its model is.
    """
    path = find_weights(path)
    spec = read_spec(path)
    if spec is None:
        raise ValueError(
            f"{path} does not say what its model is (classes, colours, sizes): if it holds weights, "
            f"`python -m allspark_fast convert {path} model.safetensors` finds that out and writes it down"
        )
    model = spec.build()
    if report := load_weights(model, path).fresh:
        raise ValueError(f"{path} lacks weights of its model: {', '.join(report[:3])}")
    return model.eval(), spec


def save_model(model: Segmentor, spec: ModelSpec, path: str | Path) -> None:
    """Write a model that ``load_model`` loads, whole or not at all.

    Args:
        model: what to save.
        spec: what must be known to use it.
        path: ``.safetensors``; or a folder, which gets ``model.safetensors``, ``config.json`` and, if it has no
            README.md, a model card, ready for the Hugging Face Hub.

    Raises:
        ValueError: the path is that of a file of weights of another kind.
    """
    path = Path(path)
    if path.suffix in (".pth", ".pt", ".bin"):
        raise ValueError(f"{path}: must be .safetensors or a folder; `convert` writes the public code's .pth")
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


def model_card(spec: ModelSpec) -> str:
    """The README.md of a model on the Hugging Face Hub."""
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
[(labels, confidence)] = Predictor(model, model.spec)([read_image("photo.jpg")])
```

Or, for the folder that holds this file: `python -m allspark_fast predict FOLDER photo.jpg`.

Classes ({len(spec.info.classes)}): {classes}.

## Licence

Say here under which terms these weights may be used. If their encoder started from NVIDIA's MiT weights (`mit_b*.pth`,
SegFormer on Hugging Face), as those of the public AllSpark code do, they are for non-commercial use under the NVIDIA
Source Code License for SegFormer. The data set that they were trained on has terms of its own.
"""
