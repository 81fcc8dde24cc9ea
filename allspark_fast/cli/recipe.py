"""Settings from the command line, for the commands that take a recipe."""

import inspect

import tyro

from allspark_fast.config import Config
from allspark_fast.recipes import RECIPES

DEFAULT_RECIPE = "scenes"


def parse_config(arguments: list[str], command: str) -> tuple[str, Config]:
    """The recipe's name and its settings with the overrides of the command line.

    Raises:
        ValueError: there is no such recipe.
    """
    named = bool(arguments) and not arguments[0].startswith("-")
    recipe = arguments[0] if named else DEFAULT_RECIPE
    if recipe not in RECIPES:
        raise ValueError(f"there is no recipe {recipe!r}; recipes are {', '.join(RECIPES)}")
    about = inspect.cleandoc(RECIPES[recipe].__doc__ or "").replace("``", "")
    config = tyro.cli(
        Config,
        prog=f"python -m allspark_fast {command} [RECIPE]",
        description=f"Recipes: {', '.join(RECIPES)}; defaults below are those of {recipe}:\n\n{about}",
        args=arguments[named:],
        default=RECIPES[recipe](),
        config=(tyro.conf.FlagConversionOff,),
    )
    return recipe, config
