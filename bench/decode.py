"""What one change costs by itself: the decoders side by side, on what both plugins send of the same work."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import psycopg
from psycopg import sql

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

PROFILE = """
name = "bench"
[target]
table = "activity"
[target.columns]
activity_type = "type"
description = "description"
change_key = "change_key"
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


def supported(connection: Connection, slot: str, options: dict[str, str]) -> dict[str, str]:
    """The options of wal2json without those that this one doesn't know."""
    known = dict(options)
    for name in wal2json.OPTIONAL:
        try:
            connection.execute(
                "SELECT 1 FROM pg_logical_slot_peek_binary_changes(%s, NULL, 1, %s, %s)", (slot, name, options[name])
            )
        except psycopg.errors.InvalidParameterValue:
            del known[name]
    return known


def sent(connection: Connection, table: str, columns: int, count: int) -> dict[str, list[bytes]]:
    """What each plugin sends of so many updates of single rows of a table, whose identity is FULL."""
    types = [*TYPES.items()] * (columns // len(TYPES) + 1)
    others = [(f"column_{number}", *types[number]) for number in range(columns - 2)]
    name = sql.Identifier(table)
    connection.execute(
        sql.SQL("CREATE TABLE {} (id integer PRIMARY KEY, status text, {})").format(
            name, sql.SQL(", ").join(sql.SQL(f"{column} {kind}") for column, kind, _ in others)
        )
    )
    connection.execute(sql.SQL("ALTER TABLE {} REPLICA IDENTITY FULL").format(name))
    row = ", ".join(value.replace("{n}", "n") for _, _, value in others).replace("%%", "%")
    connection.execute(
        f"INSERT INTO {table} SELECT n, 'generated', {row} FROM generate_series(1, {CHANGES_A_COMMIT}) n".encode()
    )
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
            options = supported(connection, slot, options)
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


def measured(connection: Connection, columns: int, count: int, rounds: int) -> list[Sequence[object]]:
    """Lines of a table: microseconds a change, decoded only, and up to what the rules tell, in rounds in turn."""
    table = f"columns_{columns}"
    payloads = sent(connection, table, columns, count)
    rules = compile_rules(profile.parse(PROFILE.format(table=table), source="bench"))
    outcomes = {plugin: [*told(decoder_of(plugin, table), payloads[plugin], rules)] for plugin in payloads}
    if not outcomes["wal2json"] == outcomes["pgoutput"] or len(outcomes["pgoutput"]) != count:
        raise RuntimeError("the plugins don't tell the same")
    lines: list[Sequence[object]] = []
    works: dict[str, Callable[[str], object]] = {
        "decode": lambda plugin: decoded(decoder_of(plugin, table), payloads[plugin]),
        "decode, diff and rules": lambda plugin: deque(told(decoder_of(plugin, table), payloads[plugin], rules), 0),
    }
    for name, work in works.items():
        taken: dict[str, list[float]] = {plugin: [] for plugin in payloads}
        for number in range(rounds):
            for plugin in sorted(payloads, reverse=bool(number % 2)):
                taken[plugin].append(seconds(partial(work, plugin)))
        ratios = [ours / theirs for ours, theirs in zip(taken["pgoutput"], taken["wal2json"], strict=True)]
        each = [f"{statistics.median(taken[plugin]) / count * 1e6:.1f}" for plugin in ("wal2json", "pgoutput")]
        lines.append((columns, name, *each, f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f}–{max(ratios):.2f}"))
    return lines
