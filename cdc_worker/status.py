"""What a person on call asks: is it alive, and is it keeping up."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final

from pydantic import BaseModel, Field

from cdc_worker import checkpoint, postgres, slot
from cdc_worker.config import Settings
from cdc_worker.lsn import LSN
from cdc_worker.postgres import fetch_one

_WALSENDER: Final = """
SELECT replay_lsn, greatest(0, extract(epoch FROM clock_timestamp() - %s::timestamptz))::float8,
       (SELECT count(*) FROM cdc_worker.dead_letter WHERE worker = %s)
FROM (SELECT) one LEFT JOIN pg_stat_replication ON pid = %s
"""


class Status(BaseModel):
    """The state of one worker, seen from the database. These are the fields of `status --json`."""

    worker: str
    slot: str
    plugin: str
    streaming: bool = Field(description="a cdc-worker reads the slot now")
    active_pid: int | None = Field(description="process of the server that serves the slot's reader")
    holder: str | None = Field(description="application_name of the slot's reader")
    checkpoint: str = Field(description="all commits that end at or before this LSN are written")
    commit_lsn: str | None = Field(description="the commit of which a part is written")
    changes: int = Field(description="how many changes of that commit are written")
    committed_at: datetime | None = Field(description="when the last change written was committed")
    wal_end: str = Field(description="end of the server's WAL")
    lag_bytes: int = Field(description="WAL that the worker has not dealt with; a quiet worker has read it all")
    lag_seconds: float = Field(description="time since the last change written was committed, 0 without lag in bytes")
    retained_bytes: int = Field(description="WAL that the server keeps for the slot")
    wal_status: str = Field(description="as in pg_replication_slots")
    dead_letters: int = Field(description="changes that could not become activities")


def status(settings: Settings) -> Status:
    """Look. Raises NotSetUpError, SlotMissingError and what a connection can fail with."""
    with postgres.connect(settings.dsn.get_secret_value(), settings.worker) as connection:
        known = checkpoint.read(connection, settings.worker)
        found = slot.require(slot.read(connection, known.slot), name=known.slot, checkpoint=known.position.lsn)
        since = known.committed_at or known.written_at
        replayed, seconds, dead_letters = fetch_one(connection, _WALSENDER, since, settings.worker, found.active_pid)
        reached = max(known.position.lsn, LSN.parse(replayed or "0/0"))
        lag = max(0, found.wal_end - reached)
    return Status(
        worker=known.worker,
        slot=found.name,
        plugin=found.plugin,
        streaming=found.active_pid is not None and found.held_by_worker,
        active_pid=found.active_pid,
        holder=found.holder,
        checkpoint=str(known.position.lsn),
        commit_lsn=str(known.position.commit_lsn) if known.position.commit_lsn else None,
        changes=known.position.changes,
        committed_at=known.committed_at,
        wal_end=str(found.wal_end),
        lag_bytes=lag,
        lag_seconds=round(seconds, 3) if lag else 0.0,
        retained_bytes=found.retained,
        wal_status=found.wal_status,
        dead_letters=dead_letters,
    )


def lines(found: Status) -> list[str]:
    """The status as a person reads it."""
    values: dict[str, Any] = {
        "worker": found.worker,
        "slot": f"{found.slot} ({found.plugin}, {found.wal_status}, {found.retained_bytes:,} bytes of WAL retained)",
        "reader": f"{found.holder}, process {found.active_pid}" if found.active_pid else "none",
        "checkpoint": found.checkpoint
        + (f", and {found.changes:,} changes of the commit at {found.commit_lsn}" if found.commit_lsn else ""),
        "lag": f"{found.lag_bytes:,} bytes, {found.lag_seconds:.1f} s",
        "dead letters": found.dead_letters,
    }
    return [f"{name + ':':14}{value}" for name, value in values.items()]
