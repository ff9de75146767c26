"""Connections to the server, what its errors mean, and what its catalog says."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any, Final, LiteralString

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import TupleRow

from cdc_worker import errors
from cdc_worker.errors import CdcWorkerError
from cdc_worker.profile import Profile, Target
from cdc_worker.rules import Rules, qualified

Connection = psycopg.Connection[TupleRow]

APPLICATION_NAME: Final = "cdc-worker"

# A role's or database's defaults must change neither what the plugin prints nor when we are interrupted.
_PINNED: Final = {
    "bytea_output": "hex",
    "datestyle": "ISO",
    "extra_float_digits": "1",
    "intervalstyle": "postgres",
    "lc_monetary": "C",
    "statement_timeout": "0",
    "lock_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
}

# A half-open connection is noticed within a minute and a half.
_KEEPALIVES: Final = {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 6, "connect_timeout": 10}


def _connect(dsn: str, worker: str, pinned: dict[str, str], **parameters: Any) -> Connection:
    own = conninfo_to_dict(dsn)
    options = str(own.get("options") or os.environ.get("PGOPTIONS", ""))
    options = " ".join([options, *(f"-c {name}={value}" for name, value in pinned.items())])
    defaults = {name: value for name, value in _KEEPALIVES.items() if name not in own}
    if "PGCONNECT_TIMEOUT" in os.environ:
        defaults.pop("connect_timeout", None)
    try:
        return psycopg.connect(
            make_conninfo(dsn, **defaults),
            autocommit=True,
            application_name=f"{APPLICATION_NAME} {worker}",
            options=options.strip(),
            **parameters,
        )
    except psycopg.Error as error:
        raise _connection_error(error) from error


def connect(dsn: str, worker: str) -> Connection:
    """An ordinary connection, in autocommit, whose commits are durable whatever the role's defaults are."""
    connection = _connect(dsn, worker, {**_PINNED, "synchronous_commit": "on"}, client_encoding="UTF8")
    connection.execute(
        "SELECT set_config(name, '0', false) FROM pg_settings"
        " WHERE name IN ('idle_session_timeout', 'transaction_timeout')"
    )
    return connection


def connect_replication(dsn: str, worker: str) -> Connection:
    """A connection that speaks the replication protocol."""
    return _connect(dsn, worker, {**_PINNED, "timezone": "UTC"}, replication="database")


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
        r"FATAL:  (must be superuser or replication role .*|permission denied to start WAL sender)",
        errors.AuthenticationError,
        "as a superuser: ALTER ROLE {user} REPLICATION",
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
        "mend the options in CDC_WORKER_DSN or PGOPTIONS",
    ),
    (
        r"(unsupported startup parameter.*)",
        errors.ConnectionStringError,
        "name the server itself, no pooler: replication needs a connection of its own",
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
    "55000": "if this is a standby: promote it, or name the primary in CDC_WORKER_DSN",
    "25006": "let the database be written, or name the primary in CDC_WORKER_DSN",
}


def failure(error: psycopg.Error) -> CdcWorkerError:
    """What an error of the server that no other place has foreseen asks of the operator."""
    state = error.sqlstate
    if state is None:
        return errors.ServerError(
            " ".join(str(error).split()),
            hint="see that the server is up, can be reached, and has max_connections and max_wal_senders to spare",
        )
    said = f"the server refused: {error.diag.message_primary} (SQLSTATE {state})"
    if is_about_the_row(state):  # the server's message holds values
        said = f"the server refused a row (SQLSTATE {state})"
    elif error.diag.message_primary is None:
        said = str(error)
    kind = errors.TargetUnusableError if state[:2] == "42" or state in ("25006", "0A000") else errors.ServerError
    return kind(said, hint=_HINTS.get(state, "the server's log tells more"))


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


def fetch_one(connection: Connection, query: LiteralString, *parameters: Any) -> tuple[Any, ...]:
    """The only row of a query that always has one."""
    row = connection.execute(query, parameters).fetchone()
    assert row is not None
    return row


@dataclass(frozen=True, slots=True)
class Server:
    """What the worker needs to know of a server. `time_zone` is the database's, `version` server_version_num.

    `output_plugin_libraries` is None where there is no such setting, and for a role that may not see it.
    """

    version: int
    wal_level: str
    encoding: str
    time_zone: str
    role: str
    synchronous_standby_names: str
    may_replicate: bool
    output_plugin_libraries: str | None


_SERVER: Final = """
SELECT current_setting('server_version_num')::int, current_setting('wal_level'), current_setting('server_encoding'),
       coalesce((SELECT split_part(c, '=', 2)
                 FROM pg_db_role_setting s, unnest(s.setconfig) c
                 WHERE s.setrole = 0 AND c ILIKE 'timezone=%%'
                   AND s.setdatabase = (SELECT oid FROM pg_database WHERE datname = current_database())),
                (SELECT reset_val FROM pg_settings WHERE name = 'TimeZone')),
       current_user::text, current_setting('synchronous_standby_names'),
       (SELECT rolreplication OR rolsuper FROM pg_roles WHERE rolname = current_user),
       CASE WHEN pg_has_role('pg_read_all_settings', 'USAGE') THEN current_setting('output_plugin_libraries', true) END
"""


def server(connection: Connection) -> Server:
    """Ask the server about itself."""
    return Server(*fetch_one(connection, _SERVER))


def check_server(server: Server, worker: str) -> None:
    """Raise for a server on which the worker can't work, or would do harm."""
    check_wal_level(server)
    check_no_standby(server, worker)


def check_wal_level(server: Server) -> None:
    """Raise WalLevelError unless the server writes what logical decoding needs."""
    if server.wal_level != "logical":
        raise errors.WalLevelError(
            f'wal_level is "{server.wal_level}"',
            hint="as a superuser: ALTER SYSTEM SET wal_level = logical; then restart the server",
        )


def check_no_standby(server: Server, worker: str) -> None:
    """Raise SynchronousStandbyError if commits would wait for this worker."""
    if matches_standby(server.synchronous_standby_names, f"{APPLICATION_NAME} {worker}"):
        raise errors.SynchronousStandbyError(
            f'synchronous_standby_names is "{server.synchronous_standby_names}" and would count this worker, whose own '
            "commits would then wait for itself, and the application's with them",
            hint="name the real standbys there instead of *: ALTER SYSTEM SET synchronous_standby_names = 'standby1'",
        )


def matches_standby(synchronous_standby_names: str, application_name: str) -> bool:
    """Whether a walsender of this name could be a synchronous standby.

    Manual: "Replication", synchronous_standby_names. Names match without regard to case, `*` matches all.
    """
    names = re.sub(r"^\s*(?:(?:FIRST|ANY)\s+)?\d+\s*\((.*)\)\s*$", r"\1", synchronous_standby_names, flags=re.I | re.S)
    return any(name == "*" or name.lower() == application_name.lower() for name in listed(names))


def listed(setting: str) -> list[str]:
    """The elements of a setting that is a list of names."""
    names = [name.strip() for name in re.findall(r'"(?:[^"]|"")*"|[^,]+', setting)]
    unquoted = [name[1:-1].replace('""', '"') if name.startswith('"') else name for name in names]
    return [name for name in unquoted if name]


_COLUMNS: Final = """
SELECT a.attname, a.atttypid::regtype::text
FROM pg_attribute a
WHERE a.attrelid = to_regclass(format('%%I.%%I', %s::text, %s::text)) AND a.attnum > 0 AND NOT a.attisdropped
"""


def columns(connection: Connection, table: tuple[str, str]) -> dict[str, str]:
    """A table's columns with their types; none when there is no such table."""
    return dict(connection.execute(_COLUMNS, table).fetchall())


_UNDECODED: Final = """
SELECT CASE WHEN relkind = 'p' THEN 'partitioned: its changes bear the names of its partitions, capture those'
            WHEN relkind IN ('v', 'm') THEN 'a view: capture the tables that it shows'
            WHEN relkind = 'f' THEN 'foreign: its changes are another server''s, capture it there'
            WHEN relkind <> 'r' THEN 'no table'
            WHEN relpersistence = 'u' THEN
                format('unlogged: its changes are not in the WAL, ALTER TABLE %%s SET LOGGED', c.oid::regclass)
            WHEN relpersistence = 't' THEN 'temporary: its changes are not in the WAL' END
FROM pg_class c WHERE c.oid = to_regclass(format('%%I.%%I', %s::text, %s::text))
"""


@dataclass(frozen=True, slots=True)
class TargetTable:
    """What the sink must know of the table that it writes to, beyond what the profile says.

    `columns` are all of its columns, with their types; `lengths` are in characters, of the columns that have one.
    `foreign_keys` are the constraints, with their columns, that hold for what the worker writes: each of its rows
    locks the row that it refers to. A target that setup prepared has none.
    """

    columns: dict[str, str]
    lengths: dict[str, int]
    foreign_keys: dict[str, tuple[str, ...]]
    deferrable: bool
    row_security: bool
    deadlock_timeout: float


_LENGTHS: Final = """
WITH RECURSIVE type AS (
    SELECT attname, atttypid AS oid, atttypmod AS modifier
    FROM pg_attribute
    WHERE attrelid = to_regclass(format('%%I.%%I', %s::text, %s::text)) AND attnum > 0 AND NOT attisdropped
    UNION ALL
    SELECT attname, typbasetype, typtypmod FROM type JOIN pg_type USING (oid) WHERE typtype = 'd'
)
SELECT attname, modifier - 4 FROM type WHERE oid IN ('varchar'::regtype, 'bpchar'::regtype) AND modifier > 0
"""

_FOREIGN_KEYS: Final = """
SELECT conname, (SELECT array_agg(attname::text) FROM pg_attribute WHERE attrelid = conrelid AND attnum = ANY (conkey))
FROM pg_constraint
WHERE conrelid = to_regclass(format('%%I.%%I', %s::text, %s::text)) AND contype = 'f'
"""

_TARGET: Final = """
SELECT EXISTS (SELECT FROM pg_constraint WHERE conrelid = target AND condeferrable), row_security_active(target),
       (SELECT setting::float / 1000 FROM pg_settings WHERE name = 'deadlock_timeout')
FROM to_regclass(format('%%I.%%I', %s::text, %s::text)) AS target
"""


def _target_table(connection: Connection, target: Target, columns: dict[str, str]) -> TargetTable:
    table = qualified(target.table)
    written = target.columns.keys() | target.constants.keys()
    lengths: dict[str, int] = dict(connection.execute(_LENGTHS, table).fetchall())
    foreign_keys = {
        name: tuple(own)
        for name, own in connection.execute(_FOREIGN_KEYS, table)
        if not written.isdisjoint(own)  # others are on columns that the worker leaves alone
    }
    return TargetTable(columns, lengths, foreign_keys, *fetch_one(connection, _TARGET, *table))


def check_catalog(connection: Connection, profile: Profile, rules: Rules) -> TargetTable:
    """Hold a profile against the database; returns what there is to know of its target.

    CatalogMismatchError has every fault.
    """
    faults = []
    for table in rules.values():
        name = ".".join(table.name)
        found = columns(connection, table.name)
        if not found:
            faults.append(f"captured table {name} does not exist")
        elif missing := sorted(table.columns - found.keys()):
            faults.append(f"captured table {name} has no column {', '.join(missing)}")
        elif (undecoded := fetch_one(connection, _UNDECODED, *table.name)[0]) is not None:
            faults.append(f"captured table {name} is {undecoded}")
    target = columns(connection, qualified(profile.target.table))
    name = ".".join(qualified(profile.target.table))
    if not target:
        faults.append(f"target table {name} does not exist")
    elif missing := sorted({*profile.target.columns, *profile.target.constants} - target.keys()):
        faults.append(f"target table {name} has no column {', '.join(missing)}")
    if faults:
        lines = "\n".join(f"  {fault}" for fault in faults)
        raise errors.CatalogMismatchError(
            f'profile "{profile.name}" does not fit the database:\n{lines}',
            hint="mend the profile, or run: cdc-worker setup",
        )
    return _target_table(connection, profile.target, target)
