"""Rows of other tables that rules look up, fetched from the database as the stream would show them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from decimal import Decimal
from typing import Final

import psycopg
from psycopg import generators, pq, sql
from psycopg.pq.abc import PGresult

from cdc_worker import catalog, postgres
from cdc_worker.catalog import Column
from cdc_worker.changes import Row
from cdc_worker.postgres import Connection
from cdc_worker.rules import Lookup, Rules
from cdc_worker.sink import Writing, finished
from cdc_worker.templates import text
from cdc_worker.transform import Wanted
from cdc_worker.values import Value

_CHANGED: Final = (
    psycopg.errors.UndefinedColumn,
    psycopg.errors.UndefinedTable,
    psycopg.errors.InvalidSchemaName,
    psycopg.errors.UndefinedFunction,
)

Found = dict[Wanted, Row | None]

XIDS: Final = 1 << 32
"""The stream knows transactions by so many numbers, which the server uses again and again."""

WAIT: Final = 0.1
"""Seconds, at most, between two looks whether a commit that the stream has told is to be seen."""


class Lookups:
    """Fetches rows through a connection that does nothing else. Nothing here waits: see `Sink`.

    `on_failure(table, sqlstate)` is told when a table is no longer as the profile has it: its rows, or some of their
    columns, are then missing. `failed` are the lookups of the last `fetch` for which that is so.
    """

    def __init__(
        self,
        connection: Connection,
        rules: Rules,
        *,
        on_failure: Callable[[tuple[str, str], str], None] = lambda table, sqlstate: None,
    ) -> None:
        self._on_failure = on_failure
        self.connection = connection
        self._pgconn = connection.pgconn
        self._tables = {lookup.table for table in rules.values() for lookup in table.looked_up}
        self._columns = catalog.columns(connection, *self._tables)
        self._pgconn.nonblocking = 1
        self.failed: set[Lookup] = set()

    def fileno(self) -> int:
        """The socket, for select."""
        return self._pgconn.socket

    @property
    def pid(self) -> int:
        """The process of the server that serves us."""
        return self.connection.info.backend_pid

    def fetch(self, wanted: Collection[Wanted], xids: Collection[int] = ()) -> Writing[Found]:
        """What is there of the rows that are `wanted`, as of when all of these transactions are to be seen.

        The stream may be faster than the commit that it tells of is visible to others.
        """
        pause = 0.0
        while xids and not (yield from self._visible(xids, pause)):
            pause = min(WAIT, 2 * pause or 0.001)
        self.failed = set()
        found: Found = {}
        by_lookup: dict[Lookup, list[tuple[Value, ...]]] = {}
        for lookup, values in wanted:
            by_lookup.setdefault(lookup, []).append(values)
        for lookup, sought in by_lookup.items():
            rows: dict[tuple[Value, ...], Row] = {}
            try:
                rows = yield from self._rows_by_now(lookup, sought)
            except _CHANGED as error:
                self._failed(lookup, error.sqlstate or "")
            except psycopg.DataError:  # a value that the column can't have: whose, is found out one by one
                for values in sought:
                    with contextlib.suppress(psycopg.DataError):
                        rows |= yield from self._rows(lookup, [values])
            found |= {(lookup, values): rows.get(values) for values in sought}
        return found

    def cancel(self) -> None:
        """End what is being fetched: a query that waits for a lock would go on waiting without us. Brief."""
        if self._pgconn.transaction_status == pq.TransactionStatus.ACTIVE:
            with contextlib.suppress(psycopg.Error):
                self.connection.cancel_safe(timeout=0.1)

    def _failed(self, lookup: Lookup, sqlstate: str) -> None:
        self.failed.add(lookup)
        self._on_failure(lookup.table, sqlstate)

    def _visible(self, xids: Collection[int], pause: float) -> Writing[bool]:
        result = yield from self._query(_SNAPSHOT, [str(pause).encode()])
        return visible((result.get_value(0, 0) or b"").decode(), xids)

    def _rows_by_now(
        self, lookup: Lookup, sought: Sequence[tuple[Value, ...]]
    ) -> Writing[dict[tuple[Value, ...], Row]]:
        """Rows of a table that may have been altered since we looked at its columns."""
        try:
            return (yield from self._rows(lookup, sought))
        except (*_CHANGED, psycopg.DataError):
            before, self._columns = self._columns, catalog.columns(self.connection, *self._tables)
            if self._columns == before:
                raise
            return (yield from self._rows(lookup, sought))

    def _rows(self, lookup: Lookup, sought: Sequence[tuple[Value, ...]]) -> Writing[dict[tuple[Value, ...], Row]]:
        columns = self._columns[lookup.table]
        if {*lookup.theirs, *(column for column, _ in lookup.where)} - columns.keys():
            raise postgres.error("42703", "a column is gone")
        kept = [column for column in lookup.columns if column in columns]
        if len(kept) < len(lookup.columns):
            self._failed(lookup, "42703")
        arrays = [
            postgres.array(_asked(value, columns[column]) for value in values).encode()
            for column, values in zip(lookup.theirs, zip(*sought, strict=True), strict=True)
        ]
        result = yield from self._query(_select(lookup, columns, kept).as_bytes(self.connection), arrays)
        rows: dict[tuple[Value, ...], Row] = {}
        for row in range(result.ntuples):
            place, *values = (result.get_value(row, column) for column in range(result.nfields))
            assert place is not None
            rows[sought[int(place) - 1]] = {
                column: catalog.value(value, columns[column]) for column, value in zip(kept, values, strict=True)
            }
        return rows

    def _query(self, query: bytes, parameters: Sequence[bytes]) -> Writing[PGresult]:
        self._pgconn.send_query_params(query, parameters)
        results: list[PGresult] = yield from generators.execute(self._pgconn)
        found = results[0]
        if found.status != pq.ExecStatus.TUPLES_OK:
            sqlstate = (found.error_field(pq.DiagnosticField.SQLSTATE) or b"").decode()
            raise postgres.error(sqlstate, "looking rows up failed")
        return found


def fetch(connection: Connection, rules: Rules, wanted: Collection[Wanted]) -> Found:
    """What is there of the rows that are `wanted`."""
    lookups = Lookups(connection, rules)
    return finished(lookups.fetch(wanted), connection)


_SNAPSHOT: Final = b"SELECT pg_current_snapshot()::text FROM pg_sleep($1::float8)"


def visible(snapshot: str, xids: Collection[int]) -> bool:
    """Whether all these transactions, by their last 32 bits, have ended before a snapshot as Postgres prints it.

    Manual: "System Information Functions", Snapshot Components. They are no older than half of all numbers.
    """
    _, ahead, running = snapshot.split(":")
    xmax = int(ahead)
    in_progress = {int(xid) % XIDS for xid in running.split(",") if xid}
    return not any(xid in in_progress or 0 <= (xid - xmax) % XIDS < XIDS // 2 for xid in xids)


def _select(lookup: Lookup, columns: Mapping[str, Column], kept: Sequence[str]) -> sql.Composed:
    """A query for rows by arrays of values: the number of the values, from 1, and the columns of the row."""
    names = [sql.Identifier(f"value_{number}") for number in range(len(lookup.theirs))]
    arrays = sql.SQL(", ").join(sql.SQL(f"${number}::text[]") for number in range(1, len(names) + 1))
    conditions = [
        sql.SQL("found.{} = asked.{}::{}").format(sql.Identifier(column), name, catalog.cast(columns[column]))
        for column, name in zip(lookup.theirs, names, strict=True)
    ]
    conditions += [
        sql.SQL("found.{} = {}::{}").format(sql.Identifier(c), sql.Literal(text(v)), catalog.cast(columns[c]))
        for c, v in lookup.where
    ]
    order = [column for column in lookup.key if column in columns] or ["ctid"]
    # One by one, each would be sought in the whole table where no index has the columns: this reads it once.
    return sql.SQL(
        "SELECT DISTINCT ON (asked.number) {columns}"
        " FROM unnest({arrays}) WITH ORDINALITY AS asked ({names}, number) JOIN {table} AS found ON {conditions}"
        " ORDER BY asked.number, {order}"
    ).format(
        arrays=arrays,
        names=sql.SQL(", ").join(names),
        columns=sql.SQL(", ").join([sql.Identifier("asked", "number"), *(sql.Identifier("found", c) for c in kept)]),
        table=sql.Identifier(*lookup.table),
        conditions=sql.SQL(" AND ").join(conditions),
        order=sql.SQL(", ").join(sql.Identifier("found", column) for column in order),
    )


def _asked(value: Value, column: Column) -> str:
    """A value as the column's type reads it: no integer has digits behind the point, be they zeros."""
    if isinstance(value, Decimal) and column.base in catalog.INTEGERS and value == (whole := value.to_integral_value()):
        return f"{whole:f}"
    return text(value)
