"""The activity feed as a person reads it in a terminal, wide or narrow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, Final

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from cdc_worker.console import one_line
from cdc_worker.feed import Count, Entry

NARROW: Final = 80
"""On fewer columns than these a text has lines of its own."""

TYPE: Final = 18
BY: Final = 12
"""Columns of a type and of a name, of which a longer one takes more."""


def line(entry: Entry, console: Console) -> Text:
    """An activity on a line of its own; on a terminal what doesn't fit is cut off."""
    narrow = console.width < NARROW
    text = Text()
    text.append(_when(entry)[11 if narrow else 0 :], style="dim")
    text.append("  ")
    text.append(_type(entry).ljust(TYPE), style=_style(entry))
    text.append("  " if narrow else f"  {_by(entry).ljust(BY)}  ")
    text.append_text(_about(entry))
    if console.is_terminal:
        text.truncate(console.width, overflow="ellipsis")
    return text


def history(entries: Sequence[Entry], console: Console) -> Iterator[RenderableType]:
    """Activities by day."""
    types, names = (max(map(len, map(of, entries)), default=0) for of in (_type, _by))
    for day, of in groupby(entries, lambda entry: _when(entry)[:10]):
        yield Text(day.strip() or "without a date", style="bold")
        table = Table.grid(Column(min_width=8), Column(width=types), Column(width=names), padding=(0, 2, 0, 0))
        for entry in of:
            time, kind, by = _when(entry)[11:], _type(entry), _by(entry)
            head = [Text(time, style="dim"), Text(kind, style=_style(entry)), Text(by)]
            if console.width >= NARROW:
                table.add_row(*head, _about(entry))
            else:
                yield Text("  ").append_text(Text("  ").join(head))
                yield Padding(_about(entry), (0, 0, 0, 4), expand=False)
        if table.row_count:
            yield Padding(table, (0, 0, 0, 2), expand=False)


def tables(counts: Sequence[Count]) -> Iterator[RenderableType]:
    """The statistics, a table each."""
    of = {name: [*found] for name, found in groupby(counts, lambda count: count.statistic)}
    latest = ("activities", "last 7 days", "latest")
    yield from _table(
        "Activities by category", ("category", *latest), [(c.activity_category, *_told(c)) for c in of.get("total", ())]
    )
    days = [[*found] for _, found in groupby(of.get("trend", ()), lambda count: count.day)]
    yield from _table(
        "The last seven days",
        ("day", *(str(c.activity_category) for c in days[0])),
        [(found[0].day, *(c.activities for c in found)) for found in days],
    )
    yield from _table(
        "Manual activities by BD",
        ("BD", "type", *latest),
        [(c.bd_in_charge, c.activity_type, *_told(c)) for c in of.get("bd", ())],
    )
    yield from _table(
        "System activities by type",
        ("type", *latest),
        [(c.activity_type, *_told(c)) for c in of.get("system_event", ())],
    )


def _told(count: Count) -> tuple[int, int, str]:
    return count.activities, count.last_7_days, _time(count.latest)


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> Iterator[RenderableType]:
    yield Text(title, style="bold")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for place, head in enumerate(heads):
        right = any(isinstance(row[place], int) for row in rows)
        table.add_column(one_line(head), justify="right" if right else "left", header_style="dim", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    yield Padding(table if rows else Text("none"), (0, 0, 1, 2), expand=False)


def _cell(value: Any) -> Text:
    return Text(f"{value:,}" if isinstance(value, int) else "–" if value is None else one_line(str(value)))


def _time(at: str | None) -> str:
    """To the second, without its offset, which is that of the target's zone."""
    return "" if at is None else at[:19].replace("T", " ")


def _when(entry: Entry) -> str:
    return _time(entry.at).ljust(19)


def _type(entry: Entry) -> str:
    return one_line(entry.type or "")


def _by(entry: Entry) -> str:
    return one_line(str(next((by for by in (entry.created_by, entry.owner) if by not in (None, "")), "")))


def _about(entry: Entry) -> Text:
    return Text(one_line(entry.description or ""), overflow="fold")


def _style(entry: Entry) -> str:
    return {"system": "cyan", "manual": "green"}.get(entry.category or "", "magenta")
