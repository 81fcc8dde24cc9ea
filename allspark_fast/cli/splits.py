"""``splits``."""

import posixpath
from pathlib import Path

from allspark_fast.cli import command_parser
from allspark_fast.data.check import check_unused
from allspark_fast.data.datasets import Entry, SegmentationDataset, find_split, read_split, scan_folder
from allspark_fast.data.info import read_info
from allspark_fast.data.splits import doubts_about, make_split, parse_amount, read_shares, spread, write_lists
from allspark_fast.errors import DataError, InputError
from allspark_fast.text import one_line

PARSER = command_parser("splits")
PARSER.add_argument("root", metavar="ROOT", type=Path, help="folder that holds images/, labels/ and meta.json")
PARSER.add_argument(
    "amount",
    metavar="AMOUNT",
    nargs="?",
    help="how many images to train on with their label: 1/16, 0.125 or a count; default: all that have one",
)
PARSER.add_argument(
    "--val",
    metavar="AMOUNT",
    help="first set so many labeled images aside for validation, in val.txt of ROOT/splits or FOLDER; default: those"
    " that stand there",
)
PARSER.add_argument(
    "--folds",
    metavar="K",
    type=int,
    help="write K splits, fold1 to foldK, each of which validates on another K-th of the labeled images",
)
PARSER.add_argument(
    "--list",
    type=Path,
    metavar="FILE",
    help="split file to divide, below ROOT or the working directory; default: all of images/",
)
PARSER.add_argument("--seed", type=int, default=0, help="seed of the random choice; default: %(default)s")
PARSER.add_argument(
    "--out",
    type=Path,
    metavar="FOLDER",
    help="where to write; default: ROOT/splits, lists of an AMOUNT in ROOT/splits/AMOUNT",
)
PARSER.add_argument("--overwrite", action="store_true", help="replace lists that exist")


def run(arguments: list[str]) -> int:
    """Choose which images are labeled; write labeled.txt, unlabeled.txt and, if asked for, val.txt."""
    options = PARSER.parse_args(arguments)
    if options.folds is not None and (options.val is not None or options.folds < 2):
        PARSER.error("--folds needs at least 2, and takes the place of --val")
    entries = scan_folder(options.root) if options.list is None else find_split(options.root, options.list)
    for problem in check_unused(options.root) if options.list is None else ():
        print(problem)
    out = options.out or options.root / "splits" / (options.amount or "").replace("/", "_")
    if options.val is None:
        entries = _without_val({options.root / "splits" / "val.txt", out / "val.txt"}, entries)
    total = sum(entry.label is not None for entry in entries)
    if total == 0:
        raise DataError(f"{options.root}: no image has a label; labels/a.png belongs to images/a.jpg (or .png, ...)")
    if total < (options.folds or 1):
        raise InputError(f"--folds {options.folds} needs as many labels, but {total} images have one")
    info = read_info(options.root) if (options.root / "meta.json").is_file() else None
    shares = read_shares(SegmentationDataset(options.root, entries, info=info))
    order = spread(entries, options.seed, shares)
    if options.folds is None:
        # The end of the order: training gets the rare classes.
        aside = 0 if options.val is None else parse_amount(options.val, total)
        parts = {out: order[total - aside :]}
    else:
        parts = {out / f"fold{i + 1}": order[i :: options.folds] for i in range(options.folds)}
    kept = {folder: total - len(val) for folder, val in parts.items()}
    if min(kept.values()) == 0:
        raise InputError(f"--val {options.val} leaves no label to train on: {total} images have one")
    amount = "1/1" if options.amount is None else options.amount
    splits = {
        folder: make_split(entries, order, val, parse_amount(amount, kept[folder])) for folder, val in parts.items()
    }
    lists = {folder / f"{name}.txt": part for folder, split in splits.items() for name, part in split._asdict().items()}
    if options.folds is None:
        val = lists.pop(out / "val.txt")
        lists |= {(options.out or options.root / "splits") / "val.txt": val} if val else {}
    write_lists(lists, overwrite=options.overwrite)
    names = [*map(one_line, info.classes)] if info is not None else [f"class {index}" for index in range(255)]
    for folder, split in splits.items():
        print(
            f"{folder}: {len(split.labeled)} labeled, {len(split.unlabeled)} unlabeled, {len(split.val)} for validation"
        )
        for doubt in doubts_about(split, shares, names):
            print(f"  {doubt}")
    return 0


def _without_val(files: set[Path], entries: list[Entry]) -> list[Entry]:
    """Leave out what an earlier ``--val`` set aside."""
    for file in sorted(filter(Path.is_file, files)):
        aside = {posixpath.normpath(entry.image) for entry in read_split(file)}
        kept = [entry for entry in entries if posixpath.normpath(entry.image) not in aside]
        if len(kept) < len(entries):
            print(
                f"{file}: {len(entries) - len(kept)} images stay aside for validation; remove the file to split them"
                " too"
            )
        entries = kept
    return entries
