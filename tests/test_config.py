import dataclasses
import json
import re
from pathlib import Path

import pytest

from allspark_fast.cli.recipe import parse_config
from allspark_fast.config import Config, from_plain
from allspark_fast.errors import InputError
from allspark_fast.recipes import RECIPES
from tests.helpers.runs import changed


def test_settings_that_earlier_versions_lacked_take_their_defaults(tmp_path):
    config = changed(Config(), train={"lr": 0.5}, data={"crop": 65})
    fields = json.loads(config.to_json())
    del fields["train"]["ema"], fields["data"]["workers"], fields["eval"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert Config.read(tmp_path / "config.json") == config


@pytest.mark.parametrize(
    ("train", "evaluation", "expected"),
    [
        ({"epochs": 8, "warmup_epochs": 2, "pseudo_from_epoch": 6}, {"every": 2}, (80, 20, 60, 20)),
        ({"epochs": 8, "steps": 500, "warmup": 0.1, "pseudo_from": 1 / 3}, {"times": 4}, (500, 50, 167, 125)),
        ({"epochs": 8, "warmup": 0.5, "pseudo_from_epoch": 1}, {"times": 100}, (80, 40, 10, 1)),
    ],
)
def test_lengths_in_epochs_steps_and_parts_of_the_run(train, evaluation, expected):
    assert changed(Config(), train=train, eval=evaluation).schedule(10) == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("train.lrr", "there is no setting train.lrr (did you mean train.lr?)"),
        ("run.folder", "run.folder was renamed: use run.output_dir"),
        ("train.attend", "train.attend was renamed: use train.kv_source"),
    ],
)
def test_settings_that_do_not_exist_are_refused_with_the_right_name(name, message, tmp_path):
    """On the command line, in a file of settings, and in the config.json of a run."""
    message = re.escape(message)
    group, field = name.split(".")
    (tmp_path / "a.yaml").write_text(f"{group}: {{{field}: 1}}")
    (tmp_path / "config.json").write_text(json.dumps({group: {field: 1}}))
    for words in (f"--{name.replace('_', '-')} 1", f"--config {tmp_path}/a.yaml", f"--config {tmp_path}/config.json"):
        with pytest.raises(InputError, match=message):
            parse_config(["pascal", *words.split()], "train")


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_json_and_tells_its_command(name):
    config = RECIPES[name]()
    assert from_plain(Config, json.loads(config.to_json()), "config") == config
    if config.model.weights == Path("imagenet"):  # what these were trained with
        assert config.data.mean == config.data.std == (0.5, 0.5, 0.5)
    documentation = RECIPES[name].__doc__
    assert "python train.py" in documentation
    if name in ("pascal", "pascal_augmented", "cityscapes", "coco"):
        assert "Paper" in documentation
        assert "Ours: " in documentation


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("data.crop", 31), ("data.workers", -1), ("data.scale", (2, 0.5)), ("data.scenes", (3, 8, 0)),
        ("data.std", (0, 1, 1)), ("model.num_heads", 0), ("model.embedding_dim", 0), ("train.batch_size", 0),
        ("train.ema", 1.0), ("train.ohem_threshold", 2), ("train.gradient_accumulation_steps", 0),
        ("data.range", ("4095", "0")), ("data.range", ("1", "99%")), ("data.range", ("-1%", "99%")),
        ("data.range", ("a", "b")), ("data.range", ("0", "inf")), ("data.range", ("0", "nan")),
    ],
)  # fmt: skip
def test_values_that_are_just_out_of_range_are_refused(name, value):
    """Other numbers: tests/faults/test_bad_input.py."""
    group, field = name.split(".")
    with pytest.raises(InputError, match=rf"^{name} is {re.escape(str(value))}, expected "):
        changed(Config(), **{group: {field: value}})


def test_epochs_that_are_given_replace_the_steps_of_a_recipe():
    _, config = parse_config(["folder", "--train.epochs", "4", "--train.warmup-epochs=1", "--eval.every", "2"], "train")
    assert config.schedule(10) == (40, 10, 13, 20)  # pseudo labels from a third of the run, as in the recipe
    assert parse_config(["folder", "--train.steps", "9"], "train")[1].schedule(10) == (9, 1, 3, 1)


def test_a_file_stands_between_the_recipe_and_the_command_line(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "data: {range: [0, 4095], root: /a b, augment: aerial}\n"
        "train:\n  lr: 1e-3\n  compile: on\n  epochs: 4\n  warmup: null\n  amp: true\n"
    )
    recipe, config = parse_config(["folder", "--config", str(file), "--train.lr=0.5", "--eval.every", "2"], "train")
    data = {"range": ("0", "4095"), "root": Path("/a b"), "augment": "aerial"}
    train = {"lr": 0.5, "compile": "on", "epochs": 4, "steps": None, "warmup": None, "amp": True}
    expected = changed(RECIPES["folder"](), data=data, train=train, eval={"every": 2, "times": None})
    assert (recipe, config) == ("folder", expected)
    # All settings of a run take the place of the recipe's.
    (tmp_path / "config.json").write_text(expected.to_json())
    words = ["--config", str(tmp_path / "config.json"), "--train.seed", "3"]
    assert parse_config(words, "train") == ("scenes", changed(expected, train={"seed": 3}))
    assert parse_config([], "train") == ("scenes", RECIPES["scenes"]())


@pytest.mark.parametrize("text", ["[1]", "train: 3", "train: {lr: {a: 1}}", "train: {lr: [", "\xff", ""])
def test_files_that_hold_no_settings_are_refused(text, tmp_path):
    (tmp_path / "a.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"a\.yaml: expected groups of settings such as"):
        parse_config(["--config", str(tmp_path / "a.yaml")], "train")


@pytest.mark.parametrize("recipe", RECIPES)
def test_printed_settings_are_a_file_of_them(recipe, tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        parse_config([recipe, "--train.lr", "1e-5", "--train.compile", "off", "--print-config"], "train")
    (tmp_path / "a.yaml").write_text(capsys.readouterr().out)
    printed = parse_config([recipe, "--config", str(tmp_path / "a.yaml")], "train")[1]
    assert printed == changed(RECIPES[recipe](), train={"lr": 1e-5, "compile": "off"})


def test_the_papers_hyper_parameters():
    model = {"backbone": "mit_b5", "embedding_dim": 768, "num_heads": 2, "memory_init": "randn"}
    model |= {"memory_sync": "rank0", "class_map": "logits"}
    train = {"optimizer": "sgd", "weight_decay": 1e-4, "kv_source": "batch", "pseudo_padding": True, "ema": 0}
    train |= {"pseudo_from_epoch": 0, "teacher": "student", "conf_thresh": 0, "strong": False, "cutmix": 0}
    train |= {"copy_paste": 0, "unlabeled_weight": 1}
    own = {
        "pascal": (513, "whole", "ce", 80, 8, 0.001, 10.0, 5),
        "cityscapes": (801, "sliding", "ohem", 240, 8, 0.005, 1.0, 15),
        "coco": (513, "whole", "ce", 10, 16, 0.001, 10.0, 1),
    }
    for name, expected in own.items():
        config = dataclasses.asdict(RECIPES[name]())
        assert model.items() <= config["model"].items()
        assert train.items() <= config["train"].items()
        names = ("loss", "epochs", "batch_size", "lr", "lr_multi", "warmup_epochs")
        assert (config["data"]["crop"], config["eval"]["mode"], *(config["train"][x] for x in names)) == expected
    assert RECIPES["cityscapes"]().train.ohem_min_kept == 200_000
