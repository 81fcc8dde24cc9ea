"""``splits``."""

import posixpath
from collections.abc import Mapping
from pathlib import Path

from allspark_fast.cli import command_parser
from allspark_fast.data import splits
from allspark_fast.data.check import check_unused
from allspark_fast.data.datasets import Entry, SegmentationDataset, find_split, scan_folder
from allspark_fast.data.info import read_info
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
    help="set so many labeled images aside, in val.txt of ROOT/splits or FOLDER; default: those that earlier calls did",
)
PARSER.add_argument(
    "--folds", metavar="K", type=int, help="write K splits, each of which validates on another K-th of the labels"
)
PARSER.add_argument(
    "--list", type=Path, metavar="FILE", help="split file to divide, below ROOT or here; default: all of images/"
)
PARSER.add_argument("--seed", type=int, default=0, help="seed of the random choice; default: %(default)s")
PARSER.add_argument("--out", type=Path, metavar="FOLDER", help="where to write; default: ROOT/splits, or its AMOUNT/")
PARSER.add_argument("--overwrite", action="store_true", help="replace lists that exist")


def run(arguments: list[str]) -> int:
    """Choose which images are labeled; write labeled.txt, unlabeled.txt and, if asked for, val.txt."""
    options = PARSER.parse_args(arguments)
    root, folds = options.root, options.folds
    if folds is not None and (options.val is not None or folds < 2):
        PARSER.error("--folds needs at least 2, and takes the place of --val")
    entries = scan_folder(root) if options.list is None else find_split(root, options.list)
    if options.list is None:
        print(*(f"{problem}\n" for problem in check_unused(root, entries)[0]), sep="", end="")
    out = options.out or root / "splits" / (options.amount or "").replace("/", "_")
    val_file = (options.out or root / "splits") / "val.txt"
    earlier = splits.read_val_lists(root, out, replaced=None if options.val is None else val_file)
    if options.val is None:
        entries = _without_val(entries, earlier)
    total = sum(entry.label is not None for entry in entries)
    if total < (needed := folds or 1):
        expected = f"expected at least {needed}; labels/a.png belongs to images/a.jpg (or .png, ...)"
        raise DataError(f"{root}: {total} images have a label, {expected}")
    info = read_info(root) if (root / "meta.json").is_file() else None
    contents = splits.read_contents(SegmentationDataset(root, entries, info=info))
    order = splits.spread(entries, options.seed, contents)
    if folds is None:
        # The end of the order: training gets the rare classes.
        parts = {out: order[total - (0 if options.val is None else splits.parse_amount(options.val, total)) :]}
    else:
        parts = {out / f"fold{i + 1}": order[total * i // folds : total * (i + 1) // folds] for i in range(folds)}
    if total in map(len, parts.values()):
        raise InputError(f"--val {options.val} leaves no label to train on: give less than {total}, all there are")
    amount = "1/1" if options.amount is None else options.amount
    divided = {
        folder: splits.make_split(entries, order, val, splits.parse_amount(amount, total - len(val)))
        for folder, val in parts.items()
    }
    lists = {folder / f"{name}.txt": part for folder, x in divided.items() for name, part in x._asdict().items()}
    if folds is None:
        val = lists.pop(out / "val.txt")
        lists |= {val_file: val} if val else {}
    splits.write_lists(lists, overwrite=options.overwrite)
    names = [*map(one_line, info.classes)] if info is not None else [f"class {index}" for index in range(255)]
    for folder, x in divided.items():
        print(f"{folder}: {len(x.labeled)} labeled, {len(x.unlabeled)} unlabeled, {len(x.val)} for validation")
        doubts = splits.doubts_about(x, contents, names, is_fold=folds is not None)
        print(*(f"  {doubt}\n" for doubt in doubts), sep="", end="")
    if options.val is not None:
        _say_of_val(root, val_file, earlier, {x.image for part in divided[out][:2] for x in part})
    return 0


def _without_val(entries: list[Entry], earlier: Mapping[Path, set[str]]) -> list[Entry]:
    for file, aside in earlier.items():
        kept = [entry for entry in entries if posixpath.normpath(entry.image) not in aside]
        if count := len(entries) - len(kept):
            print(f"{file}: {count} images stay aside for validation; remove the file to split them too")
        entries = kept
    return entries


def _say_of_val(root: Path, file: Path, earlier: Mapping[Path, set[str]], trained: set[str]) -> None:
    for other, aside in earlier.items():
        if count := len(aside & {*map(posixpath.normpath, trained)}):
            print(f"  {count} images of {other} are trained on in these lists: validate with {file} only")
    try:
        splits.note_val_list(root, file)
    except OSError as error:
        print(f"  later splits will not know of {file} and may train on its images: {error}")
