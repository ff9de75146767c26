"""What one change costs by itself: the decoders side by side, on what both plugins send of the same work."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import click
import psycopg
from psycopg import sql

from bench.figures import Spread, ratio, spread
from bench.server import Opener, supported
from bench.sizes import Sizes
from bench.tables import table
from cdc_worker import decoders, profile, wal2json
from cdc_worker.changes import Assembler
from cdc_worker.decoders import Decoder
from cdc_worker.rules import Rules, compile_rules
from cdc_worker.transform import Told, transform

Connection = psycopg.Connection[tuple[object, ...]]

TYPES = {
    "text": "md5({n}::text)",
    "integer": "{n}",
    "numeric": "{n} / 100.0",
    "timestamp": "'2026-01-01'::timestamp + {n} * interval '1 minute'",
    "boolean": "{n} %% 2 = 0",
}
"""Of columns, in turn, with a value by the row's number."""

TARGET = """
name = "bench"
[target]
table = "activity"
[target.columns]
activity_type = "type"
description = "description"
change_key = "change_key"
"""

RULES = """
[tables.{table}]
[[tables.{table}.rules]]
on = "update"
changed = "status"
type = "status_changed"
description = "{{old.status}} to {{new.status}}"
"""

CHANGES_A_COMMIT = 100

UPDATES = """
DO $$ BEGIN FOR number IN 1..{commits} LOOP
    UPDATE {table} SET status = 'proposal ' || number WHERE id <= {each};
    COMMIT;
END LOOP; END $$
"""

SENT = "SELECT data FROM pg_logical_slot_peek_binary_changes(%s, NULL, NULL, VARIADIC %s)"


def make(connection: Connection, table: str, columns: int, rows: int = CHANGES_A_COMMIT, *, text: int = 0) -> None:
    """A table of so many columns, a key and a status among them, with identity FULL; one may have a long `text`."""
    types = [*TYPES.items()] * (columns // len(TYPES) + 1)
    others = [(f"column_{number}", *types[number]) for number in range(columns - 2)]
    if text:
        # What compresses is no long text.
        long = f"(SELECT string_agg(md5({{n}}::text || part), '') FROM generate_series(1, {text // 32}) part)"
        others[0] = (others[0][0], "text", long)
    kinds = ", ".join(f"{column} {kind}" for column, kind, _ in others)
    connection.execute(f"CREATE TABLE {table} (id integer PRIMARY KEY, status text, {kinds})".encode())
    connection.execute(f"ALTER TABLE {table} REPLICA IDENTITY FULL".encode())
    row = ", ".join(value.replace("{n}", "n") for _, _, value in others).replace("%%", "%")
    connection.execute(f"INSERT INTO {table} SELECT n, 'generated', {row} FROM generate_series(1, {rows}) n".encode())


def sent(connection: Connection, table: str, columns: int, count: int) -> dict[str, list[bytes]]:
    """What each plugin sends of so many updates of single rows of a table, whose identity is FULL."""
    make(connection, table, columns)
    name = sql.Identifier(table)
    connection.execute(sql.SQL("CREATE PUBLICATION {} FOR TABLE {}").format(name, name))
    for plugin in decoders.PLUGINS:
        connection.execute("SELECT pg_create_logical_replication_slot(%s, %s)", (f"{table}_{plugin}", plugin))
    commits = count // CHANGES_A_COMMIT
    connection.execute(UPDATES.format(table=table, commits=commits, each=CHANGES_A_COMMIT).encode())
    found = {}
    for plugin in decoders.PLUGINS:
        slot = f"{table}_{plugin}"
        options, _ = decoders.options(plugin, [("public", table)], (), publication=table)
        if plugin == wal2json.PLUGIN:
            options = supported(connection, options)
        arguments = [part for option in options.items() for part in option]
        rows = connection.execute(SENT.encode(), (slot, arguments))
        found[plugin] = [bytes(data) for (data,) in rows]
        connection.execute("SELECT pg_drop_replication_slot(%s)", (slot,))
    return found


def decoder_of(plugin: str, table: str) -> Decoder:
    return decoders.decoder(plugin, [("public", table)], (), encoding="utf-8")


def decoded(decoder: Decoder, payloads: Sequence[bytes]) -> None:
    for payload in payloads:
        decoder.decode(payload)


def told(decoder: Decoder, payloads: Sequence[bytes], rules: Rules) -> Iterator[Told]:
    """What the rules tell of it, transaction by transaction."""
    assembler = Assembler()
    for payload in payloads:
        message = decoder.decode(payload)
        for one in message if isinstance(message, tuple) else [message]:
            if one is not None and (transaction := assembler.feed(one, payload)) is not None:
                yield from transform(rules, [transaction], worker="bench", system_identifier="1")


def seconds(work: Callable[[], object]) -> float:
    """Of the processor."""
    started = time.process_time()
    work()
    return time.process_time() - started


def measured(connection: Connection, columns: int, count: int, rounds: int) -> Iterator[tuple[str, dict[str, Spread]]]:
    """Of each work, by plugin: microseconds a change, in rounds in turn."""
    table = f"columns_{columns}"
    payloads = sent(connection, table, columns, count)
    rules = compile_rules(profile.parse(TARGET + RULES.format(table=table), source="bench"))
    outcomes = {plugin: [*told(decoder_of(plugin, table), payloads[plugin], rules)] for plugin in payloads}
    if not outcomes["wal2json"] == outcomes["pgoutput"] or len(outcomes["pgoutput"]) != count:
        raise RuntimeError("the plugins don't tell the same")
    works: dict[str, Callable[[str], object]] = {
        "decode": lambda plugin: decoded(decoder_of(plugin, table), payloads[plugin]),
        "decode, diff and rules": lambda plugin: deque(told(decoder_of(plugin, table), payloads[plugin], rules), 0),
    }
    for name, work in works.items():
        taken: dict[str, list[float]] = {plugin: [] for plugin in payloads}
        for number in range(rounds):
            for plugin in sorted(payloads, reverse=bool(number % 2)):
                taken[plugin].append(seconds(partial(work, plugin)) / count * 1e6)
        yield name, {plugin: spread(each) for plugin, each in taken.items()}


def measure(opened: Opener, sizes: Sizes) -> dict[str, Any]:
    """What a change costs by itself, with either decoder."""
    count = max(CHANGES_A_COMMIT, sizes.count // 10 // CHANGES_A_COMMIT * CHANGES_A_COMMIT)
    lines: list[Sequence[object]] = [("columns", "", "wal2json", "pgoutput", "ratio", "of rounds")]
    found: list[dict[str, Any]] = []
    with opened() as server:
        if not server.has_wal2json:
            raise click.ClickException("the server has no wal2json to compare with")
        for columns in (6, 40):
            for work, taken in measured(server.connection, columns, count, sizes.rounds):
                ratios = ratio(taken["pgoutput"], taken["wal2json"])
                each = [f"{taken[plugin]['median']:.1f}" for plugin in ("wal2json", "pgoutput")]
                of_rounds = f"{ratios['min']:.2f}–{ratios['max']:.2f}"
                lines.append((columns, work, *each, f"{ratios['median']:.2f}", of_rounds))
                found.append({"columns": columns, "work": work, "microseconds": taken, "ratio": ratios})
    table(f"Microseconds a change, in {sizes.rounds} rounds of {count:,} updates with a full old row", lines)
    return {"changes": count, "works": found}
