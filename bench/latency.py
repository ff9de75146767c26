"""How late an activity is: from the commit's timestamp to when the worker knows that it is durable.

By then everybody sees it. The worker's log tells when that was of each batch: a session that looked for them every
millisecond would take more of two processors than the worker, and be what is measured.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from itertools import repeat
from pathlib import Path
from typing import Any, TypeVar

from bench import clients
from bench.figures import percentile, rounded, spread, tail
from bench.server import LEADS, Opener, Server
from bench.sizes import Sizes
from bench.tables import number, table

T = TypeVar("T")

RATES = (100, 500, 2_000)
"""Transactions a second."""

COMMITTED = "SELECT date_created FROM activity ORDER BY activity_id"

WARMING = 1
"""Seconds at the beginning of a stretch that don't count: pgbench connects, and caches are empty."""

POINTS = 100
"""Of a plot over time."""

Arrivals = list[tuple[float, float]]
"""Seconds since the first commit that counts, and milliseconds from that commit until it was seen."""


def measure(opened: Opener, sizes: Sizes) -> dict[str, Any]:
    """Each rate with each plugin, in turn."""
    rates = sorted({*RATES} - {500} | {sizes.rate})
    with opened() as server:
        server.fill(LEADS)
        kinds = [(plugin, rate) for plugin in server.plugins for rate in rates]
        found: dict[tuple[str, int], list[Arrivals]] = {kind: [] for kind in kinds}
        for round_number in range(sizes.rounds):
            for plugin, rate in rotated(kinds, round_number):
                found[plugin, rate].append(stretch(server, plugin, rate, sizes.seconds))
    lines: list[Sequence[object]] = [("plugin", "a second", "activities", "p50", "p95", "p99", "p99.9", "max")]
    result: dict[str, Any] = {}
    for (plugin, rate), rounds in found.items():
        late = [milliseconds for arrivals in rounds for _, milliseconds in arrivals]
        told = tail(late)
        lines.append((plugin, rate, f"{len(late):,}", *map(number, told.values())))
        result.setdefault(plugin, {})[str(rate)] = {
            "activities": len(late),
            **told,
            "p50_rounds": spread([percentile([late for _, late in arrivals], 50) for arrivals in rounds]),
            "p99_rounds": spread([percentile([late for _, late in arrivals], 99) for arrivals in rounds]),
            "over_time": over_time(rounds),
        }
    table(f"Milliseconds from commit to visible activity, in {sizes.rounds} rounds of {sizes.seconds} s each", lines)
    return {"rate": sizes.rate, "seconds": sizes.seconds, "plugins": result}


def stretch(server: Server, plugin: str, rate: int, seconds: int) -> Arrivals:
    """What arrived while there were so many transactions a second."""
    slot = f"latency_{plugin}"
    server.begin_now(slot, plugin)
    server.connection.execute("VACUUM lead")
    server.connection.execute("CHECKPOINT")
    mark = f"after {plugin} at {rate} {time.monotonic():.3f}"
    log = server.directory / "latency.log"
    with server.daemon(slot, log=log, log_level="debug", log_format="json") as worker:
        server.caught_up(worker, f"{plugin} at {rate} {time.monotonic()}")
        before = server.newest()
        with server.loading("-c", "8", "-R", str(rate), "-T", str(seconds + WARMING)) as load:
            load.wait()
        # However late it is, what comes before this has to come first.
        server.caught_up(worker, mark)
    clients.drop(server, slot)
    committed, written = [at for (at,) in server.connection.execute(COMMITTED)], [*durable(log)]
    if len(committed) != len(written):
        raise clients.FailedError(f"the worker's log tells of {len(written):,} activities of {len(committed):,}")
    # Both clocks are one, and the server's zone is UTC.
    found = [*zip(committed, written, strict=True)][before:-1]
    since = found[0][0]
    late = [((at - since).total_seconds() - WARMING, (seen - at).total_seconds() * 1000) for at, seen in found]
    return [(at, milliseconds) for at, milliseconds in late if at >= 0]


def durable(log: Path) -> Iterator[datetime]:
    """When each activity was durable, in order, in UTC. Raises FailedError where the log tells of anything else."""
    for line in log.read_text().splitlines():
        told = json.loads(line)
        if told["event"] == "batch_written":
            if told["dead_letters"] or told["already_there"]:
                raise clients.FailedError(f"a batch was not written whole: {line}")
            at = datetime.fromisoformat(told["timestamp"]).replace(tzinfo=None)
            yield from repeat(at, told["activities"])


def over_time(rounds: Sequence[Arrivals]) -> list[tuple[float, float, float]]:
    """Seconds, median and maximum of the points of a plot: all rounds, one after another."""
    points, before = [], 0.0
    each = max(1, POINTS // len(rounds))
    for arrivals in rounds:
        until = max(at for at, _ in arrivals) + 1e-6
        parts: list[list[float]] = [[] for _ in range(each)]
        for at, milliseconds in arrivals:
            parts[int(at / until * each)].append(milliseconds)
        points += [
            (rounded(before + until * (place + 0.5) / each), rounded(percentile(part, 50)), rounded(max(part)))
            for place, part in enumerate(parts)
            if part
        ]
        before += until
    return points


def rotated(kinds: Sequence[T], by: int) -> list[T]:
    """What comes later may find more in caches, or a slower machine: each round begins with another one."""
    place = by % len(kinds)
    return [*kinds[place:], *kinds[:place]]
