"""``selftest``."""

import torch

from allspark_fast.cli import command_parser
from allspark_fast.kernels.selftest import check_kernels, passed, results_table

PARSER = command_parser("selftest")


def run(arguments: list[str]) -> int:
    """Check the kernels and print a table; 1 if one fails."""
    PARSER.parse_args(arguments)
    results = check_kernels(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    print(results_table(results))
    return int(not passed(results))
