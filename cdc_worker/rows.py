"""Rows of a captured table as they are now, by its key: short reads, and values as the stream has them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple

import psycopg
from psycopg import sql

from cdc_worker import catalog, errors, postgres
from cdc_worker.changes import Row
from cdc_worker.config import Settings
from cdc_worker.postgres import Connection
from cdc_worker.rules import Table, subject
from cdc_worker.templates import text

RowKey = tuple[str, ...]
"""The values of a row's key as Postgres prints them, in the order of its index."""


LONG: Final = 4 << 20
"""About so many bytes of rows are read at once: what is made of them is several times as much."""

STEP: Final = 4
"""So many times as many rows as could be read at once the last time are measured for the next."""


class Read(NamedTuple):
    """Rows by their keys, in order, as they were in one snapshot at a time."""

    rows: dict[RowKey, Row]
    at: datetime


# An index finds rows only by all of its columns, in its order. The primary key first.
_INDEX: Final = """
SELECT ARRAY(SELECT attname::text FROM unnest(indkey) WITH ORDINALITY AS k (number, place)
             JOIN pg_attribute ON attrelid = indrelid AND attnum = number ORDER BY place)
FROM pg_index
WHERE indrelid = to_regclass(format('%%I.%%I', %s::text, %s::text)) AND indisunique AND indisvalid AND indimmediate
  AND indpred IS NULL AND indexprs IS NULL AND indnkeyatts = indnatts AND indnkeyatts = %s
  AND NOT EXISTS (SELECT FROM pg_attribute WHERE attrelid = indrelid AND attnum = ANY (indkey) AND NOT attnotnull)
ORDER BY NOT indisprimary, indexrelid
"""


def connect(settings: Settings) -> Connection:
    """A connection for short reads, each in a snapshot of its own. What a policy would hide from it is an error."""
    connection = postgres.connect_reading(settings.dsn.get_secret_value(), settings.worker)
    connection.execute("SET row_security = off")
    connection.execute("SET plan_cache_mode = force_custom_plan")  # which counts on few rows, where few are asked for
    connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    return connection


class Rows:
    """The rows of one table, of which the columns that its rules name are read, or if `whole` all that there are.

    `key` are the columns of the index that they are read by. Raises CatalogMismatchError if there is none on the key
    that the profile names.
    """

    def __init__(self, connection: Connection, table: Table, *, whole: bool = False) -> None:
        self._connection = connection
        self.table = table
        found = catalog.columns(connection, table.name)[table.name]
        indexes = connection.execute(_INDEX, (*table.name, len(table.key))).fetchall()
        self.key: tuple[str, ...] = next((tuple(key) for (key,) in indexes if {*key} == {*table.key}), ())
        name = ".".join(table.name)
        if not self.key:
            relation = sql.Identifier(*table.name).as_string()
            names = sql.SQL(", ").join(map(sql.Identifier, table.key)).as_string()
            raise errors.CatalogMismatchError(
                f'{name} has no primary key on its "key" in the profile ({", ".join(table.key) or "none"}),'
                " by which its rows could be read",
                hint=f"as its owner: ALTER TABLE {relation} ADD PRIMARY KEY ({names})"
                if table.key
                else 'name its primary key as "key" of the table in the profile',
            )
        self.columns = {
            column: found[column] for column in dict.fromkeys((*self.key, *(found if whole else sorted(table.columns))))
        }
        keys = sql.SQL(", ").join(map(sql.Identifier, self.key))
        self._length = sql.SQL("SELECT 0::bigint + {} FROM ").format(
            sql.SQL(" + ").join(
                sql.SQL("coalesce(octet_length({}::text), 0)").format(sql.Identifier(table.name[1], column))
                for column in self.columns
            )
        )
        self._most: int | None = None
        self._select = sql.SQL("SELECT {columns} FROM {table}").format(
            columns=sql.SQL(", ").join(sql.Identifier(table.name[1], column) for column in self.columns),
            table=sql.Identifier(*table.name),
        )
        self._keys = sql.SQL("({})").format(keys)
        self._order = sql.SQL(" ORDER BY {}").format(keys)
        self._given = sql.SQL("({})").format(
            sql.SQL(", ").join(sql.SQL("%s::{}").format(catalog.cast(found[column])) for column in self.key)
        )

    def subject(self, key: RowKey) -> str:
        """Which row has this key, as the stream names it."""
        values = dict(zip(self.key, key, strict=True))
        return subject(
            [text(catalog.value(values[column].encode(), self.columns[column])) for column in self.table.key]
        )

    def count(self) -> int | None:
        """About how many rows there are; None if nobody has counted them yet."""
        found = self._connection.execute(_COUNT, {"relation": sql.Identifier(*self.table.name).as_string()}).fetchone()
        return None if found is None or found[0] is None or found[0] < 0 else int(found[0])

    def after(self, key: RowKey | None, limit: int, until: RowKey | None = None) -> Read:
        """Up to so many rows, in the order of their keys: those after one key and up to another.

        Where they are long there are fewer, but one at least, if there is any.
        """
        where, parameters = self._between(key, until)
        most = limit if self._most is None else min(limit, self._most)
        some = where + self._order + sql.SQL(" LIMIT %s")
        with self._connection.transaction():
            (at,) = postgres.fetch_one(self._connection, "SELECT now()")
            count = self._fitting(self._length + sql.Identifier(*self.table.name) + some, [*parameters, most])
            rows = self._rows(self._select + some, [*parameters, count])
        self._most = STEP * max(1, count)
        return Read(rows, at)

    def first(self, keys: Sequence[RowKey], limit: int) -> tuple[Read, Sequence[RowKey]]:
        """The rows that have the first of these keys, up to so many, and the keys that are left.

        Where they are long there are fewer.
        """
        asked, same, arrays = self._asked(keys[:limit])
        query = self._length + sql.SQL("{} LEFT JOIN {} ON {} ORDER BY asked_place").format(
            asked, sql.Identifier(*self.table.name), same
        )
        with self._connection.transaction():
            count = self._fitting(query, arrays)
            return self.of(keys[:count]), keys[count:]

    def _fitting(self, lengths: sql.Composed, parameters: Sequence[Any]) -> int:
        """How many rows, of which a query gives the lengths, may be read at once: one at least, if there is any."""
        query = _FITTING.format(lengths=lengths, long=LONG)
        (count,) = self._connection.execute(postgres.with_parameters(query), parameters).fetchall()[0]
        return int(count)

    def of(self, keys: Sequence[RowKey]) -> Read:
        """The rows that have these keys, as far as there are any."""
        asked, same, arrays = self._asked(keys)
        query = self._select + sql.SQL(" JOIN {} ON {}").format(asked, same) + self._order
        with self._connection.transaction():
            (at,) = postgres.fetch_one(self._connection, "SELECT now()")
            return Read(self._rows(query, arrays), at)

    def there(self, keys: Sequence[RowKey]) -> set[RowKey]:
        """Those of these keys that rows have."""
        asked, same, arrays = self._asked(keys)
        return {*self._keys_of(sql.SQL(" JOIN {} ON {}").format(asked, same), arrays)}

    def _keys_of(self, which: sql.Composed, parameters: Sequence[Any]) -> list[RowKey]:
        query = sql.SQL("SELECT {} FROM {}").format(
            sql.SQL(", ").join(sql.Identifier(self.table.name[1], column) for column in self.key),
            sql.Identifier(*self.table.name),
        )
        result = self._connection.execute(postgres.with_parameters(query + which), parameters).pgresult
        assert result is not None
        return [
            tuple((result.get_value(number, place) or b"").decode() for place in range(len(self.key)))
            for number in range(result.ntuples)
        ]

    def _asked(self, keys: Sequence[RowKey]) -> tuple[sql.Composable, sql.Composable, list[list[str]]]:
        """Keys in their places, what joins a row with them, and the parameters of that."""
        asked = [sql.Identifier(f"asked_{number}") for number in range(len(self.key))]
        given = sql.SQL("unnest({arrays}) WITH ORDINALITY AS asked ({names}, asked_place)").format(
            arrays=sql.SQL(", ").join(sql.SQL("%s::text[]") for _ in asked), names=sql.SQL(", ").join(asked)
        )
        same = sql.SQL(" AND ").join(
            sql.SQL("{} = {}::{}").format(
                sql.Identifier(self.table.name[1], column), name, catalog.cast(self.columns[column])
            )
            for column, name in zip(self.key, asked, strict=True)
        )
        return given, same, [list(values) for values in zip(*keys, strict=True)]

    def sample(self, count: int) -> list[RowKey]:
        """The keys of about so many rows, from all over the table."""
        name = sql.Identifier(*self.table.name)
        which = sql.Composed([sql.SQL(" TABLESAMPLE SYSTEM (%s) ORDER BY random() LIMIT %s")])
        return self._keys_of(which, [share(self._connection, name, count), count])

    def _between(self, key: RowKey | None, until: RowKey | None) -> tuple[sql.Composable, list[Any]]:
        bounds = [(">", bound) for bound in (key,) if bound is not None]
        bounds += [("<=", bound) for bound in (until,) if bound is not None]
        conditions = [self._keys + sql.SQL(f" {operator} ") + self._given for operator, _ in bounds]
        where = sql.SQL(" WHERE ") + sql.SQL(" AND ").join(conditions) if conditions else sql.SQL("")
        return where, [value for _, bound in bounds for value in bound]

    def _rows(self, query: sql.Composed, parameters: Sequence[Any]) -> dict[RowKey, Row]:
        result = self._connection.execute(postgres.with_parameters(query), parameters).pgresult
        assert result is not None
        rows: dict[RowKey, Row] = {}
        for number in range(result.ntuples):
            values = [result.get_value(number, place) for place in range(len(self.columns))]
            key = tuple((value or b"").decode() for value in values[: len(self.key)])
            rows[key] = {
                name: catalog.value(value, column)
                for (name, column), value in zip(self.columns.items(), values, strict=True)
            }
        return rows


# Of texts the server knows the length without a look at them. The last row may be as long as it likes.
_FITTING: Final = sql.SQL("""
SELECT count(*) FROM (SELECT sum(length) OVER (ROWS UNBOUNDED PRECEDING) - length AS before
                      FROM ({lengths}) AS measured (length)) AS told
WHERE before < {long}
""")

SPARE: Final = 4
"""So many times as many rows are looked at as are wanted: those of a block are neighbours."""

FEW: Final = 20_000
"""Of so many rows all are looked at."""

# Who hasn't been counted has at most so many rows in a block.
_SIZE: Final = """
SELECT sum(CASE WHEN reltuples < 0 THEN pg_relation_size(oid) / 8192 * 100 ELSE reltuples END)::float8
FROM pg_class
WHERE relkind = 'r' AND (oid = to_regclass(%(relation)s)
                         OR oid IN (SELECT relid FROM pg_partition_tree(to_regclass(%(relation)s))))
"""


def share(connection: Connection, table: sql.Composable, count: int) -> float:
    """How much of a table must be looked at, in per cent, for so many rows from all over it."""
    name = table.as_string()
    found = connection.execute(_SIZE, {"relation": name}).fetchone()
    size = found[0] if found else None
    return 100.0 if not size or size < FEW else min(100.0, 100.0 * SPARE * count / size)


# Of a partitioned table the sum of its partitions, which it doesn't have itself until someone analyses it.
_COUNT: Final = """
SELECT CASE WHEN bool_or(reltuples < 0) THEN -1 ELSE sum(reltuples) END::bigint
FROM pg_class
WHERE relkind = 'r' AND (oid = to_regclass(%(relation)s)
                         OR oid IN (SELECT relid FROM pg_partition_tree(to_regclass(%(relation)s))))
"""
