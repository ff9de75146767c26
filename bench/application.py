"""What the application pays: its own updates of single leads, with what may record them.

The triggers are those that LeadFi had before, on their own `activity` with its own indexes, in a database beside.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

from bench import clients
from bench.figures import percentile, ratio, spread
from bench.latency import rotated
from bench.server import LEADS, Opener, Server
from bench.sizes import Sizes
from bench.tables import ranged, table
from cdc_worker.ddl import schema

LEGACY = Path(__file__).parent.parent / "tests" / "legacy"

LINGER = 0.02
"""Seconds."""

CONDITIONS = {
    "nothing": "nothing",
    "identity": "REPLICA IDENTITY FULL",
    "worker": "the worker",
    "linger": f"the worker, with a linger of {LINGER * 1000:.0f} ms",
    "triggers": "the old triggers",
}

SETTINGS: dict[str, dict[str, str]] = {"worker": {}, "linger": {"linger": str(LINGER)}}
"""Of the worker, where there is one."""

RATE = 2_000
"""Transactions a second of the fixed rate."""

LOADS = {"saturated": ("-c", "4"), "fixed": ("-c", "8", "-R", str(RATE))}


def measure(opened: Opener, sizes: Sizes) -> dict[str, Any]:
    """Each load under each condition, in turn."""
    found: dict[tuple[str, str], list[list[float]]] = {(load, name): [] for load in LOADS for name in CONDITIONS}
    with opened() as server:
        server.fill(LEADS)
        server.begin_now("application", server.plugins[0])
        clients.drop(server, "application")
        with_triggers(server)
        for number in range(sizes.rounds):
            for load, arguments in LOADS.items():
                for name in rotated([*CONDITIONS], number):
                    found[load, name].append(stretch(server, name, arguments, sizes.seconds))
    measures = {
        "throughput": lambda times: len(times) / sizes.seconds,
        "p50_ms": lambda times: percentile(times, 50),
        "p95_ms": lambda times: percentile(times, 95),
        "p99_ms": lambda times: percentile(times, 99),
    }
    result: dict[str, Any] = {}
    for (load, name), rounds in found.items():
        of = {measured: spread([value(times) for times in rounds]) for measured, value in measures.items()}
        result.setdefault(load, {})[name] = of
    for load, title in (("saturated", "as many as four clients can"), ("fixed", f"{RATE:,} a second")):
        lines: list[Sequence[object]] = [("with", "a second", "p50 ms", "p95", "p99", "a second, to triggers", "p50")]
        for name, of in result[load].items():
            beside = [ratio(of[key], result[load]["triggers"][key]) for key in ("throughput", "p50_ms")]
            lines.append((CONDITIONS[name], *map(ranged, of.values()), *map(ranged, beside)))
        table(f"Updates of single leads, {title}, in {sizes.rounds} rounds of {sizes.seconds} s each", lines)
    return {"rate": RATE, "seconds": sizes.seconds, "loads": result}


def with_triggers(server: Server) -> None:
    """A database in which triggers record what happens to as many leads."""
    server.cluster.createdb("triggers")
    with psycopg.connect(server.cluster.socket_dsn("triggers"), autocommit=True) as connection:
        connection.execute(schema("leadfi.sql").encode())
        for name in ("legacy.sql", "old_migration.sql"):
            connection.execute((LEGACY / name).read_bytes())
    with (
        server.connection.cursor().copy("COPY lead TO STDOUT") as source,
        psycopg.connect(server.cluster.socket_dsn("triggers")) as connection,
        connection.cursor() as cursor,
    ):
        connection.execute("SET session_replication_role = replica")
        with cursor.copy("COPY lead FROM STDIN") as target:
            for data in source:
                target.write(data)


def stretch(server: Server, name: str, load: Sequence[str], seconds: int) -> list[float]:
    """Milliseconds of each update."""
    database = "triggers" if name == "triggers" else "postgres"
    with psycopg.connect(server.cluster.socket_dsn(database), autocommit=True) as connection:
        connection.execute("TRUNCATE activity RESTART IDENTITY")
        connection.execute("VACUUM lead")
        connection.execute(f"ALTER TABLE lead REPLICA IDENTITY {'FULL' if name == 'identity' else 'DEFAULT'}".encode())
    with recording(server, name):
        server.connection.execute("CHECKPOINT")
        return server.update_times(*load, "-T", str(seconds), dbname=database)


@contextmanager
def recording(server: Server, name: str) -> Iterator[None]:
    """With the worker, if it is that, which has nothing to do before, and at the end is waited for until it hasn't."""
    if name not in SETTINGS:
        yield
        return
    server.begin_now("application", server.plugins[0])
    with server.daemon("application", **SETTINGS[name]) as worker:
        server.caught_up(worker, f"began {time.monotonic()}")
        yield
        server.caught_up(worker, f"ended {time.monotonic()}")
    clients.drop(server, "application")
