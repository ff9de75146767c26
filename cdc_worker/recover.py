"""What leads on where nothing keeps what comes next: the slot is gone, lost or was moved, or the cluster is another.

What was committed meanwhile can't be recorded any more. So it is noted first of all that there is a gap, and from where
on; a slot that is of no use is dropped; then all is done that `setup` does, which makes one and lets the worker go on
where that begins; and beside a worker all rows are held against their log, and what is missing is made up for. It may
be interrupted anywhere, and repeated: what is to be done is seen from how things are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Final

import psycopg
from psycopg import sql

from cdc_worker import (
    catalog,
    checkpoint,
    cutover,
    ddl,
    errors,
    failpoints,
    gap,
    postgres,
    setup,
    slot,
    verify,
    worker,
)
from cdc_worker.activities import key_prefix
from cdc_worker.checkpoint import Checkpoint
from cdc_worker.config import Settings
from cdc_worker.errors import CdcWorkerError
from cdc_worker.gap import Gap
from cdc_worker.log import Logger
from cdc_worker.lsn import LSN
from cdc_worker.postgres import Connection
from cdc_worker.profile import Profile
from cdc_worker.rules import Rules, qualified
from cdc_worker.slot import Slot


def recover(settings: Settings, profile: Profile, *, log: Logger, dry_run: bool = False) -> Iterator[str]:
    """Lead on; yields a line for each thing done, or that would be. Where nothing is wrong nothing is done.

    Raises SlotMismatchError or SlotTakenError for a slot of that name that isn't the worker's to drop, and what setup,
    verify and a worker can fail with: then the same again leads on from there.
    """
    with ddl.connected(settings) as connection:
        if not dry_run:
            ddl.one_at_a_time(connection)
        way = _look(connection, settings, profile)
        left = gap.pending(connection, settings.worker)
        if way is None and not left:
            known, found = slot.check_checkpoint(connection, settings.worker, settings.slot)
            yield (
                f"nothing to do: the worker is at {known.position.lsn}, and its slot at {found.confirmed_flush_lsn}:"
                " nothing is missing between them"
            )
            return
        if dry_run:
            yield from _plan(way, left)
            return
        known = checkpoint.read(connection, settings.worker)
        wishes = _wishes(connection, known, failover=way is not None and way.failover)
        if way is not None:
            yield from _begin(connection, settings.worker, way)
    yield from setup.setup(settings, profile, wishes)
    yield from _reconcile(settings, profile, log)


@dataclass(frozen=True, slots=True)
class _Way:
    """What is wrong, and what leads on: with the slot of this `name`, once one that is `useless` is dropped."""

    error: CdcWorkerError
    known: Checkpoint
    name: str
    found: Slot | None
    useless: bool
    noted: Gap | None
    failover: bool


def _look(connection: Connection, settings: Settings, profile: Profile) -> _Way | None:
    """What is wrong, if anything is. Raises what there is to be done about it first."""
    known = checkpoint.read(connection, settings.worker)
    error = _fault(connection, settings, known)
    if error is None:
        return None
    noted = gap.open_one(connection, settings.worker)
    name = known.slot if known.slot in slot.names(settings.slot) else settings.slot
    checkpoint.check_unclaimed(connection, name, settings.worker)
    server, found = postgres.server(connection), slot.read(connection, name)
    useless = found is not None and _check_ours(found, connection.info.dbname)
    if found is not None and isinstance(error, errors.ClusterMismatchError) and server.may_replicate:
        useless = True  # it would tell the restore as well, as if somebody had made all the rows
    _check_rights(connection, settings, profile, error)
    if isinstance(error, errors.ClusterMismatchError):
        _check_unused(connection, profile, known)
    failover = (found is not None and found.failover) or (noted is not None and noted.failover)
    if not server.may_replicate and (found is None or useless):
        raise ddl.AdministratorError(_statements(settings, known, name, found, failover=failover))
    return _Way(error, known, name, found, useless, noted, failover)


def _fault(connection: Connection, settings: Settings, known: Checkpoint) -> CdcWorkerError | None:
    """What `run` would end with for good. Raises SlotMismatchError where only the settings are wrong."""
    try:
        slot.check_checkpoint(connection, settings.worker, settings.slot)
        gap.check(connection, settings.worker)
    except gap.GAPS as error:
        return error
    except errors.SlotMismatchError as error:
        if known.slot in slot.names(settings.slot):
            return error
        # The settings name another slot: they may, if the one that it was is not to be had any more.
        try:
            slot.check_checkpoint(connection, settings.worker, known.slot)
        except (*gap.GAPS, errors.SlotMismatchError) as other:
            return other
        raise
    return None


def _check_ours(found: Slot, database: str) -> bool:
    """Whether a slot that is ours is of no use. Raises unless it is ours, and nobody reads it."""
    try:
        slot.check_disposable(found, database=database)
    except errors.SlotMismatchError as error:
        drop = sql.SQL("SELECT pg_drop_replication_slot({})").format(found.name).as_string()
        raise errors.SlotMismatchError(
            str(error),
            hint=f"if nobody needs it: {drop}; or name another slot in CDC_WORKER_SLOT, and the worker as it is called"
            " in CDC_WORKER_NAME; then: cdc-worker recover",
        ) from error
    if found.active_pid is not None:
        raise slot.taken(found)
    # What it has still to tell is all the less that is missing.
    return found.wal_status == "lost" or found.confirmed_flush_lsn > found.wal_end


def _check_rights(connection: Connection, settings: Settings, profile: Profile, error: CdcWorkerError) -> None:
    """Raise TargetUnusableError without the rights that it takes, before anything is done."""
    target = sql.Identifier(*qualified(profile.target.table)).as_string()
    read = [sql.Identifier(*table).as_string() for table in cutover.recorded(settings.rules(profile))]
    needed = {target: ["SELECT", "INSERT"], "cdc_worker.checkpoint": ["SELECT", "UPDATE"], **verify.REPAIR}
    if ddl.exists(connection, "cdc_worker.gap"):
        needed["cdc_worker.gap"] = ["SELECT", "INSERT", "UPDATE"]
    if isinstance(error, errors.ClusterMismatchError):
        needed |= {table: rights for table, rights in gap.OF_LATER.items() if ddl.exists(connection, table)}
    needed |= {table: ["SELECT"] for table in read if ddl.exists(connection, table)}
    postgres.check_rights(connection, needed, partly=(), whole=[target, *read])


_BEYOND: Final = """SELECT count(*) > 0 FROM {table} WHERE {key} COLLATE "C" BETWEEN {begin} AND {end}"""


def _check_unused(connection: Connection, profile: Profile, known: Checkpoint) -> None:
    """Raise ClusterMismatchError if activities have keys of commits that this server has yet to come to.

    It was set back and the database was not: what is committed there next would be taken for what is recorded. Keys of
    another cluster are others.
    """
    (cluster,) = postgres.fetch_one(connection, "SELECT cdc_worker.cluster()")
    end = slot.committed_so_far(connection)
    table, key = sql.Identifier(*qualified(profile.target.table)), catalog.key_column(profile.target)
    if key is None:
        table, key = sql.Identifier("cdc_worker", "written_key"), "change_key"
    first, last = (key_prefix(known.worker, cluster, at) for at in (LSN(end + 1), LSN(2**64 - 1)))
    query = sql.SQL(_BEYOND).format(table=table, key=sql.Identifier(key), begin=first, end=last)
    if connection.execute(query).fetchone() == (True,):
        raise errors.ClusterMismatchError(
            f"activities are recorded of commits that the server, whose WAL ends at {end}, has yet to come to: it was"
            " set back, and what is committed there next would be taken for these",
            hint="restore the database as it was by then; or name another worker in CDC_WORKER_NAME, whose keys are its"
            " own, and: cdc-worker setup",
        )


def _statements(
    settings: Settings, known: Checkpoint, name: str, found: Slot | None, *, failover: bool
) -> Iterator[str]:
    """What an administrator can do for a role that may not replicate: the slot is then taken as it is."""
    if found is not None:
        yield sql.SQL("SELECT pg_drop_replication_slot({})").format(name).as_string()
    plugin = known.plugin if settings.plugin == "auto" else settings.plugin
    yield slot.creation(name, plugin, failover=failover).as_string()


_PROTECTED: Final = "SELECT count(*) > 0 FROM cdc_worker.schema_file WHERE strpos(name, 'protection') > 0"

_MARKED: Final = """
SELECT count(*) > 0 FROM cdc_worker.excluded
WHERE worker = %s AND system_identifier = %s AND until_lsn IS NULL AND marked
"""


def _wishes(connection: Connection, known: Checkpoint, *, failover: bool) -> setup.Wishes:
    """How it was set up. What triggers record is left to them: that is for cutover."""
    (protect,) = postgres.fetch_one(connection, _PROTECTED)
    (marked,) = postgres.fetch_one(connection, _MARKED, known.worker, known.system_identifier)
    return setup.Wishes(protect=protect, failover=failover, cutover=False, marked=marked)


def _plan(way: _Way | None, left: list[Gap]) -> Iterator[str]:
    if way is not None:
        yield f"wrong: {way.error}"
        if way.noted is None:
            yield f"it would be noted that changes from {way.known.end} on are missing"
        if way.useless:
            yield f'slot "{way.name}" would be dropped, and made anew'
        elif way.found is None:
            yield f'slot "{way.name}" would be made'
        at = "where that begins" if way.found is None or way.useless else f"at {way.found.confirmed_flush_lsn}"
        yield f'worker "{way.known.worker}" would go on {at}'
    for of in left:
        if not of.open:
            yield f"gap {of}: not reconciled"
    yield "beside a worker all tables would be verified, and what is missing made up for"


_DROP: Final = "SELECT pg_drop_replication_slot(%s)"


def _begin(connection: Connection, name: str, way: _Way) -> Iterator[str]:
    """Note the gap, and then drop what is of no use."""
    yield f"wrong: {way.error}"
    yield from ddl.performing(connection, setup.tables(connection))
    if way.noted is None or isinstance(way.error, errors.ClusterMismatchError):
        ddl.perform(connection, gap.noting(name, way.error, slot=way.name, failover=way.failover))
    if way.noted is None:
        failpoints.reach("gap_noted")
        yield f"noted: changes from {way.known.end} on are missing"
        if way.found is None and connection.info.server_version >= 170000:
            yield "note: whether the slot was a failover slot isn't known; to make it one: cdc-worker setup --failover"
    if way.useless:
        try:
            connection.execute(_DROP, (way.name,))
        except psycopg.errors.InsufficientPrivilege as error:
            raise slot.role_error(error, connection.info.user) from error
        failpoints.reach("slot_dropped")
        yield f'slot "{way.name}" is dropped'
    elif way.found is not None:
        yield f'slot "{way.name}" is taken as it is: it keeps what was committed since {way.found.confirmed_flush_lsn}'


_ELSEWHERE: Final = (
    "note: the worker was on this cluster before, and on another since: of a row that was recorded there it is known"
    " that it came to be, and no more; what became of it in the gap is not made up for"
)

_UNKNOWN: Final = (
    "what can't be known: of rows that were made and deleted in the gap nothing is left, several changes of a row are"
    " told as one, and nobody is named for any"
)


def _reconcile(settings: Settings, profile: Profile, log: Logger) -> Iterator[str]:
    """Hold all rows against their log, beside a worker, and make up for what is missing."""
    rules = settings.rules(profile)
    with closing(postgres.connect(settings.dsn.get_secret_value(), settings.worker)) as connection:
        gaps = gap.pending(connection, settings.worker)
        tables, notes = _verifiable(connection, settings, profile, rules)
        yield from (f"gap {of}" for of in gaps)
        known = checkpoint.read(connection, settings.worker)
        if any(of.elsewhere for of in gaps) and not gap.clusters(connection, known).former:
            yield _ELSEWHERE
        yield from notes
        done: list[verify.Verified] = []

        def found() -> Iterator[verify.Finding]:
            for of in verify.verify(settings, profile, tables, verify.Wishes(repair=True), log=log):
                if isinstance(of, verify.Verified):
                    done.append(of)
                yield of

        if tables:
            with worker.beside(settings, profile, log.bind(slot=settings.slot)):
                yield from verify.lines(found())
        if undecided := sum(of.undecided for of in done):
            raise errors.ServerError(
                f"of {undecided:,} rows it couldn't be told whether anything is missing, so the gap is not reconciled",
                hint="run it again: cdc-worker recover",
            )
        gap.reconciled(connection, gaps)
        yield f"reconciled, by {sum(of.activities for of in done):,} activities; {_UNKNOWN}"
        if wrong := sum(of.disagree - of.repaired for of in done):
            raise errors.ServerError(
                f"of {wrong:,} rows something is missing that can't be made up for",
                hint="which these are, and why it can't: cdc-worker verify --repair",
            )


def _verifiable(
    connection: Connection, settings: Settings, profile: Profile, rules: Rules
) -> tuple[list[str], list[str]]:
    """The tables that can be verified, and notes of those that can't yet."""
    known = checkpoint.read(connection, settings.worker)
    ends = checkpoint.scope(connection, known).open_ends({*cutover.recorded(rules)})
    left = ends.waiting | ends.marked | ends.fresh
    catalog.check(connection, profile, rules)
    names = verify.tables(profile, ())
    notes = [
        f"note: {name} is not verified, for not all of it is the worker's to record (see: cdc-worker doctor)"
        for name in names
        if qualified(name) in left
    ]
    return [name for name in names if qualified(name) not in left], notes
