"""Text from people, such as names of classes, as terminals and pictures can show it."""

import functools
import logging
import unicodedata
from collections.abc import Sequence

logger = logging.getLogger(__name__)

_LONGEST = 60
_LISTED = 5
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
    """Return how many columns of a terminal a line takes: two for each wide sign of East Asia, none for accents."""
    return sum(
        0 if unicodedata.category(x) in ("Mn", "Me", "Cf") else 1 + (unicodedata.east_asian_width(x) in "WF")
        for x in text
    )


@functools.cache
def drawable(names: tuple[str, ...]) -> Sequence[str]:
    """Return names for a picture of matplotlib: signs that its font lacks become "?", after the index; said once."""
    from matplotlib import font_manager  # noqa: PLC0415 slow to import

    font = font_manager.get_font(font_manager.findfont(font_manager.FontProperties()))
    lines = ["".join(x if font.get_char_index(ord(x)) else "?" for x in one_line(name)) for name in names]
    if replaced := [f"{index} {one_line(names[index])}" for index, line in enumerate(lines) if line != names[index]]:
        listed = ", ".join([*replaced[:_LISTED], *["..."] * (len(replaced) > _LISTED)])
        logger.warning("pictures show these classes by their index, as the font cannot draw their names: %s", listed)
    # matplotlib reads formulas between dollars, and leaves out labels that start with an underscore.
    return [
        (line if line == name and not name.startswith("_") else f"{index} {line}").replace("$", r"\$")
        for index, (name, line) in enumerate(zip(names, lines, strict=True))
    ]
