"""The checkpoint: how far a worker has written, and which process may write."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import psycopg
from psycopg import sql
from psycopg.abc import Params

from cdc_worker import errors, failpoints
from cdc_worker.activities import Position, Scope, Stretch
from cdc_worker.ddl import Step
from cdc_worker.lsn import LSN
from cdc_worker.postgres import Connection, Statement, fetch_one
from cdc_worker.rules import qualified


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A worker's row in cdc_worker.checkpoint."""

    worker: str
    slot: str
    plugin: str
    system_identifier: str
    slot_created_at: LSN
    position: Position
    committed_at: datetime | None
    written_at: datetime
    backend_pid: int | None
    backend_start: datetime | None
    owner: uuid.UUID | None
    nonce: uuid.UUID
    tables: list[str] | None
    activities: int
    dead_letters: int

    @property
    def end(self) -> str:
        """Up to where all is written, and what is known of when that was."""
        within = f", with a part of the commit at {self.position.commit_lsn}" if self.position.commit_lsn else ""
        if self.committed_at is None:
            return f"{self.position.lsn} (nothing has been written yet; it was there at {utc(self.written_at)}{within})"
        return f"{self.position.lsn} (the last change written was committed at {utc(self.committed_at)}{within})"

    def fenced(self) -> errors.FencedError:
        """Another process has become the owner."""
        return fenced(self.worker)

    def advance(
        self,
        before: Position,
        after: Position,
        committed_at: datetime | None = None,
        *,
        activities: int = 0,
        dead_letters: int = 0,
    ) -> Statement:
        """The statement that moves the checkpoint from `before` to `after`, with what is written beside it.

        It touches no row if another process has become the owner, or if there is a cut-over or an erasure that this one
        has not heard of: each makes a new nonce, in the transaction in which it happens.
        """
        values = (
            str(after.lsn),
            str(after.commit_lsn),
            after.changes,
            None if committed_at is None else committed_at.isoformat(),
            activities,
            dead_letters,
            self.worker,
            str(self.owner),
            str(self.nonce),
            str(before.lsn),
            str(before.commit_lsn),
            before.changes,
        )
        return Statement(_ADVANCE, values)


_ADVANCE: Final = (
    "UPDATE cdc_worker.checkpoint SET lsn = {}, commit_lsn = {}, changes = {},"
    " committed_at = coalesce({}::timestamptz, committed_at), written_at = now(),"
    " activities = activities + {}, dead_letters = dead_letters + {}"
    " WHERE worker = {} AND owner = {} AND nonce = {} AND lsn = {} AND commit_lsn = {} AND changes = {}"
)


def utc(at: datetime) -> str:
    """A time as messages have it."""
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def now() -> str:
    """The time by this machine's clock, likewise."""
    return utc(datetime.now(UTC))


WRITTEN: Final = (
    *("cdc_worker.checkpoint", "cdc_worker.dead_letter", "cdc_worker.process", "cdc_worker.tally"),
    *("cdc_worker.skipped", "cdc_worker.written_key"),
)
"""The tables that a worker writes, beside the target."""

_READ: Final = """
SELECT worker, slot, plugin, system_identifier, slot_created_at, lsn, commit_lsn, changes, committed_at, written_at,
       backend_pid, backend_start, owner, nonce, tables, activities, dead_letters
FROM cdc_worker.checkpoint WHERE worker = %s
"""


def read(connection: Connection, worker: str) -> Checkpoint:
    """The worker's checkpoint. Raises NotSetUpError when there is none."""
    rows = fetched(connection, _READ, (worker,))
    if not rows:
        raise errors.NotSetUpError(f'there is no checkpoint of the worker "{worker}"', hint="run: cdc-worker setup")
    name, slot, plugin, system_identifier, created_at, lsn, commit_lsn, changes, *rest = rows[0]
    position = Position(LSN.parse(lsn), LSN.parse(commit_lsn), changes)
    return Checkpoint(name, slot, plugin, system_identifier, LSN.parse(created_at), position, *rest)


def slot_of(connection: Connection, worker: str) -> str | None:
    """The slot that the worker reads, if it has begun. Raises NotSetUpError."""
    rows = fetched(connection, "SELECT slot FROM cdc_worker.checkpoint WHERE worker = %s", (worker,))
    return rows[0][0] if rows else None


def fetched(connection: Connection, query: str, parameters: Params) -> list[tuple[Any, ...]]:
    """What is in tables of cdc-worker. Raises NotSetUpError if they aren't as this version makes them."""
    with as_set_up():
        return connection.execute(query.encode(), parameters).fetchall()


@contextmanager
def as_set_up() -> Iterator[None]:
    """Raise NotSetUpError for tables of cdc-worker that aren't as this version makes them."""
    try:
        yield
    except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName) as error:
        raise errors.NotSetUpError("the database has no tables of cdc-worker", hint="run: cdc-worker setup") from error
    except psycopg.errors.UndefinedColumn as error:
        raise errors.NotSetUpError(
            f"the tables of cdc-worker are not those of this version: {error.diag.message_primary}",
            hint="run: cdc-worker setup; what someone has renamed or dropped there, bring back",
        ) from error


_CREATE: Final = """\
INSERT INTO cdc_worker.checkpoint (worker, slot, plugin, system_identifier, slot_created_at, lsn)
SELECT {}, slot_name, plugin, system_identifier, confirmed_flush_lsn, confirmed_flush_lsn
FROM pg_replication_slots, pg_control_system() WHERE slot_name = {}"""


def create(worker: str, slot: str) -> Step:
    """The first checkpoint: where the slot begins."""
    return Step(f'worker "{worker}" begins where the slot does', sql.SQL(_CREATE).format(worker, slot).as_string())


_READER: Final = "SELECT worker FROM cdc_worker.checkpoint WHERE slot = %s AND worker <> %s"


def check_unclaimed(connection: Connection, slot: str, worker: str) -> None:
    """Raise if the slot is another worker's already."""
    row = connection.execute(_READER, (slot, worker)).fetchone()
    if row is not None:
        raise errors.SlotMismatchError(
            f'slot "{slot}" is the slot of the worker "{row[0]}"',
            hint=f"name another slot in CDC_WORKER_SLOT, or set CDC_WORKER_NAME to {row[0]}",
        )


def check(checkpoint: Checkpoint, *, slots: Sequence[str], system_identifier: str, wal_end: LSN) -> None:
    """Raise unless the checkpoint speaks of one of these slots on this cluster, at a point that its WAL has reached."""
    if checkpoint.slot not in slots:
        raise errors.SlotMismatchError(
            f'the worker "{checkpoint.worker}" reads the slot "{checkpoint.slot}", not "{slots[0]}"',
            hint="name that slot in CDC_WORKER_SLOT, or another worker in CDC_WORKER_NAME",
        )
    check_cluster(checkpoint, system_identifier)
    if checkpoint.position.lsn > wal_end:
        raise errors.ClusterMismatchError(
            f"the checkpoint is at {checkpoint.end}, and the server's WAL ends at {wal_end} ({now()}): "
            "the server was set back to an earlier state, and changes up to that position would be skipped",
            hint="see that this is the server that is meant; then: cdc-worker recover",
        )


def check_cluster(checkpoint: Checkpoint, system_identifier: str) -> None:
    """Raise unless it was made on this cluster."""
    if checkpoint.system_identifier != system_identifier:
        raise errors.ClusterMismatchError(
            f"the checkpoint is of the cluster {checkpoint.system_identifier}, and this is {system_identifier}: the "
            "database was restored or copied here; changes from "
            f"{checkpoint.end} there until now ({now()}) here are not recorded",
            hint="see that this is the server that is meant; then: cdc-worker recover",
        )


_SCOPE: Final = """
SELECT table_name, from_lsn, until_lsn, marked, NULL, NULL FROM cdc_worker.excluded
WHERE worker = %(worker)s AND system_identifier = %(cluster)s
UNION ALL
SELECT NULL, CASE WHEN system_identifier = %(cluster)s THEN erased_lsn ELSE '0/0' END, until_lsn, NULL, field, key
FROM cdc_worker.erased
WHERE worker = %(worker)s AND (system_identifier = %(cluster)s OR until_lsn IS NULL)
"""


_TOO_OLD: Final = "SELECT to_regclass('cdc_worker.skip') IS NULL"


def scope(connection: Connection, found: Checkpoint) -> Scope:
    """What the worker leaves out and keeps silent about: read it after the checkpoint, whose nonce it goes with.

    Tables that setup has not seen are not in it: nobody has noted from where on they can be recorded. Raises
    NotSetUpError also where the tables are those of an older version.
    """
    if fetch_one(connection, _TOO_OLD) == (True,):
        raise errors.NotSetUpError(
            "the tables of cdc-worker are not those of this version: there is no cdc_worker.skip",
            hint="run: cdc-worker setup",
        )
    excluded: dict[tuple[str, str], list[Stretch]] = {}
    marks: dict[tuple[str, str], list[Stretch]] = {}
    erased: dict[tuple[str, str], list[Stretch]] = {}
    parameters = {"worker": found.worker, "cluster": found.system_identifier}
    for table, begin, end, marked, field, key in fetched(connection, _SCOPE, parameters):
        stretch = (LSN.parse(begin), None if end is None else LSN.parse(end))
        if table is not None:
            (marks if marked else excluded).setdefault(qualified(table), []).append(stretch)
        else:
            erased.setdefault((field, key), []).append(stretch)
    return Scope(excluded, erased, marks)


def check_tables(checkpoint: Checkpoint, tables: list[str]) -> None:
    """Raise if it stands within a commit, whose changes were counted with other tables."""
    if checkpoint.position.commit_lsn and checkpoint.tables not in (None, tables):
        raise errors.CatalogMismatchError(
            f"the worker stopped within the commit at {checkpoint.position.commit_lsn}, whose changes were counted "
            f"with the tables {', '.join(checkpoint.tables or ())}, and the profile has {', '.join(tables)}",
            hint="run it with those tables until that commit is done, then change the profile",
        )


_BACKEND_ALIVE: Final = "SELECT count(*) FROM pg_stat_activity WHERE pid = %s AND backend_start = %s"

_SLOT_READER: Final = "SELECT max(active_pid) FROM pg_replication_slots WHERE slot_name = %s"

_TAKE_OVER: Final = """
UPDATE cdc_worker.checkpoint
SET owner = %s, tables = %s, backend_pid = pg_backend_pid(),
    backend_start = (SELECT backend_start FROM pg_stat_activity WHERE pid = pg_backend_pid())
WHERE worker = %s AND owner IS NOT DISTINCT FROM %s
"""


def take_over(
    connection: Connection, worker: str, tables: list[str], *, owner: uuid.UUID, reader: int, timeout: float = 10
) -> Checkpoint:
    """Become the process that may write, and captures these tables; returns the checkpoint, with its token as owner.

    A process has one token for its life: it may have become the owner without having heard so. Only who reads the
    slot may, through the process `reader` of the server: we may have slept meanwhile, and another taken over. The
    predecessor's writing backend is terminated first: what it has in hand is either in the position that is returned,
    or will never be. Raises CatalogMismatchError where that position has no meaning with these tables.
    """
    deadline = time.monotonic() + timeout
    while True:
        before = read(connection, worker)
        if fetch_one(connection, _SLOT_READER, before.slot) != (reader,):
            raise psycopg.OperationalError("another process has come to read the slot")
        backend = before.backend_pid, before.backend_start
        if before.backend_pid is not None and fetch_one(connection, _BACKEND_ALIVE, *backend) != (0,):
            connection.execute("SELECT pg_terminate_backend(%s)", (before.backend_pid,))
        else:
            check_tables(read(connection, worker), tables)  # what it had in hand may have been written since
            failpoints.reach("predecessor_ended")
            connection.execute(_TAKE_OVER, (owner, tables, worker, before.owner))
            failpoints.reach("taken_over")
            after = read(connection, worker)
            if after.owner == owner:
                return after
        if time.monotonic() > deadline:
            raise psycopg.OperationalError(f"the predecessor's backend {before.backend_pid} does not end")
        time.sleep(0.01)


def new_nonce(worker: str) -> str:
    """The statement after which whoever writes for this worker must look again at what it leaves out and erases."""
    return _NEW_NONCE.format(worker=worker).as_string()


_NEW_NONCE: Final = sql.SQL(
    "WITH backfills AS (UPDATE cdc_worker.backfill SET nonce = gen_random_uuid() WHERE worker = {worker}),"
    " replays AS (UPDATE cdc_worker.replay SET nonce = gen_random_uuid() WHERE worker = {worker})"
    " UPDATE cdc_worker.checkpoint SET nonce = gen_random_uuid() WHERE worker = {worker}"
)


def fenced(worker: str) -> errors.FencedError:
    """Another process writes now."""
    return errors.FencedError(
        f'another process has taken over as the worker "{worker}"', hint="nothing to do: it goes on there"
    )


_TALLY: Final = """
WITH kept AS (
    SELECT max(at) AS since FROM cdc_worker.tally WHERE worker = %(worker)s AND at < now() - interval '1 day'
), old AS (
    DELETE FROM cdc_worker.tally USING kept WHERE worker = %(worker)s AND at < since
)
INSERT INTO cdc_worker.tally (worker, at, activities, dead_letters)
SELECT worker, written_at, activities, dead_letters FROM cdc_worker.checkpoint WHERE worker = %(worker)s
ON CONFLICT DO NOTHING
"""


def tally(connection: Connection, worker: str) -> None:
    """Note how much was written when something was last, for status to tell how much was written since."""
    connection.execute(_TALLY, {"worker": worker})
