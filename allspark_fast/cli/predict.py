"""``predict``."""

import sys
from pathlib import Path

from tqdm import tqdm

from allspark_fast.cli import command_parser
from allspark_fast.inference.predict import (
    MAX_WHOLE_PIXELS,
    OTHER_SUFFIXES,
    Predictor,
    find_images,
    plan_files,
    predict_files,
)
from allspark_fast.text import progress
from allspark_fast.weights.spec import load_model

PARSER = command_parser("predict")
PARSER.add_argument("weights", metavar="WEIGHTS", help="a run folder, or a file such as its best.safetensors")
PARSER.add_argument(
    "images", metavar="IMAGE", nargs="+", help="files, folders (searched recursively), patterns like 'a/**/*.jpg'"
)
PARSER.add_argument(
    "--out",
    type=Path,
    default=Path("predictions"),
    help="folder for labels/NAME.png (class indices, with a palette) and overlays/NAME.jpg (regions outlined, with a "
    "legend), where NAME is the path below a folder IMAGE; default: %(default)s; images in it are not labeled",
)
PARSER.add_argument("--confidence", action="store_true", help="also write confidence/NAME.png, 255 for certain")
PARSER.add_argument("--overwrite", action="store_true", help="replace predictions that exist")
_MODE = PARSER.add_mutually_exclusive_group()
_MODE.add_argument(
    "--whole",
    dest="mode",
    action="store_const",
    const="whole",
    help="predict whole images; default: as the model was validated, but images of more than "
    f"{MAX_WHOLE_PIXELS / 2**20:.0f} megapixels in windows",
)
_MODE.add_argument(
    "--window", dest="mode", action="store_const", const="sliding", help="slide a window as large as a training crop"
)
PARSER.add_argument(
    "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto (default): a GPU if there is one"
)


def run(arguments: list[str]) -> int:
    """Label images; 1 if one of them was left out, cannot be read, or its prediction not be written."""
    options = PARSER.parse_args(arguments)
    model, spec = load_model(options.weights)
    predictor = Predictor(model, spec, device=options.device, mode=options.mode)
    images, others = find_images(options.images, skip=options.out)
    plan = plan_files(images, options.out, confidence=options.confidence, overwrite=options.overwrite)
    failed = 0
    for error in progress(predict_files(predictor, plan), total=len(images), unit="image"):
        if error is not None:
            failed += not isinstance(error, UserWarning)
            tqdm.write(f"{'warning' if isinstance(error, UserWarning) else 'error'}: {error}", file=sys.stderr)
    print(f"{options.out}: {len(images) - failed} images labeled" + (f", {failed} failed" if failed else ""))
    left_out = [path for path in others if path.suffix.lower() in OTHER_SUFFIXES]
    for path in left_out:
        reason = (
            "because of its suffix; convert it, or name it alone" if path.is_file() else "a broken link, or no file"
        )
        print(f"error: {path}: left out, {reason}", file=sys.stderr)
    if rest := [str(path) for path in others if path not in left_out]:
        print(f"{len(rest)} files that are no images were left out, {rest[0]!r} first")
    return int(failed > 0 or bool(left_out))
