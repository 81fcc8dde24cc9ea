"""``convert``."""

from pathlib import Path

from allspark_fast.cli import command_parser, require_new
from allspark_fast.errors import InputError
from allspark_fast.text import property_table
from allspark_fast.weights.files import require_weights_suffix
from allspark_fast.weights.spec import describe_model, load_model, save_model

PARSER = command_parser("convert")
PARSER.add_argument(
    "source", metavar="SRC", help="checkpoint of the public AllSpark code (.pth), a run folder, or weights of ours"
)
PARSER.add_argument(
    "target", metavar="DST", type=Path, help=".safetensors, or .pth for the layout of the public AllSpark code"
)
PARSER.add_argument(
    "--classes",
    metavar="NAME|META.JSON",
    help="data set that names the classes, or their meta.json; default: what SRC says, or the public data set with "
    "so many classes",
)
PARSER.add_argument("--overwrite", action="store_true", help="replace DST if it exists")


def run(arguments: list[str]) -> int:
    """Convert weights."""
    options = PARSER.parse_args(arguments)
    target = options.target
    require_weights_suffix(target)
    require_new(target, overwrite=options.overwrite)
    model, spec = load_model(options.source, infer=True, classes=options.classes)
    if target.suffix == ".pth" and spec.backbone.startswith("timm/"):
        raise InputError(f"{target}: the public code has MiT encoders only, not {spec.backbone}; use .safetensors")
    save_model(model, spec, target)
    print(f"{target}:\n{property_table(describe_model(model, spec))}")
    return 0
