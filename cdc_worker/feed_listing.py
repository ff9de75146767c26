"""The activity feed as a person reads it in a terminal, wide or narrow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, Final

from rich.cells import cell_len
from rich.console import Console, Group, JustifyMethod, RenderableType
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from cdc_worker.console import one_line
from cdc_worker.feed import Count, Entry

NARROW: Final = 80
"""On fewer columns than these a line has neither day nor name."""

TIME: Final = 8
TYPE: Final = 18
BY: Final = 12
"""Columns of a time, and of a type and a name on a line of its own, of which a longer one takes more."""

CAP: Final = 24
"""Columns beyond which what stands beside others is folded, where they aren't many."""

ABOUT: Final = 30
"""A text that would have fewer columns than these beside the others has lines of its own."""


def line(entry: Entry, console: Console) -> Text:
    """An activity on a line of its own; on a terminal what doesn't fit is cut off."""
    narrow = console.width < NARROW
    day, time = _moment(entry.at)
    text = Text()
    text.append(f"{time:{TIME}}" if narrow else f"{f'{day} {time}':19}", style="dim")
    text.append("  ")
    text.append(_padded(_type(entry), TYPE), style=_style(entry))
    text.append("  " if narrow else f"  {_padded(_by(entry), BY)}  ")
    text.append_text(_about(entry))
    if console.is_terminal:
        text.truncate(console.width, overflow="ellipsis")
    return text


def history(entries: Sequence[Entry], console: Console) -> Iterator[RenderableType]:
    """Activities by day, with all that is told of them: what doesn't fit is folded."""
    types, names = (min(max(map(cell_len, map(of, entries)), default=0), _cap(console)) for of in (_type, _by))
    beside = sum((2, TIME, 2, types, 2, names, 2, ABOUT)) <= console.width
    for day, of in groupby(entries, lambda entry: _moment(entry.at)[0]):
        yield Text(day or "without a date", style="bold")
        table = _grid(Column(width=TIME), Column(width=types), Column(width=names))
        for entry in of:
            time = Text(_moment(entry.at)[1], style="dim")
            kind, by, about = _folded(_type(entry), _style(entry)), _folded(_by(entry)), _about(entry)
            if beside:
                table.add_row(time, kind, by, about)
                continue
            head = _grid(Column(width=TIME))
            head.add_row(time, Text("  ", overflow="fold").join([kind, by]))
            yield Padding(head, (0, 0, 0, 2), expand=False)
            if about:
                yield Padding(about, (0, 0, 0, 4), expand=False)
        if table.row_count:
            yield Padding(table, (0, 0, 0, 2), expand=False)


def _grid(*columns: Column) -> Table:
    return Table.grid(*columns, padding=(0, 2, 0, 0))


def _cap(console: Console) -> int:
    return max(CAP, console.width // 4)


def tables(counts: Sequence[Count], console: Console) -> Iterator[RenderableType]:
    """The statistics, a table each."""
    of = {name: [*found] for name, found in groupby(counts, lambda count: count.statistic)}
    latest = ("activities", "last 7 days", "latest")
    yield from _table(
        "Activities by category",
        ("category", *latest),
        [(c.activity_category, *_told(c)) for c in of.get("total", ())],
        console,
        optional=1,
    )
    days = [[*found] for _, found in groupby(of.get("trend", ()), lambda count: count.day)]
    yield from _table(
        "The last seven days",
        ("day", *(_cell(c.activity_category) for c in days[0])),
        [(found[0].day, *(c.activities for c in found)) for found in days],
        console,
    )
    yield from _table(
        "Manual activities by BD",
        ("BD", "type", *latest),
        [(c.bd_in_charge, c.activity_type, *_told(c)) for c in of.get("bd", ())],
        console,
        names=2,
        optional=1,
    )
    yield from _table(
        "System activities by type",
        ("type", *latest),
        [(c.activity_type, *_told(c)) for c in of.get("system_event", ())],
        console,
        optional=1,
    )


def _told(count: Count) -> tuple[int, int, str]:
    return count.activities, count.last_7_days, " ".join(_moment(count.latest)).strip()


def _table(
    title: str,
    heads: Sequence[str],
    rows: Sequence[Sequence[Any]],
    console: Console,
    *,
    names: int = 1,
    optional: int = 0,
) -> Iterator[RenderableType]:
    """A table whose first columns, the `names`, may be folded, and nothing else.

    Where it is too wide the last columns are left out that are `optional`, and if that isn't enough the others stand
    below each other.
    """
    yield Text(title, style="bold")
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(heads, *cells, strict=True)]
    widths[:names] = [min(width, _cap(console)) for width in widths[:names]]
    least = len(heads) - optional
    shown = next((n for n in (len(heads), least) if 2 + sum(widths[:n]) + 2 * (n - 1) <= console.width), 0)
    body: RenderableType = Text("none")
    if rows and shown:
        body = table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
        for place in range(shown):
            right = any(isinstance(row[place], int) for row in rows)
            justify: JustifyMethod = "right" if right else "left"
            table.add_column(_folded(heads[place], "dim"), justify=justify, width=widths[place])
        for row in cells:
            table.add_row(*map(_folded, row[:shown]))
    elif rows:
        body = Group(*(_listed(heads[names:least], row[:names], row[names:least]) for row in cells))
    yield Padding(body, (0, 0, 1, 2), expand=False)


def _listed(heads: Sequence[str], names: Sequence[str], values: Sequence[str]) -> RenderableType:
    """What a row of a table tells, below each other."""
    widest = min(max(map(cell_len, heads)), CAP)
    told = [
        Text(_padded(head, widest), style="dim", overflow="fold").append(f"  {value}", style="not dim")
        for head, value in zip(heads, values, strict=True)
    ]
    return Group(_folded("  ".join(names)), *(Padding(text, (0, 0, 0, 2), expand=False) for text in told))


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "–" if value is None else one_line(str(value))


def _folded(text: str, style: str = "") -> Text:
    return Text(text, style=style, overflow="fold")


def _padded(text: str, width: int) -> str:
    return text + " " * (width - cell_len(text))


def _moment(at: str | None) -> tuple[str, str]:
    """Day, and time to the second, without its offset, which is that of the target's zone."""
    day, _, time = one_line(at or "").partition("T")
    return day, time[:8]


def _type(entry: Entry) -> str:
    return one_line(entry.type or "")


def _by(entry: Entry) -> str:
    return one_line(str(next((by for by in (entry.created_by, entry.owner) if by not in (None, "")), "")))


def _about(entry: Entry) -> Text:
    return _folded(one_line(entry.description or ""))


def _style(entry: Entry) -> str:
    return {"system": "cyan", "manual": "green"}.get(entry.category or "", "magenta")
