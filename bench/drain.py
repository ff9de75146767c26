"""How fast a backlog drains, by each client in turn: of single-row transactions, of batches, and of one large one."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import click

from bench import clients
from bench.clients import CLIENTS, Run
from bench.figures import ratio, rounded, spread
from bench.server import LEADS, Backlog, Opener, Server
from bench.sizes import Sizes
from bench.tables import number, ranged, table
from bench.usage import peak

BATCH = 1_000

BATCHES = """
DO $$ BEGIN FOR batch IN 0..{batches} - 1 LOOP
    UPDATE lead SET status = '2. proposal ' || (random() * 1000000000)::integer
    WHERE lead_id > batch * {rows} % {leads} AND lead_id <= batch * {rows} % {leads} + {rows};
    COMMIT;
END LOOP; END $$
"""

LARGE = "UPDATE lead SET status = '2. proposal ' || (random() * 1000000000)::integer"


def single(server: Server, sizes: Sizes) -> int:
    """Transactions of one row."""
    server.updates(sizes.count)
    return sizes.count // 4 * 4


def batches(server: Server, sizes: Sizes) -> int:
    """As many changes in transactions of a thousand rows each."""
    count = max(1, sizes.count // BATCH)
    server.connection.execute(BATCHES.format(batches=count, rows=BATCH, leads=LEADS).encode())
    return count * BATCH


def large(server: Server, sizes: Sizes) -> int:
    """One transaction."""
    server.connection.execute(LARGE.encode())
    return sizes.large


SCENARIOS: dict[str, Callable[[Server, Sizes], int]] = {"single": single, "batches": batches, "large": large}

TITLES = {
    "single": "single-row updates, a transaction each",
    "batches": "updates in transactions of 1,000 rows",
    "large": "updates in one transaction",
}

WITHIN = {
    "single": {*CLIENTS} - {"pg_recvlogical-format-2"},
    "batches": {*CLIENTS} - {"pg_recvlogical-format-2", "worker-recording"},
    "large": {*CLIENTS} - {"worker-recording"},
}
"""Which clients take part. A large transaction may be too large for the one document that wal2json's defaults make."""


def measure(opened: Opener, sizes: Sizes) -> dict[str, Any]:
    """Each scenario on a server of its own."""
    scenarios = {}
    for name, commit in SCENARIOS.items():
        with opened() as server:
            scenarios[name] = scenario(server, name, commit, sizes)
    return {"scenarios": scenarios}


def scenario(server: Server, name: str, commit: Callable[[Server, Sizes], int], sizes: Sizes) -> dict[str, Any]:
    """One backlog, drained by all."""
    server.fill(sizes.large if name == "large" else LEADS)
    server.cdc("setup", slot="base")
    changes = commit(server, sizes)
    backlog = Backlog("base", changes, server.end())
    left_out = clients.missing(server, sizes.without)
    drains = {client: drain for client, drain in CLIENTS.items() if client in WITHIN[name] and client not in left_out}
    runs, failed = clients.interleaved(server, backlog, drains, sizes.rounds)
    left_out = {client: why for client, why in (left_out | failed).items() if client in WITHIN[name]}
    found = {client: clients.summary(each) for client, each in runs.items()}
    lines: list[list[object]] = [
        ["", "changes /s", "to the first", "CPU s", "walsender", "backend", "peak MB", "whole process s"]
    ]
    first = next(iter(found.values()))
    for client, measures in found.items():
        columns = ["cpu_seconds", "walsender_cpu_seconds", "backend_cpu_seconds", "peak_mb", "process_seconds"]
        rates = [ranged(measures["rate"]), ranged(ratio(measures["rate"], first["rate"]))]
        lines.append([client, *rates, *(number(measures[column]["median"]) for column in columns)])
    table(f"Drain of {changes:,} {TITLES[name]}, rows checked, in {sizes.rounds} rounds", lines)
    for client, why in left_out.items():
        click.echo(f"  without {client}: {why}")
    result: dict[str, Any] = {"changes": changes, "clients": found, "left_out": left_out}
    if name == "large":
        result["idle_peak_mb"] = {
            f"worker{'' if plugin == 'wal2json' else '-pgoutput'}": rounded(idle_peak(server, plugin) / 1e6)
            for plugin in server.plugins
        }
        result["first_activity"] = {client: early(each) for client, each in runs.items() if "worker" in client}
        for client, told in result["first_activity"].items():
            click.echo(
                f"  {client}: first activity visible after {told['seconds']['median']:.2f} s,"
                f" {'before' if told['before_the_end'] else 'NOT before'} the transaction was read to its end;"
                f" idle {result['idle_peak_mb'][client]:.1f} MB"
            )
    return result


def early(runs: list[Run]) -> dict[str, Any]:
    """When there was something of a backlog, and whether that was before the server had sent its end, in each round."""
    seconds = spread([run.first or 0.0 for run in runs])
    return {"seconds": seconds, "before_the_end": all(run.early for run in runs)}


def idle_peak(server: Server, plugin: str) -> int:
    """Bytes that a worker has had at most which has told of one change."""
    server.begin_now("idle", plugin)
    with server.daemon("idle") as process:
        server.caught_up(process, f"told by {plugin}")
        time.sleep(0.1)
        found = peak(process.pid)
    clients.drop(server, "idle")
    return found
