"""``check``."""

import dataclasses
import json
from collections.abc import Iterator

from allspark_fast.cli.recipe import parse_config
from allspark_fast.data.check import Report, check_sources
from allspark_fast.data.sources import open_sources

_KINDS = 6


def run(arguments: list[str]) -> int:
    """Describe a recipe's data set and list every problem of it, as a table or with --json; 1 if there are errors."""
    _, config = parse_config([word for word in arguments if word != "--json"], "check")
    report = check_sources(open_sources(config.data), config.data.crop)
    errors = sum(not problem.is_warning for problem in report.problems)
    if "--json" in arguments:
        print(json.dumps(dataclasses.asdict(report), indent=2))
    else:
        print("\n".join(_lines(report)))
        print(f"{errors} errors, {len(report.problems) - errors} warnings")
    return int(errors > 0)


def _lines(report: Report) -> Iterator[str]:
    for name, part in report.lists.items():
        yield f"{name}: {part['entries']} entries"
        for what in ("images", "masks"):
            kinds = [f"  {count:6} {what} of {kind}" for kind, count in part[what].items()]
            yield from kinds[:_KINDS]
            if len(kinds) > _KINDS:
                yield f"         and {what} of {len(kinds) - _KINDS} more sizes"
        for mode, (low, high) in part["ranges"].items():
            yield f"         values of {mode}: {low:g}..{high:g}"
    masked = {name: part for name, part in report.lists.items() if part["masks"]}
    if masked:
        classes = next(iter(masked.values()))["pixels"]
        width = max(map(len, classes))
        yield f"{'class':{width}}" + "".join(f"  {f'{name}: pixels':>16}  {'images':>8}" for name in masked)
        for label in classes:
            shares = (
                f"  {part['pixels'][label] / max(sum(part['pixels'].values()), 1):16.2%}"
                f"  {part['holding'][label] / sum(part['masks'].values()):8.1%}"
                for part in masked.values()
            )
            yield f"{label:{width}}" + "".join(shares)
    if report.in_no_list:
        yield f"in no list: {len(report.in_no_list)} images, {report.in_no_list[0]} first"
    yield from map(str, report.problems)
