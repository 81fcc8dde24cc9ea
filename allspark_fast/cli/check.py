"""``check``."""

import dataclasses
import json
from collections.abc import Iterator

from allspark_fast.cli.recipe import parse_config
from allspark_fast.data.check import Summary, check_sources
from allspark_fast.data.sources import open_sources
from allspark_fast.text import columns, one_line, padded

# Sizes that the table shows of each list; --json holds all.
_SHOWN = 5


def run(arguments: list[str]) -> int:
    """Describe a recipe's data set and list every problem of it, as tables or with --json; 1 if there are errors."""
    _, config = parse_config([word for word in arguments if word != "--json"], "check")
    problems, summary = check_sources(open_sources(config.data), config.data.crop)
    errors = sum(not problem.is_warning for problem in problems)
    if "--json" in arguments:
        print(json.dumps({"problems": [dataclasses.asdict(x) for x in problems], **summary}, indent=2))
    else:
        print(*_lines(summary), *problems, f"{errors} errors, {len(problems) - errors} warnings", sep="\n")
    return int(errors > 0)


def _lines(summary: Summary) -> Iterator[str]:
    unlisted = summary.pop("in no list", [])
    for name, found in summary.items():
        for kind in ("images", "masks"):
            for text, count in found[kind].most_common(_SHOWN):
                yield f"{name:9}  {count:6} {kind} of {text}"
            if len(found[kind]) > _SHOWN:
                yield f"{name:9}  and {kind} of {len(found[kind]) - _SHOWN} more sizes or modes"
        for mode, (low, high) in found["values"].items():
            yield f"{name:9}  values of {mode}: {low:g}..{high:g}"
    masked = {name: found for name, found in summary.items() if found["masks"]}
    if masked:
        labels = next(iter(masked.values()))["pixels"]
        width = max(columns(one_line(name)) for name in ("class", *labels))
        yield f"{'class':{width}}" + "".join(f"{f'{name} pixels':>17}{'masks':>14}" for name in masked)
        for label in labels:
            figures = (
                f"{found['pixels'][label] / max(sum(found['pixels'].values()), 1):17.2%}"
                f"{found['holding'][label]:6} of {found['masks'].total():4}"
                for found in masked.values()
            )
            yield padded(one_line(label), width) + "".join(figures)
    if unlisted:
        yield f"in no list: {len(unlisted)} images, {unlisted[0]} first"
