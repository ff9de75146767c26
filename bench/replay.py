"""The worker's recording of a backlog, in turn into an empty `activity`, and again, when nothing is left to write."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from bench.backfill import taken
from bench.figures import spread
from bench.server import LEADS, Backlog, Opener
from bench.sizes import Sizes
from bench.tables import table


def measure(opened: Opener, sizes: Sizes) -> dict[str, Any]:
    """How fast a recording becomes activities, and how fast it is seen that there is nothing to do."""
    with opened() as server:
        server.fill(LEADS)
        server.cdc("setup", slot="base")
        server.updates(sizes.count)
        count = sizes.count // 4 * 4
        backlog = Backlog("base", count, server.end())
        recording = server.directory / "recording"
        recording.mkdir()
        server.cdc("run", "--once", slot="base", recording_directory=str(recording))
        lines: list[Sequence[object]] = [("round", "changes /s", "peak MB", "again /s", "peak MB")]
        rates: list[list[float]] = []
        peaks: list[float] = []
        for number in range(1, sizes.rounds + 1):
            server.connection.execute("TRUNCATE activity")
            found = [taken(server, "replay", str(recording)) for _ in range(2)]
            server.check(backlog)
            rates.append([count / seconds for seconds, _ in found])
            peaks.append(max(most for _, most in found) / 1e6)
            values = (value for seconds, most in found for value in (count / seconds, most / 1e6))
            lines.append((number, *(f"{value:,.1f}" for value in values)))
        fresh, again = zip(*rates, strict=True)
        lines.append(("median", f"{statistics.median(fresh):,.1f}", "", f"{statistics.median(again):,.1f}", ""))
        size = sum(path.stat().st_size for path in recording.iterdir())
    table(f"Replay of {count:,} single-row transactions in {size / 1e6:.1f} MB, rows checked", lines)
    return {
        "changes": count,
        "bytes": size,
        "rate": spread(fresh),
        "again_rate": spread(again),
        "peak_mb": spread(peaks),
    }
