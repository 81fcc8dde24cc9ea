"""Settings of earlier versions, on the command line and in the config.json of a run."""

import json
from dataclasses import dataclass
from typing import Literal

import pytest

from allspark_fast.cli.recipe import parse_config
from allspark_fast.config import REMOVED, RENAMED, Config, from_plain
from allspark_fast.errors import InputError


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_renamed_settings_are_refused_with_the_new_name(old: str, new: str) -> None:
    message = rf"{old} was renamed: use {new}"
    for argument in (f"--{old}", f"--{old}=1"):
        with pytest.raises(InputError, match=message):
            parse_config(["pascal", "--train.lr", "1", argument, "1"], "train")
    group, field = old.split(".")
    config = json.loads(Config().to_json())
    config[group][field] = config[group].pop(new.split(".")[1])
    with pytest.raises(InputError, match=message):
        Config.from_json(json.dumps(config))


@pytest.mark.parametrize("removed", REMOVED)
@pytest.mark.parametrize("separator", [" ", "="])
def test_removed_settings_are_refused_with_the_reason(removed: str, separator: str) -> None:
    name, _, value = removed.partition("=")
    argument = f"--{name.replace('_', '-')}{separator}{value or 'True'}"
    with pytest.raises(InputError, match=rf"{removed} was removed: {REMOVED[removed][:20]}"):
        parse_config(argument.split(), "train")


@dataclass
class Run:
    kernels: Literal["auto", "torch"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kernels": "strict"}, "run.kernels=strict was removed: .* selftest"),
        ({"kernels": "auto", "sharded_checkpoints": True}, "run.sharded_checkpoints was removed"),
        ({"kernels": "auto", "sharded": True}, r"config.run: fields \['sharded'\] are missing or unknown"),
        ({"kernels": 1}, "config.run.kernels is 1, expected one of auto, torch"),
        ([], r"config.run is \[\], expected an object"),
    ],
)
def test_removed_and_unknown_settings_of_a_run_are_refused(fields: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_plain(Run, fields, "config.run")
