"""A private server with LeadFi's tables, a backlog before it, and the worker beside it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import psycopg

from bench.usage import APPLICATION_NAME
from cdc_worker import wal2json
from cdc_worker.binaries import Binaries
from cdc_worker.cluster import Cluster
from cdc_worker.ddl import schema

LEADS = 10_000

SETTINGS = {
    "max_wal_size": "32GB",
    "checkpoint_timeout": "1h",
    "autovacuum": "off",
    "wal_sender_timeout": "0",
    "max_replication_slots": "60",
    "timezone": "UTC",
}
"""What the server would begin by itself, at a moment of its own, is begun between what is measured."""

UPDATE = r"""
\set id random(1, {leads})
\set status random(1, 1000000000)
UPDATE lead SET status = '2. proposal ' || :status WHERE lead_id = :id;
"""

NEWEST = "SELECT * FROM activity ORDER BY activity_id DESC LIMIT 1"

TOLD = f"SELECT (SELECT metadata ->> 'new_status' FROM ({NEWEST}) newest) = %s"
"""Whether the newest activity is of a lead's change to this status."""

INTACT = """
SELECT count(*) = %s AND count(DISTINCT change_key) = %s AND bool_and(coalesce(before = old, true))
FROM (SELECT change_key, metadata ->> 'old_status' AS old,
             lag(metadata ->> 'new_status') OVER (PARTITION BY lead_id ORDER BY activity_id) AS before
      FROM activity WHERE activity_type = 'status_changed' AND activity_id > %s) each
"""
"""So many activities, each of another change, and those of a lead in the order of its changes."""

COUNTED = "SELECT count(*) = %s AND count(DISTINCT change_key) = %s FROM activity WHERE activity_id > %s"
"""The same of a table without metadata, whose subjects nobody knows."""


@dataclass(frozen=True)
class Backlog:
    """Changes that wait for a worker of this `name`, which is also that of its slot and its publication.

    `end` is behind the last of them, and `tables` is what they are changes of.
    """

    name: str
    changes: int
    end: str
    tables: Sequence[str] = ("lead",)
    profile: str = "leadfi"
    intact: str = INTACT


class Server:
    """A private server, and the directory of what is run beside it."""

    def __init__(self, cluster: Cluster, directory: Path, *, socket: bool) -> None:
        self.cluster = cluster
        self.dsn = cluster.socket_dsn() if socket else cluster.dsn()
        self.directory = directory
        self.connect()

    @property
    def has_wal2json(self) -> bool:
        return self.cluster.binaries.plugin == wal2json.PLUGIN

    @property
    def plugins(self) -> tuple[str, ...]:
        return ("wal2json", "pgoutput") if self.has_wal2json else ("pgoutput",)

    def connect(self) -> None:
        self.connection = psycopg.connect(self.cluster.socket_dsn(), autocommit=True, application_name=APPLICATION_NAME)

    def value(self, statement: str, *parameters: object) -> object:
        """The first value of the first row."""
        ((found, *_),) = self.connection.execute(statement.encode(), parameters or None).fetchall()
        return found

    def fill(self, leads: int) -> None:
        """LeadFi's tables, with so many leads."""
        self.connection.execute(schema("leadfi.sql").encode())
        self.connection.execute(
            "INSERT INTO lead (full_name, title, email, telegram, phone_number, source, status, linkedin_url,"
            " company_name, country, bd_in_charge, background, type)"
            " SELECT 'Lead ' || n, 'CTO', 'lead' || n || '@example.com', '@lead' || n, '+49 30 ' || n, 'website',"
            " '1. lead generated', 'https://example.com/in/lead' || n, 'Company ' || n, 'Germany', 'jane',"
            " 'met at a fair', 'exchange' FROM generate_series(1, %s) n",
            (leads,),
        )
        self.connection.execute("VACUUM ANALYZE lead")

    def environment(self, slot: str, **settings: str) -> dict[str, str]:
        given = {
            "dsn": self.dsn,
            "slot": slot,
            # One publication from before the backlog, and so one worker: whatever copy of the slot it reads.
            "name": "base",
            "publication": "base",
            "log_level": "error",
            **settings,
        }
        return os.environ | {f"CDC_WORKER_{name.upper()}": value for name, value in given.items()}

    def cdc(self, *arguments: str, slot: str, **settings: str) -> None:
        command = [sys.executable, "-m", "cdc_worker", *arguments]
        subprocess.run(command, env=self.environment(slot, **settings), check=True, stdout=subprocess.DEVNULL)

    def script(self, leads: int) -> Path:
        """What pgbench does in one transaction."""
        script = self.directory / "update.sql"
        script.write_text(UPDATE.format(leads=leads))
        return script

    def load(self, *arguments: str, dbname: str = "postgres", leads: int = LEADS) -> list[str]:
        """The command of updates of single leads by pgbench."""
        program = self.cluster.binaries.program("pgbench")
        return [program, "-n", "-M", "prepared", *arguments, "-f", str(self.script(leads)), dbname]

    @contextmanager
    def loading(self, *arguments: str, dbname: str = "postgres") -> Iterator[subprocess.Popen[bytes]]:
        """Updates while the block runs, or until they end by themselves."""
        quiet = subprocess.DEVNULL
        environment = self.cluster.environment()
        process = subprocess.Popen(self.load(*arguments, dbname=dbname), env=environment, stdout=quiet, stderr=quiet)
        try:
            yield process
        finally:
            process.terminate()
            process.wait()

    def updates(self, count: int) -> None:
        """So many single-row transactions, fewer by what four clients can't share."""
        clients = 4
        self.connection.execute("ALTER SYSTEM SET synchronous_commit = off")
        self.connection.execute("SELECT pg_reload_conf()")
        _, *arguments = self.load("-c", str(clients), "-t", str(count // clients))
        self.cluster.run("pgbench", *arguments)
        self.connection.execute("ALTER SYSTEM RESET synchronous_commit")
        self.connection.execute("SELECT pg_reload_conf()")

    def end(self) -> str:
        """Where WAL ends, all of which is on disk then."""
        end = str(self.value("SELECT pg_current_wal_insert_lsn()"))
        self.connection.execute("CHECKPOINT")
        return end

    def copy_slot(self, name: str, plugin: str = wal2json.PLUGIN, *, of: str = "base") -> None:
        self.connection.execute("SELECT pg_copy_logical_replication_slot(%s, %s, false, %s)", (of, name, plugin))

    def drop_slot(self, name: str) -> None:
        self.connection.execute("SELECT pg_drop_replication_slot(%s)", (name,))

    def begin(self, slot: str, plugin: str, *, keep: bool = False, of: str = "base", **settings: str) -> None:
        """Let the worker begin where a slot is, with a copy of it and an empty target, or all that it has."""
        self.copy_slot(slot, plugin, of=of)
        if not keep:
            self.connection.execute("TRUNCATE activity RESTART IDENTITY")
        self.connection.execute("DELETE FROM cdc_worker.checkpoint")
        self.cdc("setup", slot=slot, **settings)

    def begin_now(self, slot: str, plugin: str, **settings: str) -> None:
        """Let the worker begin here, with a slot of its own and an empty target."""
        if self.value("SELECT to_regclass('cdc_worker.checkpoint')") is not None:
            self.connection.execute("DELETE FROM cdc_worker.checkpoint")
        self.cdc("setup", slot=slot, plugin=plugin, **settings)
        self.connection.execute("TRUNCATE activity RESTART IDENTITY")

    def newest(self) -> int:
        """The number of the newest activity that is visible, 0 if there is none."""
        return int(str(self.value("SELECT coalesce(max(activity_id), 0) FROM activity")))

    def check(self, backlog: Backlog, *, after: int = 0) -> None:
        """Raises ClickException unless the activities after this one are those of the backlog, once each, in order."""
        if not self.value(backlog.intact, backlog.changes, backlog.changes, after):
            raise click.ClickException("the worker's activities are not what they should be")

    @contextmanager
    def daemon(self, slot: str, *, log: Path | None = None, **settings: str) -> Iterator[subprocess.Popen[bytes]]:
        """The worker, from when it reads its slot, with its log in a file if that is given."""
        command = [sys.executable, "-m", "cdc_worker", "run"]
        environment = self.environment(slot, **settings)
        if log is None:
            process = subprocess.Popen(command, env=environment)
        else:
            with log.open("wb") as file:
                process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
        active = "SELECT count(*) > 0 FROM pg_replication_slots WHERE slot_name = %s AND active"
        try:
            self.until(process, active, slot)
            yield process
        finally:
            process.terminate()
            process.wait()

    def until(self, worker: subprocess.Popen[bytes], fact: str, *parameters: object) -> None:
        """Wait until a statement says that it is so. Raises ClickException if the worker ends before."""
        while not self.value(fact, *parameters):
            if worker.poll() is not None:
                raise click.ClickException("the worker has ended")
            time.sleep(0.01)

    def caught_up(self, worker: subprocess.Popen[bytes], mark: str) -> None:
        """Change a lead, and wait until the worker has told of it: then it is up, and has nothing before it."""
        self.connection.execute("UPDATE lead SET status = %s WHERE lead_id = 1", (mark,))
        self.until(worker, TOLD, mark)

    @contextmanager
    def running(self, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
        """A command, which is ended if it still runs."""
        command = [sys.executable, "-m", "cdc_worker", *arguments]
        process = subprocess.Popen(
            command, env=self.environment("base"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            yield process
        finally:
            process.terminate()
            process.wait()

    def update_times(self, *arguments: str, dbname: str = "postgres", leads: int = LEADS) -> list[float]:
        """Milliseconds from when an update was to begin until the client knew of its commit."""
        prefix = self.directory / "times"
        _, *load = self.load(*arguments, "--log", f"--log-prefix={prefix}", dbname=dbname, leads=leads)
        self.cluster.run("pgbench", *load)
        found = []
        for path in self.directory.glob("times.*"):
            # Manual: "pgbench", Per-Transaction Logging. The third is the time, in microseconds.
            found += [int(line.split()[2]) / 1000 for line in path.read_text().splitlines()]
            path.unlink()
        return found


def supported(connection: psycopg.Connection[tuple[object, ...]], options: dict[str, str]) -> dict[str, str]:
    """The options of wal2json without those that this one doesn't know."""
    known = dict(options)
    # A slot of its own has nothing to decode: the others' backlog may be one transaction, which is then read whole.
    connection.execute("SELECT pg_create_logical_replication_slot('probe', 'wal2json')")
    for name in wal2json.OPTIONAL:
        try:
            connection.execute(
                "SELECT 1 FROM pg_logical_slot_peek_binary_changes('probe', NULL, 1, %s, %s)", (name, options[name])
            )
        except psycopg.errors.InvalidParameterValue:
            del known[name]
    connection.execute("SELECT pg_drop_replication_slot('probe')")
    return known


Opener = Callable[[], AbstractContextManager[Server]]
"""Makes a server of its own for each who asks."""


def opener(binaries: Binaries, *, socket: bool) -> Opener:
    @contextmanager
    def opened() -> Iterator[Server]:
        with tempfile.TemporaryDirectory() as directory, Cluster(binaries, settings=SETTINGS) as cluster:
            server = Server(cluster, Path(directory), socket=socket)
            try:
                yield server
            finally:
                server.connection.close()

    return opened
