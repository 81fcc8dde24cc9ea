"""Settings from the command line, for the commands that take a recipe."""

import argparse
import inspect
import json
from dataclasses import make_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import tyro
import yaml

from allspark_fast.config import IN_PLACE, Config, prefer_given_lengths, require_setting
from allspark_fast.errors import InputError
from allspark_fast.recipes import RECIPES, find_recipe

_FLAGS = (tyro.conf.FlagConversionOff,)
# What people change first, which --help shows.
_FIRST = {
    "data": ("root", "crop", "augment"),
    "model": ("backbone", "weights"),
    "train": ("method", "steps", "batch_size", "lr"),
    "run": ("output_dir",),
}


def parse_config(arguments: list[str], command: str, run: Config | None = None) -> tuple[str, Config]:
    """Return the recipe's name, and its settings with those of a file and, above these, of the command line.

    Arguments are ``[RECIPE] [--config FILE] [--print-config] [--group.field value ...]``. If no recipe is named, the
    settings of a ``run`` take its place.

    Raises:
        InputError: there is no such recipe or setting, the file holds something else, or a length is given twice.
        SystemExit: after help, a wrong value, or printing the settings.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--print-config", action="store_true")
    options, arguments = parser.parse_known_args(arguments)
    named = bool(arguments) and not arguments[0].startswith("-")
    recipe = arguments[0] if named else "scenes"
    settings = find_recipe(recipe)
    config = settings if named or run is None else run
    if options.config is not None and options.config.suffix == ".json":
        config = Config.read(options.config)
    elif options.config is not None:
        config = _override(config, _read_yaml(options.config), str(options.config))
    program, words = f"python -m allspark_fast {command} [RECIPE]", arguments[named:]
    if {"-h", "--help", "--help-all"} & set(words):
        _show_help(recipe, config, program, everything="--help-all" in words)
    config = _override(config, words, program)
    if options.print_config:
        _print_yaml(config)
        raise SystemExit(0)
    return recipe, config


def _show_help(recipe: str, config: Config, program: str, *, everything: bool) -> None:
    """Print all settings, or what people change first, and end."""
    shown = "All settings" if everything else "What people change first (--help-all shows all settings)"
    about = inspect.cleandoc(RECIPES[recipe].__doc__ or "").replace("``", "")
    description = (
        f"Recipes: {', '.join(RECIPES)}.\n\n{recipe}: {about}\n\n"
        "--config FILE takes settings from a YAML file, or all of them from the config.json of\n"
        "a run; flags count more. --print-config prints settings as such a file, and ends.\n\n"
        f"{shown}, with defaults of {recipe}:"
    )
    default = config if everything else _first(config)
    tyro.cli(type(default), prog=program, description=description, args=["--help"], default=default, config=_FLAGS)


def _override(config: Config, arguments: list[str], program: str) -> Config:
    """Return settings with those of arguments ``--group.field value``."""
    words = [word.partition("=")[0].removeprefix("--") for word in arguments if word.startswith("--")]
    given = [word.replace("-", "_") for word in words if "." in word]
    for name in given:
        require_setting(name)
    return prefer_given_lengths(tyro.cli(Config, prog=program, args=arguments, default=config, config=_FLAGS), given)


def _read_yaml(path: Path) -> list[str]:
    """Return the settings of a file as arguments: a value means there what it means on the command line."""
    words: list[str] = []
    spelled = {"true": "True", "false": "False", "null": "None", "": "None"}
    try:
        # As text: YAML's own types would take 1e-3 for text, and `on` for a truth value.
        for group, fields in yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader).items():
            for field, value in fields.items():
                values: list[str] = value if isinstance(value, list) else [value]
                words += [f"--{group}.{field}", *(spelled.get(x, x) for x in values)]
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError, TypeError) as error:
        raise InputError(f"{path}: expected groups of settings such as `train: {{lr: 1e-3}}` ({error})") from error
    return words


def _print_yaml(config: Config) -> None:
    """Print settings as a file of them, without lengths in epochs that have no effect."""
    groups = json.loads(config.to_json())
    for length, other in IN_PLACE.items():
        (group, name), (_, other_name) = length.split("."), other.split(".")
        if groups[group][other_name] is not None:
            del groups[group][name]
    for group, settings in groups.items():
        print(f"{group}:", *(f"  {name}: {json.dumps(x)}" for name, x in settings.items()), sep="\n")


def _first(config: Config) -> Any:
    """Return the settings that people change first, in dataclasses with the docstrings of all settings."""
    groups = {}
    for group, names in _FIRST.items():
        settings = getattr(config, group)
        fields = [(name, get_type_hints(type(settings))[name]) for name in names]
        kind = make_dataclass(group, fields, namespace={"__doc__": type(settings).__doc__}, kw_only=True)
        groups[group] = kind(**{name: getattr(settings, name) for name in names})
    return make_dataclass("First", [(group, type(x)) for group, x in groups.items()])(**groups)
