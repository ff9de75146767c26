"""What a backfill costs the application, and how fast it is: of leads, one in ten converted, beside a running worker.

First the application's updates of single leads are timed by pgbench, from when they were to begin, in turn without a
backfill, beside one at full speed and beside one with `--rate`; each goes on where the last was. Then what is left is
written, as fast as may be. Its peak memory is held against that of the same command with a range of keys that no lead
has.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import click

from bench.figures import percentile, percentiles, rounded, spread
from bench.server import Opener, Server
from bench.sizes import Sizes
from bench.tables import table
from bench.usage import peak

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


def measure(opened: Opener, sizes: Sizes) -> dict[str, Any]:
    """What a backfill costs the application, and how fast it is."""
    leads, rounds, slow = sizes.leads, sizes.rounds, str(sizes.backfill_rate)
    stretch = max(1, round(sizes.seconds * 2 / 5))
    conditions = {"none": None, "at full speed": [], f"--rate {slow}": ["--rate", slow]}
    times: dict[str, list[list[float]]] = {name: [] for name in conditions}
    with opened() as server:
        server.fill(leads)
        server.connection.execute(CONVERTED.encode())
        server.connection.execute("VACUUM ANALYZE")
        server.cdc("setup", slot="base")
        load = ("-c", "4", "-R", str(sizes.rate), "-T", str(stretch))
        with server.daemon("base"):
            for _ in range(rounds):
                for name, arguments in conditions.items():
                    times[name].append(beside(server, arguments, *load, leads=leads))
            _, idle = taken(server, "backfill", "lead", "--to-key", "0")
            before = backfilled(server)
            seconds, memory = taken(server, "backfill", "lead")
        ((intact,),) = server.connection.execute(BACKFILLED.encode(), {"leads": leads}).fetchall()
    if not intact:
        raise click.ClickException("the activities are not what they should be")
    lines: list[Sequence[object]] = [("backfill", "updates", "p50", "p95", "p99")]
    pooled = {name: [late for each in found for late in each] for name, found in times.items()}
    without = percentiles(pooled["none"])
    for name, found in pooled.items():
        these = percentiles(found)
        lines.append((name, f"{len(found):,}", *(f"{value:.1f}" for value in these)))
        if name != "none":
            lines.append(("ratio", "", *(f"{ours / theirs:.2f}" for ours, theirs in zip(these, without, strict=True))))
    table(
        f"Milliseconds of an update at {sizes.rate} a second, in {rounds} stretches of {stretch} s each in turn", lines
    )
    table(
        f"Backfill of {leads - before:,} leads, activities checked",
        [
            ("seconds", "leads /s", "peak MB", "idle MB"),
            (f"{seconds:.1f}", f"{(leads - before) / seconds:,.0f}", *(f"{most / 1e6:.1f}" for most in (memory, idle))),
        ],
    )
    return {
        "leads": leads - before,
        "rate": rounded((leads - before) / seconds),
        "peak_mb": rounded(memory / 1e6),
        "idle_peak_mb": rounded(idle / 1e6),
        "updates": {
            name: {
                "p50_ms": spread([percentile(each, 50) for each in found]),
                "p99_ms": spread([percentile(each, 99) for each in found]),
            }
            for name, found in times.items()
        },
    }


def backfilled(server: Server) -> int:
    """How many leads are done with."""
    done = server.connection.execute("SELECT rows FROM cdc_worker.backfill WHERE part = ''").fetchone()
    return 0 if done is None else int(done[0])


def beside(server: Server, arguments: Sequence[str] | None, *load: str, leads: int) -> list[float]:
    """Milliseconds of updates beside a backfill with these arguments, or none."""
    if arguments is None:
        return server.update_times(*load, leads=leads)
    before = backfilled(server)
    with server.running("backfill", "lead", *arguments) as process:
        while backfilled(server) == before and process.poll() is None:
            time.sleep(0.01)
        found = server.update_times(*load, leads=leads)
        if process.poll() is not None:
            raise click.ClickException("the backfill ended while updates were timed: give it more --leads")
    return found


def taken(server: Server, *arguments: str) -> tuple[float, int]:
    """Seconds that a command takes, and the most memory that it has, in bytes."""
    started, most = time.perf_counter(), 0
    with server.running(*arguments) as process:
        while process.poll() is None:
            with suppress(OSError, IndexError):  # it may have ended meanwhile
                most = peak(process.pid)
            time.sleep(0.01)
    if process.returncode != 0:
        raise click.ClickException(f"{arguments[0]} failed")
    return time.perf_counter() - started, most
