"""The processes of a worker as its database knows them: which is active, which stand by, and what went wrong last."""

from __future__ import annotations

import os
import socket
import time
import uuid
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

import psycopg

from cdc_worker import __version__
from cdc_worker.postgres import Connection, application_name, fetch_one

KEPT: Final = 20
"""So many processes of a worker are remembered, and those that run or wrote last."""


@dataclass(slots=True)
class Process:
    """This process."""

    worker: str
    process: uuid.UUID = field(default_factory=uuid.uuid4)
    began: float = field(default_factory=time.monotonic)
    failure: str | None = None
    """What went wrong, and could not be written down yet."""


_REGISTER: Final = """
INSERT INTO cdc_worker.process
    (process, worker, host, pid, version, started_at, backend_pid, backend_start, failure, failed_at)
SELECT %(process)s, %(worker)s, %(host)s, %(pid)s, %(version)s,
       clock_timestamp() - make_interval(secs => %(age)s), pid, backend_start,
       %(failure)s, CASE WHEN %(failure)s::text IS NOT NULL THEN clock_timestamp() END
FROM pg_stat_activity WHERE pid = pg_backend_pid()
ON CONFLICT (process) DO UPDATE
SET backend_pid = excluded.backend_pid, backend_start = excluded.backend_start,
    failure = coalesce(excluded.failure, process.failure), failed_at = coalesce(excluded.failed_at, process.failed_at)
"""

_PRUNE: Final = """
DELETE FROM cdc_worker.process p WHERE worker = %(worker)s AND process <> ALL (ARRAY(
    SELECT process FROM cdc_worker.process WHERE worker = %(worker)s ORDER BY started_at DESC LIMIT %(kept)s))
    AND NOT EXISTS (SELECT FROM pg_stat_activity a
                    WHERE pid = backend_pid AND coalesce(a.backend_start = p.backend_start, true))
    AND NOT EXISTS (SELECT FROM cdc_worker.checkpoint c
                    WHERE (c.backend_pid, c.backend_start) = (p.backend_pid, p.backend_start))
"""


def register(connection: Connection, own: Process) -> None:
    """Say that this process is there, for as long as this connection is."""
    connection.execute(
        _REGISTER,
        {
            "process": own.process,
            "worker": own.worker,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "version": __version__,
            "age": time.monotonic() - own.began,
            "failure": own.failure,
        },
    )
    own.failure = None
    connection.execute(_PRUNE, {"worker": own.worker, "kept": KEPT})


_FAILED: Final = "UPDATE cdc_worker.process SET failure = %s, failed_at = clock_timestamp() WHERE process = %s"


def failed(connection: Connection, own: Process) -> None:
    """Write down what went wrong."""
    if own.failure is not None:
        connection.execute(_FAILED, (own.failure, own.process))
        own.failure = None


_ENDED: Final = "UPDATE cdc_worker.process SET exit_code = %s, ended_at = clock_timestamp() WHERE process = %s"


def ended(connection: Connection, own: Process, exit_code: int) -> None:
    """Write down that it ends, and with what."""
    failed(connection, own)
    connection.execute(_ENDED, (exit_code, own.process))


_UNENDED: Final = "SELECT EXISTS (SELECT FROM cdc_worker.process WHERE worker = %s AND ended_at IS NULL)"


def unended(connection: Connection, worker: str) -> bool:
    """Whether there may be a process of the worker: one that has not said that it ended, and may have been killed."""
    try:
        (found,) = fetch_one(connection, _UNENDED, worker)
    except psycopg.errors.InsufficientPrivilege:
        return True  # to the role of a command that reads alone
    return bool(found)


@dataclass(frozen=True, slots=True)
class Known:
    """A process of the worker, this or another. The `last` that wrote is the active one, if it is `alive`."""

    host: str
    pid: int
    version: str
    started_at: datetime
    uptime: float
    alive: bool
    last: bool
    failure: str | None
    failed_at: datetime | None
    exit_code: int | None
    ended_at: datetime | None


# To others a session shows its name, and not since when it is there.
_KNOWN: Final = """
SELECT p.host, p.pid, p.version, p.started_at,
       extract(epoch FROM clock_timestamp() - p.started_at)::float8,
       a.pid IS NOT NULL AND p.ended_at IS NULL AS alive,
       coalesce((c.backend_pid, c.backend_start) = (p.backend_pid, p.backend_start), false) AS last,
       p.failure, p.failed_at, p.exit_code, p.ended_at
FROM cdc_worker.process p
LEFT JOIN cdc_worker.checkpoint c USING (worker)
LEFT JOIN pg_stat_activity a ON a.pid = p.backend_pid AND a.application_name = %s
    AND coalesce(a.backend_start = p.backend_start, true)
WHERE p.worker = %s
ORDER BY p.started_at DESC
"""


def known(connection: Connection, worker: str) -> list[Known]:
    """The last processes of a worker, the newest first."""
    rows = connection.execute(_KNOWN, (application_name(worker), worker))
    return [Known(*row) for row in rows]
