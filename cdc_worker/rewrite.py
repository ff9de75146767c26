"""Rewrite: after a profile has changed, what was recorded becomes what the profile says now.

Some changes of a recording at a time, the worker's rows that are about them are held against what the rules make of
them now:

    places    of which changes all is known that the rules make of them: the beginnings of their keys
    there     the rows, and the dead letters, whose keys begin like that
    wanted    what the rules make of these changes

What is wanted and isn't there is written like anything that comes late, and only then the rest is done: what is there
in another way is changed in place, what nobody wants is removed. So whoever interrupts it finds an activity twice at
worst, never none, and to run it again leads to the same end. A row goes only if its very change was read: what a
recording doesn't hold, be it that it has a gap, that it is damaged, or that it was made of fewer tables, says nothing.

Others' rows are neither read nor locked, and ours only where nobody else has them locked: who has is waited for with
nothing in hand.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple
from zoneinfo import ZoneInfo

import psycopg
from psycopg import sql
from pydantic import BaseModel, Field

from cdc_worker import catalog, errors, kept, postgres, replay
from cdc_worker.activities import Activity, DeadLetter, Person, Position, Skipped, key_prefix
from cdc_worker.catalog import TargetTable
from cdc_worker.changes import Transaction, Unread
from cdc_worker.config import Settings
from cdc_worker.context import PREFIX as CONTEXT_PREFIX
from cdc_worker.late import Late
from cdc_worker.log import Logger
from cdc_worker.lsn import LSN
from cdc_worker.postgres import Connection
from cdc_worker.profile import Profile, Target
from cdc_worker.replay import SAMPLES, Loop, Portion, Replayed, Wishes, show
from cdc_worker.rules import Rules, Table, qualified
from cdc_worker.sink import MAX_LOCKING, MAX_REFUSALS, encoder, hurry, parsed, unlinked
from cdc_worker.transform import ERASED, Outcome, told

PORTION: Final = 1_000
"""So many changes, or activities, are held against the target at once."""

PATIENCE: Final = 1.0
"""Seconds, at most, between two looks whether rows are free that others have locked."""

PRESET: Final = frozenset(("is_visible_to_bd",))
"""Columns that rows begin with, and that are the application's from then on: see 050_leadfi_protection.sql."""

Values = Mapping[str, str | None]
"""Columns of a row as text."""


Fate = Literal["changed", "removed"]


class Was(BaseModel):
    """A value before and after."""

    was: Any = Field(description="as it is")
    now: Any = Field(description="as it would be")


class Difference(BaseModel):
    """An activity that isn't what the profile says now."""

    fate: Fate = Field(description="what would be done about it")
    type: str = Field(description="its type; if that would change, the new one")
    change_key: str = Field(description="which it is")
    description: str = Field(description="its text; if that would change, the new one")
    fields: dict[str, Was] = Field(default={}, description="what would change, by column and within metadata by name")


class Rewritten(Replayed):
    """What was done about activities, or would be. These are the fields of `replay --rewrite --json`."""

    changed: dict[str, int] = Field(default={}, description="activities that were changed in place, by type")
    fields: dict[str, dict[str, int]] = Field(
        default={}, description="of these, by type: in how many each column was changed, or name in the metadata"
    )
    removed: dict[str, int] = Field(default={}, description="activities that no rule makes any more, by type")
    refused: int = Field(
        default=0, description="activities that the target refused to change or to give up: they are as they were"
    )
    differences: list[Difference] = Field(
        default=[], description="some of what would be changed or removed; only with --dry-run"
    )

    @property
    def whole(self) -> bool:
        """Whether all was done that was asked for, as far as that can be known."""
        return super().whole and not self.refused


SHOWN: Final = 100
"""So many characters of a value are printed."""


def lines(done: Rewritten) -> Iterator[str]:
    """What was done as a person reads it."""
    yield from replay.lines(done)
    would = "would be " if done.dry_run else ""
    for fate, counts in (("changed", done.changed), ("removed", done.removed)):
        what = ", ".join(f"{count:,} {kind}" for kind, count in sorted(counts.items())) or "none"
        yield f"{sum(counts.values()):,} activities {would}{fate}: {what}"
        for kind, fields in sorted(done.fields.items()) if fate == "changed" else ():
            yield f"  {kind}: {', '.join(f'{name} in {count:,}' for name, count in sorted(fields.items()))}"
        for difference in done.differences:
            if difference.fate == fate:
                yield f"  {difference.type}  {difference.description}"
                for name, of in difference.fields.items():
                    yield f"    {name}: {_shown(of.was)} -> {_shown(of.now)}"
    if done.refused:
        yield f"{done.refused:,} activities are as they were: the target refused what would be done, as the log tells"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def place_of(key: str) -> str:
    """The change that a key is of: all of it but the rule."""
    return key.rpartition("/")[0]


class Places:
    """Tells of which changes of a commit all is known: slices are taken in order."""

    def __init__(self, rules: Rules, worker: str, cluster: str, tables: Collection[tuple[str, str]] = ()) -> None:
        """With `tables` only their changes count."""
        self._rules, self._worker, self._cluster, self._tables = rules, worker, cluster, tables
        self._prefix = ""
        self._ordinals: dict[tuple[str, str], int] = {}
        self._open: deque[tuple[int, str]] = deque()  # with the number that the transformer has given to each
        self._index = self._messages = 0

    def take(self, transaction: Transaction, decided: int, excluded: Collection[tuple[str, str]] = ()) -> list[str]:
        """The changes of which all is known by now: `decided` are so many of those that rules are about.

        What became of tables that are `excluded` is nobody's to say.
        """
        if transaction.first:
            self._prefix = key_prefix(self._worker, self._cluster, transaction.commit_lsn)
            self._ordinals, self._index, self._messages = {}, 0, 0
            self._open.clear()
        for change in transaction.changes:
            table = (change.schema, change.table)
            ordinal = self._ordinals.get(table, 0)
            self._ordinals[table] = ordinal + 1
            if table not in excluded and (not self._tables or table in self._tables):
                self._open.append((self._index, f"{self._prefix}{'.'.join(table)}/{ordinal}"))
            self._index += table in self._rules or type(change) is Unread
        self._messages += sum(message.prefix == CONTEXT_PREFIX for _, message in transaction.messages)
        if not transaction.last:
            found = []
            while self._open and self._open[0][0] < decided:
                found.append(self._open.popleft()[1])
            return found
        # What is told in place of changes, of whatever tables, may come until the end.
        messages = range(0 if self._tables else self._messages)
        summaries = [f"{self._prefix}cdc_worker.context/{number}" for number in messages]
        return [place for _, place in self._open] + summaries


class There(NamedTuple):
    """A row of the target: perhaps of a person who was `erased`, or without links that were refused, or `gone`."""

    type: str
    description: str
    erased: bool
    unlinked: Mapping[str, Any]
    gone: bool


class Letter(NamedTuple):
    """A dead letter; it is left at what it says if it is `settled`: discarded, or of a person who was erased."""

    settled: bool


@dataclass(frozen=True, slots=True)
class Edit:
    """A row that is to be changed or, if nothing is `wanted`, removed.

    `was` and `now` are the values of the columns that rules write, as the target prints them, and `wanted` as they are
    sent.
    """

    key: str
    type: str
    was: Values = field(default_factory=dict)
    now: Values = field(default_factory=dict)
    wanted: Values | None = None
    description: str = ""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that differ."""
        return tuple(column for column, value in self.now.items() if self.was[column] != value)


class Rows:
    """The worker's rows of the target, by key."""

    def __init__(
        self,
        connection: Connection,
        target: Target,
        *,
        table: TargetTable,
        worker: str,
        cluster: str,
        time_zone: str,
        anyone_erased: bool,
    ) -> None:
        """`table` is the target as the catalog has it. TargetUnusableError where its rows can't be told apart."""
        self._connection = connection
        self._prefix = f"{worker}/{cluster}/"
        self._catalog = table
        self._encode = encoder(target, table, ZoneInfo(time_zone))
        self._sent = (*target.columns, *target.constants)
        self._by_field = {field: column for column, field in target.columns.items()}
        name = qualified(target.table)
        self.table = sql.Identifier(*name)
        found = catalog.columns(connection, name)[name]
        own = catalog.key_column(target)
        left = {own, *PRESET, table.numbered and table.numbered[0]}
        self._written = [column for column in self._sent if column not in left]
        self._types = {
            # What is too long is to be refused, as it is when it is written; a scale rounds then as well.
            column: catalog.cast(found[column])
            if found[column].category in ("S", "V")
            else sql.SQL(found[column].declared)
            for column in self._written
        }
        if own is not None:
            self._key: sql.Composable = sql.Identifier("told", own)
            self._gone: sql.Composable = sql.SQL("false")
            self._all = self._rows = sql.SQL("{} AS told").format(self.table)
            self._ours: sql.Composable = sql.SQL("true")
            self._keys: sql.Composable = self.table
            self._key_column: sql.Composable = sql.Identifier(own)
        elif table.numbered is not None:
            row = sql.Identifier("told", table.numbered[0])
            self._key = sql.SQL("written.change_key")
            self._rows, self._all = (
                sql.SQL("cdc_worker.written_key AS written {} {} AS told ON written.row_id = {}").format(
                    join, self.table, row
                )
                for join in (sql.SQL("JOIN"), sql.SQL("LEFT JOIN"))
            )
            self._gone = sql.SQL("{} IS NULL").format(row)
            self._ours = sql.SQL("written.table_name = {}").format(".".join(name))
            self._keys, self._key_column = sql.Identifier("cdc_worker", "written_key"), sql.Identifier("change_key")
        else:
            raise errors.TargetUnusableError(
                f"which rows of {target.table} are the worker's can't be told: it has no column for change keys,"
                " and no primary key from a sequence",
                hint="add a column for change keys, and name it in [target.columns] of the profile",
            )
        self._numbered = own is None
        self._metadata = self._by_field.get("metadata")
        self._anyone_erased = anyone_erased
        # The target grows beneath plans that would be kept.
        connection.execute("SET plan_cache_mode = force_custom_plan")
        self._rules_of: tuple[LSN, LSN] | None = None
        self._rules: list[str] = []

    @property
    def catalog(self) -> TargetTable:
        """The target as the catalog has it."""
        return self._catalog

    @property
    def foreign_keys(self) -> Mapping[str, tuple[str, ...]]:
        """Constraints that hold for the rows, with their columns."""
        return self._catalog.foreign_keys

    def values(self, activity: Activity) -> dict[str, str | None]:
        """An activity as it is sent."""
        return dict(zip(self._sent, parsed(self._encode(activity)), strict=True))

    def without(self, values: Values, links: Collection[str]) -> dict[str, str | None]:
        """The values as they are where the target has refused links."""
        return unlinked(values, links, metadata=self._metadata, types=self._catalog.columns)

    def recorded(self, places: Collection[str], since: LSN, until: LSN) -> tuple[dict[str, There], dict[str, Letter]]:
        """What there is of changes in commits from one to another: activities, and dead letters, by key."""
        rules = self._names(since, until)
        keys = [f"{place}/{rule}" for place in places for rule in rules]
        return self.there(keys), self.letters(keys)

    def _names(self, since: LSN, until: LSN) -> list[str]:
        """The rules by which anything was told in these commits. Keys sort as commits do, and not by what follows."""
        if self._rules_of != (since, until):
            bounds = {"since": f"{self._prefix}{since:016X}", "until": f"{self._prefix}{until + 1:016X}"}
            query = _NAMES.format(key=self._key_column, keys=self._keys)
            self._rules = [name for (name,) in self._connection.execute(postgres.with_parameters(query), bounds)]
            self._rules_of = since, until
        return self._rules

    def there(self, keys: Sequence[str]) -> dict[str, There]:
        """Those of these activities that are there."""
        column = sql.SQL("''")
        blank: sql.Composable = sql.SQL("false")
        refused: sql.Composable = sql.SQL("NULL")
        kind, description = (
            sql.SQL("{}::text").format(sql.Identifier("told", self._by_field[of])) if of in self._by_field else column
            for of in ("type", "description")
        )
        if self._metadata is not None:
            metadata = sql.SQL("{}::jsonb").format(sql.Identifier("told", self._metadata))
            blank = sql.SQL("coalesce({} ->> 'erased' = 'true', false)").format(metadata)
            refused = sql.SQL("{} -> 'unlinked'").format(metadata)
        elif self._anyone_erased and "description" in self._by_field:
            blank = sql.SQL("{} = ''").format(description)
        query = _THERE.format(
            key=self._key,
            kind=kind,
            description=description,
            blank=blank,
            unlinked=refused,
            rows=self._all,
            ours=self._ours,
            gone=self._gone,
        )
        found = self._connection.execute(postgres.with_parameters(query), {"keys": [*keys]})
        return {
            key: There(kind or "", said or "", erased, without if isinstance(without, dict) else {}, gone)
            for key, kind, said, erased, without, gone in found
        }

    def letters(self, keys: Sequence[str]) -> dict[str, Letter]:
        """Those of these activities that are dead letters."""
        return {key: Letter(settled) for key, settled in self._connection.execute(_LETTERS, (ERASED, [*keys]))}

    def compared(self, wanted: Mapping[str, tuple[str, Values]]) -> list[Edit]:
        """Which of these rows are to be changed: their types, and values as they are sent, by key.

        Postgres prints both, so that what it takes for the same is the same. What it can't read as a value of its
        column is told as it is sent.
        """
        if not wanted:
            return []
        try:
            return self._compared(wanted)
        except (psycopg.DataError, psycopg.IntegrityError):
            if len(wanted) > 1:
                items = [*wanted.items()]
                middle = len(items) // 2
                return [*self.compared(dict(items[:middle])), *self.compared(dict(items[middle:]))]
            ((key, (kind, values)),) = wanted.items()
            return [Edit(key, kind, {}, {}, values)]

    def _compared(self, wanted: Mapping[str, tuple[str, Values]]) -> list[Edit]:
        columns = self._written
        names = [sql.Identifier(f"value_{number}") for number in range(len(columns))]
        query = _COMPARED.format(
            was=sql.SQL(", ").join(_printed(sql.Identifier("told", column)) for column in columns),
            now=sql.SQL(", ").join(
                _printed(sql.SQL("asked.{}::{}").format(name, self._types[column]))
                for name, column in zip(names, columns, strict=True)
            ),
            asked=self._asked(names),
            rows=self._rows,
            key=self._key,
            ours=self._ours,
        )
        found = self._connection.execute(postgres.with_parameters(query), self._arrays(wanted, columns))
        return [
            Edit(
                key,
                wanted[key][0],
                dict(zip(columns, was, strict=True)),
                dict(zip(columns, now, strict=True)),
                wanted[key][1],
            )
            for key, was, now in found
        ]

    def _asked(self, names: Sequence[sql.Identifier]) -> sql.Composed:
        """Values, row by row, with their keys."""
        arrays = [sql.SQL("%(keys)s::text[]"), *(sql.SQL(f"%(value_{n})s::text[]") for n in range(len(names)))]
        return sql.SQL("unnest({}) AS asked ({})").format(
            sql.SQL(", ").join(arrays), sql.SQL(", ").join([sql.Identifier("key"), *names])
        )

    def _arrays(self, wanted: Mapping[str, tuple[str, Values]], columns: Sequence[str]) -> dict[str, Any]:
        arrays: dict[str, Any] = {"keys": [*wanted]}
        for number, column in enumerate(columns):
            arrays[f"value_{number}"] = [values[column] for _, values in wanted.values()]
        return arrays

    def description(self, values: Values) -> str:
        """The text of an activity, as it is sent."""
        return values.get(self._by_field.get("description", "")) or ""

    def fields(self, edit: Edit) -> dict[str, Was]:
        """What differs, by column and within metadata by name."""
        found: dict[str, Was] = {}
        for column in edit.columns:
            was, now = edit.was[column], edit.now[column]
            if column == self._metadata and (names := _apart(was, now)):
                found |= {f"{column}.{name}": of for name, of in names.items()}
            else:
                found[column] = Was(was=was, now=now)
        return found

    # What changes them takes another connection, within a transaction.

    def lock(self, connection: Connection, keys: Sequence[str]) -> tuple[set[str], set[str]]:
        """Lock what is there of rows, and nobody else has locked; returns the keys of these, and of the others."""
        query = _LOCK.format(key=self._key, rows=self._rows, ours=self._ours)
        locked = {key for (key,) in connection.execute(postgres.with_parameters(query), {"keys": [*keys]})}
        query = _STANDING.format(key=self._key, rows=self._rows, ours=self._ours)
        there = {key for (key,) in connection.execute(postgres.with_parameters(query), {"keys": [*keys]})}
        return locked, there - locked

    def change(self, connection: Connection, edits: Sequence[Edit]) -> None:
        """Give rows the columns that differ."""
        by_columns: dict[tuple[str, ...], list[Edit]] = {}
        for edit in edits:
            by_columns.setdefault(edit.columns or tuple(self._written), []).append(edit)
        for columns, of in by_columns.items():
            names = [sql.Identifier(f"value_{number}") for number in range(len(columns))]
            query = _CHANGE.format(
                table=self.table,
                assigned=sql.SQL(", ").join(
                    sql.SQL("{} = asked.{}::{}").format(sql.Identifier(column), name, self._types[column])
                    for name, column in zip(names, columns, strict=True)
                ),
                asked=self._asked(names),
                same=self._same(),
            )
            wanted = {edit.key: (edit.type, edit.wanted or {}) for edit in of}
            connection.execute(postgres.with_parameters(query), self._arrays(wanted, columns))

    def _same(self) -> sql.Composable:
        """That a row of the target is the one that is asked for."""
        if not self._numbered:
            return sql.SQL("{} = asked.key").format(self._key)
        return sql.SQL("{} = (SELECT row_id FROM cdc_worker.written_key WHERE change_key = asked.key)").format(
            sql.Identifier("told", self._row)
        )

    @property
    def _row(self) -> str:
        assert self._catalog.numbered is not None
        return self._catalog.numbered[0]

    def remove(self, connection: Connection, keys: Sequence[str]) -> None:
        """Take rows away, and where their keys are in a table of their own these as well."""
        if self._numbered:
            query = _REMOVE_NUMBERED.format(table=self.table, row=sql.Identifier("told", self._row))
            connection.execute(postgres.with_parameters(query), {"keys": [*keys]})
            connection.execute(_FORGET, ([*keys],))
        else:
            query = _REMOVE.format(table=self.table, key=self._key)
            connection.execute(postgres.with_parameters(query), {"keys": [*keys]})


def _printed(value: sql.Composable) -> sql.Composed:
    """A value as text, of which no letter is like another."""
    return sql.SQL("""{}::text COLLATE "C\"""").format(value)


_NAMES: Final = sql.SQL("""
SELECT split_part({key}, '/', -1) FROM {keys} WHERE {key} > %(since)s AND {key} < %(until)s
UNION
SELECT split_part(change_key, '/', -1) FROM cdc_worker.dead_letter
WHERE change_key > %(since)s AND change_key < %(until)s
""")

_THERE: Final = sql.SQL("""
SELECT {key}, {kind}, {description}, {blank}, {unlinked}, {gone} FROM {rows} WHERE {key} = ANY (%(keys)s) AND {ours}
""")

_LETTERS: Final = """
SELECT change_key, discarded_at IS NOT NULL OR reason = %s FROM cdc_worker.dead_letter WHERE change_key = ANY (%s)
"""

# Not analysed, the target would be read as a whole.
_COMPARED: Final = sql.SQL("""
SELECT asked.key, was, now
FROM {asked} CROSS JOIN LATERAL (
    SELECT ARRAY[{was}] AS was, ARRAY[{now}] AS now FROM {rows} WHERE {key} = asked.key AND {ours} OFFSET 0
) AS compared
WHERE was IS DISTINCT FROM now
""")

# The application may refer to rows that are changed.
_LOCK: Final = sql.SQL("""
SELECT {key} FROM {rows} WHERE {key} = ANY (%(keys)s) AND {ours} FOR NO KEY UPDATE OF told SKIP LOCKED
""")

_STANDING: Final = sql.SQL("SELECT {key} FROM {rows} WHERE {key} = ANY (%(keys)s) AND {ours}")

_CHANGE: Final = sql.SQL("UPDATE {table} AS told SET {assigned} FROM {asked} WHERE {same}")

_REMOVE: Final = sql.SQL("DELETE FROM {table} AS told WHERE {key} = ANY (%(keys)s)")

_REMOVE_NUMBERED: Final = sql.SQL("""
DELETE FROM {table} AS told USING cdc_worker.written_key AS written
WHERE written.change_key = ANY (%(keys)s) AND written.row_id = {row}
""")

_FORGET: Final = "DELETE FROM cdc_worker.written_key WHERE change_key = ANY (%s)"


def _apart(was: str | None, now: str | None) -> dict[str, Was]:
    """What differs between two JSON objects, by name."""
    olds, news = (json.loads(of or "{}", parse_float=Decimal) for of in (was, now))
    return {
        name: Was(was=olds.get(name), now=news.get(name))
        for name in dict.fromkeys([*olds, *news])
        if olds.get(name) != news.get(name)
    }


class Slice(NamedTuple):
    """What came of a slice of a commit, all filters but that of types applied."""

    outcomes: Sequence[Outcome]
    transaction: Transaction
    done: int
    complete: bool
    given: Sequence[Person]


class Rewriting:
    """Makes what there is of changes what the rules make of them. `flush` in the end.

    Any call may raise FencedError, as those of `late` do: then another one is to begin anew, from the start.
    """

    def __init__(
        self,
        late: Late,
        cluster: str,
        done: Rewritten,
        *,
        types: Collection[str] = (),
        anyone_erased: bool = False,
    ) -> None:
        """With `types` it is about activities that are of one of them, or would be."""
        self._late, self._cluster, self._done, self._types = late, cluster, done, types
        self._worker = late.checkpoint.worker
        self._rows = Rows(
            late.control,
            late.profile.target,
            table=late.target,
            worker=self._worker,
            cluster=cluster,
            time_zone=late.time_zone,
            anyone_erased=anyone_erased,
        )
        self._size = MAX_LOCKING if late.target.foreign_keys else PORTION
        self._slices: list[Slice] = []
        self._places: list[str] = []
        self._count = 0
        self._summaries: set[str] = set()  # those of the commit that is read: its places come in the end
        self._at = Position(LSN(0))
        self._refused_in_a_row = 0

    def add(self, slice_: Slice, places: Sequence[str]) -> None:
        """Take what came of a slice of a commit, and the changes of which all is known; some of it is done at once."""
        self._slices.append(slice_)
        self._places += places
        self._count += max(len(places), len(slice_.outcomes))
        if self._count >= PORTION:
            self.flush()

    def flush(self) -> None:
        """Do what was taken."""
        slices, places = self._slices, self._places
        self._slices, self._places, self._count = [], [], 0
        if not slices:
            return
        self._at = Position(slices[-1].transaction.end_lsn)
        wanted = {of.change_key: of for slice_ in slices for of in told(slice_.outcomes)}
        self._summaries |= {key for key in wanted if key.endswith(_SUMMARY)}
        commits = [slice_.transaction.commit_lsn for slice_ in slices]
        concerned = dict.fromkeys([*places, *map(place_of, wanted)])
        there, letters = self._rows.recorded(concerned, min(commits), max(commits))
        # Of a change that can't be read, nobody knows what the rules would make of it.
        held = {*places} - {place_of(key) for key in wanted if key.endswith(_UNKNOWN)}
        known = wanted.keys() | self._summaries

        missing = {key for key, of in wanted.items() if key not in there and self._is_missing(of, letters)}
        edits = self._rows.compared(
            {
                key: (of.fields["type"], self._values(of, at))
                for key, of in wanted.items()
                if isinstance(of, Activity) and (at := there.get(key)) is not None and self._is_meant(of, at)
            }
        )
        edits += (
            Edit(key, at.type, description=at.description)
            for key, at in there.items()
            if key not in known and place_of(key) in held and not at.erased and not at.gone and self._is_type(at.type)
        )
        gone = [
            key
            for key, letter in letters.items()
            if key not in known and place_of(key) in held and not letter.settled and not self._types
        ]
        failing = [
            of for key, of in wanted.items() if isinstance(of, DeadLetter) and key in letters and not self._types
        ]

        self._write(slices, missing)
        if self._done.dry_run:
            for edit in edits:
                self._show(edit, self._told(edit))
            self._late.counts.resolved += len(gone)
        else:
            for start in range(0, len(edits), self._size):
                self._apply(edits[start : start + self._size])
            self._settle(gone, failing)
        if slices[-1].complete:
            self._summaries.clear()

    def _is_type(self, *names: str) -> bool:
        return not self._types or any(name in self._types for name in names)

    def _is_missing(self, outcome: Activity | DeadLetter, letters: Mapping[str, Letter]) -> bool:
        """Whether what isn't there is to be added."""
        letter = letters.get(outcome.change_key)
        if letter is not None and letter.settled:
            return False
        if isinstance(outcome, DeadLetter):
            return outcome.reason != ERASED and letter is None and not self._types
        return not _is_blank(outcome) and self._is_type(outcome.fields["type"])

    def _is_meant(self, outcome: Activity, at: There) -> bool:
        """Whether what is there is to be compared."""
        return not at.erased and not _is_blank(outcome) and self._is_type(at.type, outcome.fields["type"])

    def _values(self, outcome: Activity, at: There) -> Values:
        """An activity as it is sent: if it is there without its links, without them."""
        values = self._rows.values(outcome)
        same = [column for column, value in at.unlinked.items() if str(value) == values.get(column)]
        return self._rows.without(values, same) if same else values

    def _show(self, edit: Edit, fields: Mapping[str, Was]) -> None:
        """Have an edit among the samples, if there aren't enough of its fate and type."""
        fate: Fate = "removed" if edit.wanted is None else "changed"
        shown = self._done.differences
        if sum((of.fate, of.type) == (fate, edit.type) for of in shown) < SAMPLES:
            description = edit.description if edit.wanted is None else self._rows.description(edit.wanted)
            shown.append(
                Difference(fate=fate, type=edit.type, change_key=edit.key, description=description, fields={**fields})
            )

    def _told(self, edit: Edit) -> dict[str, Was]:
        """Count an edit; returns the fields that it is about."""
        if edit.wanted is None:
            _count(self._done.removed, edit.type)
            return {}
        _count(self._done.changed, edit.type)
        fields = self._rows.fields(edit)
        for name in fields:
            _count(self._done.fields.setdefault(edit.type, {}), name)
        return fields

    def _write(self, slices: Sequence[Slice], missing: Collection[str]) -> None:
        """Write what is missing, as what comes late is."""
        late = self._late
        for slice_ in slices:
            outcomes = [of for of in slice_.outcomes if isinstance(of, Skipped) or of.change_key in missing]
            late.add(
                outcomes,
                slice_.transaction,
                cluster=self._cluster,
                done=slice_.done,
                complete=slice_.complete,
                given=slice_.given,
            )
        late.flush()

    def _apply(self, edits: list[Edit]) -> None:
        """Change rows in a transaction, those that the target refuses aside, as soon as nobody has them locked."""
        pause = 0.01
        while edits:
            try:
                done, left = self._changed(edits)
            except psycopg.Error as error:
                if error.sqlstate in _LOCKED:
                    done, left = [], edits
                elif not postgres.is_about_the_row(error.sqlstate or ""):
                    raise
                elif len(edits) > 1:
                    middle = len(edits) // 2
                    self._apply(edits[:middle])
                    edits = edits[middle:]
                    continue
                else:
                    edits = self._instead(edits[0], error)
                    continue
            for edit in done:
                self._told(edit)
            if done:
                self._refused_in_a_row = 0
            edits = left
            if edits:
                time.sleep(pause)
                pause = min(PATIENCE, 2 * pause)

    def _changed(self, edits: Sequence[Edit]) -> tuple[list[Edit], list[Edit]]:
        """Change rows in one transaction; returns those edits, and those of rows that somebody else has locked."""
        with self._late.transaction(self._at) as connection:
            if self._late.target.deferrable:
                connection.execute("SET CONSTRAINTS ALL IMMEDIATE")
            connection.execute(hurry(self._late.target).encode())
            locked, others = self._rows.lock(connection, [edit.key for edit in edits])
            done = [edit for edit in edits if edit.key in locked]
            self._rows.change(connection, [edit for edit in done if edit.wanted is not None])
            self._rows.remove(connection, [edit.key for edit in done if edit.wanted is None])
        return done, [edit for edit in edits if edit.key in others]

    def _instead(self, edit: Edit, error: psycopg.Error) -> list[Edit]:
        """What is to be done in place of what the target refused: a link that it refuses stays as it is, or away."""
        columns = self._late.target.foreign_keys.get(error.diag.constraint_name or "", ())
        if edit.wanted is not None and error.sqlstate == "23503" and columns:
            kept = {column: edit.was.get(column) for column in columns}
            values = {**edit.wanted, **kept}
            if not any(kept.values()):
                values = self._rows.without(edit.wanted, columns)
            if values != edit.wanted:
                return self._rows.compared({edit.key: (edit.type, values)})
        self._done.refused += 1
        self._refused_in_a_row += 1
        self._late.log.warning(
            "rewrite_refused",
            change_key=edit.key,
            sqlstate=error.sqlstate,
            constraint=error.diag.constraint_name,
            removed=edit.wanted is None,
        )
        if self._refused_in_a_row >= MAX_REFUSALS:
            raise errors.TooManyRefusalsError(
                f"the target {self._late.profile.target.table} refused {MAX_REFUSALS} changes in a row, the last with"
                f" SQLSTATE {error.sqlstate}",
                hint="mend the profile or the target, and run it again",
            )
        return []

    def _settle(self, gone: Sequence[str], failing: Sequence[DeadLetter]) -> None:
        """Resolve dead letters that nothing speaks of any more, and give others the reason that they have now."""
        failing = [letter for letter in failing if letter.kind != "unreadable"]
        if not gone and not failing:
            return
        with self._late.transaction(self._at) as connection:
            self._late.counts.resolved += connection.execute(_RESOLVE, (self._worker, [*gone])).rowcount
            connection.execute(_GIVE_REASON, (kept.encoded(self._worker, failing).decode(),))


_SUMMARY: Final = "/collapse"
_UNKNOWN: Final = "/*"

_LOCKED: Final = ("55P03", "40P01")
"""SQLSTATEs of who has waited for a lock: lock_not_available, deadlock_detected."""

_RESOLVE: Final = (
    "DELETE FROM cdc_worker.dead_letter WHERE worker = %s AND change_key = ANY (%s) AND discarded_at IS NULL"
)

_GIVE_REASON: Final = """
UPDATE cdc_worker.dead_letter AS of
SET kind = now.kind, reason = now.reason, sqlstate = NULL, constraint_name = NULL, fields = NULL, change = now.change,
    found = now.found, masked = now.masked, attempts = attempts + 1, tried_at = now()
FROM jsonb_to_recordset(%s::jsonb) AS now (worker text, change_key text, kind text, reason text, change jsonb,
    found jsonb, masked text[])
WHERE of.worker = now.worker AND of.change_key = now.change_key AND discarded_at IS NULL
  AND (of.kind, of.reason, of.change) IS DISTINCT FROM (now.kind, now.reason, now.change)
"""


def _count(counts: dict[str, int], name: str) -> None:
    counts[name] = counts.get(name, 0) + 1


def _is_blank(activity: Activity) -> bool:
    """Whether it tells of a person who was erased."""
    return activity.fields.get("metadata", {}).get("erased") is True


_PLAIN: Final = Wishes()


def rewrite(
    settings: Settings, given: Profile, paths: Sequence[Path | str], wishes: Wishes = _PLAIN, *, log: Logger
) -> Rewritten:
    """Make the worker's activities of recorded changes what a profile says now.

    May be interrupted, and run again. Raises what `replay` does, and RecordingUnreadableError for a recording that
    doesn't say which commits it is about.
    """
    done = Rewritten(dry_run=wishes.dry_run)

    def tell(outcome: Activity | DeadLetter) -> None:
        if isinstance(outcome, Activity):
            show(done, outcome)

    with ExitStack() as stack:
        late = Late(settings, given, command="rewrite", log=log, changes=True, dry_run=wishes.dry_run, tell=tell)
        stack.enter_context(late)
        # Of which types they are is also for those to say that are there.
        meant = replace(wishes, types=())
        loop = Loop(stack, settings, given, paths, meant, log=log, late=late, others=_others(late))
        loop.go(lambda: _Deal(late, done, wishes), done)
    return done


_CAPTURED: Final = "SELECT DISTINCT table_name FROM cdc_worker.excluded WHERE worker = %s"


def _others(late: Late) -> Rules:
    """Tables that the worker has captured, and that are in the profile no more."""
    names = [qualified(name) for (name,) in late.control.execute(_CAPTURED, (late.checkpoint.worker,))]
    nothing: dict[Any, Any] = {}
    return {
        name: Table(name, (), nothing, nothing, nothing, (), (), frozenset(), nothing, nothing, frozenset(), nothing)
        for name in names
        if name not in late.rules
    }


class _Deal:
    """Deals with one portion of a recording after another."""

    def __init__(self, late: Late, done: Rewritten, wishes: Wishes) -> None:
        self._late, self._done = late, done
        self._types = frozenset(wishes.types)
        self._tables = {qualified(name) for name in wishes.tables}
        self._of: dict[tuple[str, str | None], tuple[Places, Rewriting]] = {}

    def __call__(self, portion: Portion | None) -> None:
        """Deal with it, or with what is left after the last one."""
        if portion is None:
            for _, rewriting in self._of.values():
                rewriting.flush()
            return
        recorded, late = portion.recorded, self._late
        transaction, cluster = recorded.transaction, recorded.system_identifier
        if not recorded.exact:
            raise errors.RecordingUnreadableError(
                f"{recorded.file} doesn't say where its commits were: nobody knows what is of them",
                hint="record with -o format-version=2 -o include-lsn=1 -o include-timestamp=1",
            )
        of = cluster, recorded.database
        if of not in self._of:
            for _, rewriting in self._of.values():
                rewriting.flush()
            self._of[of] = (
                Places(late.rules, late.checkpoint.worker, cluster, self._tables),
                Rewriting(late, cluster, self._done, types=self._types, anyone_erased=bool(portion.scope.erased)),
            )
        places, rewriting = self._of[of]
        home = late.is_home(*of)
        rewriting.add(
            Slice(portion.outcomes, transaction, portion.done, portion.complete, portion.given if home else ()),
            places.take(transaction, portion.decided, portion.scope.excludes(transaction.commit_lsn)),
        )
