"""What tests of the edges share: a CRM's database, and the worker as a real process."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, LiteralString, Self, TypeVar

import canaries
import psycopg
import pytest
from launcher import launch
from psycopg import sql
from psycopg.conninfo import make_conninfo
from psycopg.rows import TupleRow, dict_row

from cdc_worker import checkpoint, config, profile
from cdc_worker.cluster import Cluster
from cdc_worker.ddl import schema
from cdc_worker.decoders import PLUGINS
from cdc_worker.setup import setup

T = TypeVar("T")

PATIENCE = 60.0
"""Longer than anything takes on a busy machine: the wait for a fact fails after so many seconds."""


def eventually(fact: Callable[[], T], *, what: str = "", patience: float = PATIENCE) -> T:
    """Wait until `fact` returns something true, and return it."""
    deadline = time.monotonic() + patience
    while not (found := fact()):
        assert time.monotonic() < deadline, f"never came true: {what or fact}"
        time.sleep(0.02)
    return found


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def storm(rounds: int, *, chaos: int) -> pytest.MarkDecorator:
    """Give a test its `rounds`: so many in `make test`, and so many in `make chaos`."""
    return pytest.mark.parametrize("rounds", [rounds, pytest.param(chaos, marks=pytest.mark.chaos)])


either_plugin = pytest.mark.parametrize("plugin", PLUGINS)
"""Let a test of a worker hold with each output plugin."""


_numbers = itertools.count(1)


class WorkerProcess:
    """`cdc-worker` as its users run it. Leaving the context kills what is still running."""

    def __init__(self, arguments: Sequence[str], environment: dict[str, str], log: Path) -> None:
        self.log = log
        self._offset = log.stat().st_size if log.exists() else 0
        canaries.keep(log)
        self.printed = log.with_suffix(".stdout")
        canaries.keep_printed(arguments, self.printed)
        with log.open("ab") as stderr, self.printed.open("wb") as stdout:
            self.process = launch(arguments, environment, stdout=stdout, stderr=stderr)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def said(self) -> str:
        """What it has written to stderr."""
        return self.log.read_bytes()[self._offset :].decode()

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        """Its log lines, or those of one event."""
        lines = [json.loads(line) for line in self.said.splitlines() if line.startswith("{")]
        return [line for line in lines if name in (None, line["event"])]

    def wait_for(self, event: str) -> dict[str, Any]:
        """The first log line of this event."""

        def found() -> list[dict[str, Any]]:
            assert self.process.poll() is None or self.events(event), f"ended before {event}:\n{self.said}"
            return self.events(event)

        return eventually(found, what=event)[0]

    def memory(self) -> int:
        """The most memory it has had so far, in bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()

    def terminate(self) -> int:
        """SIGTERM, and wait; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> int:
        """Wait until it ends by itself; returns the exit code."""
        return self.process.wait(PATIENCE)


class Crm:
    """A database with a CRM's tables, and a slot name of its own."""

    def __init__(self, dsn: str, slot: str, directory: Path) -> None:
        self.dsn = dsn
        self.slot = slot
        self.directory = directory
        self.settings: dict[str, str] = {}
        self.connection: psycopg.Connection[TupleRow] = psycopg.connect(dsn, autocommit=True)

    def environment(self, **settings: str) -> dict[str, str]:
        """Of a worker for this database."""
        # What narrows output, as pytest-xdist does for its own, is left out as well.
        left_out = ("CDC_WORKER_", "PG", "COLUMNS")
        bare = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
        given = {"dsn": self.dsn, "slot": self.slot, "log_format": "json"} | self.settings | settings
        return bare | {f"CDC_WORKER_{name.upper()}": value for name, value in given.items()}

    def worker(self, *arguments: str, **settings: str) -> WorkerProcess:
        """Start `cdc-worker run`."""
        log = self.directory / f"worker_{next(_numbers)}.log"
        return WorkerProcess(["run", *arguments], self.environment(**settings), log)

    def cutting_over(self) -> WorkerProcess:
        """Start `cdc-worker cutover`."""
        return WorkerProcess(["cutover"], self.environment(), self.directory / "cutover.log")

    def command(self, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        """Run a command of cdc-worker to its end."""
        with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
            process = launch(arguments, self.environment(**settings), stdout=stdout, stderr=stderr)
            try:
                code = process.wait(PATIENCE * 3)
            finally:
                process.kill()
            for file in (stdout, stderr):
                file.seek(0)
            said = stdout.read(), stderr.read()
            canaries.hear(arguments, *said)
            return subprocess.CompletedProcess(arguments, code, *said)

    def succeed(self, *arguments: str, **settings: str) -> str:
        """Run a command that must succeed; returns what it printed."""
        done = self.command(*arguments, **settings)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def setup(self) -> None:
        """What `cdc-worker setup` does, in this process: most tests want no more than to have it done."""
        settings = config.load(None, {"dsn": self.dsn, "slot": self.slot} | self.settings)
        for _ in setup(settings, profile.load(settings.profile)):
            pass

    def record(self, **settings: str) -> None:
        """`cdc-worker run --once`: all that is committed by now is recorded afterwards."""
        self.succeed("run", "--once", **settings)

    def execute(self, query: LiteralString, *parameters: Any) -> list[TupleRow]:
        """Run a statement in a transaction of its own; returns its rows."""
        cursor = self.connection.execute(query, parameters)
        return cursor.fetchall() if cursor.description else []

    def value(self, query: LiteralString, *parameters: Any) -> Any:
        """The only value of a query."""
        ((value,),) = self.execute(query, *parameters)
        return value

    def reader(self) -> int | None:
        """The process of the server that serves the slot's reader."""
        found = self.execute("SELECT active_pid FROM pg_replication_slots WHERE slot_name = %s", self.slot)
        return found[0][0] if found else None

    def activities(self) -> list[dict[str, Any]]:
        """What the worker wrote, in order."""
        with self.connection.cursor(row_factory=dict_row) as cursor:
            return cursor.execute("SELECT * FROM activity WHERE change_key IS NOT NULL ORDER BY activity_id").fetchall()

    def types(self) -> list[str]:
        """The types of what the worker wrote, in order."""
        return [activity["activity_type"] for activity in self.activities()]

    def add_leads(self, count: int) -> None:
        """Insert leads in one statement."""
        self.execute(
            "INSERT INTO lead (full_name, source, bd_in_charge, type, status, company_name)"
            " SELECT 'Lead ' || n, 'website', 'jane', 'exchange', '1. lead generated', 'Company c4n4ry ' || n"
            " FROM generate_series(1, %s) n",
            count,
        )

    def reconnect(self) -> None:
        """Connect anew, after the server was away."""
        self.connection.close()
        self.connection = psycopg.connect(self.dsn, autocommit=True)

    def close(self) -> None:
        """End the connection."""
        self.connection.close()


@contextmanager
def stranger(server: Cluster, crm: Crm, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A program that is no cdc-worker and reads the slot, and the process of the server that serves it."""
    program = server.binaries.program("pg_recvlogical")
    command = [program, "--slot", crm.slot, "--start", "--file", "-", "--no-loop", *options]
    database = ["--dbname", crm.connection.info.dbname]
    process = subprocess.Popen(
        [*command, *database], env=server.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        pid = eventually(crm.reader, what="the stranger reads")
        assert pid
        yield process, pid
    finally:
        process.kill()
        process.wait()


HOLD_ROWS_UP = "SELECT pg_advisory_xact_lock(9)"
"""Who executes that holds the rows up that `let_rows_wait` is about, until the end of the transaction."""


def let_rows_wait(crm: Crm) -> None:
    """Have each row that is inserted into activity wait, in the middle of a batch, while somebody holds it up.

    To be executed before the worker connects, which gives up what waits for longer than a part of deadlock_timeout.
    """
    crm.execute(f"ALTER DATABASE {crm.connection.info.dbname} SET deadlock_timeout = '1h'")
    crm.execute(
        "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS"
        " 'BEGIN PERFORM pg_advisory_xact_lock(9); RETURN NEW; END'"
    )
    crm.execute("CREATE TRIGGER wait BEFORE INSERT ON activity FOR EACH ROW EXECUTE FUNCTION wait()")


GRANTS = (
    "ALTER ROLE {role} LOGIN REPLICATION",
    "GRANT USAGE ON SCHEMA cdc_worker TO {role}",
    "GRANT SELECT, UPDATE ON cdc_worker.checkpoint TO {role}",
    "GRANT SELECT, INSERT ON cdc_worker.dead_letter TO {role}",
    "GRANT SELECT, INSERT, DELETE ON cdc_worker.tally TO {role}",
    "GRANT SELECT, INSERT, UPDATE, DELETE ON cdc_worker.process TO {role}",
    "GRANT SELECT, INSERT, UPDATE ON cdc_worker.partition TO {role}",
    "GRANT SELECT ON cdc_worker.excluded TO {role}",
    "GRANT SELECT, UPDATE (until_lsn) ON cdc_worker.erased TO {role}",
    "GRANT INSERT ON cdc_worker.skipped TO {role}",
    "GRANT SELECT ON cdc_worker.skip TO {role}",
    "GRANT SELECT ON cdc_worker.backfill TO {role}",
    "GRANT SELECT ON cdc_worker.gap TO {role}",
    "GRANT INSERT, SELECT (change_key) ON activity TO {role}",
    "GRANT USAGE ON SEQUENCE activity_activity_id_seq TO {role}",
)
"""All that a role needs to run the worker, after setup."""


def grant(crm: Crm, role: str) -> None:
    """Give a new role all that it needs, and let the commands use it."""
    for statement in ("CREATE ROLE {role}", *GRANTS):
        crm.connection.execute(sql.SQL(statement).format(role=sql.Identifier(role)))
    crm.settings["dsn"] = make_conninfo(crm.dsn, user=role)


@contextmanager
def role(crm: Crm, attributes: str = "", *, granted: bool = True) -> Iterator[None]:
    """Let the commands use a role of their own, with all that the worker needs or with some attributes only."""
    if granted:
        grant(crm, "cdc")
    else:
        crm.connection.execute(f"CREATE ROLE cdc LOGIN {attributes}".encode())
        crm.settings["dsn"] = make_conninfo(crm.dsn, user="cdc")
    try:
        yield
    finally:
        del crm.settings["dsn"]
        crm.execute("DROP OWNED BY cdc CASCADE")
        crm.execute("DROP ROLE cdc")


@contextmanager
def having(server: Cluster, **settings: str) -> Iterator[None]:
    """A server with other settings, which take effect without a restart; afterwards as it was."""

    def current() -> dict[str, str]:
        with psycopg.connect(server.dsn()) as connection:
            rows = connection.execute(
                "SELECT name, reset_val FROM pg_settings WHERE name = ANY (%s)", (list(settings),)
            )
            return dict(rows.fetchall())

    before = current()
    server.set(**settings)
    server.reload()
    eventually(lambda: current() != before, what=f"{settings}")
    changed = current()
    try:
        yield
    finally:
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            connection.execute("ALTER SYSTEM RESET ALL")  # what a test did about them
        server.set(**before)
        server.reload()
        eventually(lambda: current() != changed, what=f"{before}")


def leadfi(connection: psycopg.Connection[TupleRow]) -> None:
    """Make LeadFi's tables."""
    connection.execute(schema("leadfi.sql").encode())


def make_crm(server: Cluster, directory: Path, *, template: str = "template1", plugin: str = "auto") -> Crm:
    """A new database with LeadFi's tables, unless the template has them."""
    number = next(_numbers)
    name = f"crm_{number}"
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        # With files in memory it is a third of the work to copy them than to write them to the WAL, as from 15 on.
        how = "STRATEGY file_copy" if connection.info.server_version >= 150000 else ""
        create = sql.SQL("CREATE DATABASE {} TEMPLATE {} " + how)
        connection.execute(create.format(sql.Identifier(name), sql.Identifier(template)))
    crm = Crm(server.dsn(name), f"slot_{number}", directory)
    if plugin != "auto":
        crm.settings |= {"plugin": plugin, "publication": crm.slot}  # which slots with other names are read by as well
    if template == "template1":
        leadfi(crm.connection)
    return crm


PREPARED, BEGUN = "prepared", "begun"


def _has(server: Cluster, name: str) -> bool:
    with psycopg.connect(server.dsn()) as connection:
        return connection.execute("SELECT FROM pg_database WHERE datname = %s", (name,)).rowcount == 1


def _named(server: Cluster, crm: Crm, name: str) -> str:
    """Make a template of a database, under this name."""
    names = sql.Identifier(crm.connection.info.dbname), sql.Identifier(name)
    crm.execute("SELECT pg_drop_replication_slot(slot) FROM cdc_worker.checkpoint")
    if name == PREPARED:
        crm.connection.execute(sql.SQL("DROP PUBLICATION {}").format(sql.Identifier(crm.slot)))
        crm.execute("TRUNCATE cdc_worker.checkpoint, cdc_worker.excluded CASCADE")
    crm.close()
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        connection.execute(sql.SQL("ALTER DATABASE {} RENAME TO {}").format(*names))
    return name


def _prepared(server: Cluster, directory: Path) -> str:
    """A database that is set up but for slot and checkpoint: a copy is set up in a fifth of the time."""
    if not _has(server, PREPARED):
        crm = make_crm(server, directory)
        crm.setup()
        _named(server, crm, PREPARED)
    return PREPARED


def _begun(server: Cluster, directory: Path) -> str:
    """One of which a copy lacks only a slot, and has another worker's name: that is done in a tenth of that again."""
    if not _has(server, BEGUN):
        crm = make_crm(server, directory, template=_prepared(server, directory))
        crm.setup()
        _named(server, crm, BEGUN)
    return BEGUN


def begin(crm: Crm) -> None:
    """Have in a copy of `BEGUN` what `setup` leaves, which a test holds it against."""
    ((before, plugin),) = crm.execute("SELECT worker, plugin FROM cdc_worker.checkpoint")
    with crm.connection.transaction():
        names = sql.Identifier(before), sql.Identifier(crm.slot)
        crm.connection.execute(sql.SQL("ALTER PUBLICATION {} RENAME TO {}").format(*names))
        captures = sql.Literal(f'What the worker "{crm.slot}" of cdc-worker captures')
        crm.connection.execute(sql.SQL("COMMENT ON PUBLICATION {} IS {}").format(names[1], captures))
    crm.execute("SELECT pg_create_logical_replication_slot(%s, %s)", crm.slot, plugin)
    with crm.connection.transaction():
        crm.connection.execute(checkpoint.create(crm.slot, crm.slot).text.encode())
        crm.execute("UPDATE cdc_worker.excluded SET worker = %s", crm.slot)
        crm.execute("DELETE FROM cdc_worker.checkpoint WHERE worker = %s", before)


@contextmanager
def crm_on(
    server: Cluster, directory: Path, *, prepared: bool = False, begun: bool = True, plugin: str = "auto"
) -> Iterator[Crm]:
    """A new database with LeadFi's tables, which is dropped afterwards, and its slots with it.

    It is set up if `prepared`; but for slot and checkpoint if it has not `begun`.
    """
    if not prepared:
        crm = make_crm(server, directory, plugin=plugin)
    elif begun and plugin == "auto":
        crm = make_crm(server, directory, template=_begun(server, directory))
        begin(crm)
    else:
        crm = make_crm(server, directory, template=_prepared(server, directory), plugin=plugin)
        if begun:
            crm.setup()
    try:
        yield crm
    finally:
        _drop(server, crm)


def _drop(server: Cluster, crm: Crm) -> None:
    name = crm.connection.info.dbname
    crm.close()
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(active_pid, 10000) FROM pg_replication_slots"
            " WHERE database = %s AND active_pid IS NOT NULL",
            (name,),
        )
        connection.execute(
            "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE database = %s", (name,)
        )
        connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))
