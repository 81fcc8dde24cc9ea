"""Text for terminals and pictures: names that people gave, tables of properties, progress."""

import difflib
import functools
import logging
import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, TypeVar

from tqdm import tqdm

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
_LONGEST = 60
# Invisible, but Persian, Indic scripts and emoji need them: joiners and the selectors of forms.
_JOINERS = "\u200c\u200d\ufe0e\ufe0f"


def one_line(text: str) -> str:
    """Return a text as it is, but for signs that would break a line, turn its direction or cannot be printed.

    These are escaped as Python does; a long text is cut, one without any visible sign is quoted.
    """
    signs = (x if x.isprintable() or x in _JOINERS or unicodedata.category(x) == "Zs" else ascii(x)[1:-1] for x in text)
    line = "".join(signs)
    if not line.strip():
        return f'"{line}"'
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 1]}…"


def padded(text: str, width: int) -> str:
    """Fill a line up with spaces to a number of columns of a terminal, see ``columns``."""
    return text + " " * (width - columns(text))


def columns(text: str) -> int:
    """Return how many columns of a terminal a line takes: two for each wide sign of East Asia, none for accents.

    Signs that stdout cannot encode are escaped there, and take more.
    """
    encoding = sys.stdout.encoding or "utf-8"
    return sum(
        0 if unicodedata.category(x) in ("Mn", "Me", "Cf") else 1 + (unicodedata.east_asian_width(x) in "WF")
        for x in text.encode(encoding, "backslashreplace").decode(encoding)
    )


def property_table(properties: Mapping[str, str]) -> str:
    """Return a line for each property, values aligned, also those of several lines."""
    width = max(map(len, properties))
    indented = {name: value.replace("\n", "\n" + " " * (width + 4)) for name, value in properties.items()}
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in indented.items())


def first_of(texts: Sequence[str], most: int = 5, separator: str = ", ") -> str:
    """Join the first of some texts, and count those beyond the most."""
    more = [f"and {len(texts) - most} more"] if len(texts) > most else []
    return separator.join([*texts[:most], *more])


def nearest(name: str, names: Iterable[str]) -> str:
    """Return which of some names is probably meant, as a part of a message; nothing if none is near."""
    near = difflib.get_close_matches(name, list(names), 1)
    return f" (did you mean {near[0]}?)" if near else ""


def _write_line(text: str) -> None:
    """Write what redraws a bar as a line."""
    if line := text.strip():
        sys.stderr.write(f"{line}\n")


def progress(
    items: Iterable[Item] = (), *, total: int, unit: str, initial: int = 0, disable: bool = False
) -> "tqdm[Item]":
    """Return a progress bar on stderr, which is a line a minute where that is not a terminal."""
    text = "{n_fmt}/{total_fmt} " + unit + "s, {remaining} left{postfix}"
    options: dict[str, Any] = {"dynamic_ncols": True, "bar_format": "{percentage:3.0f}%|{bar}| " + text}
    if not sys.stderr.isatty():
        seconds = dict.fromkeys(("delay", "mininterval", "maxinterval"), 60)
        lines = SimpleNamespace(write=_write_line, flush=sys.stderr.flush)
        options = {"file": lines, "miniters": 1, "bar_format": text, **seconds}
    return tqdm(items, total=total, initial=initial, disable=disable, **options)


@functools.cache
def font_file() -> str:
    """Return the font of pictures, that of matplotlib."""
    from matplotlib import font_manager  # noqa: PLC0415 slow to import

    return font_manager.findfont(font_manager.FontProperties())


@functools.cache
def drawable(names: tuple[str, ...]) -> Sequence[str]:
    """Return names for a picture: signs that its font lacks become "?", after the index; said once."""
    from matplotlib import font_manager  # noqa: PLC0415 slow to import

    font = font_manager.get_font(font_file())
    lines = ["".join(x if font.get_char_index(ord(x)) else "?" for x in one_line(name)) for name in names]
    if replaced := [f"{index} {one_line(names[index])}" for index, line in enumerate(lines) if line != names[index]]:
        message = "pictures show these classes by their index, as the font cannot draw their names: %s"
        logger.warning(message, first_of(replaced))
    return [
        line if line == name else f"{index} {line}" for index, (name, line) in enumerate(zip(names, lines, strict=True))
    ]
