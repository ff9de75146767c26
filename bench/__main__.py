"""`make bench`: how fast a backlog drains beside pg_recvlogical, and how late an activity is.

Drain: two copies of one slot before the same backlog, in turn written to a file by pg_recvlogical with the worker's own
options, and drained into `activity` by `cdc-worker run --once` with all guarantees on. Times are of whole processes.
Connections are by TCP, as a worker in a container or on another machine has them; `--socket` takes a Unix socket, by
which the server sends a row in half the time.

Shutdown: from the request of a fast shutdown to its end, on a server that would wait for a walsender's client for ever.

Latency: from the commit's timestamp to the moment when another session sees the activity, which it asks for every
millisecond; so what is printed is a little more than what it was.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import datetime
from pathlib import Path

import click
import psycopg

from cdc_worker import context, profile, wal2json
from cdc_worker.binaries import find_binaries
from cdc_worker.cluster import Cluster
from cdc_worker.ddl import schema
from cdc_worker.rules import compile_rules

LEADS = 10_000

SETTINGS = {"max_wal_size": "8GB", "autovacuum": "off", "wal_sender_timeout": "0"}

UPDATE = r"""
\set id random(1, {leads})
\set status random(1, 1000000000)
UPDATE lead SET status = '2. proposal ' || :status WHERE lead_id = :id;
"""

INTACT = """
SELECT count(*) = %s AND count(DISTINCT change_key) = %s AND bool_and(coalesce(before = old, true))
FROM (SELECT change_key, metadata ->> 'old_status' AS old,
             lag(metadata ->> 'new_status') OVER (PARTITION BY lead_id ORDER BY activity_id) AS before
      FROM activity WHERE activity_type = 'status_changed') each
"""


class Bench:
    """A private server with LeadFi's tables and a base slot before what is to come."""

    def __init__(self, cluster: Cluster, directory: Path, *, socket: bool) -> None:
        self.cluster = cluster
        self.dsn = cluster.socket_dsn() if socket else cluster.dsn()
        self.directory = directory
        self.connect()
        self.connection.execute(schema("leadfi.sql").encode())
        self.cdc("setup", slot="base")
        self.connection.execute(
            "INSERT INTO lead (full_name, title, email, telegram, phone_number, source, status, linkedin_url,"
            " company_name, country, bd_in_charge, background, type)"
            " SELECT 'Lead ' || n, 'CTO', 'lead' || n || '@example.com', '@lead' || n, '+49 30 ' || n, 'website',"
            " '1. lead generated', 'https://example.com/in/lead' || n, 'Company ' || n, 'Germany', 'jane',"
            " 'met at a fair', 'exchange' FROM generate_series(1, %s) n",
            (LEADS,),
        )
        self.connection.execute("VACUUM ANALYZE lead")

    def connect(self) -> None:
        self.connection = psycopg.connect(self.cluster.socket_dsn(), autocommit=True)

    def environment(self, slot: str) -> dict[str, str]:
        return os.environ | {
            "CDC_WORKER_DSN": self.dsn,
            "CDC_WORKER_SLOT": slot,
            "CDC_WORKER_LOG_LEVEL": "error",
        }

    def cdc(self, *arguments: str, slot: str) -> None:
        command = [sys.executable, "-m", "cdc_worker", *arguments]
        subprocess.run(command, env=self.environment(slot), check=True, stdout=subprocess.DEVNULL)

    def updates(self, count: int) -> None:
        """So many single-row transactions."""
        script = self.directory / "update.sql"
        script.write_text(UPDATE.format(leads=LEADS))
        clients = 4
        self.connection.execute("ALTER SYSTEM SET synchronous_commit = off")
        self.connection.execute("SELECT pg_reload_conf()")
        self.cluster.run(
            "pgbench",
            "-n",
            "-M",
            "prepared",
            "-c",
            str(clients),
            "-t",
            str(count // clients),
            "-f",
            str(script),
            "postgres",
        )
        self.connection.execute("ALTER SYSTEM RESET synchronous_commit")
        self.connection.execute("SELECT pg_reload_conf()")
        self.connection.execute("CHECKPOINT")

    def copy_slot(self, name: str) -> None:
        self.connection.execute("SELECT pg_copy_logical_replication_slot('base', %s)", (name,))

    def drop_slot(self, name: str) -> None:
        self.connection.execute("SELECT pg_drop_replication_slot(%s)", (name,))

    def recvlogical(self, number: int) -> float:
        """Seconds that pg_recvlogical takes to write the backlog to a file."""
        self.copy_slot(slot := f"recvlogical_{number}")
        options = wal2json.options(compile_rules(profile.load("leadfi")), (context.PREFIX,))
        ((end,),) = self.connection.execute("SELECT pg_current_wal_flush_lsn()").fetchall()
        arguments = ["--start", "--slot", slot, "--dbname", self.dsn, "--endpos", end, "--no-loop"]
        arguments += [part for name, value in options.items() for part in ("--option", f"{name}={value}")]
        output = self.directory / "recvlogical"
        started = time.perf_counter()
        self.cluster.run("pg_recvlogical", *arguments, "--file", str(output))
        seconds = time.perf_counter() - started
        output.unlink()
        self.drop_slot(slot)
        return seconds

    def worker(self, number: int, count: int) -> float:
        """Seconds that the worker takes to write the backlog to `activity`, whose rows are then checked."""
        self.copy_slot(slot := f"worker_{number}")
        self.connection.execute("TRUNCATE activity")
        self.cdc("setup", slot=slot)
        started = time.perf_counter()
        self.cdc("run", "--once", slot=slot)
        seconds = time.perf_counter() - started
        ((intact,),) = self.connection.execute(INTACT.encode(), (count, count)).fetchall()
        if not intact:
            raise click.ClickException("the worker's activities are not what they should be")
        self.drop_slot(slot)
        self.connection.execute("DELETE FROM cdc_worker.checkpoint WHERE worker = %s", (slot,))
        return seconds

    @contextmanager
    def daemon(self, slot: str) -> Iterator[None]:
        """The worker, running."""
        command = [sys.executable, "-m", "cdc_worker", "run"]
        process = subprocess.Popen(command, env=self.environment(slot))
        try:
            while not self.connection.execute(
                "SELECT 1 FROM pg_replication_slots WHERE slot_name = %s AND active", (slot,)
            ).fetchall():
                time.sleep(0.05)
            yield
        finally:
            process.terminate()
            process.wait()

    def latencies(self, rate: int, seconds: int) -> list[float]:
        """Milliseconds from commit to visible activity, at so many transactions a second."""
        self.copy_slot(slot := "latency")
        self.connection.execute("TRUNCATE activity")
        self.cdc("setup", slot=slot)
        self.cdc("run", "--once", slot=slot)
        script = self.directory / "update.sql"
        found: list[float] = []
        command = [self.cluster.binaries.program("pgbench"), "-n", "-M", "prepared", "-c", "8", "-R", str(rate)]
        command += ["-T", str(seconds), "-f", str(script), "postgres"]
        newest = "SELECT max(activity_id) FROM activity"
        ((before,),) = self.connection.execute(newest).fetchall()
        with self.daemon(slot):
            # The server reads its WAL from where the slot was copied, before it has anything to send.
            self.connection.execute("UPDATE lead SET status = 'started' WHERE lead_id = 1")
            while (last := self.connection.execute(newest).fetchall()[0][0]) == before:
                time.sleep(0.01)
            load = subprocess.Popen(
                command, env=self.cluster.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            quiet_since = time.monotonic()
            while load.poll() is None or time.monotonic() < quiet_since + 1:
                rows = self.connection.execute(
                    "SELECT activity_id, date_created FROM activity WHERE activity_id > %s ORDER BY activity_id",
                    (last,),
                ).fetchall()
                # The server's zone is the machine's: both clocks are one.
                now = datetime.now()
                found += [(now - committed_at).total_seconds() * 1000 for _, committed_at in rows]
                if rows:
                    last, quiet_since = rows[-1][0], time.monotonic()
                time.sleep(0.001)
        return found

    def shutdown(self, number: int, *, behind: bool = False, locked: bool = False) -> float:
        """Seconds that a fast shutdown takes while the worker runs, has the backlog before it, or waits for a lock."""
        self.copy_slot(slot := f"shutdown_{number}")
        self.connection.execute("TRUNCATE activity")
        self.cdc("setup", slot=slot)
        if not behind:
            self.cdc("run", "--once", slot=slot)
        with self.daemon(slot), closing(psycopg.connect(self.cluster.socket_dsn())) as other:
            if locked:
                other.execute("LOCK TABLE activity")
                self.connection.execute("UPDATE lead SET status = 'locked' WHERE lead_id = 1")
            time.sleep(1)
            seconds = self.stop()
        self.cluster.start()
        self.connect()
        self.drop_slot(slot)
        return seconds

    def stop(self) -> float:
        started = time.perf_counter()
        self.cluster.stop("fast")
        return time.perf_counter() - started


def table(title: str, rows: Sequence[Sequence[object]]) -> None:
    """Print rows in columns."""
    click.echo(f"\n{title}")
    widths = [max(len(str(row[column])) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        click.echo("  " + "  ".join(str(value).rjust(width) for value, width in zip(row, widths, strict=True)))


@click.command()
@click.option("--count", default=200_000, show_default=True, help="Transactions in the backlog.")
@click.option("--rounds", default=5, show_default=True, help="Rounds of pg_recvlogical and worker in turn.")
@click.option("--rate", default=500, show_default=True, help="Transactions a second while latency is measured.")
@click.option("--seconds", default=20, show_default=True, help="How long latency is measured.")
@click.option("--socket", is_flag=True, help="Connect by Unix socket.")
def main(count: int, rounds: int, rate: int, seconds: int, socket: bool) -> None:
    """Measure drain and latency on a private server."""
    binaries = find_binaries()
    click.echo(binaries.origin)
    zone = time.strftime("%Z")
    with (
        tempfile.TemporaryDirectory() as directory,
        Cluster(binaries, settings=SETTINGS | {"timezone": zone}) as cluster,
    ):
        bench = Bench(cluster, Path(directory), socket=socket)
        bench.updates(count)
        lines: list[Sequence[object]] = [("round", "pg_recvlogical /s", "worker /s", "ratio")]
        ratios = []
        for number in range(1, rounds + 1):
            peer, ours = bench.recvlogical(number), bench.worker(number, count)
            ratios.append(peer / ours)
            lines.append((number, f"{count / peer:,.0f}", f"{count / ours:,.0f}", f"{peer / ours:.2f}"))
        lines.append(("median", "", "", f"{statistics.median(ratios):.2f}"))
        table(f"Drain of {count:,} single-row transactions, rows checked", lines)
        shutdowns = [
            ("caught up", bench.shutdown(1)),
            ("backlog", bench.shutdown(2, behind=True)),
            ("target locked", bench.shutdown(3, locked=True)),
            ("no worker", bench.stop()),
        ]
        table("Seconds of a fast shutdown", [*zip(*((name, f"{taken:.2f}") for name, taken in shutdowns), strict=True)])
        cluster.start()
        bench.connect()
        found = bench.latencies(rate, seconds)
        cuts = statistics.quantiles(found, n=100)
        table(
            f"Milliseconds from commit to visible activity at {rate} transactions a second",
            [
                ("activities", "p50", "p95", "p99", "max"),
                (f"{len(found):,}", *(f"{value:.1f}" for value in (cuts[49], cuts[94], cuts[98], max(found)))),
            ],
        )


main()
