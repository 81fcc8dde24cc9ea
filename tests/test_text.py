"""Names of classes in any script and with any sign, in tables and pictures; what else pictures must bear."""

import io
import logging
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from PIL import Image

from allspark_fast.data.info import VOC_PALETTE, DatasetInfo
from allspark_fast.inference.metrics import ConfusionMatrix, score_table
from allspark_fast.inference.pictures import draw_panel, label_map
from allspark_fast.text import columns, drawable, one_line, progress
from allspark_fast.training.log import draw_curves
from allspark_fast.weights.spec import describe_model

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
def test_names_are_shown_in_one_line(name):
    assert one_line(name) == SHOWN[name]


def test_tables_have_a_line_for_each_class(tiny_spec, monkeypatch):
    lines = score_table(ConfusionMatrix(len(SHOWN)).compute(), INFO).splitlines()
    assert len(lines) == len(SHOWN) + 4
    assert {columns(line.removesuffix("  (in no label)")) for line in lines[:-1]} == {60 + 3 * 13}
    assert [line[: len(shown)] for line, shown in zip(lines[1:], SHOWN.values(), strict=False)] == list(SHOWN.values())
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii", errors="backslashreplace"))
    print(score_table(ConfusionMatrix(len(SHOWN)).compute(), INFO), flush=True)
    lines = sys.stdout.buffer.getvalue().decode().splitlines()
    assert len({len(line.removesuffix("  (in no label)")) for line in lines[:-1]}) == 1
    rows = describe_model(tiny_spec.build(), replace(tiny_spec, info=INFO))
    assert len("".join(rows.values()).splitlines()) == 1


@pytest.mark.parametrize("names", [INFO.classes, ("two\nlines",), ("道路",) * 80])
def test_pictures_are_drawn_and_say_once_what_they_cannot_show(names, tmp_path, caplog):
    drawable.cache_clear()
    info = DatasetInfo("any", names, VOC_PALETTE)
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.filterwarnings("error", "Glyph|constrained_layout")  # of signs that the font lacks, and of no room
        record = {"step": 1, "iou": [0.5] * len(names), "memory_received": [1] * len(names)}
        draw_curves(tmp_path, [record], info)
        draw_panel(tmp_path / "p.png", [("", {"truth": label_map(torch.zeros(40, 50), info)})], info)
    for picture in ("curves.png", "p.png"):
        assert max(Image.open(tmp_path / picture).size) < 4000
    [message] = caplog.messages
    assert message.startswith("pictures show these classes by their index")
    assert len(message) < 500
    drawn = drawable(names)
    assert len(drawn) == len(names)
    assert drawn[0] == {"road": "road", "two\nlines": r"0 two\nlines", "道路": "0 ??"}[names[0]]


def test_curves_show_the_memory_and_bear_numbers_that_are_not_finite(tmp_path):
    info, pictures = DatasetInfo("any", ("a", "_b", "$c$"), VOC_PALETTE), []
    for received in ([4, 0, 0], [1, 1, 1]):
        record = {"miou": torch.nan, "iou": [0.5, torch.nan, 0], "memory_received": received}
        draw_curves(tmp_path, [{"step": 1, **record}, {"step": 2, **record}], info)
        pictures.append((tmp_path / "curves.png").read_bytes())
    assert pictures[0] != pictures[1]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_is_a_bar_or_a_line_a_minute(is_terminal, monkeypatch):
    stream, now = io.StringIO(), [0.0]
    monkeypatch.setattr(stream, "isatty", lambda: is_terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    for _ in (bar := progress(range(100), total=100, unit="image")):
        bar.set_postfix_str("8 images/s, loss 0.512", refresh=False)
        now[0] += 2.5
    printed = stream.getvalue()
    assert ("\r" in printed) == is_terminal
    lines = [line.rstrip() for line in printed.replace("\r", "\n").splitlines() if line.strip()]
    assert lines[-1].endswith("100/100 images, 00:00 left, 8 images/s, loss 0.512")
    assert len(lines) > 100 if is_terminal else len(lines) == 5
