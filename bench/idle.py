"""What a worker costs while nothing happens: processor and WAL, extrapolated to an hour.

The server's part is what all its processes take together, less what they take without a worker.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from bench import clients
from bench.figures import spread
from bench.server import LEADS, Opener, Server
from bench.sizes import Sizes
from bench.tables import number, ranged, table
from bench.usage import cpu_seconds, tree_cpu_seconds

HOUR = 3600


def measure(opened: Opener, sizes: Sizes) -> dict[str, Any]:
    """Without a worker and with one of each plugin, in turn; `minutes` of each in all."""
    stretch = sizes.minutes * 60 / sizes.rounds
    with opened() as server:
        server.fill(LEADS)
        # As it is by default: a server that waits for ever asks its clients nothing.
        server.connection.execute("ALTER SYSTEM SET wal_sender_timeout = '60s'")
        server.connection.execute("SELECT pg_reload_conf()")
        kinds = ["none", *server.plugins]
        found: dict[str, list[tuple[float, float, float]]] = {kind: [] for kind in kinds}
        for _ in range(sizes.rounds):
            for kind in kinds:
                found[kind].append(one(server, kind, stretch))
    result: dict[str, Any] = {}
    lines: list[Sequence[object]] = [("", "worker CPU s", "server CPU s", "WAL bytes")]
    names = ("worker_cpu_seconds", "server_cpu_seconds", "wal_bytes")
    for kind, rounds in found.items():
        result[kind] = dict(zip(names, map(spread, zip(*rounds, strict=True)), strict=True))
        lines.append((kind, *(ranged(result[kind][name]) for name in names)))
    for kind in kinds[1:]:
        more = {name: result[kind][name]["median"] - result["none"][name]["median"] for name in names}
        result[kind]["more"] = more
        lines.append((f"{kind}, beyond none", *(number(value) for value in more.values())))
    table(f"An idle hour, from {sizes.rounds} stretches of {stretch:.1f} s each", lines)
    return {"minutes": sizes.minutes, "kinds": result}


def one(server: Server, kind: str, seconds: float) -> tuple[float, float, float]:
    """Seconds of the processor of the worker and of the server, and bytes of WAL, for an hour."""
    with ExitStack() as stack:
        worker = None
        if kind != "none":
            server.begin_now(f"idle_{kind}", kind)
            worker = stack.enter_context(server.daemon(f"idle_{kind}"))
            server.caught_up(worker, f"{kind} {time.monotonic()}")
        server.connection.execute("CHECKPOINT")
        time.sleep(1)
        postmaster = int((server.cluster.data / "postmaster.pid").read_text().split()[0])

        def so_far() -> tuple[float, float, float]:
            wal = float(str(server.value("SELECT pg_current_wal_insert_lsn() - '0/0'")))
            return cpu_seconds(worker.pid) if worker else 0.0, tree_cpu_seconds(postmaster), wal

        before, started = so_far(), time.monotonic()
        time.sleep(seconds)
        after, taken = so_far(), time.monotonic() - started
    if kind != "none":
        clients.drop(server, f"idle_{kind}")
    worker_cpu, server_cpu, wal = ((now - then) / taken * HOUR for now, then in zip(after, before, strict=True))
    return worker_cpu, server_cpu, wal
