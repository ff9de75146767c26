"""What was committed and is not recorded, because nothing kept it: noted before anything is done about it.

A gap is open until there is a checkpoint beyond it, from which on all is recorded again, and pending until the rows
have been held against their log. So nobody forgets it, whatever is interrupted in between.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Final

import psycopg
from psycopg import sql

from cdc_worker import checkpoint, ddl, errors
from cdc_worker.activities import Clusters
from cdc_worker.checkpoint import Checkpoint, utc
from cdc_worker.ddl import Step
from cdc_worker.lsn import LSN
from cdc_worker.postgres import Connection

GAPS: Final = (
    errors.SlotMissingError,
    errors.SlotLostError,
    errors.SlotAheadError,
    errors.ClusterMismatchError,
)
"""What `run` ends with where something is missing, and goes on missing until the worker is given another beginning."""


@dataclass(frozen=True, slots=True)
class Gap:
    """A row of cdc_worker.gap. Positions of its begin are those of the cluster that the checkpoint was of."""

    number: int
    exit_code: int
    from_lsn: LSN
    from_time: datetime
    until_lsn: LSN | None
    until_time: datetime | None
    failover: bool
    elsewhere: bool
    """Whether it began on another cluster."""

    @property
    def open(self) -> bool:
        """Whether it goes on."""
        return self.until_lsn is None

    def __str__(self) -> str:
        until = f"{self.until_lsn} ({utc(self.until_time)})" if self.until_time else "now"
        return f"from {self.from_lsn} ({utc(self.from_time)}) to {until}"


_PENDING: Final = """
SELECT gap, exit_code, from_lsn, from_time, until_lsn, until_time, failover,
       coalesce(system_identifier <> until_system_identifier, false)
FROM cdc_worker.gap
WHERE worker = %s AND reconciled_at IS NULL ORDER BY gap
"""


def pending(connection: Connection, worker: str) -> list[Gap]:
    """The worker's gaps that nothing has made up for yet, the oldest first."""
    try:
        rows = connection.execute(_PENDING, (worker,)).fetchall()
    except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
        return []  # tables of an older version
    return [
        Gap(number, code, LSN.parse(since), from_time, None if until is None else LSN.parse(until), *rest)
        for number, code, since, from_time, until, *rest in rows
    ]


_MOVES: Final = """
SELECT system_identifier, until_system_identifier FROM cdc_worker.gap
WHERE worker = %s AND system_identifier <> until_system_identifier ORDER BY gap DESC
"""


def clusters(connection: Connection, known: Checkpoint) -> Clusters:
    """The clusters on which the worker has recorded, as far as it was led on from one to the next.

    Where it has come back to one, what it recorded there is from before and after the others: nobody knows an order.
    """
    try:
        moves = connection.execute(_MOVES, (known.worker,)).fetchall()
    except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
        moves = []  # tables of an older version
    found = [known.system_identifier]
    for before, after in moves:
        if after == found[0]:
            found.insert(0, before)
    *former, current = found
    return Clusters(current, tuple(former) if len({*found}) == len(found) else ())


def open_one(connection: Connection, worker: str) -> Gap | None:
    """The one that goes on until the worker's checkpoint is made anew, if there is one."""
    return next((gap for gap in pending(connection, worker) if gap.open), None)


def check(connection: Connection, worker: str) -> None:
    """Raise what `run` ended with, if that one goes on: nothing else may tell of it.

    A server that was set back comes to where the checkpoint is as time goes by, and all seems to be in order.
    """
    noted = open_one(connection, worker)
    if noted is not None:
        kind = next(kind for kind in GAPS if kind.exit_code == noted.exit_code)
        raise kind(
            f"it was noted that changes {noted}, and later ones, are not kept, and the worker was not led on",
            hint="run: cdc-worker recover",
        )


# What is published was noted for a slot that is no more, or has other numbers in a database that was restored.
_NOTE: Final = """\
INSERT INTO cdc_worker.gap (worker, exit_code, reason, system_identifier, from_lsn, from_time, failover)
SELECT worker, {}, {}, system_identifier, lsn, coalesce(committed_at, written_at), {}
FROM cdc_worker.checkpoint WHERE worker = {}
ON CONFLICT (worker) WHERE until_lsn IS NULL DO NOTHING"""

_READS: Final = "UPDATE cdc_worker.checkpoint SET slot = {}, published = NULL WHERE worker = {}"

# Of a later state of this cluster: what is committed here when the WAL comes to such a position is another thing. What
# was to be so by then is so now, as it is in the database. By the time the gap ends the WAL may have come to it.
_OF_LATER: Final = (
    # Also of another cluster: such a partition may be there, or another table of its name.
    """\
DELETE FROM cdc_worker.partition USING cdc_worker.checkpoint c
WHERE partition.worker = {} AND until_lsn IS NOT NULL AND c.worker = partition.worker
    AND (system_identifier <> cdc_worker.cluster() OR until_lsn > pg_current_wal_insert_lsn())""",
    """\
DELETE FROM cdc_worker.excluded
WHERE worker = {} AND system_identifier = cdc_worker.cluster() AND from_lsn >= pg_current_wal_insert_lsn()
    AND until_lsn IS NOT NULL""",
    """\
UPDATE cdc_worker.excluded
SET from_lsn = least(from_lsn, pg_current_wal_insert_lsn()),
    until_lsn = CASE WHEN until_lsn IS NOT NULL THEN least(until_lsn, pg_current_wal_insert_lsn()) END
WHERE worker = {} AND system_identifier = cdc_worker.cluster()
    AND greatest(from_lsn, until_lsn) > pg_current_wal_insert_lsn()""",
    """\
DELETE FROM cdc_worker.erased e
WHERE worker = {} AND system_identifier = cdc_worker.cluster() AND erased_lsn > pg_current_wal_insert_lsn()
    AND EXISTS (SELECT FROM cdc_worker.erased later
                WHERE later.erased_lsn > e.erased_lsn AND later.worker = e.worker AND later.field = e.field
                    AND later.key = e.key AND later.system_identifier = e.system_identifier)""",
    """\
UPDATE cdc_worker.erased
SET erased_lsn = least(erased_lsn, pg_current_wal_insert_lsn()),
    until_lsn = CASE WHEN until_lsn IS NOT NULL THEN least(until_lsn, pg_current_wal_insert_lsn()) END
WHERE worker = {} AND system_identifier = cdc_worker.cluster()
    AND greatest(erased_lsn, until_lsn) > pg_current_wal_insert_lsn()""",
)

OF_LATER: Final = {
    "cdc_worker.partition": ["SELECT", "DELETE"],
    "cdc_worker.excluded": ["SELECT", "UPDATE", "DELETE"],
    "cdc_worker.erased": ["SELECT", "UPDATE", "DELETE"],
}
"""The rights that it takes, where the cluster is another or was set back."""


def noting(worker: str, error: errors.CdcWorkerError, *, slot: str, failover: bool) -> Step:
    """Note that one begins where the checkpoint is, unless that is noted. The worker is to read this slot after it."""
    note = sql.SQL(_NOTE).format(error.exit_code, str(error), failover, worker)
    of_later = _OF_LATER if isinstance(error, errors.ClusterMismatchError) else ()
    statements = (sql.SQL(statement).format(worker) for statement in of_later)
    return Step("", ddl.transaction(note, sql.SQL(_READS).format(slot, worker), *statements))


# The point where the first slot began tells what may have been recorded otherwise: it stays, where positions mean the
# same. Who had the checkpoint's row until now has written all that it will.
_GO_ON: Final = """\
UPDATE cdc_worker.checkpoint SET plugin = s.plugin, system_identifier = cdc_worker.cluster(),
    slot_created_at = CASE WHEN system_identifier = cdc_worker.cluster()
                           THEN least(slot_created_at, confirmed_flush_lsn) ELSE confirmed_flush_lsn END,
    spare_slot = CASE WHEN system_identifier = cdc_worker.cluster() THEN spare_slot END,
    lsn = confirmed_flush_lsn, commit_lsn = '0/0', changes = 0, owner = NULL, written_at = now()
FROM pg_replication_slots s WHERE worker = {} AND slot_name = slot"""

_END: Final = """\
UPDATE cdc_worker.gap g
SET until_system_identifier = c.system_identifier, until_lsn = lsn, until_time = clock_timestamp()
FROM cdc_worker.checkpoint c WHERE c.worker = {} AND g.worker = c.worker AND until_lsn IS NULL"""


def ending(worker: str, position: LSN) -> Step:
    """The checkpoint is where the slot is, which ends the gap: whatever is committed later is recorded."""
    statements = (sql.SQL(statement).format(worker) for statement in (_GO_ON, _END))
    return Step(
        f'worker "{worker}" goes on from {position}', ddl.transaction(checkpoint.new_nonce(worker), *statements)
    )


_RECONCILED: Final = "UPDATE cdc_worker.gap SET reconciled_at = now() WHERE gap = ANY (%s)"


def reconciled(connection: Connection, gaps: list[Gap]) -> None:
    """Note that all rows have been held against their log since these have ended."""
    connection.execute(_RECONCILED, ([gap.number for gap in gaps],))
