"""How the cost of a change grows: with the width of its row, with the number of captured tables, with what `activity`
has already, and with what is behind it in the backlog. Beside each is what pg_recvlogical takes for the same.

Widths and tables are of generated tables, whose changes come in transactions of a hundred, with a profile of one rule a
table and an `activity` of four columns. The others are LeadFi's, as in the drain of single-row transactions.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

import click

from bench import clients, decode
from bench.clients import CLIENTS, Drain, Run, worker
from bench.figures import Spread, fit, ratio, spread
from bench.server import COUNTED, LEADS, Backlog, Opener, Server
from bench.sizes import Sizes
from bench.tables import number, ranged, table

WIDTHS = (6, 12, 25, 50, 100)
TEXT = 100_000
TABLES = (1, 10, 50, 200)
PRESENT = (0, 100_000, 1_000_000, 5_000_000)
BACKLOGS = (25_000, 50_000, 100_000, 200_000)

CHANGES = 50_000

TARGET = """
CREATE TABLE activity (
    activity_id serial PRIMARY KEY, activity_type text NOT NULL, description text, change_key text UNIQUE)
"""

UPDATES = """
DO $$ BEGIN FOR number IN 1..{commits} LOOP
    {updates}
    COMMIT;
END LOOP; END $$
"""

FILLED = """
INSERT INTO activity (
    activity_type, activity_category, description, metadata, bd_in_charge, created_by, lead_id, change_key)
SELECT 'filled', 'system', 'Lead status changed from "1. lead generated" to "2. proposal ' || n || '"',
       jsonb_build_object('lead_id', n % {leads} + 1, 'lead_name', 'Lead ' || n, 'old_status', '1. lead generated',
                          'new_status', '2. proposal ' || n, 'company_name', 'Company ' || n),
       'jane', 'system', n % {leads} + 1, 'filled ' || lpad(n::text, 12, '0')
FROM generate_series({first}, {last}) n
"""

TITLES = {
    "width": "columns of the row",
    "tables": "captured tables",
    "activity": "rows of activity",
    "backlog": "transactions in the backlog",
}


def measure(opened: Opener, sizes: Sizes) -> dict[str, Any]:
    """Each of the four on a server of its own."""
    found: dict[str, Any] = {}
    for name, of in (("width", widths), ("tables", tables), ("activity", present), ("backlog", backlogs)):
        with opened() as server:
            found[name] = of(server, sizes)
        report(name, found[name], sizes)
    return {"kinds": found}


def report(name: str, found: dict[str, Any], sizes: Sizes) -> None:
    lines: list[Sequence[object]] = [(TITLES[name], "changes", "worker µs", "pg_recvlogical µs", "worker to it")]
    for row in [*found["rows"], *found.get("others", [])]:
        columns = [ranged(row[key]) for key in ("worker", "pg_recvlogical", "ratio")]
        lines.append((row.get("name", f"{row['size']:,}"), f"{row['changes']:,}", *columns))
    table(f"Microseconds a change, in {sizes.rounds} rounds", lines)
    for client, line in found["fit"].items():
        click.echo(f"  {client}: {line['growth']}, {number(100 * line['increase'])} % from the smallest to the largest")


def widths(server: Server, sizes: Sizes) -> dict[str, Any]:
    """Tables of so many columns, and one with a long text that doesn't change."""
    server.connection.execute(TARGET)
    changes = sizes.scaled(CHANGES, least=200) // 100 * 100
    rows, others = [], []
    for columns, text in [*((width, 0) for width in WIDTHS), (WIDTHS[0], TEXT)]:
        name = f"width_{columns}{'_text' if text else ''}"
        count = changes // 20 // 100 * 100 or 100 if text else changes
        decode.make(server.connection, name, columns, text=text)
        backlog = generated(server, name, [name], count)
        row = beside(server, backlog, sizes, columns)
        if text:
            others.append(row | {"name": f"{columns} and {text // 1000} kB of text"})
        else:
            rows.append(row)
        server.drop_slot(name)
    return told(rows) | {"others": others}


def tables(server: Server, sizes: Sizes) -> dict[str, Any]:
    """So many tables, whose changes take turns."""
    server.connection.execute(TARGET)
    rows = []
    for many in TABLES:
        names = [f"of_{many}_table_{each}" for each in range(many)]
        for name in names:
            decode.make(server.connection, name, WIDTHS[0], 100 // min(many, 100))
        backlog = generated(server, f"tables_{many}", names, sizes.scaled(CHANGES, least=200))
        rows.append(beside(server, backlog, sizes, many))
        server.drop_slot(backlog.name)
    return told(rows)


def generated(server: Server, name: str, names: Sequence[str], changes: int) -> Backlog:
    """About so many changes of generated tables, a hundred or, of more tables, as many as there are in a commit."""
    profile = server.directory / f"{name}.toml"
    profile.write_text(decode.TARGET + "".join(decode.RULES.format(table=each) for each in names))
    rows = 100 // min(len(names), 100)
    updates = "\n".join(f"UPDATE {each} SET status = 'proposal ' || number WHERE id <= {rows};" for each in names)
    commits = max(1, changes // (rows * len(names)))
    settings = {"name": name, "publication": name, "profile": str(profile)}
    server.cdc("setup", slot=name, **settings)
    server.connection.execute(UPDATES.format(commits=commits, updates=updates).encode())
    return Backlog(name, commits * rows * len(names), server.end(), names, str(profile), COUNTED)


def present(server: Server, sizes: Sizes) -> dict[str, Any]:
    """An `activity` that has so many rows, and then a few more with every round."""
    server.fill(LEADS)
    server.cdc("setup", slot="base")
    count = sizes.scaled(CHANGES, least=400)
    server.updates(count)
    backlog = Backlog("base", count // 4 * 4, server.end())
    rows, filled = [], 0
    for many in PRESENT:
        size = sizes.scaled(many, least=0)
        statement = FILLED.format(leads=LEADS, first=filled + 1, last=size)
        server.connection.execute(statement.encode())
        server.connection.execute("VACUUM ANALYZE activity")
        filled = size
        # Keys have the worker's name in them: under another one the same changes are written once more.
        rows.append(beside(server, backlog, sizes, size, names=f"with_{size}" if size else None))
    return told(rows)


def backlogs(server: Server, sizes: Sizes) -> dict[str, Any]:
    """So many single-row transactions."""
    server.fill(LEADS)
    rows = []
    for many in BACKLOGS:
        count = sizes.scaled(many, least=400)
        name = f"backlog_{many}"
        server.cdc("setup", slot=name, name=name, publication=name)
        server.updates(count)
        backlog = Backlog(name, count // 4 * 4, server.end())
        rows.append(beside(server, backlog, sizes, backlog.changes))
        server.drop_slot(name)
    return told(rows)


def beside(server: Server, backlog: Backlog, sizes: Sizes, size: int, *, names: str | None = None) -> dict[str, Any]:
    """What the worker and pg_recvlogical take for a change of it."""
    plugin = server.plugins[0]
    drains: dict[str, Drain] = {
        "worker": partial(named, prefix=names, plugin=plugin),
        "pg_recvlogical": CLIENTS["pg_recvlogical" if server.has_wal2json else "pg_recvlogical-pgoutput"],
    }
    runs, failed = clients.interleaved(server, backlog, drains, sizes.rounds)
    if failed:
        raise clients.FailedError("; ".join(failed.values()))
    costs: dict[str, Spread] = {
        name: spread([run.streaming / run.changes * 1e6 for run in each]) for name, each in runs.items()
    }
    peak = spread([run.client.peak_bytes / 1e6 for run in runs["worker"]])
    return {
        "size": size,
        "changes": backlog.changes,
        **costs,
        "ratio": ratio(costs["worker"], costs["pg_recvlogical"]),
        "peak_mb": peak,
    }


def named(server: Server, backlog: Backlog, slot: str, *, prefix: str | None, plugin: str) -> Run:
    """The worker, which is given another name each time if what it has written is to stay."""
    return worker(server, backlog, slot, plugin=plugin, name=f"{prefix}_{slot}" if prefix else None)


def told(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The rows, and how their costs grow."""
    sizes = [float(row["size"]) for row in rows]
    clients_of = ("worker", "pg_recvlogical")
    return {
        "rows": [*rows],
        "fit": {name: fit(sizes, [statistics.median(row[name]["rounds"]) for row in rows]) for name in clients_of},
    }
