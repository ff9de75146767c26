"""The demo's timeline: another session looks at `activity` all the time, and tells what has come and how soon."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from typing import Any, Final

import click
import psycopg

from cdc_worker.feed import Numbers
from cdc_worker.sales_day import Entry

POLL: Final = 0.002
"""How often it looks, which is part of every latency, as is the look itself."""

PATIENCE: Final = 5.0

HEADING: Final = f"{'time':8} {'activity':18} {'by':6} {'':55} {'latency':>9}"

BURST: Final = 4
"""So many activities alike, of one transaction, are printed one by one."""

_NEWER: Final = """
SELECT activity_id, activity_type, coalesce(metadata ->> 'lead_name', metadata ->> 'customer_name', full_name, ''),
       description, coalesce(created_by, ''), activity_category,
       activity.date_created AT TIME ZONE 'UTC', clock_timestamp()
FROM unnest(%s::bigint[], %s::bigint[]) AS gap (low, high) JOIN activity ON activity_id BETWEEN low AND high
LEFT JOIN lead USING (lead_id)
ORDER BY activity_id
"""


def say(line: str = "") -> None:
    """Print a line, whole, from any thread."""
    with _printing:
        click.echo(line)


_printing = threading.Lock()


@dataclass(frozen=True, slots=True)
class Seen:
    """A row of `activity` with the time at which another session saw it. For the worker's, `created` is the commit."""

    activity_id: int
    entry: Entry
    created: datetime
    at: datetime

    @property
    def is_system(self) -> bool:
        return self.entry.category == "system"

    @property
    def latency(self) -> float:
        """From commit to visible, in milliseconds."""
        return (self.at - self.created).total_seconds() * 1000


class Timeline(threading.Thread):
    """Looks at `activity` again and again, and prints what has come."""

    def __init__(self, dsn: str) -> None:
        super().__init__(daemon=True)
        self.rows: list[Seen] = []
        self._dsn = dsn
        self._over = threading.Event()
        self._error: BaseException | None = None

    @property
    def recorded(self) -> int:
        """How many activities of the worker it has seen."""
        return sum(row.is_system for row in self.rows)

    def check(self) -> None:
        """Raise what ended it."""
        if self._error is not None:
            raise self._error

    def run(self) -> None:
        try:
            with psycopg.connect(self._dsn, autocommit=True) as connection:
                self._watch(connection)
        except (psycopg.Error, OSError) as error:
            self._error = error

    def stop(self) -> None:
        """End after one more look."""
        self._over.set()
        if self.is_alive():
            self.join(PATIENCE)

    def _watch(self, connection: psycopg.Connection[Any]) -> None:
        seen, over = Numbers(), False
        while not over:
            over = self._over.wait(POLL)
            rows = [
                Seen(activity_id, Entry(*entry), created, at)
                for activity_id, *entry, created, at in connection.execute(_NEWER, seen.bounds).fetchall()
            ]
            if rows:
                seen.note([row.activity_id for row in rows])
                self.rows.extend(rows)
                for line in lines(rows):
                    say(line)


def lines(rows: Iterable[Seen]) -> list[str]:
    """Rows as they stand in the timeline; of a burst the first two, and how many more."""
    printed = []
    for _, alike in groupby(rows, lambda row: (row.entry.type, row.entry.created_by, row.created)):
        several = [*alike]
        few = several if len(several) <= BURST else several[:2]
        printed += [_line(row) for row in few]
        if rest := several[len(few) :]:
            slowest = max(rest, key=lambda row: row.latency)
            printed.append(_columns("", "", "", f"… and {len(rest)} more of the same transaction", slowest))
    return printed


def _line(row: Seen) -> str:
    kind, subject, description, by, _ = row.entry
    text = re.sub(r"^(Lead|Customer) (status|assignment) changed from ", "", description)
    if subject not in text:
        text = f"{subject}: {text}"
    return _columns(f"{row.created.astimezone():%H:%M:%S}", kind, by, text, row)


def _columns(at: str, kind: str, by: str, text: str, row: Seen) -> str:
    text = text if len(text) <= 55 else text[:54] + "…"
    line = f"{at:8} {kind:18} {by:6} {text:55} "
    return line + milliseconds(row.latency).rjust(9) if row.is_system else click.style(line + "   manual", fg="cyan")


def milliseconds(value: float) -> str:
    return f"{value:,.1f} ms" if value < 1000 else f"{value:,.0f} ms"


def percentile(values: Iterable[float], percent: int) -> str:
    ordered = sorted(values)
    return milliseconds(ordered[math.ceil(len(ordered) * percent / 100) - 1])
