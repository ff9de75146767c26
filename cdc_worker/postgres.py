"""Connections to the server, what its errors mean, and what it says of itself."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, LiteralString, NamedTuple, TypeVar

import psycopg
from psycopg import sql
from psycopg.abc import PQGen
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import TupleRow
from psycopg.waiting import wait

from cdc_worker import errors
from cdc_worker.errors import CdcWorkerError

T = TypeVar("T")

Connection = psycopg.Connection[TupleRow]

APPLICATION_NAME: Final = "cdc-worker"

NAMEDATALEN: Final = 64
"""Of a longer name the server cuts the end off, and then some would be alike."""


def application_name(worker: str) -> str:
    """What the connections of a worker are called, those of its commands as well: as much as a server takes."""
    name = f"{APPLICATION_NAME} {worker}"
    if len(name) < NAMEDATALEN:
        return name
    return f"{name[: NAMEDATALEN - 10]}-{hashlib.sha256(worker.encode()).hexdigest()[:8]}"


DOCTOR: Final = f"{APPLICATION_NAME}-doctor"
"""What a doctor's connection is called, which may hold a slot for a moment."""


# A role's or database's defaults must change neither what the plugin prints nor when we are interrupted.
_PINNED: Final = {
    "bytea_output": "hex",
    "client_min_messages": "notice",
    "datestyle": "ISO",
    "extra_float_digits": "1",
    "intervalstyle": "postgres",
    "lc_monetary": "C",
    "quote_all_identifiers": "off",  # in values that are names of relations and the like
    "standard_conforming_strings": "on",
    "statement_timeout": "0",
    "lock_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
}

_WRITING: Final = {**_PINNED, "synchronous_commit": "on"}

_UNLIMITED: Final = ("idle_session_timeout", "transaction_timeout")
"""Timeouts that not every version has: they can't be named before we are connected.

To a walsender each commit that it reads is a transaction.
"""

OVERRIDDEN: Final = frozenset((*_WRITING, *_UNLIMITED))
"""Settings of which a role's or database's defaults don't matter."""

# A connection whose other end is gone without a word is noticed within a minute and a half, if nothing beyond it
# answers in its place: see the watchdog for that.
_KEEPALIVES: Final = {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 6, "connect_timeout": 10}

# And if something was sent there, which would else be tried again for a quarter of an hour. Only where little is sent:
# it also ends a connection to who is there and doesn't read, as a process that waits for a lock with a COPY to come.
_UNANSWERED: Final = {**_KEEPALIVES, "tcp_user_timeout": 60_000}

PATIENCE: Final = 10.0
"""So many seconds an answer may take before the server is asked after it, where connect_timeout doesn't say."""

BRIEF: Final = 3.0
"""So many seconds a brief connection waits for an answer: longer than the server works on one."""


class _Heard(psycopg.Connection[TupleRow]):
    """A connection on which nobody waits for ever: after `patience` seconds without a byte, `ask` tells what to wait
    for; if that is nothing, the connection is lost, and is given up there as well.
    """

    patience: float
    ask: Callable[[], str | None]
    give_up: Callable[[], None]

    def wait(self, gen: PQGen[T], interval: float = 0.1, timeout: float | None = None) -> T:
        return super().wait(self.within_patience(gen), interval, timeout)

    def within_patience(self, gen: PQGen[T]) -> PQGen[T]:
        heard_at, lost = time.monotonic(), False
        try:
            wants = next(gen)
            while True:
                ready = yield wants
                now = time.monotonic()
                if ready:
                    heard_at, lost = now, False
                elif lost:
                    self.give_up()
                    raise psycopg.OperationalError(f"an answer of the server did not come for {now - heard_at:.0f} s")
                elif now > heard_at + self.patience:
                    lost = self.ask() is None  # unless it has come meanwhile
                    heard_at = heard_at if lost else time.monotonic()
                wants = gen.send(ready)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]


@contextmanager
def waiting_for_nothing(connection: Connection) -> Iterator[None]:
    """What is done meanwhile waits for no lock: where the server doesn't answer in time, the connection is lost.

    Who asked after it would otherwise go on waiting for a server that is frozen, for which nobody can ask.
    """
    if not isinstance(connection, _Heard):
        yield
        return
    ask, connection.ask = connection.ask, lambda: None
    try:
        yield
    finally:
        connection.ask = ask


def finished(gen: PQGen[T], connection: Connection) -> T:
    """What comes of what is done through this connection. May be interrupted, and the connection is left as it is."""
    if isinstance(connection, _Heard):
        gen = connection.within_patience(gen)
    # Without an interval the socket would be asked again and again, at once.
    return wait(gen, connection.fileno(), interval=0.1)


def _connect(
    dsn: str,
    worker: str,
    pinned: dict[str, str],
    *,
    name: str | None = None,
    timeouts: dict[str, int] = _KEEPALIVES,
    **parameters: Any,
) -> _Heard:
    own = conninfo_to_dict(dsn)
    options = str(own.get("options") or os.environ.get("PGOPTIONS", ""))
    options = " ".join([options, *(f"-c {name}={value}" for name, value in pinned.items())])
    defaults = {name: value for name, value in timeouts.items() if name not in own and name not in parameters}
    if "PGCONNECT_TIMEOUT" in os.environ:
        defaults.pop("connect_timeout", None)
    try:
        connection = _Heard.connect(
            make_conninfo(dsn, **defaults),
            autocommit=True,
            application_name=name or application_name(worker),
            options=options.strip(),
            **parameters,
        )
    except psycopg.Error as error:
        raise _connection_error(error) from error
    # An answer may take as long as the connection itself might have, until the server is asked whether it is at work.
    given = connection.info.get_parameters().get("connect_timeout", "0")
    pid = connection.info.backend_pid
    connection.patience, connection.ask = max(int(given), 0) or PATIENCE, lambda: at_work(dsn, worker, pid, name=name)
    connection.give_up = lambda: end_lost(dsn, worker, pid, name=name)
    return connection


def connect(dsn: str, worker: str, *, name: str | None = None) -> Connection:
    """An ordinary connection, in autocommit, whose commits are durable whatever the role's defaults are.

    It has the worker's `name`, if it is given none.
    """
    return _unlimited(_connect(dsn, worker, _WRITING, name=name, client_encoding="UTF8"))


# Without parameters, which a walsender doesn't take.
_LIFT: Final = """
SELECT set_config(name, '0', false) FROM unnest('{%s}'::text[]) name WHERE current_setting(name, true) IS NOT NULL
""" % ",".join(_UNLIMITED)  # noqa: UP031  # it has braces


def _unlimited(connection: Connection) -> Connection:
    connection.execute(_LIFT.encode())
    return connection


def connect_briefly(dsn: str, worker: str) -> Connection:
    """A connection beside those that do the work, which waits for no one: its commits may be lost in a crash."""
    brief = {"synchronous_commit": "local", "lock_timeout": "500ms", "statement_timeout": "1s"}
    connection = _connect(dsn, worker, {**_WRITING, **brief}, client_encoding="UTF8", connect_timeout=2)
    connection.patience, connection.ask, connection.give_up = BRIEF, lambda: None, lambda: None
    return _unlimited(connection)


def connect_reading(dsn: str, worker: str) -> Connection:
    """A connection that only reads, and to which values print as they do in the stream."""
    reading = {**_PINNED, "timezone": "UTC", "default_transaction_read_only": "on"}
    return _unlimited(_connect(dsn, worker, reading, timeouts=_UNANSWERED, client_encoding="UTF8"))


def connect_replication(dsn: str, worker: str) -> Connection:
    """A connection that speaks the replication protocol."""
    # From a database in SQL_ASCII even its own names would come as bytes, until the stream asks for them.
    pinned = {**_PINNED, "timezone": "UTC"}
    try:
        connection = _connect(dsn, worker, pinned, timeouts=_UNANSWERED, client_encoding="UTF8", replication="database")
    except errors.AuthenticationError as error:
        if re.fullmatch(_NO_WALSENDER, str(error)):
            # An ordinary connection can tell how this server gives the right.
            with suppress(psycopg.Error, CdcWorkerError), connect_briefly(dsn, worker) as ordinary:
                error.hint = replication_right(ordinary, ordinary.info.user).hint
        raise
    return _unlimited(connection)


_NO_POOLER: Final = "name the server itself, no pooler: replication needs a connection of its own"

_NO_WALSENDER: Final = r"must be superuser or replication role .*|permission denied to start WAL sender"

MEND_OPTIONS: Final = "mend the options in CDC_WORKER_DSN or PGOPTIONS"

_MEND_CREDENTIALS: Final = "mend user and password (CDC_WORKER_DSN, ~/.pgpass) or pg_hba.conf"

_REFUSALS: Final[tuple[tuple[str, type[CdcWorkerError], str], ...]] = (
    (
        r"FATAL:  (database .* does not exist)",
        errors.DatabaseMissingError,
        "name another database in the DSN, or create it",
    ),
    (
        r"FATAL:  (password authentication failed .*|role .* does not exist|role .* is not permitted to log in|"
        r".* authentication failed .*|no pg_hba.conf entry .*|pg_hba.conf rejects .*|.* valid client certificate)",
        errors.AuthenticationError,
        _MEND_CREDENTIALS,
    ),
    (r"(no password supplied)", errors.AuthenticationError, _MEND_CREDENTIALS),
    (
        r"FATAL:  (permission denied for database .*)",
        errors.AuthenticationError,
        "as its owner: GRANT CONNECT ON DATABASE {db} TO {user}",
    ),
    (
        rf"FATAL:  ({_NO_WALSENDER})",
        errors.AuthenticationError,
        "as a superuser: ALTER ROLE {user} REPLICATION",
    ),
    (
        r"FATAL:  (conversion between UTF8 and .* is not supported)",
        errors.ServerError,
        "dump the database in an encoding that knows all of its characters, and restore that into one of UTF8",
    ),
    (
        r"(server does not support SSL.*|.*certificate verify failed.*|server certificate for .* does not match .*|"
        r"root certificate file .* does not exist)",
        errors.AuthenticationError,
        "mend sslmode and sslrootcert, or the server's certificate",
    ),
    (
        r"FATAL:  (unrecognized configuration parameter .*|invalid value for parameter .*|permission denied to set .*|"
        r"invalid command-line argument .*)",
        errors.ConnectionStringError,
        MEND_OPTIONS,
    ),
    (
        r"(unsupported startup parameter.*)",
        errors.ConnectionStringError,
        _NO_POOLER,
    ),
    # What psycopg and libpq find wrong before they have asked anybody.
    (
        r"^(could not match .*|bad value for .*)|^connection is bad: (?!connection to server|could not|no error)(.*)",
        errors.ConnectionStringError,
        "mend CDC_WORKER_DSN, or the service or variable of libpq that it relies on",
    ),
)


def _connection_error(error: psycopg.Error) -> CdcWorkerError | psycopg.Error:
    """What a failed connection asks of the operator; the error itself when it may heal.

    libpq has no SQLSTATE for a connection that failed, only text.
    """
    for pattern, kind, hint in _REFUSALS:
        if match := re.search(pattern, str(error)):
            names = (error.pgconn.user, error.pgconn.db) if error.pgconn else (b"", b"")
            user, db = (sql.Identifier(name.decode(errors="replace")).as_string() for name in names)
            return kind(match[match.lastindex or 0], hint=hint.format(user=user, db=db))
    return error


_HINTS: Final = {
    "42501": "give the role this right, or name one that has it",
    "55P03": "run it again when whoever holds the lock has ended",
    "55000": "if this is a standby, name the primary in CDC_WORKER_DSN, or promote it: SELECT pg_promote()",
    "25006": "let the database be written, or name the primary in CDC_WORKER_DSN",
}


def failure(error: psycopg.Error) -> CdcWorkerError:
    """What an error of the server that no other place has foreseen asks of the operator."""
    state = error.sqlstate
    if isinstance(error, psycopg.DataError) and state is None:  # psycopg's own, which shows what it stumbled over
        return errors.ServerError("a value can't be sent, or can't be read", hint="report it")
    if state is None:
        return errors.ServerError(
            told_by_libpq(error),
            hint="see that the server is up, can be reached, and has max_connections and max_wal_senders to spare",
        )
    words = told(error)
    if state == "42P01" and '"cdc_worker.' in words:
        return errors.NotSetUpError(
            f"the tables of cdc-worker are not those of this version: {words}", hint="run: cdc-worker setup"
        )
    said = f"the server refused: {words} (SQLSTATE {state})"
    if is_about_the_row(state):
        said = f"the server refused a row (SQLSTATE {state})"
    elif error.diag.message_primary is None:
        said = str(error)
    kind = errors.TargetUnusableError if state[:2] == "42" or state in ("25006", "0A000") else errors.ServerError
    return kind(said, hint=_HINTS.get(state, "the server's log tells more"))


def told_by_libpq(error: psycopg.Error) -> str:
    """What libpq says of a connection that can't be had, or broke. The server's last words are a part of that.

    These may go on with a context, in which a COPY shows the row that it was at.
    """
    words = str(error)
    return " ".join((words if words.startswith("connection ") else words.partition("\n")[0]).split())


_DECODING: Final = ('"wal2json"', '"pgoutput"')


def told(error: psycopg.Error) -> str:
    """What the server says, where no value of a row can be in it: else what psycopg calls such an error.

    Values are in its words of data and constraints; and, whatever the SQLSTATE, in those of functions and triggers, or
    of the statements that these put together. Then there is a context.
    """
    words, context = error.diag.message_primary, error.diag.context
    within = context is not None and not any(plugin in context for plugin in _DECODING)
    if words is None or within or (error.sqlstate is not None and is_about_the_row(error.sqlstate)):
        return type(error).__name__
    return words


def error(sqlstate: str, what: str) -> psycopg.Error:
    """An exception for an SQLSTATE, without the server's message, which may hold values of a row."""
    try:
        kind = psycopg.errors.lookup(sqlstate)
    except KeyError:
        kind = psycopg.DatabaseError
    return kind(f"{what} (SQLSTATE {sqlstate})")


TRANSIENT_CLASSES: Final = frozenset(("08", "40", "53", "55", "57", "58"))
"""SQLSTATE classes that may heal: connection, rollback, resources, object state, operator, system."""

ROW_CLASSES: Final = frozenset(("22", "23", "54"))
"""SQLSTATE classes that are about the row: data, constraints, and limits such as an index entry too long."""


def is_transient(sqlstate: str | None) -> bool:
    """Whether it may heal by itself. A connection that broke has no SQLSTATE."""
    return sqlstate is None or sqlstate[:2] in TRANSIENT_CLASSES


def is_about_the_row(sqlstate: str) -> bool:
    """Whether another row might be accepted. P0001 is what the target's triggers raise."""
    return sqlstate[:2] in ROW_CLASSES or sqlstate == "P0001"


@dataclass(frozen=True, slots=True)
class Blocker:
    """Who holds a lock that another waits for. `end` is the statement that ends it."""

    who: str
    end: str

    def __str__(self) -> str:
        return self.who


_BLOCKERS: Final = """
WITH held (pid, virtualtransaction) AS (
    SELECT l.pid, l.virtualtransaction  -- whatever would keep the worker's rows out
    FROM pg_locks l JOIN unnest(%(tables)s::text[]) AS name ON l.relation = to_regclass(name)
    WHERE l.granted AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
        AND l.mode IN ('ShareLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')
    UNION
    SELECT blocking.pid, blocking.virtualtransaction
    FROM pg_stat_activity a
    JOIN pg_locks waiting ON waiting.pid = a.pid AND NOT waiting.granted
    CROSS JOIN unnest(pg_blocking_pids(a.pid)) AS blocker (pid)
    JOIN pg_locks blocking ON blocking.granted AND blocking.pid IS NOT DISTINCT FROM nullif(blocker.pid, 0)
        AND blocking.locktype = waiting.locktype AND blocking.database IS NOT DISTINCT FROM waiting.database
        AND blocking.relation IS NOT DISTINCT FROM waiting.relation
        AND blocking.transactionid IS NOT DISTINCT FROM waiting.transactionid
    WHERE a.application_name = %(name)s
)
SELECT format('process %%s (%%s)', pid, concat_ws(', ', coalesce(nullif(application_name, ''), backend_type, 'no name'),
              host(client_addr), state, 'for ' || date_trunc('second', clock_timestamp() - xact_start))),
       format('SELECT pg_terminate_backend(%%s)', pid)
FROM held JOIN pg_stat_activity USING (pid) WHERE pid <> pg_backend_pid() AND application_name <> %(name)s
UNION
SELECT format('the prepared transaction %%L', gid), format('ROLLBACK PREPARED %%L', gid)
FROM held JOIN pg_locks own ON own.pid IS NULL AND own.virtualtransaction = held.virtualtransaction
JOIN pg_prepared_xacts ON transaction = own.transactionid
WHERE held.pid IS NULL
ORDER BY 1
"""


def blockers(connection: Connection, worker: str, tables: Collection[str] = ()) -> list[Blocker]:
    """Who holds a lock that the worker waits for, or one of these `tables` in a way that it would have to."""
    parameters = {"name": application_name(worker), "tables": [*tables]}
    return [Blocker(*row) for row in connection.execute(_BLOCKERS, parameters)]


# What waits for a client, or for something to do, would have answered.
_AT_WORK: Final = """
SELECT coalesce(format('waits (%%s: %%s)', wait_event_type, nullif(wait_event, '')), 'is at work')
FROM pg_stat_activity
WHERE pid = %s AND application_name = %s AND coalesce(wait_event_type, '') NOT IN ('Client', 'Activity')
"""


def at_work(dsn: str, worker: str, pid: int, *, name: str | None = None) -> str | None:
    """What keeps a process of the server that serves the worker from being heard, or None: it would have answered.

    It has the worker's `name`, if it was given none. Asked through another connection. Where there is none to be had,
    that it can't be asked is the answer.
    """
    try:
        with closing(connect_briefly(dsn, worker)) as connection:
            row = connection.execute(_AT_WORK, (pid, name or application_name(worker))).fetchone()
    except (psycopg.Error, CdcWorkerError) as error:
        return f"can't be asked after ({type(error).__name__})"
    return None if row is None else str(row[0])


_END_LOST: Final = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE pid = %s AND application_name = %s AND wait_event_type IN ('Client', 'Activity')
"""


def end_lost(dsn: str, worker: str, pid: int, *, name: str | None = None) -> None:
    """End the process of a lost connection, if the server can be asked to.

    It may be within a transaction, whose locks would hold up the worker for hours: so long the server waits for us.
    """
    with suppress(psycopg.Error, CdcWorkerError), closing(connect_briefly(dsn, worker)) as connection:
        connection.execute(_END_LOST, (pid, name or application_name(worker)))


@dataclass(frozen=True, slots=True)
class Session:
    """A process of the server that serves, or served, a connection. Of numbers there are only so many."""

    pid: int
    began: datetime


def session(connection: Connection) -> Session:
    """Who serves this connection."""
    return Session(*fetch_one(connection, "SELECT pid, backend_start FROM pg_stat_get_activity(pg_backend_pid())"))


_END: Final = """
SELECT pg_terminate_backend(pid, 500) FROM pg_stat_activity
WHERE application_name = %s AND (pid, backend_start) IN (SELECT * FROM unnest(%s::int[], %s::timestamptz[]))
"""


_TRIES: Final = 6


def end(connection: Connection, worker: str, sessions: Collection[Session]) -> int:
    """End those of these sessions of the worker that the server has not noticed to be over; returns how many.

    Of a connection that was given up it may hear for hours that it is still there, with the slot and its locks. Whoever
    is told to end says so to his client first. Where nobody takes that from him any more he hangs there, and nothing
    but to be told once more lets him go: no timeout of the server does.
    """
    found = [of.pid for of in sessions], [of.began for of in sessions]
    count = 0
    for _ in range(_TRIES if sessions else 0):
        ended = [over for (over,) in connection.execute(_END, (application_name(worker), *found))]
        count = count or len(ended)
        if all(ended):
            break
    return count


_RIGHTS: Final = """
SELECT relation, array_agg(privilege ORDER BY number) FILTER (
           WHERE NOT has_table_privilege(relation, privilege)
             AND NOT (relation = ANY (%s) AND has_any_column_privilege(relation, privilege))),
       row_security_active(relation)
FROM unnest(%s::text[], %s::text[]) WITH ORDINALITY AS needed (relation, privilege, number)
GROUP BY relation ORDER BY min(number)
"""


def check_rights(
    connection: Connection, needed: Mapping[str, Sequence[str]], *, partly: Collection[str], whole: Collection[str]
) -> None:
    """Raise TargetUnusableError unless our role may do this with tables, and sees all rows of those read as a `whole`.

    Tables are named as in SQL. Of those that are needed `partly` the right to some columns is enough.
    """
    pairs = [(relation, privilege) for relation, privileges in needed.items() for privilege in privileges]
    asked = [relation for relation, _ in pairs], [privilege for _, privilege in pairs]
    found = connection.execute(_RIGHTS, ([*partly], *asked)).fetchall()
    role = connection.info.user
    lacking = [f"{', '.join(privileges)} ON {relation}" for relation, privileges, _ in found if privileges]
    name = sql.Identifier(role).as_string()
    if lacking:
        grants = "; ".join(f"GRANT {grant} TO {name}" for grant in lacking)
        raise errors.TargetUnusableError(f'role "{role}" lacks {", ".join(lacking)}', hint=f"as the owner: {grants}")
    if hidden := [relation for relation, _, active in found if active and relation in whole]:
        raise errors.TargetUnusableError(
            f'row security is on for {", ".join(hidden)}: rows that it hides from the role "{role}" would be missed',
            hint=f"as a superuser: ALTER ROLE {name} BYPASSRLS",
        )


def with_parameters(query: sql.Composed) -> sql.Composed:
    """The query as psycopg takes it along with parameters: percent signs that names and constants have are doubled."""

    def doubled(part: sql.Composable) -> sql.Composable:
        if isinstance(part, sql.Composed):
            return with_parameters(part)
        return part if isinstance(part, sql.SQL) else sql.SQL(part.as_string().replace("%", "%%"))

    return sql.Composed([doubled(part) for part in query])


def fetch_one(connection: Connection, query: LiteralString, *parameters: Any) -> tuple[Any, ...]:
    """The only row of a query that always has one."""
    row = connection.execute(query, parameters).fetchone()
    assert row is not None
    return row


# Amazon RDS has this role, and lets its members replicate: nobody is given the attribute there.
_MEMBER: Final = """EXISTS (
    SELECT FROM pg_roles rds WHERE rds.rolname = 'rds_replication' AND pg_has_role(r.oid, rds.oid, 'MEMBER'))"""

MAY_REPLICATE: Final = "(rolreplication OR rolsuper OR {member})".replace("{member}", _MEMBER)
"""Whether the role of a row r of pg_roles may replicate."""

_BY_MEMBERSHIP: Final = """
SELECT count(*) > 0 FROM pg_roles
WHERE rolname = 'rds_replication' AND NOT EXISTS (SELECT FROM pg_roles r WHERE r.rolname = %s AND {member})
""".replace("{member}", _MEMBER)


@dataclass(frozen=True, slots=True)
class ReplicationRight:
    """How a role is let replicate: as a member of rds_replication, or else by an attribute."""

    role: str
    by_membership: bool = False

    @property
    def name(self) -> str:
        """What a role has that may replicate."""
        return "rds_replication" if self.by_membership else "REPLICATION"

    @property
    def statement(self) -> str:
        """What gives it."""
        role = sql.Identifier(self.role).as_string()
        return f"GRANT {self.name} TO {role}" if self.by_membership else f"ALTER ROLE {role} {self.name}"

    @property
    def hint(self) -> str:
        """Who gives it, and how."""
        return f"as {'a member of rds_superuser' if self.by_membership else 'a superuser'}: {self.statement}"


def replication_right(connection: Connection, role: str) -> ReplicationRight:
    """How a role that may not replicate, or has yet to be made, is let do so on this server."""
    # Whom the server refuses as a member isn't on RDS, whatever roles came from there.
    (by_membership,) = fetch_one(connection, _BY_MEMBERSHIP, role)
    return ReplicationRight(role, by_membership)


@dataclass(frozen=True, slots=True)
class Server:
    """What the worker needs to know of a server. `time_zone` is the database's, `version` server_version_num.

    `standbys` are the names of those that stream now. `dropped` are settings of ours that the connection lost on its
    way. `read_only` is the source of default_transaction_read_only where that is on. `output_plugin_libraries` is None
    where there is no such setting, and for a role that may not see it.
    """

    version: int
    is_standby: bool
    wal_level: str
    encoding: str
    time_zone: str
    role: str
    database: str
    synchronous_standby_names: str
    standbys: list[str]
    dropped: list[str]
    read_only: str | None
    may_replicate: bool
    output_plugin_libraries: str | None


# The server makes a list of all settings each time it is asked for some: it is asked once.
_SERVER: Final = """
WITH known AS MATERIALIZED (SELECT name, setting, reset_val, source FROM pg_settings)
SELECT current_setting('server_version_num')::int, pg_is_in_recovery(),
       current_setting('wal_level'), current_setting('server_encoding'),
       coalesce((SELECT split_part(c, '=', 2)
                 FROM pg_db_role_setting s, unnest(s.setconfig) c
                 WHERE s.setrole = 0 AND c ILIKE 'timezone=%%'
                   AND s.setdatabase = (SELECT oid FROM pg_database WHERE datname = current_database())),
                (SELECT reset_val FROM known WHERE name = 'TimeZone')),
       current_user::text, current_database()::text, current_setting('synchronous_standby_names'),
       ARRAY(SELECT DISTINCT application_name FROM pg_stat_replication
             WHERE pid NOT IN (SELECT active_pid FROM pg_replication_slots
                               WHERE slot_type = 'logical' AND active_pid IS NOT NULL)
                 AND application_name <> 'pg_basebackup'),
       ARRAY(SELECT format('%%s = %%s', name, reset_val)
             FROM known JOIN unnest(%s::text[], %s::text[]) AS asked (key, value) ON lower(name) = key
             WHERE split_part(reset_val, ',', 1) <> value  -- the order of a date's fields is left as it is
             ORDER BY 1),
       (SELECT source FROM known WHERE name = 'default_transaction_read_only' AND setting = 'on'),
       (SELECT {may_replicate} FROM pg_roles r WHERE rolname = current_user),
       CASE WHEN pg_has_role('pg_read_all_settings', 'USAGE') THEN current_setting('output_plugin_libraries', true)
            ELSE (SELECT substr(c, strpos(c, '=') + 1)
                  FROM pg_db_role_setting s, unnest(s.setconfig) c
                  WHERE c LIKE 'output\\_plugin\\_libraries=%%'
                    AND s.setrole IN (0, (SELECT oid FROM pg_roles WHERE rolname = current_user))
                    AND s.setdatabase IN (0, (SELECT oid FROM pg_database WHERE datname = current_database()))
                  ORDER BY s.setrole = 0, s.setdatabase = 0 LIMIT 1) END
""".replace("{may_replicate}", MAY_REPLICATE)


def server(connection: Connection) -> Server:
    """Ask the server about itself."""
    return Server(*fetch_one(connection, _SERVER, list(_WRITING), list(_WRITING.values())))


def check_server(server: Server, worker: str) -> None:
    """Raise for a server on which the worker can't work, or would do harm."""
    check_version(server)
    check_primary(server)
    check_options(server)
    check_writable(server)
    check_encoding(server)
    check_wal_level(server)
    check_no_standby(server, worker)


def check_version(server: Server) -> None:
    """Raise ServerError for a server that is too old."""
    if server.version < 140000:
        raise errors.ServerError(
            f"the server is PostgreSQL {server.version // 10000}, and 14 or later is needed",
            hint="upgrade the server; pg_upgrade doesn't keep slots: begin anew with cdc-worker setup",
        )


def check_primary(server: Server) -> None:
    """Raise for a standby. As it may be promoted, the error is one that may heal."""
    if server.is_standby:
        raise error("55000", "the server is a standby, where nothing can be written")


def check_options(server: Server) -> None:
    """Raise ConnectionStringError unless what our connections ask for is in force."""
    if server.dropped:
        raise errors.ConnectionStringError(
            f"the connection's options were dropped on the way, as a pooler does: {', '.join(server.dropped)}",
            hint=_NO_POOLER,
        )


def check_writable(server: Server) -> None:
    """Raise TargetUnusableError if transactions are read-only."""
    if server.read_only is not None:
        raise errors.TargetUnusableError(
            "default_transaction_read_only is on: nothing can be written (SQLSTATE 25006)",
            hint=better(server, "default_transaction_read_only", "off", source=server.read_only),
        )


def better(server: Server, name: str, value: str, *, source: str) -> str:
    """How a setting of role, database or server is overridden for the worker; `source` is as in pg_settings."""
    if source == "client":
        return MEND_OPTIONS
    role, database = sql.Identifier(server.role).as_string(), sql.Identifier(server.database).as_string()
    return f"as a superuser: ALTER ROLE {role} IN DATABASE {database} SET {name} = {sql.quote(value)}"


_UNREADABLE: Final = frozenset(("EUC_TW", "MULE_INTERNAL"))
"""Encodings that Python can't read, though a server can have them."""


def check_encoding(server: Server) -> None:
    """Raise ServerError if what the server sends can't be read."""
    if server.encoding in _UNREADABLE:
        raise errors.ServerError(
            f"the database's encoding is {server.encoding}, which can't be read", hint=into_utf8(server.database)
        )


def into_utf8(database: str) -> str:
    """The commands that copy a database into one of the encoding UTF8."""
    old, new = shlex.quote(database), shlex.quote(f"{database}_utf8")
    return (
        f"as a superuser: createdb --encoding=UTF8 --template=template0 --locale=C {new}; "
        f"pg_dump --encoding=UTF8 {old} | psql --quiet --set=ON_ERROR_STOP=1 --output=/dev/null {new}; "
        f"then: name {new} in CDC_WORKER_DSN"
    )


def check_wal_level(server: Server) -> None:
    """Raise WalLevelError unless the server writes what logical decoding needs."""
    if server.wal_level != "logical":
        raise errors.WalLevelError(
            f'wal_level is "{server.wal_level}"',
            hint="as a superuser: ALTER SYSTEM SET wal_level = logical; then: restart the server",
        )


def check_no_standby(server: Server, worker: str) -> None:
    """Raise SynchronousStandbyError if commits would wait for this worker."""
    name = application_name(worker)
    if matches_standby(server.synchronous_standby_names, name):
        others = without_standby(server.synchronous_standby_names, name, server.standbys)
        raise errors.SynchronousStandbyError(
            f'synchronous_standby_names is "{server.synchronous_standby_names}" and would count this worker, whose own '
            "commits would then wait for itself, and the application's with them",
            hint="as a superuser, name the real standbys there: "
            f"ALTER SYSTEM SET synchronous_standby_names = {sql.quote(others)}; SELECT pg_reload_conf()",
        )


def matches_standby(synchronous_standby_names: str, application_name: str) -> bool:
    """Whether a walsender of this name could be a synchronous standby.

    Manual: "Replication", synchronous_standby_names. Names match without regard to case, `*` matches all.
    """
    _, _, names = _standbys(synchronous_standby_names)
    return any(_matches(name, application_name) for name in names)


def without_standby(synchronous_standby_names: str, application_name: str, standbys: list[str]) -> str:
    """The setting without this one: `*` becomes all `standbys`."""
    method, number, names = _standbys(synchronous_standby_names)
    others = [name for name in names if not _matches(name, application_name)]
    others += sorted({*standbys} - {*others}) if "*" in names else []
    quoted = ", ".join(sql.Identifier(name).as_string() for name in others)
    return f"{method} {min(number, len(others))} ({quoted})" if others else ""


def _matches(name: str, application_name: str) -> bool:
    return name == "*" or name.lower() == application_name.lower()


def _standbys(setting: str) -> tuple[str, int, list[str]]:
    """Method, number and names."""
    counted = re.fullmatch(r"\s*(?:(FIRST|ANY)\s+)?(\d+)\s*\((.*)\)\s*", setting, flags=re.I | re.S)
    if counted is None:
        return "FIRST", 1, listed(setting)
    return (counted[1] or "FIRST").upper(), int(counted[2]), listed(counted[3])


class Statement(NamedTuple):
    """A statement with {} in the place of each of its values."""

    text: LiteralString
    values: Sequence[str | int | list[str] | None] = ()

    @property
    def literal(self) -> str:
        """With its values in it."""
        return sql.SQL(self.text).format(*self.values).as_string()

    @property
    def prepared(self) -> str:
        """With the numbers of parameters in their place."""
        return self.text.format(*(f"${number}" for number in range(1, len(self.values) + 1)))

    @property
    def parameters(self) -> list[str | None]:
        """The values as text."""
        return [of if of is None else array(of) if isinstance(of, list) else str(of) for of in self.values]


def array(values: Iterable[str]) -> str:
    """An array as Postgres reads it. Manual: "Arrays", Array Input and Output Syntax."""
    quoted = ('"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"' for value in values)
    return "{" + ",".join(quoted) + "}"


def listed(setting: str) -> list[str]:
    """The elements of a setting that is a list of names."""
    names = [name.strip() for name in re.findall(r'"(?:[^"]|"")*"|[^,]+', setting)]
    unquoted = [name[1:-1].replace('""', '"') if name.startswith('"') else name for name in names]
    return [name for name in unquoted if name]
