"""``selftest``."""

import torch

from allspark_fast.cli import command_parser
from allspark_fast.kernels.selftest import check_kernels
from allspark_fast.kernels.triton_support import why_no_triton

PARSER = command_parser("selftest")


def run(arguments: list[str]) -> int:
    """Say which kernels run on this machine and why, check them and print a table; 1 if one fails."""
    PARSER.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    why_not = "Triton has no kernels for CPUs" if device.type == "cpu" else why_no_triton(device)
    kernels = "Triton" if why_not is None else f"plain torch, because {why_not}"
    print(f"torch {torch.__version__} on {device}, kernels: {kernels}")
    results = check_kernels(device)
    for op, dtype, error, failure in results:
        print(f"{op:27}{dtype:10}{error:<9.1e}{failure or 'ok'}")
    return int(any(result.failure for result in results))
