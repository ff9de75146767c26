"""What a person on call asks: is it alive, is it keeping up, what does it hold up, what went wrong last."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from itertools import takewhile
from typing import Any, Final

import psycopg
from psycopg.rows import class_row
from pydantic import BaseModel, Field

from cdc_worker import __version__, checkpoint, cutover, errors, gap, postgres, process, slot
from cdc_worker.checkpoint import Checkpoint
from cdc_worker.config import Settings
from cdc_worker.lsn import INVALID, LSN
from cdc_worker.postgres import Blocker, Connection
from cdc_worker.process import Known
from cdc_worker.slot import Slot

SILENCE: Final = 30.0
"""A worker that has not answered for so many seconds is stopped, or cut off."""

BEHIND: Final = 5.0
"""Activities that come so many seconds after their change are late."""

SEGMENT: Final = 16 << 20
"""Who has written all that it read, and has less than so many bytes to go, is at the end but for others' WAL."""

TIMEOUTS: Final = "SET statement_timeout = '10s'; SET lock_timeout = '1s'"
"""So long it lets the server work, and waits for a lock, before it tells who holds it."""


class Counts(BaseModel):
    """How many there were lately, to ten seconds."""

    minute: int = Field(description="in the last minute")
    hour: int = Field(description="in the last hour")
    day: int = Field(description="in the last 24 hours")


class Process(BaseModel):
    """A process of the worker that runs."""

    role: str = Field(description="`active`, or `standby`: it waits for the slot")
    host: str = Field(description="where it runs")
    pid: int = Field(description="its number there")
    version: str = Field(description="of cdc-worker")
    started_at: datetime = Field(description="since when it runs")
    uptime: float = Field(description="for how many seconds")


class Failure(BaseModel):
    """What went wrong last, in any of the last twenty processes; it may have healed."""

    error: str = Field(description="what it was")
    at: datetime = Field(description="when")
    host: str = Field(description="where the process ran, or runs")
    pid: int = Field(description="its number there")
    exit_code: int | None = Field(description="with what the process ended since; null if it runs, or was killed")


class Backfill(BaseModel):
    """A backfill that has not come to its end, or has lately."""

    table: str = Field(description="schema and table")
    part: str = Field(description="which of its rows, as it was asked; empty for all")
    rows: int = Field(description="rows dealt with")
    expected: int | None = Field(description="about how many there are; null if nobody knows")
    activities: int = Field(description="activities written")
    dead_letters: int = Field(description="those that became dead letters")
    started_at: datetime = Field(description="since when")
    written_at: datetime = Field(description="when it last got further: it goes on from there when it is run again")
    finished_at: datetime | None = Field(description="when it came to its end, in the last 24 hours; null if it hasn't")


class Status(BaseModel):
    """The state of one worker, seen from the database. These are the fields of `status --json`."""

    worker: str = Field(description="name of the worker")
    late: str | None = Field(description="in one line, why activities are late; null if they are not")
    healthy: bool = Field(description="a worker reads the slot, answers the server, and keeps up")
    processes: list[Process] = Field(description="its processes that run, the active one first")
    slot: str = Field(description="name of the slot")
    plugin: str | None = Field(None, description="output plugin of the slot; null if there is no such slot, as below")
    streaming: bool = Field(description="a cdc-worker reads the slot now")
    active_pid: int | None = Field(None, description="process of the server that serves the slot's reader")
    holder: str | None = Field(None, description="application_name of the slot's reader")
    checkpoint: str = Field(description="all commits that end at or before this LSN are written")
    commit_lsn: str | None = Field(description="the commit of which a part is written")
    changes: int = Field(description="how many changes of that commit are written")
    committed_at: datetime | None = Field(description="when the last change written was committed")
    written_at: datetime = Field(description="when the checkpoint was last written; a quiet worker need not")
    wal_end: str = Field(description="end of the server's WAL")
    lag_bytes: int = Field(description="WAL that the worker has not dealt with; a quiet worker has read it all")
    lag_seconds: float = Field(
        description="at most so long ago the first change not written was committed; 0 without lag in bytes"
    )
    retained_bytes: int | None = Field(None, description="WAL that the server keeps for the slot")
    wal_status: str | None = Field(None, description="as in pg_replication_slots")
    activities: Counts = Field(description="activities written")
    dead_letters: Counts = Field(description="changes that could not become activities")
    dead_letters_waiting: int = Field(description="those that wait to be seen to; not those that were discarded")
    marked: list[str] = Field(
        description="tables of which only what follows a context message is recorded, until `cdc-worker cutover`"
    )
    gaps: list[str] = Field(description="what nothing kept and nothing has made up for yet: `cdc-worker recover` does")
    backfills: list[Backfill] = Field(description="backfills that have not come to their ends, or have lately")
    last_error: Failure | None = Field(description="what went wrong last")
    version: str = Field(description="of this command")
    server_version: str = Field(description="of PostgreSQL")


class Unreachable(BaseModel):
    """What `status --json` prints where there is no database to ask."""

    worker: str = Field(description="name of the worker")
    late: str = Field(description="why there is nothing to tell")


_LATELY: Final = """
SELECT CASE WHEN writer.wait_event = 'SyncRep' THEN current_setting('synchronous_standby_names') END AS standbys,
       sender.write_lsn, sender.replay_lsn, sender.reply_time,
       CASE WHEN sender.state IS NOT NULL THEN
           extract(epoch FROM clock_timestamp() - coalesce(sender.reply_time, sender.backend_start))::float8
       END AS silence,
       clock_timestamp() AS now, current_setting('server_version') AS server_version,
       (SELECT count(*) FROM cdc_worker.dead_letter
        WHERE worker = %(worker)s AND discarded_at IS NULL) AS waiting,
       (SELECT reason FROM cdc_worker.dead_letter
        WHERE worker = %(worker)s AND discarded_at IS NULL ORDER BY dead_letter_id DESC LIMIT 1) AS reason
FROM (SELECT) one
LEFT JOIN pg_stat_replication sender ON sender.pid = %(sender)s
LEFT JOIN pg_stat_activity writer ON writer.pid = %(writer)s
"""

# The counts of the checkpoint, less what they were when the stretch began: the last tally before it, or else the first.
_COUNTS: Final = """
SELECT stretch, now.activities - coalesce(before.activities, first.activities, now.activities) AS activities,
       now.dead_letters - coalesce(before.dead_letters, first.dead_letters, now.dead_letters) AS dead_letters
FROM cdc_worker.checkpoint now
CROSS JOIN unnest(ARRAY['minute', 'hour', 'day']) AS stretch
LEFT JOIN LATERAL (
    SELECT activities, dead_letters FROM cdc_worker.tally t
    WHERE t.worker = now.worker AND at <= clock_timestamp() - ('1 ' || stretch)::interval ORDER BY at DESC LIMIT 1
) AS before ON true
LEFT JOIN LATERAL (
    SELECT activities, dead_letters FROM cdc_worker.tally t WHERE t.worker = now.worker ORDER BY at LIMIT 1
) AS first ON true
WHERE now.worker = %s
"""


class _Seen(BaseModel):
    """A row of _LATELY."""

    standbys: str | None
    write_lsn: str | None
    replay_lsn: str | None
    reply_time: datetime | None
    silence: float | None
    now: datetime
    server_version: str
    waiting: int
    reason: str | None


def status(settings: Settings) -> Status:
    """Look. Raises NotSetUpError and what a connection can fail with."""
    worker = settings.worker
    with postgres.connect(settings.dsn.get_secret_value(), worker) as connection:
        connection.execute(TIMEOUTS)
        try:
            return _status(connection, settings)
        except psycopg.errors.LockNotAvailable as error:
            by = ", ".join(map(str, postgres.blockers(connection, worker, checkpoint.WRITTEN)))
            raise errors.ServerError(
                f"tables of cdc-worker are locked: by {by}", hint="end it, or wait for it: the worker has to"
            ) from error


def _status(connection: Connection, settings: Settings) -> Status:
    worker = settings.worker
    name = checkpoint.read(connection, worker).slot
    found = slot.read(connection, name)  # before the checkpoint, which an active worker writes first
    known = checkpoint.read(connection, worker)
    processes = process.known(connection, worker)
    parameters = {"worker": worker, "sender": found and found.active_pid, "writer": known.backend_pid}
    with connection.cursor(row_factory=class_row(_Seen)) as cursor, checkpoint.as_set_up():
        (seen,) = cursor.execute(_LATELY, parameters).fetchall()
    wal_end = found.wal_end if found else slot.committed_so_far(connection)
    told = LSN.parse(seen.replay_lsn) if seen.replay_lsn else found.confirmed_flush_lsn if found else INVALID
    lag = max(0, wal_end - max(known.position.lsn, told))
    streaming = found is not None and found.active_pid is not None and found.held_by_worker
    # How far it has read is hidden from roles that may not read statistics; it need not say so before this.
    hidden = streaming and seen.silence is None and lag <= settings.idle_advance_bytes
    seconds = _lag_seconds(known, seen, lag) if lag and not hidden else 0.0
    activities, dead_letters = _counted(connection, worker)
    try:
        _, checked = slot.check_checkpoint(connection, worker, name)
    except errors.CdcWorkerError as error:
        late: str | None = f"gap: {_one_line(str(error))}"
    else:
        holders = postgres.blockers(connection, worker) if streaming else []
        late = _late(checked, processes, seen, holders, lag=lag, seconds=seconds)
    gaps = [f"{of}: cdc-worker recover" for of in gap.pending(connection, worker)]
    of_slot: dict[str, Any] = {}
    if found is not None:
        of_slot = {
            "plugin": found.plugin,
            "active_pid": found.active_pid,
            "holder": found.holder,
            "retained_bytes": found.retained,
            "wal_status": found.wal_status,
        }
    return Status(
        worker=worker,
        late=late or _dead_letters(seen) or (f"gap {gaps[0]}" if gaps else None),
        healthy=late is None,
        processes=_running(processes),
        slot=name,
        streaming=streaming,
        checkpoint=str(known.position.lsn),
        commit_lsn=str(known.position.commit_lsn) if known.position.commit_lsn else None,
        changes=known.position.changes,
        committed_at=known.committed_at,
        written_at=known.written_at,
        wal_end=str(wal_end),
        lag_bytes=lag,
        lag_seconds=round(seconds, 3),
        activities=activities,
        dead_letters=dead_letters,
        dead_letters_waiting=seen.waiting,
        marked=cutover.marked_tables(connection, worker),
        gaps=gaps,
        backfills=_backfills(connection, worker),
        last_error=_last_error(processes),
        version=__version__,
        server_version=seen.server_version,
        **of_slot,
    )


def _lag_seconds(known: Checkpoint, seen: _Seen, lag: int) -> float:
    """How long ago the first change not written was committed, at most."""
    since = known.committed_at or known.written_at
    if seen.reply_time and seen.write_lsn == seen.replay_lsn and lag < SEGMENT:
        since = max(since, seen.reply_time)  # at that time all that it had read was written
    return max(0.0, (seen.now - since).total_seconds())


def _counted(connection: Connection, worker: str) -> tuple[Counts, Counts]:
    """Activities and dead letters."""
    lately = {stretch: counts for stretch, *counts in connection.execute(_COUNTS, (worker,))}
    activities, dead_letters = (
        Counts(**{stretch: counts[place] for stretch, counts in lately.items()}) for place in (0, 1)
    )
    return activities, dead_letters


_BACKFILLS: Final = """
SELECT table_name AS table, part, rows, expected, activities, dead_letters, started_at, written_at, finished_at
FROM cdc_worker.backfill
WHERE worker = %s AND (finished_at IS NULL OR finished_at > now() - interval '1 day')
ORDER BY started_at, table_name, part
"""


def _backfills(connection: Connection, worker: str) -> list[Backfill]:
    with connection.cursor(row_factory=class_row(Backfill)) as cursor:
        return cursor.execute(_BACKFILLS, (worker,)).fetchall()


def _running(processes: list[Known]) -> list[Process]:
    """Those that run, the active one first."""
    return [
        Process(
            role="active" if of.last else "standby",
            host=of.host,
            pid=of.pid,
            version=of.version,
            started_at=of.started_at,
            uptime=round(of.uptime, 3),
        )
        for of in sorted(processes, key=lambda of: not of.last)
        if of.alive
    ]


def _late(
    found: Slot, processes: list[Known], seen: _Seen, holders: list[Blocker], *, lag: int, seconds: float
) -> str | None:
    """Why activities are late."""
    waiting = [of for of in processes if of.alive and not of.last]
    if found.active_pid is None:
        return f"standby: {_named(waiting[0])} is about to take over" if waiting else _not_running(processes)
    if not found.held_by_worker:
        return f"slot taken: it is read by {found.reader}"
    if seen.silence is not None and seen.silence > SILENCE:
        stand_by = f"{_named(waiting[0])} waits until the server frees the slot; " if waiting else ""
        return (
            f"silence: the active worker has not answered for {seen.silence:.0f} s; {stand_by}"
            "to replace it at once: cdc-worker run --takeover"
        )
    if holders:
        return f"target locked: by {', '.join(map(str, holders))}"
    if seen.standbys is not None:
        return f"commits wait for a synchronous standby (synchronous_standby_names is {seen.standbys})"
    if seconds > BEHIND:
        return f"catching up: {lag:,} bytes are to be read, or to be written"
    return None


def _dead_letters(seen: _Seen) -> str | None:
    """That some activities don't come by themselves, if it is so."""
    if not seen.waiting:
        return None
    return (
        f"dead letters: {seen.waiting:,} changes wait to be seen to, the last because {seen.reason};"
        " see: cdc-worker dead-letters list"
    )


def _not_running(processes: list[Known]) -> str:
    if not processes:
        return "not running: no worker has run yet"
    # Who wrote last is gone, and who tried after that has failed.
    newer = list(takewhile(lambda of: not of.last, processes))
    wrote = processes[len(newer) : len(newer) + 1]
    ended = wrote[0].ended_at if wrote else None
    failed = [of for of in newer if of.exit_code and of.ended_at and (ended is None or of.ended_at > ended)]
    last = (failed or wrote or newer)[0]
    if last.ended_at is None:
        return f"not running: {_named(last)} was killed, is cut off, or tries again within half a minute"
    if last.exit_code:
        return f"not running: {_named(last)} ended with {last.exit_code}: {_one_line(last.failure or '')}"
    return f"not running: {_named(last)} was asked to end at {_time(last.ended_at)}"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _named(of: Known) -> str:
    return f"process {of.pid} on {of.host}"


def _last_error(processes: list[Known]) -> Failure | None:
    failures = [
        Failure(error=_one_line(of.failure), at=of.failed_at, host=of.host, pid=of.pid, exit_code=of.exit_code)
        for of in processes
        if of.failure is not None and of.failed_at is not None
    ]
    return max(failures, key=lambda failure: failure.at, default=None)


def watch(settings: Settings) -> Iterator[Status | Unreachable]:
    """Look again and again, also while there is no server."""
    while True:
        try:
            yield status(settings)
        except (psycopg.Error, errors.CdcWorkerError) as error:
            known = postgres.failure(error) if isinstance(error, psycopg.Error) else error
            down = isinstance(error, psycopg.Error) and postgres.is_transient(error.sqlstate)
            yield Unreachable(worker=settings.worker, late=("server down: " if down else "") + _one_line(str(known)))


def lines(found: Status | Unreachable) -> list[str]:
    """The status as a person reads it."""
    values = [("worker", found.worker), ("late", found.late or "no")]
    if isinstance(found, Status):
        values += _values(found)
    return [f"{name + ':':14}{value}" for name, value in values]


def _values(found: Status) -> Iterator[tuple[str, str]]:
    for of in found.processes:
        since = f"{timedelta(seconds=round(of.uptime))} since {_time(of.started_at)}"
        yield of.role, f"process {of.pid} on {of.host}, cdc-worker {of.version}, up {since}"
    if found.plugin is None:
        yield "slot", f"{found.slot}, which is gone"
    else:
        yield "slot", f"{found.slot} ({found.plugin}, {found.wal_status})"
        yield "reader", f"{found.holder}, process {found.active_pid} of the server" if found.active_pid else "none"
    within = f", and {found.changes:,} changes of the commit at {found.commit_lsn}" if found.commit_lsn else ""
    yield "checkpoint", found.checkpoint + within
    yield "lag", f"{found.lag_bytes:,} bytes, {found.lag_seconds:.1f} s"
    if found.retained_bytes is not None:
        yield "retained WAL", f"{found.retained_bytes:,} bytes"
    yield "activities", _counts(found.activities)
    yield "dead letters", f"{_counts(found.dead_letters)}; {found.dead_letters_waiting:,} waiting"
    if found.marked:
        yield "cut-over", f"of {', '.join(found.marked)} only what follows a context message is recorded"
    for missed in found.gaps:
        yield "gap", f"not reconciled: {missed}"
    for work in found.backfills:
        part = f" ({work.part})" if work.part else ""
        expected = f" of about {work.expected:,}" if work.expected is not None and work.finished_at is None else ""
        end = f"finished {_time(work.finished_at)}" if work.finished_at else f"last written {_time(work.written_at)}"
        yield "backfill", f"{work.table}{part}: {work.rows:,}{expected} rows, {work.activities:,} activities, {end}"
    failure = found.last_error
    yield "last error", f"{_time(failure.at)}: {failure.error}" if failure else "none"
    yield "server", f"PostgreSQL {found.server_version}"


def _time(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M:%S %Z}"


def _counts(counts: Counts) -> str:
    return f"{counts.minute:,} in the last minute, {counts.hour:,} in the hour, {counts.day:,} in the day"
