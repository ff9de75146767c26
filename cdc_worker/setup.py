"""Setting up: the worker's tables, the target, replica identities, the slot and the first checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Final

import psycopg
from psycopg import sql

from cdc_worker import checkpoint, errors, postgres, slot, wal2json
from cdc_worker.config import Settings
from cdc_worker.postgres import Connection, fetch_one
from cdc_worker.profile import Profile
from cdc_worker.replication import Replication
from cdc_worker.rules import compile_rules, qualified


def schema(name: str) -> str:
    """A file of `schema/`, which lies beside the package in a checkout, and inside it once installed."""
    installed = resources.files("cdc_worker") / "schema" / name
    return (installed if installed.is_file() else Path(__file__).parent.parent / "schema" / name).read_text("utf-8")


LOCK_TIMEOUT: Final = "5s"
"""A statement that waits for a lock on a table of the application makes all others wait behind it."""

_ONE_AT_A_TIME: Final = "SELECT pg_advisory_lock(hashtext('cdc-worker setup'))"


def setup(settings: Settings, profile: Profile) -> Iterator[str]:
    """Set up what is missing; yields a line for each thing done. May be repeated, also after an interruption."""
    rules = compile_rules(profile)
    dsn, worker = settings.dsn.get_secret_value(), settings.worker
    try:
        with postgres.connect(dsn, worker) as connection:
            server = postgres.server(connection)
            postgres.check_server(server, worker)
            connection.execute(_ONE_AT_A_TIME)
            connection.execute("SELECT set_config('lock_timeout', %s, false)", (LOCK_TIMEOUT,))
            yield from _tables(connection, profile)
            postgres.check_catalog(connection, profile, rules)
            for table in rules.values():
                if table.needs_old_rows:
                    yield from _identity(connection, table.name)
            connection.execute("SET lock_timeout = 0")
            yield from _slot(connection, settings, server)
    except psycopg.errors.InsufficientPrivilege as error:
        raise errors.ServerError(
            f"the server refused: {error.diag.message_primary} (SQLSTATE {error.sqlstate})",
            hint="set up as the owner of the tables, or as a superuser",
        ) from error


def _tables(connection: Connection, profile: Profile) -> Iterator[str]:
    connection.execute(schema("010_cdc_worker.sql").encode())
    yield "tables of the worker are in schema cdc_worker"
    if profile.target.prepare is not None:
        connection.execute(schema(profile.target.prepare).encode())
        yield f"target {'.'.join(qualified(profile.target.table))} is prepared"


def _identity(connection: Connection, table: tuple[str, str]) -> Iterator[str]:
    identifier = sql.Identifier(*table)
    (identity,) = fetch_one(
        connection,
        "SELECT relreplident::text FROM pg_class WHERE oid = to_regclass(format('%%I.%%I', %s::text, %s::text))",
        *table,
    )
    if identity != "f":
        connection.execute(sql.SQL("ALTER TABLE {} REPLICA IDENTITY FULL").format(identifier))
        yield f"replica identity of {'.'.join(table)} is FULL"


def _slot(connection: Connection, settings: Settings, server: postgres.Server) -> Iterator[str]:
    worker, name, dsn = settings.worker, settings.slot, settings.dsn.get_secret_value()
    with Replication(postgres.connect_replication(dsn, worker)) as replication:
        system_identifier = replication.system_identifier()
    found = slot.read(connection, name)
    try:
        known = checkpoint.read(connection, worker)
    except errors.NotSetUpError:
        known = None
    if known is not None:
        wal_end = slot.committed_so_far(connection)
        checkpoint.check(known, slot=name, system_identifier=system_identifier, wal_end=wal_end)
        slot.check(found, name=name, database=connection.info.dbname, checkpoint=known.position.lsn)
        yield f'slot "{name}" is there, and its checkpoint at {known.position}'
        return
    if found is None:
        position = slot.create(connection, name, server)
        yield f'slot "{name}" created at {position}'
    else:
        # Made by an administrator, or by a set-up that was interrupted here: nothing has been read from it yet.
        checkpoint.check_unclaimed(connection, name)
        position = slot.check_unread(found, database=connection.info.dbname)
    checkpoint.create(
        connection,
        worker,
        slot=name,
        plugin=wal2json.PLUGIN,
        system_identifier=system_identifier,
        position=position,
    )
    yield f'worker "{worker}" begins at {position}'
