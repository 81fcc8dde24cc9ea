"""Settings from the command line, for the commands that take a recipe."""

import inspect
from itertools import pairwise

import tyro

from allspark_fast.config import Config, prefer_given_lengths, refuse_old_setting
from allspark_fast.errors import InputError
from allspark_fast.recipes import RECIPES


def parse_config(arguments: list[str], command: str, run: Config | None = None) -> tuple[str, Config]:
    """Return the recipe's name, and its settings with those of the command line.

    Args:
        arguments: of the command: ``[RECIPE] [--group.field value ...]``.
        command: its name, for the help.
        run: what takes the place of the recipe, if none is named.

    Raises:
        InputError: there is no such recipe, a setting was renamed or removed, or a length is given twice.
    """
    named = bool(arguments) and not arguments[0].startswith("-")
    recipe = arguments[0] if named else "scenes"
    if recipe not in RECIPES:
        raise InputError(f"there is no recipe {recipe!r}; recipes are {', '.join(RECIPES)}")
    given = []
    for argument, following in pairwise([*arguments, ""]):
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            given.append(name.removeprefix("--").replace("-", "_"))
            refuse_old_setting(given[-1], value if equals else following)
    about = inspect.cleandoc(RECIPES[recipe].__doc__ or "").replace("``", "")
    default = RECIPES[recipe]() if named or run is None else run
    config = tyro.cli(
        Config,
        prog=f"python -m allspark_fast {command} [RECIPE]",
        description=f"Recipes: {', '.join(RECIPES)}; defaults below are those of {recipe}:\n\n{about}",
        args=arguments[named:],
        default=default,
        config=(tyro.conf.FlagConversionOff,),
    )
    return recipe, prefer_given_lengths(config, given)
