"""``info``."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from allspark_fast import __version__
from allspark_fast.cli import command_parser, property_table
from allspark_fast.device import available_cpus
from allspark_fast.kernels.triton_support import why_no_triton
from allspark_fast.weights.spec import describe_model, find_weights, load_model

_PACKAGES = ("torch", "torchvision", "triton", "safetensors", "timm", "onnx", "onnxruntime")

PARSER = command_parser("info")
PARSER.add_argument("weights", metavar="WEIGHTS", nargs="?", help="a run folder, or a file")


def run(arguments: list[str]) -> int:
    """Describe this machine, or a file of weights."""
    weights = PARSER.parse_args(arguments).weights
    if weights is not None:
        print(f"{find_weights(weights)}:")
    print(property_table(describe_machine() if weights is None else describe_model(*load_model(weights))))
    return 0


def describe_machine() -> dict[str, str]:
    """Return versions, and the devices with the kernels that run on them."""
    rows = {"allspark-fast": __version__, "python": f"{platform.python_version()} on {platform.platform()}"}
    rows |= {name: _version(name) for name in _PACKAGES}
    rows["CUDA"] = torch.version.cuda or torch.version.hip or "this torch is built without it"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        rows[f"cuda:{index}"] = f"{properties.name}, {memory}; {kernels_on(torch.device('cuda', index))}"
    rows["cpu"] = f"{available_cpus()} cores, {torch.get_num_threads()} threads; {kernels_on(torch.device('cpu'))}"
    return rows


def kernels_on(device: torch.device) -> str:
    """Return which kernels the operators run on a device, and why."""
    reason = "Triton has no kernels for CPUs" if device.type == "cpu" else why_no_triton(device)
    return "kernels: Triton" if reason is None else f"kernels: plain torch, because {reason}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
