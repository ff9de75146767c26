"""Cut-over: what triggers recorded so far the worker records from one position on, without a gap or a double.

For each table there is one transaction: it takes the triggers away, and with the table locked it puts a marker into the
WAL. Whoever wrote to the table before has ended by then, and whoever writes to it later commits behind the marker: the
marker's LSN divides the commits exactly, those that the triggers saw and those that the worker records. A new nonce in
the checkpoint row, which every batch must know, keeps a worker that has not heard of it from writing; and when it comes
to the marker, which anybody could have put there, it writes, if only its position, and so finds out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from psycopg import sql

from cdc_worker import checkpoint, ddl
from cdc_worker.changes import CUTOVER_PREFIX
from cdc_worker.config import Settings
from cdc_worker.ddl import Step
from cdc_worker.postgres import Connection
from cdc_worker.profile import Profile
from cdc_worker.rules import Rules, compile_rules, qualified


def cut_over(
    settings: Settings, profile: Profile, *, to_triggers: bool = False, dry_run: bool = False
) -> Iterator[str]:
    """Let the worker record in place of the triggers that are there, or the triggers again in place of the worker.

    Yields a line for each thing done, or its SQL. Raises NotSetUpError without a checkpoint.
    """
    worker = settings.worker
    with ddl.connected(settings) as connection:
        checkpoint.read(connection, worker)
        if to_triggers:
            steps = [*back(connection, worker)]
        else:
            steps = [*forward(connection, worker, trackers(connection, profile, compile_rules(profile)))]
        if not steps:
            yield "nothing to do: " + (
                "no trigger has been taken away"
                if to_triggers
                else f"no trigger of a captured table writes {profile.target.table}, and none is waited for"
            )
        yield from (ddl.script(connection, step) for step in steps) if dry_run else perform(connection, steps)


@dataclass(frozen=True, slots=True)
class Tracker:
    """A trigger that records changes of a captured table. `restore` brings it back as it was."""

    table: tuple[str, str]
    name: str
    function: str
    restore: str


# The text of functions tells what they write, directly or through others.
_TRACKERS: Final = r"""
WITH RECURSIVE writer AS (
    SELECT oid, proname FROM pg_proc
    WHERE prosrc ~* ('\minsert\s+into\s+("?' || %(schema)s || '"?\s*\.\s*)?"?' || %(table)s || '"?(\s|\(|$)')
    UNION
    SELECT p.oid, p.proname FROM writer JOIN pg_proc p
        ON p.prosrc ~* ('(^|\W)' || regexp_replace(writer.proname, '(\W)', '\\\1', 'g') || '\s*\(')
    WHERE p.pronamespace <> 'pg_catalog'::regnamespace
)
SELECT n.nspname::text, c.relname::text, t.tgname::text, t.tgfoid::regproc::text,
       pg_get_triggerdef(t.oid)
           || CASE WHEN t.tgenabled = 'A' THEN format('; ALTER TABLE %%I.%%I ENABLE ALWAYS TRIGGER %%I',
                                                    n.nspname, c.relname, t.tgname) ELSE '' END
FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE t.tgfoid IN (SELECT oid FROM writer) AND NOT t.tgisinternal AND t.tgparentid = 0
    -- A BEFORE trigger may change the row as well, and one that is disabled records nothing.
    AND t.tgtype & 2 = 0 AND t.tgenabled IN ('O', 'A')
    AND t.tgrelid = ANY (SELECT to_regclass(name) FROM unnest(%(captured)s::text[]) name)
ORDER BY 1, 2, 3
"""


def trackers(connection: Connection, profile: Profile, rules: Rules) -> list[Tracker]:
    """The triggers of captured tables whose functions write the target: found in the catalog."""
    schema, table = (_pattern(name) for name in qualified(profile.target.table))
    parameters = {
        "schema": schema,
        "table": table,
        "captured": [_quoted(t.name) for t in rules.values() if any(t.rules.values())],
    }
    rows = connection.execute(_TRACKERS, parameters)
    return [Tracker((schema, table), name, function, restore) for schema, table, name, function, restore in rows]


def _pattern(name: str) -> str:
    return "".join(c if c.isalnum() or c == "_" else f"\\{c}" for c in name)


def _quoted(table: tuple[str, str]) -> str:
    return sql.Identifier(*table).as_string()


_WAITING: Final = "SELECT table_name FROM cdc_worker.excluded WHERE worker = %s AND until_lsn IS NULL"


def forward(connection: Connection, worker: str, found: Iterable[Tracker]) -> Iterator[Step]:
    """Steps that let the worker take over from these triggers, a table each; also where they are gone already."""
    by_table: dict[str, list[Tracker]] = {}
    if ddl.exists(connection, "cdc_worker.excluded"):
        by_table = {table: [] for (table,) in connection.execute(_WAITING, (worker,))}
    for tracker in found:
        by_table.setdefault(".".join(tracker.table), []).append(tracker)
    for table, there in sorted(by_table.items()):
        taken = [
            statement.format(
                table=table, name=of.name, trigger=sql.Identifier(of.name), on=_on(table), restore=of.restore
            )
            for of in there
            for statement in (_DROP, _SAVE)
        ]
        names = ", ".join(tracker.name for tracker in there) or "triggers that are gone"
        yield _step(f"{table}: the worker records in place of {names}", worker, table, *taken, _BEGIN)


_REPLACED: Final = """
SELECT table_name, array_agg(name ORDER BY name), array_agg(restore ORDER BY name)
FROM cdc_worker.replaced WHERE kind = 'tracker' GROUP BY table_name ORDER BY table_name
"""


def back(connection: Connection, worker: str) -> Iterator[Step]:
    """Steps that bring the triggers back, a table each: from there on the worker leaves it to them."""
    for table, names, restores in connection.execute(_REPLACED).fetchall():
        yield _step(f"{table}: {', '.join(names)} record again", worker, table, *restores, _END, _FORGET)


# First of all the checkpoint's row: the worker holds it when it waits for other locks, and so must we.
_NONCE: Final = sql.SQL("UPDATE cdc_worker.checkpoint SET nonce = gen_random_uuid() WHERE worker = {worker}")
_LOCK: Final = sql.SQL("LOCK TABLE {on} IN ACCESS EXCLUSIVE MODE")
_DROP: Final = sql.SQL("DROP TRIGGER {trigger} ON {on}")
_SAVE: Final = sql.SQL(
    "INSERT INTO cdc_worker.replaced (kind, table_name, name, restore) VALUES ('tracker', {table}, {name}, {restore})\n"
    "ON CONFLICT (kind, table_name, name) DO UPDATE SET restore = EXCLUDED.restore, replaced_at = now()"
)
_FORGET: Final = sql.SQL("DELETE FROM cdc_worker.replaced WHERE kind = 'tracker' AND table_name = {table}")
_MARKER: Final = sql.SQL(
    "(SELECT pg_logical_emit_message(true, {prefix}, jsonb_build_object('worker', worker, 'table', {table},"
    " 'nonce', nonce)::text) FROM cdc_worker.checkpoint WHERE worker = {worker}) AS marker (lsn)"
)
_BEGIN: Final = sql.SQL(
    "UPDATE cdc_worker.excluded SET until_lsn = marker.lsn FROM {marker}\n"
    "WHERE worker = {worker} AND table_name = {table} AND until_lsn IS NULL"
)
_END: Final = sql.SQL(
    "INSERT INTO cdc_worker.excluded (worker, table_name, from_lsn)\nSELECT {worker}, {table}, lsn FROM {marker}"
)


def _step(title: str, worker: str, table: str, *statements: sql.Composed | sql.SQL | str) -> Step:
    marker = _MARKER.format(prefix=CUTOVER_PREFIX, worker=worker, table=table)
    names = {"worker": worker, "table": table, "on": _on(table), "marker": marker}
    parts = (part.format(**names) if isinstance(part, sql.SQL) else part for part in (_NONCE, _LOCK, *statements))
    return Step(title, ddl.transaction(*parts), f"ACCESS EXCLUSIVE on {table}")


def _on(table: str) -> sql.Identifier:
    return sql.Identifier(*qualified(table))


def perform(connection: Connection, steps: Iterable[Step]) -> Iterator[str]:
    """Do these steps; yields a line for each."""
    for step in steps:
        ddl.perform(connection, step)
        yield step.title
