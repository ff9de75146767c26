"""How long a worker that was away needs until nothing is behind any more, while the application goes on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from bench import clients
from bench.figures import fit, spread
from bench.server import LEADS, NEWEST, Opener, Server
from bench.sizes import Sizes
from bench.tables import number, ranged, table

AWAY = (5, 10, 20)
"""Seconds."""

RATE = 1_000
"""Transactions a second meanwhile."""

CURRENT = f"SELECT (SELECT now() - date_created < interval '100 milliseconds' FROM ({NEWEST}) newest)"
"""Whether there is no lag: a commit may be that old, and be the newest."""


def measure(opened: Opener, sizes: Sizes) -> dict[str, Any]:
    """Each time away, in turn."""
    times = [seconds * max(0.1, sizes.scale) for seconds in AWAY]
    found: dict[float, list[float]] = {away: [] for away in times}
    with opened() as server:
        server.fill(LEADS)
        for _ in range(sizes.rounds):
            for away in times:
                found[away].append(caught_up(server, away))
    spreads = {away: spread(seconds) for away, seconds in found.items()}
    lines: list[Sequence[object]] = [("away s", "transactions", "s to zero lag", "of the time away")]
    for away, seconds in spreads.items():
        lines.append((number(away), f"{away * RATE:,.0f}", ranged(seconds), f"{seconds['median'] / away:.2f}"))
    table(f"Catching up at {RATE:,} transactions a second, the start of the process included", lines)
    rows = [{"away_seconds": away, "seconds": seconds} for away, seconds in spreads.items()]
    return {"rate": RATE, "away": rows, "fit": fit(times, [seconds["median"] for seconds in spreads.values()])}


def caught_up(server: Server, away: float) -> float:
    """Seconds from the start of the worker until the newest activity is of a commit of just now."""
    plugin = server.plugins[0]
    server.begin_now("catchup", plugin)
    server.connection.execute("VACUUM lead")
    server.connection.execute("CHECKPOINT")
    with server.loading("-c", "8", "-R", str(RATE), "-T", "600"):
        with server.daemon("catchup") as worker:
            server.until(worker, CURRENT)
        time.sleep(away)
        started = time.monotonic()
        with server.daemon("catchup") as worker:
            server.until(worker, CURRENT)
            seconds = time.monotonic() - started
    clients.drop(server, "catchup")
    return seconds
