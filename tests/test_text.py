"""Names of classes in any script and with any sign, in tables and pictures; what else pictures must bear."""

import logging
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from allspark_fast.data.info import VOC_PALETTE, DatasetInfo
from allspark_fast.inference.metrics import ConfusionMatrix, score_table
from allspark_fast.text import columns, drawable, one_line
from allspark_fast.training.pictures import draw_curves, draw_predictions
from allspark_fast.weights.spec import ModelSpec, describe_model

# What people give, and how it is shown in one line.
SHOWN = {
    "road": "road",
    "道路": "道路",
    "शब्द": "शब्द",
    "می\u200cخواهم": "می\u200cخواهم",
    "👩\u200d🌾": "👩\u200d🌾",
    "two\nlines": r"two\nlines",
    "a\tb\r\0": r"a\tb\r\x00",
    "\u202eturned": r"\u202eturned",
    "half \ud83d": r"half \ud83d",
    "line\u2028end": r"line\u2028end",
    "": '""',
    "x" * 5000: "x" * 59 + "…",
    "$x$ and $\\frac{$": "$x$ and $\\frac{$",
    "{name} %s": "{name} %s",
}
INFO = DatasetInfo("any", tuple(SHOWN), VOC_PALETTE)


@pytest.mark.parametrize("name", SHOWN)
def test_names_are_shown_in_one_line(name: str) -> None:
    assert one_line(name) == SHOWN[name]


def test_tables_have_a_line_for_each_class(tiny_spec: ModelSpec) -> None:
    lines = score_table(ConfusionMatrix(len(SHOWN)).compute(), INFO).splitlines()
    assert len(lines) == len(SHOWN) + 2
    assert {columns(line.removesuffix("  (in no label)")) for line in lines} == {60 + 2 + 5}
    assert [line[: len(shown)] for line, shown in zip(lines, SHOWN.values(), strict=False)] == list(SHOWN.values())
    rows = describe_model(tiny_spec.build(), replace(tiny_spec, info=INFO))
    assert len("".join(rows.values()).splitlines()) == 1


@pytest.mark.parametrize("names", [INFO.classes, ("two\nlines",), ("道路",) * 80])
def test_pictures_are_drawn_and_say_once_what_they_cannot_show(
    names: tuple[str, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    drawable.cache_clear()
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.filterwarnings("error", "Glyph|constrained_layout")  # of signs that the font lacks, and of no room
        info = DatasetInfo("any", tuple(drawable(names)), VOC_PALETTE)
        records = [{"step": 1, "miou": 0.5, "memory_received": [1] * len(names), "memory_filled": 1}]
        draw_curves(tmp_path, records, info)
        labels = {"truth": torch.zeros(1, 40, 50, dtype=torch.int64)}
        draw_predictions(tmp_path / "p.png", torch.zeros(1, 3, 40, 50), labels, info, (0.5,) * 3, (0.5,) * 3)
    for picture in ("curves.png", "p.png"):
        assert max(Image.open(tmp_path / picture).size) < 4000
    [message] = caplog.messages
    assert message.startswith("pictures show these classes by their index")
    assert len(message) < 500
    drawn = drawable(names)
    assert len(drawn) == len(names)
    assert drawn[0] == {"road": "road", "two\nlines": r"0 two\nlines", "道路": "0 ??"}[names[0]]


def test_pictures_show_the_memory_and_bear_numbers_that_are_not_finite(tmp_path: Path) -> None:
    info, pictures = DatasetInfo("any", ("a", "b", "c"), VOC_PALETTE), []
    for received in ([4, 0, 0], [1, 1, 1]):
        record = {"miou": torch.nan, "memory_filled": 3, "memory_received": received}
        draw_curves(tmp_path, [{"step": 1, **record}, {"step": 2, **record}], info)
        pictures.append((tmp_path / "curves.png").read_bytes())
    assert pictures[0] != pictures[1]
    images, labels = torch.full((1, 3, 8, 8), torch.nan), {"truth": torch.full((1, 8, 8), 255)}
    draw_predictions(tmp_path / "p.png", images, labels, info, (0, 0, 0), (1, 1, 1))
    assert Image.open(tmp_path / "p.png").width > 100
