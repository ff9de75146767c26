"""The activity feed: what is in the target, whoever wrote it, selected, followed and counted as people read it."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import Any, Final, Literal

import msgspec
import psycopg
from psycopg import sql
from pydantic import BaseModel, Field

from cdc_worker import catalog, errors, postgres
from cdc_worker.config import Settings
from cdc_worker.postgres import Connection
from cdc_worker.profile import FIELDS, Profile
from cdc_worker.rules import qualified
from cdc_worker.subjects import key, theirs

POLL: Final = 0.5
"""Seconds between two looks of who follows."""

BACK: Final = 10_000
"""Among so many of the newest rows it is seen, to begin with, which are missing."""

GAPS: Final = 1_000
"""So many gaps between numbers are kept in any case: most are of what was rolled back, and each is asked for."""

GIVEN_UP: Final = 600.0
"""Seconds for which more of them are kept."""

AT_ONCE: Final = 1_000
"""So many rows are read at a time."""

DAYS: Final = 7
"""Of a trend, and of what is recent."""


class Entry(BaseModel):
    """An activity, whoever wrote it. These are the fields of `tail --json` and `timeline --json`."""

    id: Any = Field(description="primary key of its row; null if that isn't a number from a sequence")
    at: str | None = Field(description="when it happened, in ISO 8601; without an offset if the column has no zone")
    category: str | None = Field(description="`manual`, `system`, or what else the target has")
    type: str | None = Field(description="its type")
    description: str | None = Field(description="its text")
    links: dict[str, Any] = Field(description="keys of what it is about, by the profile's fields that link")
    owner: Any = Field(description="the BD in charge; null where the target has no such column, as below")
    created_by: Any = Field(description="who did it")
    visible: bool | None = Field(description="whether it is shown to everybody")
    metadata: Any = Field(description="what else is known of it")


@dataclass(frozen=True, slots=True)
class Selection:
    """Which activities are meant: all that have one of each that is given.

    `links` are keys by the profile's fields. Those of the category `manual` include those of none.
    """

    links: Mapping[str, str] = field(default_factory=dict)
    types: Collection[str] = ()
    categories: Collection[str] = ()
    owners: Collection[str] = ()
    visible_only: bool = False


class Count(BaseModel):
    """How many activities there are. These are the fields of `stats --json`, as of LeadFi's v_activity_statistics."""

    statistic: Literal["total", "trend", "bd", "system_event"] = Field(
        description="`total` by category, `trend` by day and category, `bd` by BD and type, `system_event` by type"
    )
    activity_category: str | None = Field(description="category")
    activity_type: str | None = Field(default=None, description="type; null if it is of all, as below")
    bd_in_charge: str | None = Field(default=None, description="BD, of manual activities; null also if nobody is named")
    day: date | None = Field(default=None, description="day of a trend, of the last seven with today")
    activities: int = Field(description="how many there are")
    last_7_days: int = Field(description="how many of them are of the last seven days, with today")
    latest: str | None = Field(default=None, description="when the latest happened")


_ENTRY: Final = sql.SQL("""
json_build_object(
    'id', {id}, 'at', to_jsonb({at}) #>> '{{}}', 'category', {category}, 'type', {type}, 'description', {description},
    'links', {links}, 'owner', {owner}, 'created_by', {created_by}, 'visible', {visible}, 'metadata', {metadata}
)::text
""")

_NEWEST: Final = sql.SQL("SELECT {entry} FROM {table} WHERE {selected} ORDER BY {order} LIMIT {limit}")

_RECENT: Final = sql.SQL("SELECT {id} FROM {table} ORDER BY {id} DESC LIMIT {limit}")

# In the order of the numbers, so that what is left out comes after all that is told.
_MISSED: Final = sql.SQL("""
SELECT found.number, found.entry
FROM unnest({lows}::bigint[], {highs}::bigint[]) AS cdc_worker_gap (low, high), LATERAL (
    SELECT {id}::bigint AS number, CASE WHEN {selected} THEN {entry} END AS entry
    FROM {table} WHERE {id} BETWEEN cdc_worker_gap.low AND cdc_worker_gap.high ORDER BY {id} LIMIT {limit}
) AS found
ORDER BY found.number LIMIT {limit}
""")

_STEP: Final = "SELECT seqincrement FROM pg_sequence WHERE seqrelid = %s::regclass"

_DRAWN: Final = "SELECT CASE WHEN has_sequence_privilege(%s, 'USAGE, SELECT') THEN pg_sequence_last_value(%s) END"

_COUNTS: Final = sql.SQL("""
SELECT grouping(day), grouping(owner), grouping(type), category, type, owner, day, count(*),
       count(*) FILTER (WHERE recent), to_jsonb(max(at)) #>> '{{}}'
FROM (
    SELECT {category} AS category, {type} AS type, {owner} AS owner, it.at, it.at >= it.since AS recent,
           CASE WHEN it.at >= it.since AND it.at < it.since + {days} THEN it.at::date END AS day
    FROM {table}, LATERAL (SELECT {local}::timestamp AS at, {since} AS since) AS it
    WHERE {selected}
) AS activity
GROUP BY GROUPING SETS ((category), (category, day), (category, owner, type), (category, type))
ORDER BY day, category, owner, type
""")

_TODAY: Final = "SELECT (clock_timestamp() AT TIME ZONE %s)::date"

_NULL: Final = sql.SQL("NULL::text")


_LEAST: Final = -(1 << 63)
_GREATEST: Final = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Gap:
    """Numbers of which no row was seen, from `low` to `high`, and when the clock said so."""

    low: int
    high: int
    at: float


class Numbers:
    """Which rows of a table were seen that is numbered by a sequence, where any may come later than those after it.

    A transaction draws its numbers before it commits, and a session may keep some for later (CACHE).
    """

    def __init__(
        self,
        seen: Collection[int] = (),
        *,
        whole: bool = True,
        step: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`seen` are all rows, or if they aren't the `whole` the last ones; numbers are a `step` apart."""
        self.last = _LEAST if whole else min(seen)
        self._step = abs(step)
        self._clock = clock
        self._gaps: list[Gap] = []
        self.note(seen)

    @property
    def gaps(self) -> list[tuple[int, int]]:
        """From where to where rows may still come, in order."""
        return [*((gap.low, gap.high) for gap in self._gaps), (self.last + 1, _GREATEST)]

    @property
    def bounds(self) -> tuple[list[int], list[int]]:
        """All of where from, and all of where to, as `unnest` takes them."""
        return [low for low, _ in self.gaps], [high for _, high in self.gaps]

    def note(self, seen: Collection[int]) -> None:
        """These have come, and none before the greatest of them but they."""
        now, left, numbers = self._clock(), list[Gap](), deque(sorted(seen))
        for gap in self._gaps:
            low = gap.low
            while numbers and numbers[0] <= gap.high:
                number = numbers.popleft()
                if number > low:
                    left.append(Gap(low, number - 1, gap.at))
                low = max(low, number + 1)
            if low <= gap.high:
                left.append(Gap(low, gap.high, gap.at))
        for number in numbers:
            if number - self.last > self._step:
                left.append(Gap(self.last + 1, number - 1, now))
            self.last = max(self.last, number)
        most = len(left) - GAPS  # the first are the oldest, for a number that is drawn later is greater
        self._gaps = [gap for place, gap in enumerate(left) if place >= most or now - gap.at < GIVEN_UP]


class Feed:
    """What is selected of a target, through a connection."""

    def __init__(
        self, connection: Connection, settings: Settings, profile: Profile, selection: Selection, *, metadata: bool
    ) -> None:
        """With their `metadata`, or without.

        Raises SettingsError for what can't be selected by, CatalogMismatchError for a target without the columns, and
        TargetUnusableError for one that may not be read.
        """
        target = profile.target
        self._connection = connection
        self._profile = profile
        self._metadata = metadata
        table = catalog.target_table(connection, target)
        if missing := sorted(
            {*target.columns, *filter(None, (target.category, target.visible))} - table.columns.keys()
        ):
            lacking = f"{target.table} has no column {', '.join(missing)}"
            raise errors.CatalogMismatchError(
                lacking if table.columns else f"there is no table {target.table}",
                hint="mend the profile's [target]; what is wrong tells: cdc-worker doctor",
            )
        name = qualified(target.table)
        _check_rights(connection, sql.Identifier(*name).as_string(), keys=table.numbered is not None)
        self._table = sql.Identifier(*name)
        self._columns = {of: column for column, of in target.columns.items()}
        self._change_key = catalog.row_key(target, table)
        numbered = catalog.number(connection, target)
        self._id = None if numbered is None else sql.Identifier(numbered[0])
        self._sequence = "" if numbered is None else numbered[1]
        self._links = {of: column for of, column in self._columns.items() if of not in FIELDS}
        self._zone = settings.zone(profile, postgres.server(connection).time_zone)
        self._zoned = catalog.zoned(target, table)
        self._selected = self._where(selection, table.columns)
        connection.execute(sql.SQL("SET timezone = {}").format(self._zone))

    def newest(self, limit: int | None) -> list[str]:
        """Those that happened last, in order, as JSON."""
        return self._newest(limit, self._order())

    def _newest(self, limit: int | None, order: sql.Composable) -> list[str]:
        query = _NEWEST.format(
            entry=self._entry(), table=self._table, selected=self._selected, order=order, limit=limit
        )
        return [printable(entry) for (entry,) in self._connection.execute(query)][::-1]

    def begin(self, limit: int, *, follow: bool) -> tuple[list[str], Numbers]:
        """Those that were written last, likewise, and what to ask with for those that come later.

        Raises TargetUnusableError where these can't be told.
        """
        if not follow and self._id is None:
            return self.newest(limit), Numbers()
        id_ = self._number()
        step = postgres.fetch_one(self._connection, _STEP, self._sequence)[0]
        with self._connection.transaction():
            self._connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            newest = self._newest(limit, sql.SQL("{} DESC").format(id_))
            recent = _RECENT.format(id=id_, table=self._table, limit=BACK if follow else 0)
            numbers = [int(number) for (number,) in self._connection.execute(recent)]
            return newest, Numbers(numbers, whole=len(numbers) < BACK, step=step)

    def drawn(self) -> int | None:
        """The greatest number that was drawn, if there is one that may be asked for."""
        if self._id is None:
            return None
        found: int | None = postgres.fetch_one(self._connection, _DRAWN, self._sequence, self._sequence)[0]
        return found

    def close(self) -> None:
        """End the connection."""
        self._connection.close()

    def newer(self, than: Numbers) -> Iterator[str]:
        """What has come since, as JSON; notes what was seen."""
        while True:
            lows, highs = than.bounds
            query = _MISSED.format(
                lows=lows,
                highs=highs,
                id=self._number(),
                selected=self._selected,
                entry=self._entry(),
                table=self._table,
                limit=AT_ONCE,
            )
            found = self._connection.execute(query).fetchall()
            than.note([number for number, _ in found])
            yield from (printable(entry) for _, entry in found if entry is not None)
            if len(found) < AT_ONCE:
                return

    def counts(self) -> list[Count]:
        """The statistics."""
        today = postgres.fetch_one(self._connection, _TODAY, self._zone)[0]
        at = self._column("occurred_at")
        query = _COUNTS.format(
            category=self._category(),
            type=self._text("type"),
            owner=self._text("owner"),
            table=self._table,
            local=sql.SQL("({} AT TIME ZONE {})").format(at, self._zone) if self._zoned else at,
            since=sql.SQL("{}::date").format(today - timedelta(days=DAYS - 1)),
            days=DAYS,
            selected=self._selected,
        )
        return [*_counts(self._connection.execute(query).fetchall(), today)]

    def _number(self) -> sql.Identifier:
        if self._id is None:
            raise errors.TargetUnusableError(
                f"{self._profile.target.table} has no primary key from a sequence, by which to know what is new",
                hint="what is there shows: cdc-worker timeline",
            )
        return self._id

    def _order(self) -> sql.Composable:
        """Newest first."""
        by: list[sql.Composable] = []
        if "occurred_at" in self._columns:
            by.append(sql.SQL("{} DESC NULLS LAST").format(self._column("occurred_at")))
        if self._id is not None:
            by.append(sql.SQL("{} DESC").format(self._id))
        return sql.SQL(", ").join(by or [sql.SQL("ctid DESC")])

    def _entry(self) -> sql.Composed:
        visible = self._profile.target.visible
        links = [part for of, column in self._links.items() for part in (sql.Literal(of), sql.Identifier(column))]
        return _ENTRY.format(
            id=self._id or _NULL,
            at=self._column("occurred_at"),
            category=self._category(),
            type=self._text("type"),
            description=self._text("description"),
            links=sql.SQL("json_build_object({})").format(sql.SQL(", ").join(links)),
            owner=self._column("owner"),
            created_by=self._column("created_by"),
            visible=_NULL if visible is None else sql.Identifier(visible),
            metadata=self._column("metadata") if self._metadata else _NULL,
        )

    def _column(self, of: str) -> sql.Composable:
        """The column of a field."""
        return sql.Identifier(self._columns[of]) if of in self._columns else _NULL

    def _text(self, of: str) -> sql.Composed:
        return sql.SQL("{}::text").format(self._column(of))

    def _category(self) -> sql.Composable:
        if (column := self._profile.target.category) is not None:
            return sql.SQL("coalesce({}::text, 'manual')").format(sql.Identifier(column))
        if self._change_key is None:
            return _NULL
        return sql.SQL("CASE WHEN {} IS NULL THEN 'manual' ELSE 'system' END").format(self._change_key)

    def _where(self, selection: Selection, types: Mapping[str, str]) -> sql.Composable:
        """Raise SettingsError for what the target doesn't tell."""
        conditions: list[sql.Composable] = []
        for of, given in selection.links.items():
            if of not in self._links:
                raise errors.SettingsError(
                    f'the profile "{self._profile.name}" has no links to a "{of}"',
                    hint=f"those it has: {', '.join(self._links) or 'none'}",
                )
            found = key(self._connection, of, given, types[self._links[of]])
            conditions.append(theirs(self._profile, {of: found}, change_key=self._change_key))
        for wanted, column, what in (
            (selection.types, self._text("type"), "type"),
            (selection.owners, self._text("owner"), "owner"),
            (selection.categories, self._category(), "category"),
        ):
            if wanted:
                self._check_told(what)
                conditions.append(sql.SQL("{} = ANY ({})").format(column, [*wanted]))
        if selection.visible_only:
            self._check_told("visible")
            conditions.append(sql.SQL("{} IS NOT FALSE").format(sql.Identifier(self._profile.target.visible or "")))
        return sql.SQL(" AND ").join(map(sql.SQL("({})").format, conditions)) if conditions else sql.SQL("true")

    def _check_told(self, what: str) -> None:
        target = self._profile.target
        told = {
            "category": target.category is not None or self._change_key is not None,
            "visible": target.visible is not None,
        }
        if not told.get(what, what in self._columns):
            where = f"{what} in [target]" if what in told else f"{what} in [target.columns]"
            raise errors.SettingsError(
                f"{target.table} doesn't tell the {what} of an activity",
                hint=f"leave it out, or name a column for {where} of the profile",
            )


_NONE: Final[dict[str, Any]] = {"activities": 0, "last_7_days": 0, "latest": None}


def _counts(rows: Sequence[tuple[Any, ...]], today: date) -> Iterator[Count]:
    """The statistics of what was grouped; days without any, and categories without any, count nothing."""
    categories = ["manual", "system", "automated"]
    by_day: dict[tuple[date, str | None], Count] = {}
    found: list[Count] = []
    for no_day, no_owner, no_type, category, kind, owner, day, activities, recent, latest in rows:
        of: dict[str, Any] = {
            "activity_category": category,
            "activities": activities,
            "last_7_days": recent,
            "latest": latest,
        }
        if not no_day:
            if day is not None:
                by_day[day, category] = Count(statistic="trend", day=day, **of)
        elif not no_owner:
            if category == "manual":
                found.append(Count(statistic="bd", activity_type=kind, bd_in_charge=owner, **of))
        elif not no_type:
            if category == "system":
                found.append(Count(statistic="system_event", activity_type=kind, **of))
        else:
            found.append(Count(statistic="total", **of))
            categories += [] if category in categories else [category]
    order = ("total", "trend", "bd", "system_event")
    for ago in reversed(range(DAYS)):
        day = today - timedelta(days=ago)
        found += [
            by_day.get((day, category)) or Count(statistic="trend", activity_category=category, day=day, **_NONE)
            for category in categories
        ]
    return iter(sorted(found, key=lambda count: order.index(count.statistic)))


def _check_rights(connection: Connection, table: str, *, keys: bool) -> None:
    """Raise TargetUnusableError unless our role may read it, and the keys of its rows if they are in a table."""
    needed = [table]
    if keys:
        if not postgres.fetch_one(connection, "SELECT has_schema_privilege('cdc_worker', 'USAGE')")[0]:
            role = sql.Identifier(connection.info.user).as_string()
            raise errors.TargetUnusableError(
                f'role "{connection.info.user}" lacks USAGE ON SCHEMA cdc_worker',
                hint=f"as the owner: GRANT USAGE ON SCHEMA cdc_worker TO {role};"
                f" GRANT SELECT ON cdc_worker.written_key, {table} TO {role}",
            )
        needed.append("cdc_worker.written_key")
    postgres.check_rights(connection, {name: ["SELECT"] for name in needed}, partly=[table], whole=())


def _opened(settings: Settings) -> Connection:
    return postgres.connect_reading(settings.dsn.get_secret_value(), settings.worker)


def timeline(
    settings: Settings, profile: Profile, selection: Selection, *, limit: int | None, metadata: bool
) -> list[str]:
    """The newest of what is selected, oldest first, as JSON."""
    with closing(_opened(settings)) as connection:
        return Feed(connection, settings, profile, selection, metadata=metadata).newest(limit)


def stats(settings: Settings, profile: Profile, selection: Selection) -> list[Count]:
    """What is selected, counted."""
    with closing(_opened(settings)) as connection:
        return Feed(connection, settings, profile, selection, metadata=False).counts()


def tail(
    settings: Settings,
    profile: Profile,
    selection: Selection,
    *,
    lines: int,
    follow: bool,
    metadata: bool,
    note: Callable[[str], None],
) -> Iterator[str]:
    """The newest of what is selected, then what comes, as JSON.

    While there is no server it is tried again, and `note` hears of each time that it was lost. Where the numbers have
    been set back, as by a TRUNCATE … RESTART IDENTITY or a standby that took over too early, it begins anew.
    """
    seen: Numbers | None = None
    drawn: int | None = None
    feed: Feed | None = None
    while True:
        try:
            if feed is None:
                feed = Feed(_opened(settings), settings, profile, selection, metadata=metadata)
            before, drawn = drawn, feed.drawn() if follow else None
            if before is not None and (drawn or 0) < before:
                note(f"the numbers of {profile.target.table} were set back: beginning anew")
                seen = None
            if seen is None:
                newest, seen = feed.begin(lines, follow=follow)
                yield from newest
            else:
                yield from feed.newer(seen)
        except psycopg.Error as error:
            if seen is None or not postgres.is_transient(error.sqlstate):
                raise
            if feed is not None:
                feed.close()
                note(f"connection lost, trying again: {postgres.failure(error)}")
            feed = None
        if not follow:
            return
        time.sleep(POLL)


# Line breaks and tabs are between the parts of JSON, the others within its texts: C1, marks of direction, separators.
_UNPRINTABLE: Final = re.compile("[\x00-\x1f]|[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """The same JSON on one line, in which nothing could steer a terminal."""
    return _UNPRINTABLE.sub(lambda found: " " if found[0] < " " else f"\\u{ord(found[0]):04x}", text)


def entry(line: str) -> Entry:
    """An activity, of its JSON."""
    return Entry(**msgspec.json.decode(line))
