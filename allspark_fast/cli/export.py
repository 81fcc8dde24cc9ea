"""``export``."""

from pathlib import Path

from allspark_fast.cli import command_parser, require_new
from allspark_fast.weights.export import MIN_SIDE, export_model
from allspark_fast.weights.spec import load_model

PARSER = command_parser("export")
PARSER.epilog = (
    f"The graph takes images (B, 3, H, W) in 0..1, any batch, at least {MIN_SIDE} pixels a side, "
    "and returns logits (B, K, H, W)."
)
PARSER.add_argument("weights", metavar="WEIGHTS", help="a run folder, or a file such as its best.safetensors")
PARSER.add_argument("out", metavar="OUT", type=Path, help=".pt2 for torch.export, .onnx for ONNX")
PARSER.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")


def run(arguments: list[str]) -> int:
    """Export a trained model as one graph."""
    options = PARSER.parse_args(arguments)
    require_new(options.out, overwrite=options.overwrite)
    error = export_model(*load_model(options.weights), options.out)
    print(f"{options.out}: largest error of the logits {error:.0e}, relative to the largest logit")
    return 0
