"""``splits``."""

from collections.abc import Sequence
from pathlib import Path

from allspark_fast.cli import command_parser
from allspark_fast.data.check import check_unused
from allspark_fast.data.datasets import Entry, SegmentationDataset, find_split, read_split, scan_folder
from allspark_fast.data.info import read_info
from allspark_fast.data.splits import make_split, parse_amount, read_classes, write_split
from allspark_fast.errors import DataError, InputError

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
    help="first set so many labeled images aside for validation, in val.txt; default: those of ROOT/splits/val.txt",
)
PARSER.add_argument(
    "--list",
    type=Path,
    metavar="FILE",
    help="split file to divide, below ROOT or the working directory; default: all of images/",
)
PARSER.add_argument("--seed", type=int, default=0, help="seed of the random choice; default: %(default)s")
PARSER.add_argument(
    "--out", type=Path, metavar="FOLDER", help="where to write; default: ROOT/splits, or ROOT/splits/AMOUNT"
)


def run(arguments: list[str]) -> int:
    """Choose which images are labeled; write labeled.txt, unlabeled.txt and, if asked for, val.txt."""
    options = PARSER.parse_args(arguments)
    entries = scan_folder(options.root) if options.list is None else find_split(options.root, options.list)
    for problem in check_unused(options.root) if options.list is None else ():
        print(problem)
    if options.val is None:
        entries = _without_val(options.root, entries)
    if not any(entry.label for entry in entries):
        raise DataError(f"{options.root}: no image has a label; labels/a.png belongs to images/a.jpg (or .png, ...)")
    named = (options.root / "meta.json").is_file()
    dataset = SegmentationDataset(options.root, entries, info=read_info(options.root) if named else None)
    classes = read_classes(dataset)
    val: list[Entry] = []
    if options.val is not None:
        kept = _labeled(entries) - parse_amount(options.val, _labeled(entries))
        if kept == 0:
            raise InputError(f"--val {options.val} leaves no label to train on: {_labeled(entries)} images have one")
        # Training gets the rare classes.
        aside = set(make_split([entry for entry in entries if entry.label], kept, options.seed, classes).unlabeled)
        val = [entry for entry in entries if entry in aside]
        entries = [entry for entry in entries if entry not in aside]
    amount = parse_amount("1/1" if options.amount is None else options.amount, _labeled(entries))
    split = make_split(entries, amount, options.seed, classes)
    out = options.out or options.root / "splits" / (options.amount or "").replace("/", "_")
    write_split(out, split, val)
    print(f"{out}: {len(split.labeled)} labeled, {len(split.unlabeled)} unlabeled, {len(val)} for validation")
    if split.uncovered:
        names = [dataset.info.classes[index] if dataset.info else f"class {index}" for index in split.uncovered]
        print(f"in no labeled image: {', '.join(names)}")
    return 0


def _without_val(root: Path, entries: list[Entry]) -> list[Entry]:
    """Leave out what an earlier ``--val`` set aside."""
    file = root / "splits" / "val.txt"
    aside = {entry.image for entry in read_split(file)} if file.is_file() else set()
    kept = [entry for entry in entries if entry.image not in aside]
    if len(kept) < len(entries):
        print(f"{file}: {len(entries) - len(kept)} images stay aside for validation; remove the file to split them too")
    return kept


def _labeled(entries: Sequence[Entry]) -> int:
    return sum(entry.label is not None for entry in entries)
