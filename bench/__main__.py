"""`make bench`: how fast a backlog drains beside pg_recvlogical, how late an activity is, how fast a recording of it is
replayed, and what a backfill costs.

Decode (alone: `--part decode`): what a change costs by itself, in time of the processor, with the decoder of either
plugin, on what both send of the same updates: decoded only, and up to what the rules tell.

Drain: copies of one slot before the same backlog, with each plugin in turn, written to a file by pg_recvlogical with
the worker's own options, and drained into `activity` by `cdc-worker run --once` with all guarantees on; the latter
without a recording and with one, on the file system of the system's temporary directory. Times are of whole processes.
Connections are by TCP, as a worker in a container or on another machine has them; `--socket` takes a Unix socket, by
which the server sends a row in half the time.

Shutdown: from the request of a fast shutdown to its end, on a server that would wait for a walsender's client for ever.

Latency: from the commit's timestamp to the moment when another session sees the activity, which it asks for every
millisecond; so what is printed is a little more than what it was.

Replay (alone: `--part replay`): the worker's recording of that backlog, in turn into an empty `activity`, and again,
when there is nothing left to write.

Backfill (alone: `--part backfill`): of leads, one in ten converted, beside a running worker. First the application's
updates of single leads are timed by pgbench, from when they were to begin, in turn without a backfill, beside one at
full speed and beside one with `--rate`; each goes on where the last was. Then what is left is written, as fast as may
be. Its peak memory is held against that of the same command with a range of keys that no lead has.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import click
import psycopg

from bench.decode import measured, supported
from cdc_worker import context, decoders, profile, wal2json
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


CONVERTED = """
WITH converted AS (UPDATE lead SET is_converted = true WHERE lead_id % 10 = 0 RETURNING lead_id, company_name),
customers AS (INSERT INTO customer (customer_uid, name, type) SELECT lead_id, company_name, 'fund' FROM converted)
INSERT INTO contact (customer_uid, lead_id) SELECT lead_id, lead_id FROM converted
"""

BACKFILLED = """
SELECT count(*) = count(DISTINCT change_key) AND count(*) FILTER (WHERE activity_type = 'lead_created') = %(leads)s
   AND count(*) FILTER (WHERE activity_type = 'lead_converted') = %(leads)s / 10
FROM activity WHERE metadata ? 'backfilled'
"""


@dataclass(frozen=True)
class Sizes:
    """What the options say."""

    count: int
    rounds: int
    rate: int
    seconds: int
    leads: int
    backfill_rate: int


class Bench:
    """A private server with LeadFi's tables."""

    def __init__(self, cluster: Cluster, directory: Path, *, socket: bool) -> None:
        self.cluster = cluster
        self.dsn = cluster.socket_dsn() if socket else cluster.dsn()
        self.directory = directory
        self.connect()
        self.connection.execute(schema("leadfi.sql").encode())

    def fill(self, leads: int) -> None:
        self.connection.execute(
            "INSERT INTO lead (full_name, title, email, telegram, phone_number, source, status, linkedin_url,"
            " company_name, country, bd_in_charge, background, type)"
            " SELECT 'Lead ' || n, 'CTO', 'lead' || n || '@example.com', '@lead' || n, '+49 30 ' || n, 'website',"
            " '1. lead generated', 'https://example.com/in/lead' || n, 'Company ' || n, 'Germany', 'jane',"
            " 'met at a fair', 'exchange' FROM generate_series(1, %s) n",
            (leads,),
        )
        self.connection.execute("VACUUM ANALYZE lead")

    def connect(self) -> None:
        self.connection = psycopg.connect(self.cluster.socket_dsn(), autocommit=True)

    def environment(self, slot: str, **settings: str) -> dict[str, str]:
        return os.environ | {
            "CDC_WORKER_DSN": self.dsn,
            "CDC_WORKER_SLOT": slot,
            # One publication from before the backlog, and so one worker: whatever copy of the slot it reads.
            "CDC_WORKER_NAME": "base",
            "CDC_WORKER_PUBLICATION": "base",
            "CDC_WORKER_LOG_LEVEL": "error",
            **{f"CDC_WORKER_{name.upper()}": value for name, value in settings.items()},
        }

    def cdc(self, *arguments: str, slot: str, **settings: str) -> None:
        command = [sys.executable, "-m", "cdc_worker", *arguments]
        subprocess.run(command, env=self.environment(slot, **settings), check=True, stdout=subprocess.DEVNULL)

    def script(self, leads: int) -> Path:
        """What pgbench does in one transaction."""
        script = self.directory / "update.sql"
        script.write_text(UPDATE.format(leads=leads))
        return script

    def updates(self, count: int) -> None:
        """So many single-row transactions."""
        script = self.script(LEADS)
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

    def copy_slot(self, name: str, plugin: str = wal2json.PLUGIN) -> None:
        self.connection.execute("SELECT pg_copy_logical_replication_slot('base', %s, false, %s)", (name, plugin))

    def drop_slot(self, name: str) -> None:
        self.connection.execute("SELECT pg_drop_replication_slot(%s)", (name,))

    def recvlogical(self, number: int, plugin: str) -> float:
        """Seconds that pg_recvlogical takes to write the backlog to a file."""
        self.copy_slot(slot := f"recvlogical_{number}", plugin)
        tables = compile_rules(profile.load("leadfi"))
        options, _ = decoders.options(plugin, tables, (context.PREFIX,), publication="base")
        if plugin == wal2json.PLUGIN:
            options = supported(self.connection, slot, options)
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

    def recording(self, number: int, count: int, plugin: str) -> tuple[float, int]:
        """Seconds that the worker takes when it records as well, and how many bytes it has recorded."""
        with tempfile.TemporaryDirectory() as directory:
            seconds = self.worker(number, count, plugin, recording_directory=directory)
            return seconds, sum(path.stat().st_size for path in Path(directory).iterdir())

    def begin(self, slot: str, plugin: str) -> None:
        """Let the worker begin where the base slot is, with a copy of it and an empty target."""
        self.copy_slot(slot, plugin)
        self.connection.execute("TRUNCATE activity")
        self.connection.execute("DELETE FROM cdc_worker.checkpoint")
        self.cdc("setup", slot=slot)

    def worker(self, number: int, count: int, plugin: str, **settings: str) -> float:
        """Seconds that the worker takes to write the backlog to `activity`, whose rows are then checked."""
        self.begin(slot := f"worker_{number}", plugin)
        started = time.perf_counter()
        self.cdc("run", "--once", slot=slot, **settings)
        seconds = time.perf_counter() - started
        ((intact,),) = self.connection.execute(INTACT.encode(), (count, count)).fetchall()
        if not intact:
            raise click.ClickException("the worker's activities are not what they should be")
        self.drop_slot(slot)
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

    def latencies(self, rate: int, seconds: int, plugin: str) -> list[float]:
        """Milliseconds from commit to visible activity, at so many transactions a second."""
        self.begin(slot := f"latency_{plugin}", plugin)
        self.cdc("run", "--once", slot=slot)
        script = self.directory / "update.sql"
        found: list[float] = []
        command = [self.cluster.binaries.program("pgbench"), "-n", "-M", "prepared", "-c", "8", "-R", str(rate)]
        command += ["-T", str(seconds), "-f", str(script), "postgres"]
        newest = "SELECT max(activity_id) FROM activity"
        ((before,),) = self.connection.execute(newest).fetchall()
        with self.daemon(slot):
            # The server reads its WAL from where the slot was copied, before it has anything to send.
            self.connection.execute("UPDATE lead SET status = %s WHERE lead_id = 1", (f"started with {plugin}",))
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
        self.begin(slot := f"shutdown_{number}", wal2json.PLUGIN)
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

    def backfilled(self) -> int:
        """How many leads are done with."""
        done = self.connection.execute("SELECT rows FROM cdc_worker.backfill WHERE part = ''").fetchone()
        return 0 if done is None else int(done[0])

    def beside(self, arguments: Sequence[str] | None, rate: int, seconds: int) -> list[float]:
        """Milliseconds of updates, at so many a second, beside a backfill with these arguments, or none."""
        if arguments is None:
            return self.update_times(rate, seconds)
        before = self.backfilled()
        with self.running("backfill", "lead", *arguments) as process:
            while self.backfilled() == before and process.poll() is None:
                time.sleep(0.01)
            found = self.update_times(rate, seconds)
            if process.poll() is not None:
                raise click.ClickException("the backfill ended while updates were timed: give it more --leads")
        return found

    def update_times(self, rate: int, seconds: int) -> list[float]:
        """Milliseconds from when an update was to begin until the client knew of its commit."""
        prefix, script = self.directory / "times", self.directory / "update.sql"
        arguments = ["-n", "-M", "prepared", "-c", "4", "-R", str(rate), "-T", str(seconds), "-f", str(script)]
        self.cluster.run("pgbench", *arguments, "--log", f"--log-prefix={prefix}", "postgres")
        found = []
        for path in self.directory.glob("times.*"):
            # Manual: "pgbench", Per-Transaction Logging. The third is the time, in microseconds.
            found += [int(line.split()[2]) / 1000 for line in path.read_text().splitlines()]
            path.unlink()
        return found

    def taken(self, *arguments: str) -> tuple[float, int]:
        """Seconds that a command takes, and the most memory that it has, in bytes."""
        started, most = time.perf_counter(), 0
        with self.running(*arguments) as process:
            while process.poll() is None:
                with suppress(OSError, IndexError):  # it may have ended meanwhile
                    status = Path(f"/proc/{process.pid}/status").read_text()
                    most = int(status.split("VmHWM:")[1].split()[0]) * 1024
                time.sleep(0.01)
        if process.returncode != 0:
            raise click.ClickException(f"{arguments[0]} failed")
        return time.perf_counter() - started, most

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


def percentiles(found: Sequence[float]) -> list[float]:
    """p50, p95 and p99."""
    cuts = statistics.quantiles(found, n=100)
    return [cuts[49], cuts[94], cuts[98]]


def stream(bench: Bench, sizes: Sizes) -> None:
    """Drain, shutdown and latency."""
    count, rate = sizes.count, sizes.rate
    bench.cdc("setup", slot="base")
    bench.fill(LEADS)
    bench.updates(count)
    lines: list[Sequence[object]] = [
        ("round", "plugin", "pg_recvlogical /s", "worker /s", "ratio", "recording /s", "to worker", "bytes each")
    ]
    ratios: dict[str, list[float]] = {plugin: [] for plugin in decoders.PLUGINS}
    kept: dict[str, list[float]] = {plugin: [] for plugin in decoders.PLUGINS}
    faster = []
    for number in range(1, sizes.rounds + 1):
        taken = {}
        for plugin in sorted(decoders.PLUGINS, reverse=bool(number % 2)):  # what comes later may find more in caches
            peer = bench.recvlogical(number, plugin)
            if number // 2 % 2:
                ours, (recorded, size) = bench.worker(number, count, plugin), bench.recording(number, count, plugin)
            else:
                (recorded, size), ours = bench.recording(number, count, plugin), bench.worker(number, count, plugin)
            taken[plugin] = ours
            ratios[plugin].append(peer / ours)
            kept[plugin].append(ours / recorded)
            rates = [f"{count / seconds:,.0f}" for seconds in (peer, ours, recorded)]
            ratio, recording = f"{peer / ours:.2f}", f"{ours / recorded:.2f}"
            lines.append((number, plugin, *rates[:2], ratio, rates[2], recording, f"{size / count:.0f}"))
        faster.append(taken["wal2json"] / taken["pgoutput"])
    for plugin in decoders.PLUGINS:
        ratio, recording = f"{statistics.median(ratios[plugin]):.2f}", f"{statistics.median(kept[plugin]):.2f}"
        lines.append(("median", plugin, "", "", ratio, "", recording, ""))
    table(f"Drain of {count:,} single-row transactions, rows checked", lines)
    click.echo(f"  the worker with pgoutput, of what it does with wal2json: {statistics.median(faster):.2f}")
    shutdowns = [
        ("caught up", bench.shutdown(1)),
        ("backlog", bench.shutdown(2, behind=True)),
        ("target locked", bench.shutdown(3, locked=True)),
        ("no worker", bench.stop()),
    ]
    table("Seconds of a fast shutdown", [*zip(*((name, f"{taken:.2f}") for name, taken in shutdowns), strict=True)])
    bench.cluster.start()
    bench.connect()
    late: list[Sequence[object]] = [("plugin", "activities", "p50", "p95", "p99", "max")]
    for plugin in decoders.PLUGINS:
        found = bench.latencies(rate, sizes.seconds, plugin)
        late.append((plugin, f"{len(found):,}", *(f"{value:.1f}" for value in (*percentiles(found), max(found)))))
    table(f"Milliseconds from commit to visible activity at {rate} transactions a second", late)


def decode(bench: Bench, sizes: Sizes) -> None:
    """What a change costs by itself, with either decoder."""
    count = sizes.count // 10
    lines: list[Sequence[object]] = [("columns", "", "wal2json", "pgoutput", "ratio", "of rounds")]
    for columns in (6, 40):
        lines += measured(bench.connection, columns, count, sizes.rounds)
    table(f"Microseconds a change, in {sizes.rounds} rounds of {count:,} updates with a full old row", lines)


def replay(bench: Bench, sizes: Sizes) -> None:
    """How fast a recording becomes activities, and how fast it is seen that there is nothing to do."""
    count = sizes.count
    bench.cdc("setup", slot="base")
    bench.fill(LEADS)
    bench.cdc("run", "--once", slot="base")
    bench.updates(count)
    recording = bench.directory / "recording"
    recording.mkdir()
    bench.cdc("run", "--once", slot="base", recording_directory=str(recording))
    lines: list[Sequence[object]] = [("round", "changes /s", "peak MB", "again /s", "peak MB")]
    rates: list[list[float]] = []
    for number in range(1, sizes.rounds + 1):
        bench.connection.execute("TRUNCATE activity")
        found = [bench.taken("replay", str(recording)) for _ in range(2)]
        if not bench.connection.execute(INTACT.encode(), (count, count)).fetchall()[0][0]:
            raise click.ClickException("the replayed activities are not what they should be")
        rates.append([count / seconds for seconds, _ in found])
        lines.append((number, *(f"{value:,.1f}" for seconds, most in found for value in (count / seconds, most / 1e6))))
    fresh, again = (statistics.median(of) for of in zip(*rates, strict=True))
    lines.append(("median", f"{fresh:,.1f}", "", f"{again:,.1f}", ""))
    size = sum(path.stat().st_size for path in recording.iterdir())
    table(f"Replay of {count:,} single-row transactions in {size / 1e6:.1f} MB, rows checked", lines)


def backfill(bench: Bench, sizes: Sizes) -> None:
    """What a backfill costs the application, and how fast it is."""
    leads, rounds, slow = sizes.leads, sizes.rounds, str(sizes.backfill_rate)
    bench.fill(leads)
    bench.connection.execute(CONVERTED.encode())
    bench.connection.execute("VACUUM ANALYZE")
    bench.cdc("setup", slot="base")
    bench.script(leads)
    stretch = max(1, sizes.seconds // rounds)
    conditions = {"none": None, "at full speed": [], f"--rate {slow}": ["--rate", slow]}
    times: dict[str, list[float]] = {name: [] for name in conditions}
    with bench.daemon("base"):
        for _ in range(rounds):
            for name, arguments in conditions.items():
                times[name] += bench.beside(arguments, sizes.rate, stretch)
        _, idle = bench.taken("backfill", "lead", "--to-key", "0")
        before = bench.backfilled()
        taken, memory = bench.taken("backfill", "lead")
    ((intact,),) = bench.connection.execute(BACKFILLED.encode(), {"leads": leads}).fetchall()
    if not intact:
        raise click.ClickException("the activities are not what they should be")
    lines: list[Sequence[object]] = [("backfill", "updates", "p50", "p95", "p99")]
    without = percentiles(times["none"])
    for name, found in times.items():
        beside = percentiles(found)
        lines.append((name, f"{len(found):,}", *(f"{value:.1f}" for value in beside)))
        if name != "none":
            lines.append(("ratio", "", *(f"{ours / theirs:.2f}" for ours, theirs in zip(beside, without, strict=True))))
    table(
        f"Milliseconds of an update at {sizes.rate} a second, in {rounds} stretches of {stretch} s each in turn", lines
    )
    table(
        f"Backfill of {leads - before:,} leads, activities checked",
        [
            ("seconds", "leads /s", "peak MB", "idle MB"),
            (f"{taken:.1f}", f"{(leads - before) / taken:,.0f}", *(f"{most / 1e6:.1f}" for most in (memory, idle))),
        ],
    )


PARTS = {"decode": decode, "stream": stream, "replay": replay, "backfill": backfill}


@click.command()
@click.option(
    "--part", "parts", type=click.Choice([*PARTS]), multiple=True, default=[*PARTS], help="Only this; all if not given."
)
@click.option("--count", default=200_000, show_default=True, help="Transactions in the backlog.")
@click.option("--rounds", default=5, show_default=True, help="Rounds of what is measured in turn.")
@click.option("--rate", default=500, show_default=True, help="Transactions a second while latency is measured.")
@click.option("--seconds", default=20, show_default=True, help="How long latency is measured.")
@click.option("--leads", default=1_000_000, show_default=True, help="Leads that a backfill is about.")
@click.option("--backfill-rate", default=1_000, show_default=True, help="Leads a second of the slow backfill.")
@click.option("--socket", is_flag=True, help="Connect by Unix socket.")
def main(parts: Sequence[str], socket: bool, **sizes: int) -> None:
    """Measure drain, latency, replay and backfill on private servers."""
    binaries = find_binaries()
    click.echo(binaries.origin)
    settings = SETTINGS | {"timezone": time.strftime("%Z")}
    for part, measure in PARTS.items():
        if part in parts:
            with tempfile.TemporaryDirectory() as directory, Cluster(binaries, settings=settings) as cluster:
                measure(Bench(cluster, Path(directory), socket=socket), Sizes(**sizes))


main()
