"""From the request of a fast shutdown to its end, on a server that would wait for a walsender's client for ever."""

from __future__ import annotations

import time
from contextlib import closing
from typing import Any

import psycopg

from bench.figures import rounded
from bench.server import LEADS, Opener, Server
from bench.sizes import Sizes
from bench.tables import table


def measure(opened: Opener, sizes: Sizes) -> dict[str, Any]:
    """With a worker that has caught up, that is behind, that waits for a lock, and without one."""
    with opened() as server:
        server.fill(LEADS)
        server.cdc("setup", slot="base")
        server.updates(sizes.count)
        found = {
            "caught up": shutdown(server, 1),
            "backlog": shutdown(server, 2, behind=True),
            "target locked": shutdown(server, 3, locked=True),
            "no worker": stop(server),
        }
        server.cluster.start()
        server.connect()
    table("Seconds of a fast shutdown", [[*found], [f"{seconds:.2f}" for seconds in found.values()]])
    return {"seconds": {name: rounded(seconds) for name, seconds in found.items()}}


def shutdown(server: Server, number: int, *, behind: bool = False, locked: bool = False) -> float:
    """Seconds that it takes while the worker runs, has the backlog before it, or waits for a lock."""
    server.begin(slot := f"shutdown_{number}", server.plugins[0])
    if not behind:
        server.cdc("run", "--once", slot=slot)
    with server.daemon(slot), closing(psycopg.connect(server.cluster.socket_dsn())) as other:
        if locked:
            other.execute("LOCK TABLE activity")
            server.connection.execute("UPDATE lead SET status = 'locked' WHERE lead_id = 1")
        time.sleep(1)
        seconds = stop(server)
    server.cluster.start()
    server.connect()
    server.drop_slot(slot)
    return seconds


def stop(server: Server) -> float:
    started = time.perf_counter()
    server.cluster.stop("fast")
    return time.perf_counter() - started
