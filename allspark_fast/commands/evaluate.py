"""``evaluate``."""

import json
from dataclasses import replace
from pathlib import Path

from allspark_fast.checkpoint import write_atomically
from allspark_fast.commands import command_parser
from allspark_fast.config import Config
from allspark_fast.data.loader import evaluation_loader
from allspark_fast.data.sources import open_sources
from allspark_fast.device import choose_device
from allspark_fast.evaluate import evaluate
from allspark_fast.prepare import build_model
from allspark_fast.report import draw_confusion, score_record, score_table
from allspark_fast.weights import load_weights


def run(arguments: list[str]) -> int:
    """Score weights on the validation images of a run, or on others; writes confusion.png into its folder."""
    parser = command_parser("evaluate")
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run; confusion.png is written into it")
    parser.add_argument("--weights", metavar="FILE", type=Path, help="weights to score, if not the best of the run")
    parser.add_argument(
        "--split", type=Path, metavar="FILE", help="images to score, if not the run's validation images"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all scores to this file")
    options = parser.parse_args(arguments)
    config_file = options.run / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(f"{options.run}: no run folder, there is no config.json in it")
    config = Config.read(config_file)
    if options.split is not None:
        if config.data.dataset == "scenes":
            raise ValueError("--split: rendered scenes have no split files; leave it out")
        config = replace(config, data=replace(config.data, val=options.split))
    device = choose_device(config.run.device)
    sources = open_sources(config.data)
    classes = len(sources.info.classes)
    # Those it started from are replaced, and may be gone.
    model = build_model(replace(config, model=replace(config.model, weights=None)), classes).to(device)
    load_weights(model, options.weights or options.run / "best.safetensors")
    samples = evaluation_loader(sources.val, mean=config.data.mean, std=config.data.std)
    scores = evaluate(model, samples, classes, mode=config.eval.mode, crop=config.data.crop, device=device)
    print(score_table(scores, sources.info))
    draw_confusion(options.run / "confusion.png", scores, sources.info)
    if options.json is not None:
        record = json.dumps(score_record(scores, sources.info), indent=2)
        write_atomically(options.json, lambda temporary: temporary.write_text(record, encoding="utf-8"))
    return 0
