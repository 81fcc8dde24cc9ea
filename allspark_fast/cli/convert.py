"""``convert``."""

from pathlib import Path

from allspark_fast.cli import command_parser, property_table
from allspark_fast.errors import InputError
from allspark_fast.files import require_parent, write_atomically
from allspark_fast.weights.convert import read_model
from allspark_fast.weights.files import save_weights
from allspark_fast.weights.spec import describe_model, save_model

PARSER = command_parser("convert")
PARSER.add_argument(
    "source",
    metavar="SRC",
    type=Path,
    help="checkpoint of the public AllSpark code (.pth), Hugging Face SegFormer, a run folder, or weights of ours",
)
PARSER.add_argument(
    "target",
    metavar="DST",
    type=Path,
    help=".safetensors, .pth for the layout of the public AllSpark code, or a folder for the Hugging Face Hub",
)
PARSER.add_argument(
    "--classes",
    metavar="NAME|META.JSON",
    help="data set that names the classes, or a file of names; default: what SRC says, or the public data set with "
    "so many classes",
)
PARSER.add_argument("--overwrite", action="store_true", help="replace DST if it exists")


def run(arguments: list[str]) -> int:
    """Convert weights."""
    options = PARSER.parse_args(arguments)
    target = options.target
    if target.suffix not in (".safetensors", ".pth", ""):
        PARSER.error(f"DST must be .safetensors, .pth or a folder, got {target}")
    if target.exists() and not options.overwrite:
        raise InputError(f"{target} exists: pass --overwrite to replace it")
    if target.suffix:
        require_parent(target)
    model, spec = read_model(options.source, options.classes)
    if target.suffix == ".pth" and spec.backbone.startswith("timm/"):
        raise InputError(f"{target}: the public code has MiT encoders only, not {spec.backbone}; use .safetensors")
    if target.suffix == ".pth":
        write_atomically(target, lambda temporary: save_weights(model, temporary))
    else:
        save_model(model, spec, target)
    print(f"{target}:\n{property_table(describe_model(model, spec))}")
    return 0
