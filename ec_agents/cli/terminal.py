"""What the commands print. Text that a model or a server wrote cannot control the terminal."""

import logging
import re
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

_UNSAFE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 and C1: they begin CSI and OSC sequences; \r overwrites a line
    r"\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"  # bidi, invisible, line separators
    r"\ud800-\udfff\U000e0000-\U000e007f]"  # half surrogate pairs, tags
)


def printable(text: object) -> str:
    """Replace every character that controls a terminal or hides text; line feeds and tabs stay."""
    return _UNSAFE.sub("�", str(text))


def one_line(text: object) -> str:
    """The printable text in one line."""
    return " ".join(printable(text).split())


class Terminal(Console):
    """A console that prints only printable text, whatever it is asked to show."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, highlight=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Filter the text of every segment; colours and cursor movements are kept apart from it."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def say(text: str) -> None:
    """Print text as it is, without wrapping or colours."""
    Terminal().print(Text(printable(text)), soft_wrap=True)


def log_printable() -> None:
    """Send warnings of the package to stderr, filtered."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Printable("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])


class _Printable(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))
