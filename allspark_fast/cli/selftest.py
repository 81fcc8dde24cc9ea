"""``selftest``."""

import argparse

import torch

from allspark_fast.cli import command_parser
from allspark_fast.kernels.selftest import passed, results_table
from allspark_fast.kernels.triton_support import is_interpreted, why_no_triton
from allspark_fast.training.kernel_policy import check_and_remember


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    return command_parser("selftest")


def run(arguments: list[str]) -> int:
    """Check the kernels and print a table; 1 if one fails."""
    build_parser().parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = check_and_remember(device)
    print(results_table(results))
    reason = why_no_triton(device)
    if is_interpreted():
        print("Triton's interpreter ran the kernels; it has no right products of bfloat16, which was left out.")
    elif reason is not None:
        print(f"No Triton kernel ran: {reason}. Plain torch was checked, which takes their place.")
    return int(not passed(results))
