"""``info``."""

import argparse
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from allspark_fast import __version__
from allspark_fast.cli import command_parser
from allspark_fast.kernels.triton_support import why_no_triton
from allspark_fast.model import Segmentor
from allspark_fast.training.kernel_policy import remembered_results
from allspark_fast.weights.spec import ModelSpec, find_weights, load_model

_PACKAGES = (
    "torch",
    "torchvision",
    "triton",
    "xformers",
    "safetensors",
    "timm",
    "transformers",
    "huggingface_hub",
    "onnx",
    "onnxruntime",
    "onnxscript",
)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = command_parser("info")
    parser.add_argument("weights", metavar="WEIGHTS", nargs="?", type=Path, help="a file, or the folder of a run")
    return parser


def run(arguments: list[str]) -> int:
    """Say what this machine runs, or what a file of weights holds."""
    options = build_parser().parse_args(arguments)
    if options.weights is None:
        print(describe_machine())
    else:
        model, spec = load_model(options.weights)
        print(f"{find_weights(options.weights)}:\n{describe_model(model, spec)}")
    return 0


def describe_model(model: Segmentor, spec: ModelSpec) -> str:
    """What a model is, line by line."""
    rows = {
        "encoder": spec.backbone,
        "bottleneck": "none, plain SegFormer",
        "head": f"{spec.embedding_dim} channels",
        "parameters": f"{sum(x.numel() for x in model.parameters()) / 1e6:.1f} M",
        "crop": f"{spec.crop} pixels, validated on {'whole images' if spec.mode == 'whole' else 'sliding windows'}",
        "colours": f"mean {spec.mean}, std {spec.std}",
        "classes": f"{len(spec.info.classes)} of {spec.info.name}: {', '.join(spec.info.classes)}",
    }
    if model.decoder.allspark is not None:
        memory = model.decoder.allspark.attn
        classes, slots, tokens = memory.kv_queue.shape
        filled = classes if memory.queue_filled is None else int(memory.queue_filled.sum())
        rows["bottleneck"] = f"AllSpark, {spec.num_heads} heads"
        rows["memory"] = (
            f"{slots} channels of {tokens} tokens for each class, started {spec.memory_init}; "
            f"{filled} of {classes} classes filled"
        )
    return _table(rows)


def describe_machine() -> str:
    """Devices, versions, and which kernels run here and why."""
    rows = {"allspark-fast": __version__, "python": f"{platform.python_version()} on {platform.platform()}"}
    rows |= {name: _version(name) for name in _PACKAGES}
    rows["CUDA"] = torch.version.cuda or torch.version.hip or "this torch is built without"
    for index in range(torch.cuda.device_count()):
        properties, kernels = torch.cuda.get_device_properties(index), _kernels(torch.device("cuda", index))
        rows[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB; {kernels}"
    rows["cpu"] = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads; {_kernels(torch.device('cpu'))}"
    return _table(rows)


def _kernels(device: torch.device) -> str:
    """What the operators choose on a device by themselves, and the reason."""
    if device.type == "cpu":
        return "kernels: plain torch, because Triton has none for CPUs"
    reason = why_no_triton(device)
    if reason is not None:
        return f"kernels: plain torch, because {reason}"
    results = remembered_results(device)
    if results is None:
        return "kernels: Triton, not checked yet: python -m allspark_fast selftest"
    failed = ", ".join(dict.fromkeys(result.op for result in results if result.failure))
    verdict = f"but plain torch for {failed}, which failed" if failed else "which passed"
    return f"kernels: Triton, {verdict} the self-test"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _table(rows: dict[str, str]) -> str:
    width = max(map(len, rows))
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows.items())
