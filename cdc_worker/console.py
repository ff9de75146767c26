"""The terminal that results are printed on: its width, its colours, and what may reach it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Final

from rich.console import Console, RenderableType

UNLIMITED: Final = 10_000
"""Columns of what is no terminal: who reads it further wants whole lines."""

LEAST: Final = 20
"""Columns of a terminal: what says that it has fewer doesn't know."""

USUAL: Final = 80
"""Columns that it has then."""


def console() -> Console:
    """Where results are printed. A terminal has colours, unless NO_COLOR is set, and COLUMNS overrides its width."""
    known = sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdecimal()
    made = Console(width=None if known else UNLIMITED, highlight=False, markup=False, emoji=False)
    if made.width < LEAST:
        made.width = USUAL
    return made


def printed(screen: Console, parts: Iterable[RenderableType]) -> str:
    """What is printed of these, without spaces at the ends of lines."""
    with screen.capture() as captured:
        for part in parts:
            screen.print(part)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def one_line(text: str) -> str:
    """What others wrote, on one line and without what would steer a terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
