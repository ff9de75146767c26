"""Whose the changes of partitions are: plugins send their names, and not that of the table that they are parts of.

New ones come at any time, in any schema, and may be gone before their changes are read. So everything is asked for but
what can't become one, what arrives of a table that nobody has seen is looked up, and what was found is kept in the
database.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

import psycopg

from cdc_worker import errors
from cdc_worker.changes import Change
from cdc_worker.log import Logger
from cdc_worker.lsn import INVALID, LSN
from cdc_worker.postgres import Connection, fetch_one
from cdc_worker.rules import Rules, qualified

Table = tuple[str, str]

FOREVER: Final = LSN(2**64 - 1)

_NOBODYS: Final[tuple[Table | None, LSN]] = (None, INVALID)

# Its primary key is without what the rows are partitioned by, for that is what changes when one moves.
_PARTITIONED: Final = """
SELECT nspname::text, relname::text,
       ARRAY(SELECT attname::text FROM pg_attribute WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped),
       ARRAY(SELECT attname::text FROM pg_index JOIN pg_attribute ON attrelid = indrelid AND attnum = ANY (indkey)
             WHERE indrelid = c.oid AND indisprimary AND attnum <> ALL (partattrs))
FROM unnest(%s::text[], %s::text[]) AS captured (schema, name)
JOIN pg_namespace n ON nspname = schema
JOIN pg_class c ON relnamespace = n.oid AND relname = name
JOIN pg_partitioned_table ON partrelid = c.oid
"""

_PARTITIONS: Final = """
WITH RECURSIVE part AS (
    SELECT c.oid, schema, name, 0 AS level
    FROM unnest(%s::text[], %s::text[]) AS captured (schema, name)
    JOIN pg_namespace n ON nspname = schema JOIN pg_class c ON relnamespace = n.oid AND relname = name
    UNION ALL
    SELECT inhrelid, schema, name, level + 1 FROM part JOIN pg_inherits ON inhparent = part.oid
)
SELECT DISTINCT ON (c.oid) nspname::text, relname::text, schema, name
FROM part JOIN pg_class c USING (oid) JOIN pg_namespace n ON n.oid = relnamespace
WHERE level > 0
ORDER BY c.oid, level DESC
"""

# What is refreshed concurrently has changes, as a table has.
_OTHERS: Final = """
SELECT nspname::text, relname::text, relkind <> 'm',
       ARRAY(SELECT attname::text FROM pg_attribute WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped)
FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace
WHERE relkind IN ('r', 'p', 'm') AND nspname NOT IN ('pg_catalog', 'information_schema')
"""

_ANCESTORS: Final = """
WITH RECURSIVE up AS (
    SELECT c.oid, 0 AS level FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace
    WHERE nspname = %s AND relname = %s
    UNION ALL
    SELECT inhparent, level + 1 FROM up JOIN pg_inherits ON inhrelid = up.oid
)
SELECT nspname::text, relname::text,
       ARRAY(SELECT attname::text FROM pg_attribute WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped)
FROM up JOIN pg_class c USING (oid) JOIN pg_namespace n ON n.oid = relnamespace
ORDER BY level DESC
"""

# The numbers of transactions go round: one of long ago may seem to be yet to come.
_LEAVES: Final = """
WITH RECURSIVE part AS (
    SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace WHERE nspname = %s AND relname = %s
    UNION ALL
    SELECT inhrelid FROM part JOIN pg_inherits i ON inhparent = part.oid
    WHERE coalesce(age(i.xmin) NOT BETWEEN 0 AND age(nullif(%s, '0')::xid), true)
)
SELECT nspname::text, relname::text FROM part JOIN pg_class c USING (oid) JOIN pg_namespace n ON n.oid = relnamespace
WHERE relkind = 'r'
"""

_KNOWN: Final = "SELECT schema_name, table_name, root, until_lsn FROM cdc_worker.partition WHERE worker = %s"

_REMEMBER: Final = """
INSERT INTO cdc_worker.partition (worker, schema_name, table_name, root, until_lsn) VALUES (%s, %s, %s, %s, %s)
ON CONFLICT (worker, schema_name, table_name) DO UPDATE SET root = excluded.root, until_lsn = excluded.until_lsn
"""

_NOW: Final = "SELECT pg_current_wal_insert_lsn()"


class Partitions:
    """The captured tables that are partitioned, and whose any other table is.

    `keys` tell their rows apart, wherever these are stored. `others` are the tables that can't become partitions, above
    all those that the worker writes to; None if nothing is partitioned. `overlooked` are some of them that did.
    """

    def __init__(
        self,
        connection: Connection,
        rules: Rules,
        worker: str,
        *,
        connect: Callable[[], Connection],
        log: Logger,
        on_lost: Callable[[Table, Table], None],
    ) -> None:
        """`connect` makes the connection for what is looked up later, until `close`.

        `on_lost(partition, root)` is told of a table that is gone, and may have been a partition of that root.
        """
        self._worker = worker
        self._connect = connect
        self._log = log
        self._on_lost = on_lost
        self._connection: Connection | None = None
        self._captured = frozenset(rules)
        self._columns: dict[Table, frozenset[str]] = {}
        self.keys: dict[Table, tuple[str, ...]] = {}
        for schema, name, columns, key in connection.execute(_PARTITIONED, _pairs(rules)):
            self._columns[schema, name] = frozenset(columns)
            self.keys[schema, name] = rules[schema, name].key or tuple(key)
        self._kept: dict[Table, tuple[Table, LSN]] = {}
        self._found: dict[Table, tuple[Table | None, LSN]] = {table: (table, FOREVER) for table in rules}
        self.others: list[Table] | None = None
        self.overlooked: list[Table] = []
        if self:
            self._look(connection)

    def __bool__(self) -> bool:
        return bool(self._columns)

    def _look(self, connection: Connection) -> None:
        """What there is now, and what there was."""
        try:
            for schema, name, root, until in connection.execute(_KNOWN, (self._worker,)):
                if qualified(root) in self._columns:
                    self._kept[schema, name] = qualified(root), FOREVER if until is None else LSN.parse(until)
        except psycopg.errors.UndefinedTable as error:
            raise errors.NotSetUpError(
                "the tables of cdc-worker are not those of this version: there is no cdc_worker.partition",
                hint="run: cdc-worker setup",
            ) from error
        at = _now(connection)
        for partition, root in roots(connection, self._columns).items():
            if partition not in self._found:
                self._note(connection, partition, root, FOREVER)
        for table, (root, until) in [*self._kept.items()]:
            if table not in self._found:
                self._note(connection, table, root, min(until, at))
        self.others = [
            (schema, name)
            for schema, name, may_be, columns in connection.execute(_OTHERS)
            if (schema, name) not in self._found and not (may_be and self._like(columns))
        ]

    def _note(self, connection: Connection, table: Table, root: Table, until: LSN) -> None:
        """Remember that the changes of a table are its root's, in all commits before `until`."""
        if self._kept.get(table) != (root, until):
            bound = None if until == FOREVER else str(until)
            connection.execute(_REMEMBER, (self._worker, *table, ".".join(root), bound))
            self._kept[table] = root, until
        self._found[table] = root, until

    def _like(self, columns: Iterable[str]) -> Table | None:
        """A partitioned table of which one with these columns may be a part, or may become one."""
        names = frozenset(columns)
        return next((root for root, own in self._columns.items() if names <= own or names >= own), None)

    def root_of(self, change: Change, commit_lsn: LSN) -> Table | None:
        """The captured table that a change in this commit is of, or None if it is nobody's.

        Raises psycopg.Error, or what connecting raises, when that can't be found out now.
        """
        root, until = self._found.get((change.schema, change.table), _NOBODYS)
        return root if commit_lsn < until else self._ask(change, commit_lsn)

    def _ask(self, change: Change, commit_lsn: LSN) -> Table | None:
        table = change.schema, change.table
        connection = self._asking()
        # First: what becomes a partition after we looked has no changes as one before this position.
        at = _now(connection)
        lineage = connection.execute(_ANCESTORS, table).fetchall()
        root = next(((schema, name) for schema, name, _ in lineage[:-1] if (schema, name) in self._columns), None)
        if root is not None:
            self._note(connection, table, root, FOREVER)
            self._log.info("partition_noticed", table=".".join(root), partition=".".join(table))
            return root
        if table in self._kept:
            root, until = self._kept[table]
            self._note(connection, table, root, min(until, at))
            if commit_lsn < min(until, at):
                return root
        self._found[table] = None, at if not lineage or self._like(lineage[-1][2]) else FOREVER
        row = change.new or change.old
        if not lineage and row and (lost := self._like(row)) is not None:
            self._on_lost(table, lost)
        return None

    def stored_in(self, root: Table, xid: int) -> frozenset[Table]:
        """See `leaves`. Raises psycopg.Error, or what connecting raises, when that can't be found out now."""
        return leaves(self._asking(), root, xid)

    def _asking(self) -> Connection:
        if self._connection is None:
            self._connection = self._connect()
        return self._connection

    def look(self, connection: Connection) -> None:
        """See whether anything has become ours that was not asked for: partitions of a captured table that had none, or
        what could not become one by its columns.
        """
        partitioned = [(row[0], row[1]) for row in connection.execute(_PARTITIONED, _pairs(self._captured))]
        if partitioned:
            nobodys = {*(self.others or ()), *(t for t, found in self._found.items() if found == (None, FOREVER))}
            for partition, root in roots(connection, partitioned).items():
                if root not in self._columns or partition in nobodys:
                    self.overlooked.append(partition)

    def close(self) -> None:
        """End the connection, if there is one."""
        if self._connection is not None:
            self._connection.close()


def roots(connection: Connection, tables: Iterable[Table]) -> dict[Table, Table]:
    """Which of these tables each partition is a part of now."""
    found = connection.execute(_PARTITIONS, _pairs(tables))
    return {(schema, name): (root_schema, root) for schema, name, root_schema, root in found}


def leaves(connection: Connection, root: Table, xid: int) -> frozenset[Table]:
    """The partitions that hold a table's rows, but for those that came with a transaction of this number or later."""
    return frozenset((schema, name) for schema, name in connection.execute(_LEAVES, (*root, str(xid))))


def keys(connection: Connection, rules: Rules) -> dict[Table, tuple[str, ...]]:
    """What tells the rows of tables apart, wherever they are stored."""
    own = {name: table.key for name, table in rules.items()}
    found = connection.execute(_PARTITIONED, _pairs(rules))
    return own | {(schema, name): own[schema, name] or tuple(key) for schema, name, _, key in found}


def kept(connection: Connection, worker: str) -> dict[Table, Table]:
    """Which captured table each partition was a part of that the worker has met, also where it is gone."""
    return {(schema, name): qualified(root) for schema, name, root, _ in connection.execute(_KNOWN, (worker,))}


def _now(connection: Connection) -> LSN:
    return LSN.parse(fetch_one(connection, _NOW)[0])


def _pairs(tables: Iterable[Table]) -> tuple[list[str], list[str]]:
    named = [*tables]
    return [schema for schema, _ in named], [name for _, name in named]
