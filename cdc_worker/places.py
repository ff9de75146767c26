"""On which lines of a TOML text its keys and elements stand, which tomllib doesn't tell."""

from __future__ import annotations

import re
import tomllib
from bisect import bisect_right
from collections.abc import Collection
from typing import Final

from cdc_worker.errors import Place

_BLANK: Final = re.compile(r"(?:\s|#[^\n]*)*")
_BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")
_STRING: Final = re.compile(
    r'"""(?:\\.|[^\\])*?"""(?!")' r"|'''.*?'''(?!')" r'|"(?:\\.|[^"\\])*"' r"|'[^']*'", re.DOTALL
)
_PLAIN: Final = re.compile(r"[^,\]}#\n]*")


class Places:
    """The lines of a text that tomllib has read."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._ends = [found.start() for found in re.finditer("\n", text)]
        self._last: dict[Place, int] = {}  # the number of the last table of an array of tables
        self._lines: dict[Place, int] = {}
        self._document()

    def line(self, place: Place) -> int:
        """The line of a place, or of the nearest around it."""
        return next((self._lines[at] for n in range(len(place), 0, -1) if (at := place[:n]) in self._lines), 1)

    def mention(self, place: Place, names: Collection[str]) -> int:
        """The first line at a place, or within, that has one of these names; without one, its own."""
        lines = self._text.split("\n")
        named = re.compile("|".join(rf"(?<!\w){re.escape(name)}(?!\w)" for name in names) or r"\Z\A")
        within = sorted({line for at, line in self._lines.items() if at[: len(place)] == place and at != place})
        return next((line for line in within if named.search(lines[line - 1])), self.line(place))

    def _document(self) -> None:
        within: Place = ()
        while self._skip() < len(self._text):
            if self._text.startswith("[[", self._at):
                keys = self._header(2)
                around = self._resolved(keys[:-1])
                array = (*around, keys[-1])
                self._note(array)
                self._last[array] = self._last.get(array, -1) + 1
                within = (*array, self._last[array])
                self._note(within)
            elif self._text[self._at] == "[":
                within = self._resolved(self._header(1))
                self._note(within)
            else:
                self._pair(within)

    def _skip(self) -> int:
        """Pass over blanks, ends of lines and comments; returns where that is."""
        blank = _BLANK.match(self._text, self._at)
        self._at = blank.end() if blank else self._at
        return self._at

    def _note(self, place: Place) -> None:
        self._lines.setdefault(place, bisect_right(self._ends, self._at - 1) + 1)

    def _resolved(self, keys: tuple[str, ...]) -> Place:
        """A header's place: where an array of tables is on its way, in the last of these."""
        place: Place = ()
        for key in keys:
            place = (*place, key)
            if place in self._last:
                place = (*place, self._last[place])
        return place

    def _header(self, brackets: int) -> tuple[str, ...]:
        self._at += brackets
        keys = self._keys()
        self._skip()
        self._at += brackets
        return keys

    def _keys(self) -> tuple[str, ...]:
        """A key, which may be dotted."""
        keys = []
        while True:
            self._skip()
            if (bare := _BARE_KEY.match(self._text, self._at)) is not None:
                keys.append(bare[0])
                self._at = bare.end()
            else:
                keys.append(tomllib.loads(f"key = {self._string()}")["key"])
            if self._text[self._skip()] != ".":
                return tuple(keys)
            self._at += 1

    def _string(self) -> str:
        found = _STRING.match(self._text, self._at)
        assert found, "tomllib has read it"
        self._at = found.end()
        return found[0]

    def _pair(self, within: Place) -> None:
        self._skip()
        begin, keys = self._at, self._keys()
        end, self._at = self._at, begin
        for n in range(1, len(keys) + 1):
            self._note((*within, *keys[:n]))
        self._at = end + 1  # past the =
        self._value((*within, *keys))

    def _value(self, place: Place) -> None:
        match self._text[self._skip()]:
            case "[":
                self._at += 1
                number = 0
                while self._text[self._skip()] != "]":
                    self._note((*place, number))
                    self._value((*place, number))
                    number += 1
                    self._comma()
                self._at += 1
            case "{":
                self._at += 1
                while self._text[self._skip()] != "}":
                    self._pair(place)
                    self._comma()
                self._at += 1
            case '"' | "'":
                self._string()
            case _:
                plain = _PLAIN.match(self._text, self._at)
                self._at = plain.end() if plain else self._at

    def _comma(self) -> None:
        if self._text[self._skip()] == ",":
            self._at += 1
