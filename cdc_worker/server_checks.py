"""Checks of the server: can it be decoded, does it allow it, and what would the worker do to it."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Final

import psycopg
from psycopg import sql

from cdc_worker import checkpoint, decoders, errors, pgoutput, postgres, setup, wal2json
from cdc_worker import replication as replicating
from cdc_worker import slot as slots
from cdc_worker.checks import Check, Finding, Look, failed, ok, unknown, warning
from cdc_worker.decoders import PLUGINS
from cdc_worker.postgres import fetch_one
from cdc_worker.slot import Slot
from cdc_worker.transform import PREFIXES

RELOAD: Final = "SELECT pg_reload_conf()"


def _name(name: str) -> str:
    return sql.Identifier(name).as_string()


def _slot_name(look: Look) -> str:
    return slots.own(look.connection, look.settings.worker, look.settings.slot)


def _slot(look: Look) -> Slot | None:
    return slots.read(look.connection, _slot_name(look))


def _running(found: Slot | None) -> bool:
    return found is not None and found.active_pid is not None and found.held_by_worker


# What it is


def version(look: Look) -> Iterator[Finding]:
    """Whether it is new enough."""
    postgres.check_version(look.server)
    yield ok("PostgreSQL " + fetch_one(look.connection, "SHOW server_version")[0])


def primary(look: Look) -> Iterator[Finding]:
    """Whether it can be written."""
    postgres.check_primary(look.server)
    yield ok("a primary")


def wal_level(look: Look) -> Iterator[Finding]:
    """Whether the WAL has what logical decoding needs."""
    postgres.check_wal_level(look.server)
    yield ok("logical")


def encoding(look: Look) -> Iterator[Finding]:
    """Whether all that the server sends can be read as text."""
    postgres.check_encoding(look.server)
    if look.server.encoding == "SQL_ASCII":
        yield warning(
            "the database's encoding is SQL_ASCII, which takes any bytes: a row that isn't UTF-8 stops the worker",
            postgres.into_utf8(look.server.database),
        )
    else:
        yield ok(look.server.encoding)


CLOCK_SKEW: Final = 5.0
"""Seconds that clocks may differ."""


def clock(look: Look) -> Iterator[Finding]:
    """Whether the server and this machine have the same time."""
    before = time.time()
    (there,) = fetch_one(look.connection, "SELECT extract(epoch FROM clock_timestamp())::float8")
    after = time.time()
    # It was asked at some moment between the two.
    skew = max(before - there, there - after, 0.0)
    if skew > CLOCK_SKEW:
        yield warning(
            f"the server's clock is {skew:,.0f} s {'behind' if there < before else 'ahead of'} this machine's: "
            "times in the worker's log and in what it records don't go together",
            "as an administrator of the machine whose clock is wrong: timedatectl set-ntp true",
        )
    else:
        yield ok("the server's goes with this machine's")


# What there is to spare


@dataclass(frozen=True, slots=True)
class _Room:
    """How many there may be of something, and how many there are. A worker takes so many `each`."""

    what: str
    limit: int
    used: int
    each: int
    fix: str

    def finding(self, *, satisfied: bool) -> Finding:
        """Whether it is enough for this worker, unless it is `satisfied`, and for another that is to take over."""
        spare, required = self.limit - self.used, 0 if satisfied else self.each
        said = f"{self.used} of {self.limit} {self.what} are in use"
        if spare < required:
            return failed(f"{said}, and the worker needs {self.each}", self.fix)
        if spare < required + self.each:
            return warning(f"{said}, which leaves too few for a stand-by, a take-over or a backup", self.fix)
        return ok(said)


def _restarting(setting: str, value: int) -> str:
    return f"as a superuser, on standbys first: ALTER SYSTEM SET {setting} = {value}; then: restart the server"


def senders(look: Look) -> Iterator[Finding]:
    """Whether there is a walsender to spare."""
    limit, used = fetch_one(
        look.connection, "SELECT current_setting('max_wal_senders')::int, count(*) FROM pg_stat_replication"
    )
    room = _Room("walsenders", limit, used, 1, _restarting("max_wal_senders", limit + 4))
    yield room.finding(satisfied=_running(_slot(look)))


_SLOTS: Final = """
SELECT current_setting('max_replication_slots')::int, count(*),
       string_agg(quote_ident(slot_name), ', ' ORDER BY slot_name) FILTER (WHERE NOT active AND slot_name <> %s)
FROM pg_replication_slots
"""


def replication_slots(look: Look) -> Iterator[Finding]:
    """Whether there is a slot to spare."""
    limit, used, idle = fetch_one(look.connection, _SLOTS, _slot_name(look))
    what = "replication slots" + (
        f" (nobody reads {idle}: pg_drop_replication_slot frees what nobody needs)" * bool(idle)
    )
    room = _Room(what, limit, used, 1, _restarting("max_replication_slots", limit + 4))
    yield room.finding(satisfied=_slot(look) is not None)


_UNREAD: Final = """
SELECT slot_name::text, (pg_current_wal_flush_lsn() - restart_lsn)::bigint
FROM pg_replication_slots
WHERE NOT active AND slot_name <> %s AND pg_current_wal_flush_lsn() - restart_lsn > %s
ORDER BY slot_name
"""


def other_slots(look: Look) -> Iterator[Finding]:
    """Whether the server keeps much WAL for another slot, which nobody reads: the disk is the same."""
    unread = look.connection.execute(_UNREAD, (_slot_name(look), look.settings.retained_alarm_bytes)).fetchall()
    for name, size in unread:
        yield warning(
            f'nobody reads the slot "{name}", for which the server keeps {size:,} bytes of WAL',
            f"as a superuser, unless it is still wanted: SELECT pg_drop_replication_slot({sql.quote(name)})",
        )
    if not unread:
        yield ok("none that nobody reads makes the server keep much WAL")


_CONNECTIONS: Final = """
WITH session AS (
    SELECT datname, usename, pid IN (SELECT pid FROM pg_stat_replication) AS sends FROM pg_stat_activity
    WHERE pid <> pg_backend_pid()
)
SELECT current_setting('max_connections')::int - CASE WHEN rolsuper THEN 0 ELSE
           current_setting('superuser_reserved_connections')::int
           + coalesce(current_setting('reserved_connections', true)::int, 0) END,
       (SELECT count(*) FROM session WHERE datname IS NOT NULL AND NOT sends), current_setting('max_connections')::int,
       CASE WHEN rolsuper THEN -1 ELSE datconnlimit END,
       (SELECT count(*) FROM session WHERE session.datname = d.datname),
       CASE WHEN rolsuper THEN -1 ELSE rolconnlimit END,
       (SELECT count(*) FROM session WHERE usename = rolname)
FROM pg_roles, pg_database d
WHERE rolname = current_user AND datname = current_database()
"""


def connections(look: Look) -> Iterator[Finding]:
    """Whether server, database and role have connections to spare: a worker needs two, one of them a walsender."""
    limit, used, maximum, of_database, used_there, of_role, used_by_role = fetch_one(look.connection, _CONNECTIONS)
    rooms = [_Room("connections", limit, used, 1, _restarting("max_connections", maximum + 10))]
    for kind, name, most, count in (
        ("DATABASE", look.server.database, of_database, used_there),
        ("ROLE", look.server.role, of_role, used_by_role),
    ):
        if most >= 0:
            what = f'connections of the {kind.lower()} "{name}"'
            enlarge = f"as a superuser: ALTER {kind} {_name(name)} CONNECTION LIMIT {max(most, count) + 4}"
            rooms.append(_Room(what, most, count, 2, enlarge))
    running = _running(_slot(look))
    for room in rooms:
        yield room.finding(satisfied=running)


# What may be read


def replication(look: Look) -> Iterator[Finding]:
    """Whether a replication connection can be had."""
    dsn = look.settings.dsn.get_secret_value()
    try:
        with closing(postgres.connect_replication(dsn, look.settings.worker)) as connection:
            fetch_one(connection, "IDENTIFY_SYSTEM")
        yield ok("a replication connection can be had")
    except psycopg.OperationalError:
        if not _running(_slot(look)):
            raise
        yield ok("the worker has one, and there is no other to be had")


def plugin(look: Look) -> Iterator[Finding]:
    """Whether the output plugin is there and allowed, and whether it can read the slot as the worker does."""
    found = _slot(look)
    if not look.server.may_replicate:
        yield unknown(f'role "{look.server.role}" may not try it', _right(look).hint)
        return
    ours = found if found is not None and found.plugin in PLUGINS and found.database == look.server.database else None
    wished = ours.plugin if ours is not None else look.settings.plugin
    try:
        yield _tried(look, ours, wal2json.PLUGIN if wished == "auto" else wished)
    except (errors.PluginMissingError, errors.PluginRefusedError) as error:
        if wished == "auto":
            tried = _tried(look, None, pgoutput.PLUGIN)
            yield tried.model_copy(update={"message": f"{tried.message}, for {error}"})
            return
        yield failed(str(error), error.hint or "")
        if ours is not None and ours.active_pid is None:
            yield failed(
                f'nobody can read the slot "{ours.name}" like this, and the server keeps {ours.retained:,} bytes of WAL'
                " for it, more and more",
                error.hint or "",
            )


def _tried(look: Look, found: Slot | None, plugin: str) -> Finding:
    """What comes of reading the worker's slot, or one for that moment. Raises errors of `slot.plugin_error`."""
    name = found.name if found is not None and found.active_pid is None and found.wal_status != "lost" else None
    try:
        said = f"{plugin}{_release(look, name, plugin)}"
        return ok(said if name is None else f'{said}, which can read the slot "{name}"')
    except (psycopg.errors.QueryCanceled, psycopg.errors.LockNotAvailable):
        # It has been loaded by then.
        held_by = slots.holders(look.connection, 0)
        return ok(f"{plugin}, of a version not known, for a slot to try it waits for open transactions ({held_by})")
    except psycopg.errors.ObjectInUse:
        return ok(f"{plugin}, with which the slot is being read")
    except psycopg.errors.ConfigurationLimitExceeded:
        said = "there is no replication slot to spare with which to try it"
        return ok(f"{plugin}, of a version not known: {said}") if _running(found) else unknown(said)
    except psycopg.Error as error:
        raise slots.plugin_error(error, look.server, plugin, slot=found is not None) from error


def _release(look: Look, name: str | None, plugin: str) -> str:
    """The release of the plugin, after it has begun to read a slot with the worker's options; see `slot.peek`."""
    options, optional = decoders.options(plugin, look.rules, PREFIXES, publication=look.settings.publication_name)
    replicating.offer(options, optional, lambda accepted: slots.peek(look.connection, name, accepted, plugin=plugin))
    return f" {slots.wal2json_release(look.connection, name)}" if plugin == wal2json.PLUGIN else ""


def _right(look: Look) -> postgres.ReplicationRight:
    return postgres.replication_right(look.connection, look.server.role)


_ROLE: Final = """
SELECT rolsuper, to_regnamespace('cdc_worker') IS NOT NULL,
       CASE WHEN rolvaliduntil < now() + make_interval(days => %s) THEN rolvaliduntil::text END
FROM pg_roles WHERE rolname = current_user
"""

PASSWORD_DAYS: Final = 14
"""So many days before it expires, a password is warned of."""


def role(look: Look) -> Iterator[Finding]:
    """Whether the role has the rights it needs."""
    name = look.server.role
    superuser, installed, valid_until = fetch_one(look.connection, _ROLE, PASSWORD_DAYS)
    faults = []
    if not look.server.may_replicate:
        right = _right(look)
        faults.append(failed(f'role "{name}" lacks {right.name}', right.hint))
    if installed:
        faults += _grants(look)
    else:
        faults.append(unknown("there are no tables of cdc-worker yet to have rights on", "cdc-worker setup"))
    if valid_until:
        forever = f"as a superuser: ALTER ROLE {_name(name)} VALID UNTIL 'infinity'"
        faults.append(warning(f'the password of role "{name}" is valid until {valid_until}', forever))
    yield from faults or [ok(f'"{name}"' + ", a superuser: it needs much less" * superuser)]


def _grants(look: Look) -> Iterator[Finding]:
    try:
        with suppress(psycopg.errors.InsufficientPrivilege):  # which is for the grants to explain
            checkpoint.read(look.connection, look.settings.worker)
        setup.check_grants(look.connection, look.profile, look.rules, look.server.role)
    except errors.NotSetUpError as error:
        yield unknown(f"there are no tables of cdc-worker yet to have rights on: {error}", error.hint)
    except errors.TargetUnusableError as error:
        yield failed(str(error), error.hint or "")


# What is set


@dataclass(frozen=True, slots=True)
class _Harm:
    """A setting that does harm: with the `bad` value, or with any but the `good` one if that is None."""

    name: str
    bad: str | None
    good: str
    why: str


_HARMS: Final = (
    _Harm("wal_sender_timeout", "0", "1min", "where a worker's machine has died, its slot is never free for another"),
    _Harm("fsync", "off", "on", "a crash of the server may lose what the slot no longer holds"),
    _Harm("full_page_writes", "off", "on", "a crash of the server may spoil what was recorded"),
    # From PostgreSQL 18 on.
    _Harm("idle_replication_slot_timeout", None, "0", "while the worker is away for so long, its slot is lost"),
)

_SETTINGS: Final = "SELECT name, reset_val, context, source FROM pg_settings WHERE name = ANY (%s)"

_DEFAULTS: Final = """
SELECT DISTINCT lower(split_part(setting, '=', 1))
FROM pg_db_role_setting, unnest(setconfig) AS setting
WHERE setrole IN (0, (SELECT oid FROM pg_roles WHERE rolname = current_user))
    AND setdatabase IN (0, (SELECT oid FROM pg_database WHERE datname = current_database()))
"""


def settings(look: Look) -> Iterator[Finding]:
    """Whether server, database and role have settings that do harm, and whether ours are in force instead."""
    postgres.check_options(look.server)
    postgres.check_writable(look.server)
    found = {name: rest for name, *rest in look.connection.execute(_SETTINGS, ([harm.name for harm in _HARMS],))}
    healthy = True
    for harm in _HARMS:
        value, context, source = found.get(harm.name, (harm.good, "", ""))
        if value == harm.bad or (harm.bad is None and value != harm.good):
            healthy = False
            yield warning(f"{harm.name} is {value}: {harm.why}", _better(look, harm, context, source))
    if healthy:
        defaults = {name for (name,) in look.connection.execute(_DEFAULTS)}
        overridden = ", ".join(sorted(postgres.OVERRIDDEN & defaults))
        yield ok(f"of role and database, {overridden}: overridden by the worker" if overridden else "none does harm")


def _better(look: Look, harm: _Harm, context: str, source: str) -> str:
    if context != "user":
        return f"as a superuser: ALTER SYSTEM SET {harm.name} = {sql.quote(harm.good)}; {RELOAD}"
    return postgres.better(look.server, harm.name, harm.good, source=source)


def synchronous_standby(look: Look) -> Iterator[Finding]:
    """Whether commits would wait for the worker."""
    postgres.check_no_standby(look.server, look.settings.worker)
    yield ok("commits don't wait for the worker")


def max_slot_wal_keep_size(look: Look) -> Iterator[Finding]:
    """Whether the server keeps WAL for the slot without a limit, or less than what is no reason for an alarm."""
    (megabytes,) = fetch_one(
        look.connection, "SELECT setting::bigint FROM pg_settings WHERE name = 'max_slot_wal_keep_size'"
    )
    alarm = look.settings.retained_alarm_bytes
    limit = -(-alarm * 4 >> 20)
    fix = f"as a superuser: ALTER SYSTEM SET max_slot_wal_keep_size = '{limit}MB'; {RELOAD}"
    if megabytes < 0:
        yield warning("unlimited: while nobody reads the slot, the server's disk fills", fix)
    elif megabytes << 20 < alarm:
        yield warning(
            f"{megabytes} MB, less than the {alarm:,} bytes of CDC_WORKER_RETAINED_ALARM_BYTES: "
            "the slot is lost before there is an alarm",
            fix,
        )
    else:
        yield ok(f"{megabytes} MB")


# Who is in the way

LONG: Final = 60.0
"""Seconds after which a transaction that writes is a long one."""


def open_transactions(look: Look) -> Iterator[Finding]:
    """Whether there are old transactions that have written: a new slot waits for them, and WAL is kept since."""
    own = postgres.application_name(look.settings.worker)  # what holds up the worker is told by writing
    found = [each for each in slots.open_transactions(look.connection, LONG) if each.name != own]
    hidden = [transaction.holder for transaction in found if transaction.since is None]
    finding, harm = (
        (failed, "the worker's slot can't be made before it ends")
        if _slot(look) is None
        else (warning, "the server keeps all WAL since then for the slot")
    )
    for each in found:
        if each.gid is not None and each.database is not None:
            end = f"ROLLBACK PREPARED {sql.quote(each.gid)}"
            if each.database != look.server.database:
                end = f"psql --dbname={shlex.quote(each.database)} --command={shlex.quote(end)}"
            said = f'{each.holder} of the database "{each.database}"'
        else:
            end = f"SELECT pg_terminate_backend({each.pid})"
            said = f"{each.holder} ({each.name}, {each.state})"
        if each.since is not None:
            yield finding(
                f"{said} has a transaction open since {each.since}: {harm}",
                f"as a superuser, unless it is still wanted: {end}",
            )
    if hidden:
        yield unknown(
            f'role "{look.server.role}" may not see since when others\' transactions are open: {", ".join(hidden)}',
            f"as a superuser: GRANT pg_read_all_stats TO {_name(look.server.role)}",
        )
    if not found:
        yield ok(f"none that has written is older than {LONG:g} s")


CHECKS: Final[tuple[Check, ...]] = (
    version,
    primary,
    wal_level,
    encoding,
    plugin,
    role,
    replication,
    senders,
    replication_slots,
    other_slots,
    connections,
    settings,
    synchronous_standby,
    max_slot_wal_keep_size,
    open_transactions,
    clock,
)
