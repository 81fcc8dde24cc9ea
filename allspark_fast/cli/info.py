"""``info``."""

from allspark_fast.cli import command_parser
from allspark_fast.text import property_table
from allspark_fast.weights.spec import describe_model, find_weights, load_model

PARSER = command_parser("info")
PARSER.add_argument("weights", metavar="WEIGHTS", help="a run folder, or a file such as its best.safetensors")


def run(arguments: list[str]) -> int:
    """Describe a file of weights."""
    weights = PARSER.parse_args(arguments).weights
    print(f"{find_weights(weights)}:\n{property_table(describe_model(*load_model(weights)))}")
    return 0
