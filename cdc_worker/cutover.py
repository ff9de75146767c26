"""Cut-over: what triggers recorded so far the worker records from one position on, without a gap or a double.

For each table there is one transaction: it takes the triggers away, and with the table locked it puts a marker into the
WAL. Whoever wrote to the table before has ended by then, and whoever writes to it later commits behind the marker: the
marker's LSN divides the commits exactly, those that the triggers saw and those that the worker records. A new nonce in
the checkpoint row, which every batch must know, keeps a worker that has not heard of it from writing; and when it comes
to the marker, which anybody could have put there, it writes, if only its position, and so finds out.

Where the application itself recorded so far, and its new code, which leaves that to the worker, comes gradually, there
is a stretch in between: of the tables that are `marked` the worker records what follows a context message, which only
new code sends. Such a stretch begins with a marker too, and ends with the cut-over.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from psycopg import sql

from cdc_worker import checkpoint, ddl, slot
from cdc_worker.config import Settings
from cdc_worker.ddl import Step
from cdc_worker.postgres import Connection
from cdc_worker.profile import Profile
from cdc_worker.rules import Rules, qualified


def cut_over(
    settings: Settings, profile: Profile, *, to_triggers: bool = False, marked: bool = False, dry_run: bool = False
) -> Iterator[str]:
    """Let the worker record in place of the triggers that are there, or the triggers again in place of the worker.

    With `marked`, it records only what follows a context message until it is called again without. Yields a line for
    each thing done, or its SQL. Raises what `run` would be stopped by at its start.
    """
    worker, rules = settings.worker, settings.rules(profile)
    with ddl.connected(settings) as connection:
        if not dry_run:
            ddl.one_at_a_time(connection)  # before anything is read that another may be changing
        if to_triggers:
            checkpoint.read(connection, worker)
            steps = back(connection, worker, rules)
            nothing = "no trigger of a captured table has been taken away"
        elif marked:
            slot.check_checkpoint(connection, worker, settings.slot)
            tracked = {".".join(tracker.table) for tracker in trackers(connection, profile, rules)}
            steps = mark(connection, worker, rules, tracked=tracked)
            yield from unclear(connection, profile, rules)
            yield from not_marked(rules, tracked)
            nothing = "of all tables that could be, only what follows a context message is recorded already"
        else:
            slot.check_checkpoint(connection, worker, settings.slot)
            found = trackers(connection, profile, rules)
            steps = forward(connection, worker, found)
            yield from unclear(connection, profile, rules)
            yield from not_yet(connection, worker, found)
            nothing = f"no trigger of a captured table writes {profile.target.table}, and none is waited for"
        if dry_run:
            lines = [ddl.header(connection), *(ddl.script(connection, step) for step in steps)]
        else:
            lines = [""]
            for line in ddl.performing(connection, steps):
                lines.append(line)
                yield line
        if len(lines) == 1:
            yield f"nothing to do: {nothing}"
        elif dry_run:
            yield from lines


@dataclass(frozen=True, slots=True)
class Tracker:
    """A trigger that records changes of a captured table. `restore` brings it back as it was."""

    table: tuple[str, str]
    name: str
    restore: str


# The text of functions tells what they write, directly or through others. Comments are left out.
_FUNCTIONS: Final = r"""
WITH RECURSIVE function AS (
    SELECT p.oid, nspname, proname,
           regexp_replace(coalesce(pg_get_function_sqlbody(p.oid), prosrc), '--[^\n]*|/\*.*?\*/', ' ', 'g') AS source
    FROM pg_proc p JOIN pg_namespace n ON n.oid = pronamespace
    WHERE prolang NOT IN (SELECT oid FROM pg_language WHERE lanname IN ('c', 'internal'))
      AND nspname NOT IN ('pg_catalog', 'information_schema')
), writer AS (
    SELECT oid, nspname, proname FROM function
    WHERE source ~* ('\m(insert|merge)\s+into\s+("?' || %(schema)s || '"?\s*\.\s*)?"?' || %(table)s || '"?(\s|\(|$)')
    UNION
    SELECT f.oid, f.nspname, f.proname
    FROM writer w JOIN function f ON f.source ~* (
        '(^|[^\w."])("?' || regexp_replace(w.nspname, '(\W)', '\\\1', 'g') || '"?\s*\.\s*)?"?'
        || regexp_replace(w.proname, '(\W)', '\\\1', 'g') || '"?\s*\(')
), found AS (
    SELECT t.oid, n.nspname, c.relname, t.tgname, t.tgenabled, t.tgtype & 2 <> 0 AS before,
           t.tgfoid IN (SELECT oid FROM writer) AS writes,
           coalesce((SELECT source FROM function f WHERE f.oid = t.tgfoid) ~* '\mexecute\M', true) AS dynamic
    FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE NOT t.tgisinternal AND t.tgparentid = 0 AND t.tgenabled IN ('O', 'A')
      AND t.tgrelid = ANY (SELECT to_regclass(name) FROM unnest(%(captured)s::text[]) name)
)
"""

# A BEFORE trigger may change the row as well, and one that is disabled records nothing.
_TRACKERS: Final = (
    _FUNCTIONS
    + """
SELECT nspname::text, relname::text, tgname::text,
       pg_get_triggerdef(oid) || CASE WHEN tgenabled = 'A' THEN
           format('; ALTER TABLE %%I.%%I ENABLE ALWAYS TRIGGER %%I', nspname, relname, tgname) ELSE '' END
FROM found WHERE writes AND NOT before ORDER BY 1, 2, 3
"""
)

_UNCLEAR: Final = (
    _FUNCTIONS
    + """
SELECT format('%%s.%%s', nspname, relname), tgname::text, writes FROM found
WHERE (writes AND before) OR (dynamic AND NOT writes AND NOT before) ORDER BY 1, 2
"""
)


def trackers(connection: Connection, profile: Profile, rules: Rules) -> list[Tracker]:
    """The triggers of captured tables whose functions write the target: found in the catalog."""
    rows = connection.execute(_TRACKERS, _parameters(profile, rules))
    return [Tracker((schema, table), name, restore) for schema, table, name, restore in rows]


@dataclass(frozen=True, slots=True)
class Unclear:
    """A trigger that may record changes of a captured table as well; it is certain to write the target, or it isn't."""

    table: str
    name: str
    writes: bool
    why: str


def unclear_triggers(connection: Connection, profile: Profile, rules: Rules) -> Iterator[Unclear]:
    """The triggers that may record changes as well, and that are not for us to take away."""
    for table, name, writes in connection.execute(_UNCLEAR, _parameters(profile, rules)):
        why = (
            f"writes {profile.target.table} before the row is changed, and may change the row as well"
            if writes
            else "runs statements that its text doesn't tell"
        )
        yield Unclear(table, name, writes, f"trigger {name} of {table} {why}")


def unclear(connection: Connection, profile: Profile, rules: Rules) -> Iterator[str]:
    """A line for each of them."""
    for trigger in unclear_triggers(connection, profile, rules):
        yield f"note: {trigger.why}: see whether it records what the worker records"


def _parameters(profile: Profile, rules: Rules) -> dict[str, object]:
    schema, table = (_pattern(name) for name in qualified(profile.target.table))
    return {"schema": schema, "table": table, "captured": [_on(".".join(t)).as_string() for t in recorded(rules)]}


def recorded(rules: Rules) -> list[tuple[str, str]]:
    """The captured tables that have activities of their own."""
    return [table.name for table in rules.values() if any(table.rules.values())]


def _pattern(name: str) -> str:
    return "".join(c if c.isalnum() or c == "_" else f"\\{c}" for c in name)


_WAITING: Final = """
SELECT DISTINCT table_name FROM cdc_worker.excluded
WHERE worker = %s AND until_lsn IS NULL AND system_identifier = cdc_worker.cluster()
"""

# Also before setup has given it the column.
_MARKED: Final = _WAITING + " AND to_jsonb(excluded) -> 'marked' = 'true' ORDER BY 1"


def forward(
    connection: Connection, worker: str, found: Iterable[Tracker], *, but: Collection[str] = ()
) -> Iterator[Step]:
    """Steps that let the worker take over from these triggers, a table each; also where they are gone already.

    And that end the stretches that are marked. Tables that the worker doesn't capture yet, with the profile that it
    last ran with, are left to their triggers; these `but` stay as they are.
    """
    by_table: dict[str, list[Tracker]] = {}
    if ddl.exists(connection, "cdc_worker.excluded"):
        by_table = {table: [] for (table,) in connection.execute(_WAITING, (worker,))}
    marked = marked_tables(connection, worker)
    for tracker in found:
        by_table.setdefault(".".join(tracker.table), []).append(tracker)
    captured = _captured(connection, worker)
    for table, there in sorted(by_table.items()):
        if table in but or (captured is not None and table not in captured):
            continue
        taken = [
            statement.format(
                table=table, name=of.name, trigger=sql.Identifier(of.name), on=_on(table), restore=of.restore
            )
            for of in there
            for statement in (_DROP, _SAVE)
        ]
        names = ", ".join(tracker.name for tracker in there) or "triggers that are gone"
        if not there and table in marked:
            names = "the application's old code: from here on, all that is committed"
        yield _step(f"{table}: the worker records in place of {names}", worker, table, *taken, _BEGIN)


def not_yet(connection: Connection, worker: str, found: Iterable[Tracker]) -> Iterator[str]:
    """A line for each table that stays with its triggers, because the worker doesn't capture it yet."""
    for table in not_captured(connection, worker, {".".join(tracker.table) for tracker in found}):
        yield (
            f"note: {table} stays with its triggers, for the worker has not run with it yet:"
            " start it with this profile, or send it a SIGHUP, then: cdc-worker cutover"
        )


def not_captured(connection: Connection, worker: str, tables: Iterable[str]) -> list[str]:
    """Which of these tables the worker has not run with yet, if it has run."""
    captured = _captured(connection, worker)
    return sorted(table for table in tables if captured is not None and table not in captured)


def marked_tables(connection: Connection, worker: str) -> list[str]:
    """The tables of which only what follows a context message is recorded as yet."""
    if not ddl.exists(connection, "cdc_worker.excluded"):
        return []
    return [table for (table,) in connection.execute(_MARKED, (worker,))]


_SET_UP: Final = """
SELECT DISTINCT table_name FROM cdc_worker.excluded
WHERE worker = %s AND table_name = ANY (%s) AND system_identifier = cdc_worker.cluster() ORDER BY 1
"""


def mark(connection: Connection, worker: str, rules: Rules, *, tracked: Collection[str]) -> Iterator[Step]:
    """A step from which on only what follows a context message is recorded, of tables that no triggers record.

    Nothing need be locked: whose transaction it is, old code's or new code's, it says itself.
    """
    names = [".".join(table) for table in recorded(rules)]
    there = [table for (table,) in connection.execute(_SET_UP, (worker, names))]
    tables = [table for table in there if table not in {*marked_tables(connection, worker), *tracked}]
    if tables:
        begin = (_BEGIN_MARKED.format(worker=worker, table=table) for table in tables)
        yield Step(
            f"{', '.join(tables)}: the worker records what follows a context message, and the application the rest",
            ddl.transaction(checkpoint.new_nonce(worker), *begin),
        )


def not_marked(rules: Rules, tracked: Collection[str]) -> Iterator[str]:
    """A line for each table that triggers record, also what follows a context message."""
    for table in sorted({".".join(table) for table in recorded(rules)}.intersection(tracked)):
        yield f"note: {table} is recorded by its triggers, whoever writes to it; to take over: cdc-worker cutover"


_GIVEN_BACK: Final = _WAITING + " AND triggers AND from_lsn <> '0/0'"


def given_back(connection: Connection, worker: str) -> list[str]:
    """The tables that `cutover --back` left to their triggers."""
    if not ddl.exists(connection, "cdc_worker.excluded"):
        return []
    return [table for (table,) in connection.execute(_GIVEN_BACK, (worker,))]


_CAPTURED: Final = "SELECT tables FROM cdc_worker.checkpoint WHERE worker = %s"


def _captured(connection: Connection, worker: str) -> list[str] | None:
    """The tables of the profile that the worker last ran with; None if it never ran."""
    if not ddl.exists(connection, "cdc_worker.checkpoint"):
        return None
    found = connection.execute(_CAPTURED, (worker,)).fetchone()
    return found[0] if found else None


_REPLACED: Final = """
SELECT table_name, array_agg(name ORDER BY name), array_agg(restore ORDER BY name)
FROM cdc_worker.replaced WHERE kind = 'tracker' AND table_name = ANY (%s) GROUP BY table_name ORDER BY table_name
"""


def back(connection: Connection, worker: str, rules: Rules) -> Iterator[Step]:
    """Steps that bring the triggers back, a table each: from there on all workers leave it to them."""
    tables = [".".join(table) for table in recorded(rules)]
    for table, names, restores in connection.execute(_REPLACED, (tables,)).fetchall():
        restored = [ddl.attempt(restore) for restore in restores]
        yield _step(f"{table}: recorded by {', '.join(names)} again", worker, table, *restored, _END, _FORGET)


# First of all the checkpoint's row: a worker holds it when it waits for other locks, and so must we. All workers are
# meant that leave the table to its triggers, or did.
_OTHERS: Final = "    OR worker IN (SELECT worker FROM cdc_worker.excluded WHERE table_name = {table} AND triggers)"
_LOCK: Final = sql.SQL("LOCK TABLE {on} IN ACCESS EXCLUSIVE MODE")
_DROP: Final = sql.SQL("DROP TRIGGER {trigger} ON {on}")
_SAVE: Final = sql.SQL(
    "INSERT INTO cdc_worker.replaced (kind, table_name, name, restore) VALUES ('tracker', {table}, {name}, {restore})\n"
    "    ON CONFLICT (kind, table_name, name) DO UPDATE SET restore = EXCLUDED.restore, replaced_at = now()"
)
_FORGET: Final = sql.SQL("DELETE FROM cdc_worker.replaced WHERE kind = 'tracker' AND table_name = {table}")
_BEGIN: Final = sql.SQL(
    "WITH marker AS MATERIALIZED (SELECT cdc_worker.mark({worker}, {table}) AS lsn), closed AS (\n"
    "    UPDATE cdc_worker.excluded SET until_lsn = marker.lsn, triggers = NOT marked FROM marker\n"
    "    WHERE table_name = {table} AND until_lsn IS NULL AND system_identifier = cdc_worker.cluster()\n"
    "        AND (worker = {worker} OR NOT marked)\n"
    "    RETURNING worker)\n"
    "SELECT lsn FROM marker"
)
_BEGIN_MARKED: Final = sql.SQL(
    "WITH marker AS MATERIALIZED (SELECT cdc_worker.mark({worker}, {table}) AS lsn), closed AS (\n"
    "    UPDATE cdc_worker.excluded SET until_lsn = marker.lsn FROM marker\n"
    "    WHERE worker = {worker} AND table_name = {table} AND until_lsn IS NULL"
    " AND system_identifier = cdc_worker.cluster())\n"
    "INSERT INTO cdc_worker.excluded (worker, table_name, from_lsn, marked)"
    " SELECT {worker}, {table}, lsn, true FROM marker"
)
_END: Final = sql.SQL(
    "INSERT INTO cdc_worker.excluded (worker, table_name, from_lsn, triggers)\n"
    "    SELECT worker, {table}, lsn, true FROM (SELECT cdc_worker.mark({worker}, {table})) AS marker (lsn),\n"
    "        (SELECT {worker} UNION SELECT worker FROM cdc_worker.excluded WHERE table_name = {table} AND triggers)"
    " AS of (worker)"
)


def _step(title: str, worker: str, table: str, *statements: sql.Composed | sql.SQL | str) -> Step:
    names = {"worker": worker, "table": table, "on": _on(table)}
    nonce = f"{checkpoint.new_nonce(worker)}\n{sql.SQL(_OTHERS).format(table=table).as_string()}"
    parts = (part.format(**names) if isinstance(part, sql.SQL) else part for part in (nonce, _LOCK, *statements))
    return Step(title, ddl.transaction(*parts), f"ACCESS EXCLUSIVE on {_on(table).as_string()}")


def _on(table: str) -> sql.Identifier:
    return sql.Identifier(*qualified(table))
