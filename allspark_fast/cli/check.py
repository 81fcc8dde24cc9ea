"""``check``."""

from allspark_fast.cli.recipe import parse_config
from allspark_fast.data.check import check_sources
from allspark_fast.data.sources import open_sources


def run(arguments: list[str]) -> int:
    """List every problem of a recipe's data set; 1 if there are errors."""
    _, config = parse_config(arguments, "check")
    problems = check_sources(open_sources(config.data), config.data.crop)
    for problem in problems:
        print(problem)
    errors = sum(not problem.is_warning for problem in problems)
    print(f"{errors} errors, {len(problems) - errors} warnings")
    return int(errors > 0)
