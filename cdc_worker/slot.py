"""The replication slot: the server's promise to keep the WAL that we have not confirmed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import psycopg

from cdc_worker import errors, wal2json
from cdc_worker.lsn import LSN
from cdc_worker.postgres import APPLICATION_NAME, Connection, Server, fetch_one


@dataclass(frozen=True, slots=True)
class Slot:
    """A logical slot as pg_replication_slots shows it. `retained` is in bytes; `wal_end` is the server's."""

    name: str
    plugin: str
    database: str
    confirmed_flush_lsn: LSN
    wal_end: LSN
    retained: int
    wal_status: str
    active_pid: int | None
    holder: str | None
    """application_name of the process that reads it."""

    @property
    def held_by_worker(self) -> bool:
        """Whether its reader is a cdc-worker."""
        return (self.holder or "").startswith(APPLICATION_NAME)


_SLOT: Final = """
SELECT s.slot_name::text, s.plugin::text, s.database::text, s.confirmed_flush_lsn, pg_current_wal_flush_lsn(),
       (pg_current_wal_flush_lsn() - s.restart_lsn)::bigint, s.wal_status, s.active_pid, a.application_name
FROM pg_replication_slots s LEFT JOIN pg_stat_activity a ON a.pid = s.active_pid
WHERE s.slot_name = %s
"""


def read(connection: Connection, name: str) -> Slot | None:
    """The slot, or None when there is none of that name."""
    row = connection.execute(_SLOT, (name,)).fetchone()
    if row is None:
        return None
    name, plugin, database, confirmed, wal_end, retained, wal_status, active_pid, holder = row
    return Slot(
        name,
        plugin or "",
        database or "",
        LSN.parse(confirmed or "0/0"),
        LSN.parse(wal_end),
        retained or 0,
        wal_status or "lost",
        active_pid,
        holder,
    )


def require(slot: Slot | None, *, name: str, checkpoint: LSN) -> Slot:
    """The slot, if it is there. Raises SlotMissingError."""
    if slot is None:
        raise errors.SlotMissingError(
            f'slot "{name}" does not exist',
            hint=f"what was committed since {checkpoint} is not kept; find out who dropped it, then: cdc-worker setup",
        )
    return slot


def check(slot: Slot | None, *, name: str, database: str, checkpoint: LSN) -> Slot:
    """Raise unless this is the slot that the checkpoint speaks of, and nothing between the two is missing."""
    slot = require(slot, name=name, checkpoint=checkpoint)
    if slot.plugin != wal2json.PLUGIN:
        raise errors.SlotMismatchError(
            f'slot "{name}" is of the plugin "{slot.plugin}", not {wal2json.PLUGIN}',
            hint="name another slot in CDC_WORKER_SLOT",
        )
    if slot.database != database:
        raise errors.SlotMismatchError(
            f'slot "{name}" belongs to the database "{slot.database}", not to "{database}"',
            hint="name another slot in CDC_WORKER_SLOT, or the other database in CDC_WORKER_DSN",
        )
    if slot.wal_status == "lost":
        raise errors.SlotLostError(
            f'slot "{name}" is lost: the server discarded WAL that it needed (max_slot_wal_keep_size)',
            hint=f"changes from {checkpoint} to {slot.wal_end} are not recorded; drop the slot, then: cdc-worker setup",
        )
    if slot.confirmed_flush_lsn > checkpoint:
        raise errors.SlotAheadError(
            f'slot "{name}" is at {slot.confirmed_flush_lsn}, ahead of the checkpoint at {checkpoint}: '
            f"changes between {checkpoint} and {slot.confirmed_flush_lsn} would be lost",
            hint="the slot was advanced or made anew by someone; find out by whom before you set up again",
        )
    return slot


_COMMITTED: Final = """
SELECT CASE WHEN mod(at, block) IN (24, 40) THEN lsn - mod(at, block) ELSE lsn END
FROM (SELECT lsn, lsn - '0/0'::pg_lsn AS at, current_setting('wal_block_size')::numeric AS block
      FROM pg_current_wal_insert_lsn() lsn) insert
"""


def committed_so_far(connection: Connection) -> LSN:
    """A position that all commits until now end at or before, and that the WAL is sure to reach.

    The insert position of a page that is still empty lies behind its header (24 bytes, or 40 on a segment's first
    page), where no record ends.
    """
    return LSN.parse(fetch_one(connection, _COMMITTED)[0])


def create(connection: Connection, name: str, server: Server) -> LSN:
    """Make the slot and return its first position. Waits until the transactions that run now have ended."""
    connection.execute("SET statement_timeout = '30s'")
    try:
        (position,) = fetch_one(
            connection, "SELECT lsn FROM pg_create_logical_replication_slot(%s, %s)", name, wal2json.PLUGIN
        )
    except psycopg.errors.QueryCanceled as error:
        raise errors.ServerError(
            f'slot "{name}" could not be made: transactions of the processes {_writers(connection)} hold it up',
            hint="end them, then run setup again",
        ) from error
    except psycopg.Error as error:
        raise plugin_error(error, server) from error
    finally:
        connection.execute("SET statement_timeout = 0")
    return LSN.parse(position)


def _writers(connection: Connection) -> str:
    rows = connection.execute(
        "SELECT pid FROM pg_stat_activity WHERE backend_xid IS NOT NULL AND pid <> pg_backend_pid() ORDER BY xact_start"
    )
    return ", ".join(str(pid) for (pid,) in rows)


def plugin_error(error: psycopg.Error, server: Server) -> Exception:
    """What the server's refusal to decode with the plugin asks of the operator; the error itself if it is another."""
    allowed = server.output_plugin_libraries
    if error.sqlstate == "58P01":
        return errors.PluginMissingError(
            f"the server has no output plugin {wal2json.PLUGIN}",
            hint=f"install it there, for example: apt-get install postgresql-{server.version // 10000}-wal2json",
        )
    if error.sqlstate == "42501" and allowed is not None and wal2json.PLUGIN not in _listed(allowed):
        return errors.PluginRefusedError(
            f"the server refuses the output plugin {wal2json.PLUGIN}: output_plugin_libraries is {allowed}",
            hint=f'as a superuser: ALTER ROLE "{server.role}" SET output_plugin_libraries = '
            f"{', '.join([*_listed(allowed), wal2json.PLUGIN])}",
        )
    if error.sqlstate == "42501":
        return errors.ServerError(
            f'role "{server.role}" may not use replication slots',
            hint=f'as a superuser: ALTER ROLE "{server.role}" REPLICATION',
        )
    if error.sqlstate == "53400":
        return errors.ServerError("all replication slots of the server are taken", hint="raise max_replication_slots")
    return error


def _listed(libraries: str) -> list[str]:
    return [name.strip().strip('"') for name in libraries.split(",") if name.strip()]
