"""The replication slot: the server's promise to keep the WAL that we have not confirmed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import psycopg
from psycopg import sql

from cdc_worker import checkpoint, errors, pgoutput, wal2json
from cdc_worker.checkpoint import Checkpoint, now
from cdc_worker.decoders import PLUGINS
from cdc_worker.lsn import LSN
from cdc_worker.postgres import (
    DOCTOR,
    NAMEDATALEN,
    Connection,
    ReplicationRight,
    Server,
    application_name,
    fetch_one,
    listed,
    told,
)


@dataclass(frozen=True, slots=True)
class Slot:
    """A logical slot as pg_replication_slots shows it. `retained` is in bytes; `wal_end` is the server's.

    A doctor, which may hold it for a moment, is nobody.
    """

    name: str
    plugin: str
    database: str
    confirmed_flush_lsn: LSN
    wal_end: LSN
    retained: int
    wal_status: str
    failover: bool
    active_pid: int | None
    holder: str | None
    """application_name of the process that reads it."""
    client: str | None
    """Where that process comes from, if this may be known."""

    @property
    def held_by_worker(self) -> bool:
        """Whether its reader is a cdc-worker."""
        return (self.holder or "").startswith(application_name(""))

    @property
    def reader(self) -> str:
        """Who reads it."""
        return f"process {self.active_pid} ({', '.join(filter(None, [self.holder or 'no name', self.client]))})"


def names(base: str) -> tuple[str, ...]:
    """The names that the slot of a worker may have whose settings name this one: a copy has its plugin's behind it."""
    return (base, *(f"{base[: NAMEDATALEN - 2 - len(plugin)]}_{plugin}" for plugin in PLUGINS))


def own(connection: Connection, worker: str, base: str) -> str:
    """The name of the worker's slot: the one that its checkpoint names, or `base` if there is no asking that."""
    try:
        return checkpoint.slot_of(connection, worker) or base
    except (errors.NotSetUpError, psycopg.errors.InsufficientPrivilege, psycopg.errors.LockNotAvailable):
        return base


_SLOT: Final = """
SELECT s.slot_name::text, s.plugin::text, s.database::text, s.confirmed_flush_lsn, pg_current_wal_flush_lsn(),
       (pg_current_wal_flush_lsn() - s.restart_lsn)::bigint, s.wal_status,
       coalesce(to_jsonb(s) -> 'failover' = 'true', false), a.pid, a.application_name,
       host(a.client_addr)
FROM pg_replication_slots s
LEFT JOIN pg_stat_activity a ON a.pid = s.active_pid AND NOT starts_with(a.application_name, '{doctor}')
WHERE s.slot_name = %s
""".replace("{doctor}", DOCTOR)


def read(connection: Connection, name: str) -> Slot | None:
    """The slot, or None when there is none of that name."""
    row = connection.execute(_SLOT, (name,)).fetchone()
    if row is None:
        return None
    name, plugin, database, confirmed, wal_end, retained, wal_status, failover, *reader = row
    return Slot(
        name,
        plugin or "",
        database or "",
        LSN.parse(confirmed or "0/0"),
        LSN.parse(wal_end),
        retained or 0,
        wal_status or "lost",
        failover,
        *reader,
    )


# Also before setup has given it the column. In a copy of the database it is not ours, nor once it is another worker's.
_SPARE: Final = """
SELECT slot_name::text
FROM cdc_worker.checkpoint c JOIN pg_replication_slots s ON slot_name = to_jsonb(c) ->> 'spare_slot'
WHERE worker = %s AND s.database = current_database() AND slot_name NOT IN (SELECT slot FROM cdc_worker.checkpoint)
    AND system_identifier = (SELECT system_identifier::text FROM pg_control_system())
"""


def spare(connection: Connection, worker: str) -> Slot | None:
    """What a switch of the plugin that was interrupted has left to be dropped."""
    rows = checkpoint.fetched(connection, _SPARE, (worker,))
    return read(connection, rows[0][0]) if rows else None


def check_unread(slot: Slot, *, database: str) -> LSN:
    """Raise unless this slot can be a new worker's; returns where it begins."""
    check(slot, name=slot.name, database=database, checkpoint=slot.confirmed_flush_lsn)
    if slot.active_pid is not None:
        raise taken(slot)
    return slot.confirmed_flush_lsn


def check_disposable(slot: Slot, *, database: str) -> None:
    """Raise unless this slot is one that a worker for this database may have used."""
    if slot.plugin not in PLUGINS or slot.database != database:
        raise errors.SlotMismatchError(
            f'slot "{slot.name}" is of the plugin "{slot.plugin}" and the database "{slot.database}": '
            "no cdc-worker of this database has used it",
            hint="name the worker's slot in CDC_WORKER_SLOT",
        )


def taken(slot: Slot) -> errors.SlotTakenError:
    """Something else reads the slot."""
    return errors.SlotTakenError(
        f'slot "{slot.name}" is read by {slot.reader}',
        hint=f"stop that process, or: SELECT pg_terminate_backend({slot.active_pid})",
    )


def given_up(slot: Slot, known: Checkpoint, limit: int) -> errors.SlotGivenUpError:
    """The slot makes the server keep more WAL than its operator allows."""
    return errors.SlotGivenUpError(
        f'slot "{slot.name}" is given up: the server kept {slot.retained:,} bytes of WAL for it, more than the '
        f"{limit:,} of CDC_WORKER_RETAINED_LIMIT_BYTES; changes from {known.end} to {slot.wal_end} (now, {now()}), and"
        " later ones, are not kept",
        hint="see what held it up; then: cdc-worker recover",
    )


_FREE: Final = """
SELECT pg_terminate_backend(pid) FROM pg_replication_slots JOIN pg_stat_activity ON pid = active_pid
WHERE slot_name = %s AND application_name = %s
"""

_DROP: Final = "SELECT pg_drop_replication_slot(%s)"


def give_up(connection: Connection, name: str, worker: str) -> None:
    """Drop the slot, whichever process of the worker still reads it. Raises SlotTakenError if another does."""
    while (found := read(connection, name)) is not None:
        try:
            connection.execute(_DROP, (name,))
        except psycopg.errors.ObjectInUse:
            if not free(connection, name, worker) and found.active_pid is not None:
                raise taken(found) from None


def free(connection: Connection, name: str, worker: str) -> bool:
    """End the process of the server that serves the slot's reader, if that is this worker; returns whether it is."""
    try:
        freed = connection.execute(_FREE, (name, application_name(worker))).fetchall() != []
    except psycopg.errors.InsufficientPrivilege as error:
        role = sql.Identifier(connection.info.user).as_string()
        raise errors.SlotTakenError(
            f'slot "{name}" is read by another role\'s worker, which the role {role} may not end',
            hint=f"as a superuser: GRANT pg_signal_backend TO {role}",
        ) from error
    time.sleep(0.05)
    return freed


def check(
    slot: Slot | None, *, name: str, database: str, checkpoint: LSN, since: str | None = None, until: str = "now"
) -> Slot:
    """Raise unless this is the slot that the checkpoint speaks of, and nothing between the two is missing.

    `since` and `until` tell of the checkpoint, and of what is now, with their times.
    """
    since = since or str(checkpoint)
    if slot is None:
        raise errors.SlotMissingError(
            f'slot "{name}" does not exist: changes from {since} to {until}, and later ones, are not kept',
            hint="find out who dropped it; then: cdc-worker recover",
        )
    if slot.plugin not in PLUGINS:
        raise errors.SlotMismatchError(
            f'slot "{name}" is of the plugin "{slot.plugin}", not {" or ".join(PLUGINS)}'
            if slot.plugin
            else f'slot "{name}" is a physical one',
            hint="name another slot in CDC_WORKER_SLOT, then: cdc-worker setup",
        )
    if slot.database != database:
        raise errors.SlotMismatchError(
            f'slot "{name}" belongs to the database "{slot.database}", not to "{database}"',
            hint="name another slot in CDC_WORKER_SLOT, or the other database in CDC_WORKER_DSN",
        )
    if slot.wal_status == "lost":
        raise errors.SlotLostError(
            f'slot "{name}" is lost: the server discarded WAL that it needed (max_slot_wal_keep_size): '
            f"changes from {since} to {until}, and later ones, are not kept",
            hint="raise max_slot_wal_keep_size; then: cdc-worker recover",
        )
    if slot.confirmed_flush_lsn > checkpoint:
        raise errors.SlotAheadError(
            f'slot "{name}" is ahead of the checkpoint: changes from {since} to {slot.confirmed_flush_lsn}, where it is'
            f" by now ({now()}), are not kept",
            hint="find out who advanced it or made it anew; then: cdc-worker recover",
        )
    return slot


def check_checkpoint(connection: Connection, worker: str, base: str) -> tuple[Checkpoint, Slot]:
    """The worker's checkpoint and its slot, of which settings name the `base`. Raises unless these and the cluster fit.

    Which slot it is the checkpoint says: it is another one once the plugin was switched.
    """
    known = checkpoint.read(connection, worker)
    while True:
        # In this order: a worker may be at it, who writes the checkpoint first and confirms it then.
        name = known.slot
        slot = read(connection, name)
        known = checkpoint.read(connection, worker)
        if known.slot == name:
            break
    (system_identifier,) = fetch_one(connection, "SELECT system_identifier::text FROM pg_control_system()")
    wal_end = committed_so_far(connection)
    checkpoint.check(known, slots=names(base), system_identifier=system_identifier, wal_end=wal_end)
    return known, check(
        slot,
        name=name,
        database=connection.info.dbname,
        checkpoint=known.position.lsn,
        since=known.end,
        until=f"{wal_end} (now, {now()})",
    )


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


@dataclass(frozen=True, slots=True)
class OpenTransaction:
    """A transaction that has written, and for which a new slot waits. It is prepared if it has a `gid`, not a `pid`.

    `since` and `state` are None if the role may not see them.
    """

    pid: int | None
    name: str
    state: str | None
    since: str | None
    gid: str | None
    database: str | None

    @property
    def holder(self) -> str:
        """Who holds it open."""
        return f"process {self.pid}" if self.gid is None else f"prepared transaction {sql.quote(self.gid)}"


# pg_locks, for pg_stat_activity shows other roles' transactions to superusers only.
_OPEN: Final = """
SELECT l.pid, coalesce(nullif(a.application_name, ''), 'no name'), a.state,
       coalesce(a.xact_start, p.prepared)::timestamptz(0)::text, p.gid, p.database::text
FROM pg_locks l
LEFT JOIN pg_stat_activity a USING (pid)
LEFT JOIN pg_prepared_xacts p ON p.transaction = l.transactionid
WHERE l.locktype = 'transactionid' AND l.mode = 'ExclusiveLock' AND l.granted
    AND coalesce(a.xact_start, p.prepared, '-infinity') < clock_timestamp() - make_interval(secs => %s)
ORDER BY age(l.transactionid) DESC
"""


def open_transactions(connection: Connection, age: float) -> list[OpenTransaction]:
    """Those that have been open for so many seconds, or may have been, the oldest first."""
    return [OpenTransaction(*row) for row in connection.execute(_OPEN, (age,))]


def holders(connection: Connection, age: float) -> str:
    """Who holds up a new slot for so many seconds."""
    return ", ".join(transaction.holder for transaction in open_transactions(connection, age))


def creation(name: str, plugin: str, *, failover: bool = False) -> sql.Composed:
    """The query that makes a slot and returns its first position."""
    arguments = sql.SQL(", failover => true") if failover else sql.SQL("")
    query = sql.SQL("SELECT lsn FROM pg_create_logical_replication_slot({}, {}{})")
    return query.format(name, plugin, arguments)


def check_failover(server: Server) -> None:
    """Raise unless the server knows failover slots."""
    if server.version < 170000:
        raise errors.ServerError(
            f"failover slots need PostgreSQL 17, and this is {server.version // 10000}", hint="leave out --failover"
        )


@contextmanager
def patient(connection: Connection, seconds: float) -> Iterator[None]:
    """Let the server work for so long at each statement, whatever it waits for: a transaction's end is a lock, too."""
    before = fetch_one(connection, "SELECT current_setting('statement_timeout'), current_setting('lock_timeout')")
    connection.execute(_TIMEOUTS, (f"{round(seconds * 1000)}ms", "0"))
    try:
        yield
    finally:
        connection.execute(_TIMEOUTS, before)


_TIMEOUTS: Final = "SELECT set_config('statement_timeout', %s, false), set_config('lock_timeout', %s, false)"


def create(
    connection: Connection, name: str, plugin: str, server: Server, *, failover: bool = False, timeout: float = 30
) -> LSN:
    """Make the slot and return its first position. Waits until the transactions that run now have ended.

    A `failover` slot is kept on standbys as well, which PostgreSQL knows from version 17 on.
    """
    if failover:
        check_failover(server)
    try:
        with patient(connection, timeout):
            ((position,),) = connection.execute(creation(name, plugin, failover=failover))
    except psycopg.errors.QueryCanceled as error:
        held_by = holders(connection, timeout)
        raise errors.ServerError(
            f'slot "{name}" could not be made within {timeout:g} s: it waits for open transactions ({held_by})',
            hint="end them, then again: cdc-worker setup",
        ) from error
    except psycopg.Error as error:
        raise plugin_error(error, server, plugin, slot=False) from error
    return LSN.parse(position)


def choose(connection: Connection, server: Server, wished: str) -> tuple[str, str]:
    """The plugin to make a slot with, and why: wal2json where it can be had, unless another is wished for.

    Raises what keeps a slot from being made with either.
    """
    if wished != "auto":
        return wished, "CDC_WORKER_PLUGIN says so"
    untried = pgoutput.PLUGIN, f'role "{server.role}" may not try {wal2json.PLUGIN}, and every server has it'
    if not server.may_replicate:
        return untried
    try:
        peek(connection, None, {"format-version": "2"})
    except (psycopg.errors.QueryCanceled, psycopg.errors.LockNotAvailable):
        pass  # by open transactions; it has been loaded by then
    except psycopg.Error as error:
        known = plugin_error(error, server, wal2json.PLUGIN, slot=False)
        if isinstance(known, RoleRefusedError):
            return untried
        if not isinstance(known, errors.PluginMissingError | errors.PluginRefusedError):
            raise known from error
        return pgoutput.PLUGIN, str(known)
    return wal2json.PLUGIN, "the server has and allows it"


def check_plugin(slot: Slot, wished: str) -> None:
    """Raise SlotMismatchError if settings name the other plugin than the slot's."""
    if wished not in ("auto", slot.plugin):
        raise errors.SlotMismatchError(
            f'slot "{slot.name}" is of the plugin {slot.plugin}, and CDC_WORKER_PLUGIN is {wished}',
            hint="run: cdc-worker switch-plugin",
        )


_PEEK: Final = "SELECT count(*) FROM pg_logical_slot_peek_binary_changes(%s, '0/1', NULL, VARIADIC %s)"

_CREATE_TEMPORARY: Final = "SELECT pg_create_logical_replication_slot(%s, %s, true)"


def peek(
    connection: Connection,
    name: str | None,
    options: Mapping[str, str],
    *,
    plugin: str = wal2json.PLUGIN,
    timeout: float = 2,
) -> None:
    """Let its plugin begin to read a slot with these options, up to its first record. The slot stays as it is.

    Without a name it is one of this `plugin` for that moment; QueryCanceled if open transactions hold it up for so many
    seconds.
    """
    words = [word for option in options.items() for word in option]
    if name is not None:
        connection.execute(_PEEK, (name, words))
        return
    temporary = f"cdc_worker_{connection.info.backend_pid}"
    with patient(connection, timeout):
        connection.execute(_CREATE_TEMPORARY, (temporary, plugin))
    connection.execute(_PEEK, (temporary, words))  # after an error the server drops it itself
    connection.execute(_DROP, (temporary,))


def wal2json_release(connection: Connection, name: str | None) -> str:
    """Which releases of wal2json this may be, by the options that it knows; the slot is as for `peek`."""
    for option, release in wal2json.RELEASES.items():
        try:
            peek(connection, name, {"format-version": "2", option: "0"})
        except psycopg.errors.InvalidParameterValue:
            continue
        return release
    return "before 2.3"


def allow(role: str, allowed: list[str], plugin: str = wal2json.PLUGIN, *, database: str | None = None) -> str:
    """The statement that lets a role use the plugin as well. A list: in one pair of quotes it would be one library.

    Of what may be set for a role, that in a `database` counts most.
    """
    libraries = sql.SQL(", ").join(map(sql.Identifier, dict.fromkeys([*allowed, plugin])))
    where = sql.SQL(" IN DATABASE {}").format(sql.Identifier(database)) if database is not None else sql.SQL("")
    statement = sql.SQL("ALTER ROLE {}{} SET output_plugin_libraries = {}")
    return statement.format(sql.Identifier(role), where, libraries).as_string()


class RoleRefusedError(errors.ServerError):
    """The server has no slots for a role that it should have them for, by all that is known of it."""


_PERMITTING: Final = ("CheckSlotPermissions", "check_permissions")
"""What in the server asks whether a role may replicate: in slot.c, and in slotfuncs.c before version 15."""


def role_error(error: psycopg.Error, role: str) -> Exception:
    """What the server's refusal of slots to a role asks of the operator; the error itself if it is another."""
    if error.sqlstate != "42501" or error.diag.source_function not in _PERMITTING:
        return error
    return RoleRefusedError(
        f'the server refuses slots to the role "{role}": {told(error)} (SQLSTATE 42501)',
        hint=ReplicationRight(role).hint,
    )


def plugin_error(
    error: psycopg.Error, server: Server, plugin: str = wal2json.PLUGIN, *, slot: bool = True
) -> Exception:
    """What the server's refusal to decode with the plugin asks of the operator; the error itself if it is another.

    If there is a `slot` already, it can be switched to the other plugin.
    """
    if server.may_replicate and (refused := role_error(error, server.role)) is not error:
        return refused
    known = server.output_plugin_libraries
    other = next(each for each in PLUGINS if each != plugin)
    way = f"to go on with {other}: cdc-worker switch-plugin" if slot else f"name {other} in CDC_WORKER_PLUGIN"
    install = f"for example: apt-get install postgresql-{server.version // 10000}-wal2json"
    if error.sqlstate == "58P01" and plugin == pgoutput.PLUGIN:
        hint = (
            "as a superuser, with what else stands there: ALTER SYSTEM SET dynamic_library_path = '$libdir';"
            " SELECT pg_reload_conf()"
        )
        return errors.PluginMissingError(f"the server has no output plugin {plugin}", hint=hint)
    if error.sqlstate == "58P01":
        return errors.PluginMissingError(
            f"the server has no output plugin {plugin}", hint=f"{way}; or install {plugin} there, {install}"
        )
    if error.sqlstate == "22023" and plugin == wal2json.PLUGIN:
        return errors.PluginMissingError(
            f"the server's {plugin} is too old, for 2.0 or later is needed: {error.diag.message_primary}",
            hint=f"{way}; or install a newer one there, {install}",
        )
    if error.sqlstate == "42501" and server.may_replicate and (known is None or plugin not in listed(known)):
        allowed = ["pgoutput"] if known is None else listed(known)
        statement = allow(server.role, allowed, plugin, database=server.database)
        return errors.PluginRefusedError(
            f"the server refuses the output plugin {plugin}: output_plugin_libraries "
            + (f"is {known}" if known is not None else "doesn't name it"),
            hint=f"{way}; or, to use {plugin}, as a superuser: {statement}",
        )
    if error.sqlstate == "53400":
        return errors.ServerError("all replication slots of the server are taken", hint="raise max_replication_slots")
    return error
