"""Settings from the command line, for the commands that take a recipe."""

import inspect
import shutil
import textwrap
from dataclasses import make_dataclass
from itertools import pairwise
from typing import Any, get_type_hints

import tyro

from allspark_fast.config import Config, prefer_given_lengths, refuse_old_setting
from allspark_fast.recipes import RECIPES, find_recipe

# What people change first, which --help shows.
_FIRST = {
    "data": ("root", "crop", "workers"),
    "model": ("backbone", "weights"),
    "train": ("method", "steps", "batch_size", "lr"),
    "run": ("output_dir",),
}


def parse_config(arguments: list[str], command: str, run: Config | None = None) -> tuple[str, Config]:
    """Return the recipe's name, and its settings with those of the command line.

    Args:
        arguments: of the command: ``[RECIPE] [--group.field value ...]``; ``--help-all`` shows all of them.
        command: its name, for the help.
        run: what takes the place of the recipe, if none is named.

    Raises:
        InputError: there is no such recipe, a setting was renamed or removed, or a length is given twice.
    """
    named = bool(arguments) and not arguments[0].startswith("-")
    recipe = arguments[0] if named else "scenes"
    settings = find_recipe(recipe)
    given = []
    for argument, following in pairwise([*arguments, ""]):
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            given.append(name.removeprefix("--").replace("-", "_"))
            refuse_old_setting(given[-1], value if equals else following)
    default: Any = settings if named or run is None else run
    words = ["--help" if argument == "--help-all" else argument for argument in arguments[named:]]
    shown = "All settings"
    if {"-h", "--help"} & set(arguments):
        words, shown, default = ["--help"], "What people change first (--help-all shows all settings)", _first(default)
    about = inspect.cleandoc(RECIPES[recipe].__doc__ or "").replace("``", "")
    description = f"Recipes: {', '.join(RECIPES)}.\n\n{recipe}: {about}\n\n{shown}, with defaults of {recipe}:"
    width = shutil.get_terminal_size().columns
    config = tyro.cli(
        type(default),
        prog=f"python -m allspark_fast {command} [RECIPE]",
        description="\n\n".join(textwrap.fill(paragraph, width) for paragraph in description.split("\n\n")),
        args=words,
        default=default,
        config=(tyro.conf.FlagConversionOff,),
    )
    return recipe, prefer_given_lengths(config, given)


def _first(config: Config) -> Any:
    """Return the settings that people change first, in dataclasses with the docstrings of all settings."""
    groups = {}
    for group, names in _FIRST.items():
        settings = getattr(config, group)
        fields = [(name, get_type_hints(type(settings))[name]) for name in names]
        kind = make_dataclass(group, fields, namespace={"__doc__": type(settings).__doc__}, kw_only=True)
        groups[group] = kind(**{name: getattr(settings, name) for name in names})
    return make_dataclass("First", [(group, type(x)) for group, x in groups.items()])(**groups)
