"""What nothing may print: passwords and the values of rows, into which the suite puts a word that is found again.

Debug lines are exempt: they follow the protocol, and name positions, sizes and counts as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

CANARY = "c4n4ry"

_SILENT = frozenset(("cutover", "doctor", "recover", "run", "setup", "status", "switch-plugin", "teardown"))
"""Commands whose results tell of no rows either. Others are asked for them."""

_logs: set[Path] = set()
_texts: list[str] = []


def keep(log: Path) -> None:
    """Have a process's log looked at when the test is over."""
    _logs.add(log)


def keep_printed(command: Sequence[str], printed: Path) -> None:
    """Have looked at what a command prints, as well, unless it is asked for values."""
    if command and command[0] in _SILENT:
        keep(printed)


def hear(command: Sequence[str], stdout: str, stderr: str) -> None:
    """Have looked at what a command has said."""
    _texts.append(stderr)
    if command and command[0] in _SILENT:
        _texts.append(stdout)


def caught(more: str = "") -> list[str]:
    """The lines that give something away, of all that was kept since the last time, and `more`."""
    texts = [*_texts, *(log.read_text("utf-8", "replace") for log in sorted(_logs) if log.exists()), more]
    _texts.clear()
    _logs.clear()
    return [line for text in texts for line in giving_away(text)]


def giving_away(text: str) -> Iterator[str]:
    """The lines of a log, or of messages to the user, that have a canary and are no debug lines."""
    for line in text.splitlines():
        if CANARY in line.lower() and not _is_debug(line):
            yield line


def _is_debug(line: str) -> bool:
    if line.startswith("{"):
        try:
            return bool(json.loads(line).get("level") == "debug")
        except ValueError:
            return False  # half a line of a process that was killed
    return "[debug " in line
