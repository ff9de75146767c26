"""The worker's own rows of the target, by their change keys: which there are, how they differ, and to change them."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Final, NamedTuple
from zoneinfo import ZoneInfo

import psycopg
from psycopg import sql
from pydantic import BaseModel, Field

from cdc_worker import catalog, errors, postgres
from cdc_worker.activities import Activity
from cdc_worker.catalog import TargetTable
from cdc_worker.lines import encoder, parsed, unlinked
from cdc_worker.lsn import LSN
from cdc_worker.postgres import Connection
from cdc_worker.profile import Target
from cdc_worker.rules import qualified
from cdc_worker.transform import ERASED

PRESET: Final = frozenset(("is_visible_to_bd",))
"""Columns that rows begin with, and that are the application's from then on: see 050_leadfi_protection.sql."""

Values = Mapping[str, str | None]
"""Columns of a row as text."""


class Was(BaseModel):
    """A value before and after."""

    was: Any = Field(description="as it is")
    now: Any = Field(description="as it would be")


class There(NamedTuple):
    """A row of the target: perhaps of a person who was `erased`, or without links that were refused, or `gone`."""

    type: str
    description: str
    erased: bool
    unlinked: Mapping[str, Any]
    gone: bool


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


class Ours:
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
        self._table = sql.Identifier(*name)
        found = catalog.columns(connection, name)[name]
        self._row: sql.Identifier | None = None
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
            self._all = self._rows = sql.SQL("{} AS told").format(self._table)
            self._ours: sql.Composable = sql.SQL("true")
            self._keys: sql.Composable = self._table
            self._key_column: sql.Composable = sql.Identifier(own)
        elif table.numbered is not None:
            row = self._row = sql.Identifier("told", table.numbered[0])
            self._key = sql.SQL("written.change_key")
            self._rows, self._all = (
                sql.SQL("cdc_worker.written_key AS written {} {} AS told ON written.row_id = {}").format(
                    join, self._table, row
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
        self._metadata = self._by_field.get("metadata")
        self._anyone_erased = anyone_erased
        # The target grows beneath plans that would be kept.
        connection.execute("SET plan_cache_mode = force_custom_plan")
        self._rules_of: tuple[LSN, LSN] | None = None
        self._rules: list[str] = []

    def values(self, activity: Activity) -> dict[str, str | None]:
        """An activity as it is sent."""
        return dict(zip(self._sent, parsed(self._encode(activity)), strict=True))

    def without(self, values: Values, links: Collection[str]) -> dict[str, str | None]:
        """The values as they are where the target has refused links."""
        return unlinked(values, links, metadata=self._metadata, types=self._catalog.columns)

    def recorded(self, places: Collection[str], since: LSN, until: LSN) -> tuple[dict[str, There], dict[str, bool]]:
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

    def letters(self, keys: Sequence[str]) -> dict[str, bool]:
        """Those of these activities that are dead letters, and whether they are to stay: nothing is told of them."""
        return dict(self._connection.execute(_LETTERS, (ERASED, [*keys])).fetchall())

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
            query = (_CHANGE if self._row is None else _CHANGE_NUMBERED).format(
                table=self._table,
                assigned=sql.SQL(", ").join(
                    sql.SQL("{} = asked.{}::{}").format(sql.Identifier(column), name, self._types[column])
                    for name, column in zip(names, columns, strict=True)
                ),
                row=self._row,
                asked=self._asked(names),
                key=self._key,
            )
            wanted = {edit.key: (edit.type, edit.wanted or {}) for edit in of}
            connection.execute(postgres.with_parameters(query), self._arrays(wanted, columns))

    def remove(self, connection: Connection, keys: Sequence[str]) -> None:
        """Take rows away, and where their keys are in a table of their own these as well."""
        query = (_REMOVE if self._row is None else _REMOVE_NUMBERED).format(
            table=self._table, key=self._key, row=self._row
        )
        connection.execute(postgres.with_parameters(query), {"keys": [*keys]})
        if self._row is not None:
            connection.execute(_FORGET, ([*keys],))


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

_CHANGE: Final = sql.SQL("UPDATE {table} AS told SET {assigned} FROM {asked} WHERE {key} = asked.key")

_CHANGE_NUMBERED: Final = sql.SQL("""
UPDATE {table} AS told SET {assigned} FROM {asked} JOIN cdc_worker.written_key AS written ON {key} = asked.key
WHERE {row} = written.row_id
""")

_REMOVE: Final = sql.SQL("DELETE FROM {table} AS told WHERE {key} = ANY (%(keys)s)")

_REMOVE_NUMBERED: Final = sql.SQL("""
DELETE FROM {table} AS told USING cdc_worker.written_key AS written
WHERE {key} = ANY (%(keys)s) AND written.row_id = {row}
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
