"""``compare``."""

import json
from pathlib import Path

from allspark_fast.cli import command_parser
from allspark_fast.cli.recipe import parse_config
from allspark_fast.files import make_folder, write_text
from allspark_fast.recipes import RECIPES
from allspark_fast.signals import STOPPED
from allspark_fast.training import compare

PARSER = command_parser("compare")
PARSER.usage = "%(prog)s [RECIPE] [--methods ...] [--seeds ...] [--labels ...] [--group.field value ...]"
PARSER.epilog = f"RECIPE ({', '.join(RECIPES)}) and settings are those of `train`. The same command again goes on."
PARSER.add_argument(
    "--methods",
    nargs="+",
    choices=compare.METHODS,
    default=["supervised", "semi", "allspark"],
    help="full is supervised with every label; default: %(default)s",
)
PARSER.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: %(default)s")
PARSER.add_argument(
    "--labels", type=int, nargs="+", default=[], help="numbers of labels to compare at; default: those of the recipe"
)
PARSER.add_argument(
    "--every-label", type=Path, metavar="FILE", help="split file of all labels, for full, and for --labels to draw from"
)
PARSER.add_argument(
    "--test", type=Path, metavar="FILE", help="split file of held-out images to report on; default: val"
)
PARSER.add_argument(
    "--equal-time", action="store_true", help="train supervised also for as long as the slowest method took"
)
PARSER.add_argument("--out", type=Path, metavar="FOLDER", help="of all runs; default: runs/compare_RECIPE")


def run(arguments: list[str]) -> int:
    """Train methods over seeds; after each run print the table, and write records and plot, of what is finished."""
    options, settings = PARSER.parse_known_args(arguments)
    recipe, config = parse_config(settings, "compare")
    folder = options.out or Path("runs") / f"compare_{recipe}"
    chosen = {name: getattr(options, name) for name in ("methods", "seeds", "labels", "every_label")}
    groups = compare.plan(config, folder, **chosen)
    make_folder(folder)
    records: list[compare.Record] = []
    for record in compare.compare(groups, options.test, equal_time=options.equal_time):
        if record is None:
            return STOPPED
        records.append(record)
        print(f"\n{compare.summary(records)}\n", flush=True)
        write_text(folder / "compare.json", json.dumps(records, indent=2))
        compare.draw(folder / "compare.png", records)
    return 0
