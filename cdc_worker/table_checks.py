"""Checks of the tables that are captured, and of who else records their changes; then those of the target."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

import psycopg
from psycopg import sql

from cdc_worker import catalog, checkpoint, cutover, errors, slot, target_checks, written
from cdc_worker import profile as profiles
from cdc_worker.activities import OpenEnds, key_prefix
from cdc_worker.catalog import Fault, quoted, section
from cdc_worker.checks import Check, Finding, Look, failed, ok, unknown, warning
from cdc_worker.history import recorded
from cdc_worker.lsn import INVALID, LSN
from cdc_worker.rules import qualified
from cdc_worker.target_checks import otherwise, setup_would
from cdc_worker.templates import text


def profile(look: Look) -> Iterator[Finding]:
    """Whether the profile's tables and columns are there, with types that fit."""
    healthy = f"{look.profile.name}: its {len(look.rules)} tables and their columns are there"
    yield from otherwise(_misfits(look), healthy)


def _misfits(look: Look) -> Iterator[Finding]:
    for fault in catalog.faults(look.connection, look.profile, look.rules, plugin=_plugin(look)):
        yield misfit(look, fault)
    for fault in backfill_faults(look):
        yield misfit(look, replace(fault, certain=False))  # the worker doesn't mind
    try:
        look.settings.zone(look.profile, look.server.time_zone)
    except errors.SettingsError as error:
        yield failed(str(error), error.hint or "")


def _plugin(look: Look) -> str | None:
    """The plugin that is read with, or will be; None if that is still open."""
    found = slot.read(look.connection, slot.own(look.connection, look.settings.worker, look.settings.slot))
    if found is not None:
        return found.plugin
    return None if look.settings.plugin == "auto" else look.settings.plugin


def backfill_faults(look: Look) -> Iterator[Fault]:
    """Where the profile and the database disagree in what is told of rows that are there already, and in that alone."""
    if not any(rule.backfill for table in look.profile.tables.values() for rule in table.rules):
        return
    yield from _untold_moves(look.profile)
    # Of a column of the target that has a fault it doesn't matter which rules make more of it.
    known = {of for fault in catalog.faults(look.connection, look.profile, look.rules) for of in _identity(fault)}
    read = profiles.backfilled(look.profile)
    dates = [("target", "columns", column) for column, of in read.target.columns.items() if of == "occurred_at"]
    for fault in catalog.faults(look.connection, read, look.settings.backfill_rules(look.profile)):
        if known.isdisjoint(_identity(fault)):
            fix = 'name a column of dates as "at" of the backfill' if fault.place in dates else fault.fix
            yield replace(fault, message=f"for backfill: {fault.message}", fix=fix)


def _untold_moves(profile: profiles.Profile) -> Iterator[Fault]:
    for name, table in profile.tables.items():
        if not any(rule.backfill for rule in table.rules):
            continue
        changes = recorded(profile, name).changes
        told = [rule for rule in table.rules if rule.certain and changes.get(rule.label)]
        if not any({*rule.changed} & {"*", "unclaimed"} or {*table.key} <= {*rule.changed} for rule in told):
            yield Fault(
                f"for backfill: no rule of {'.'.join(qualified(name))} is sure to tell which {', '.join(table.key)}"
                " a row had before: one that gets another is told of once more",
                'add a rule on "update" with changed = "unclaimed" and metadata = { changes = "{changes}" }',
                certain=False,
                captured=True,
                place=("tables", name),
            )


def _identity(fault: Fault) -> set[object]:
    return {fault.message, fault.place if fault.place[:2] == ("target", "columns") else fault.message}


def misfit(look: Look, fault: Fault) -> Finding:
    """Where the profile and the database disagree."""
    made = fault.missing and not fault.captured
    made = made and all(setup_would(look, f"ADD COLUMN {column}") for column in fault.missing)
    return (failed if fault.certain else warning)(fault.message, "cdc-worker setup" if made else fault.fix)


# A captured table stands for itself and its partitions, and those that are captured one by one for their root.
_IDENTITIES: Final = """
WITH captured AS (
    SELECT to_regclass(name)::oid AS oid, needs FROM unnest(%s::text[], %s::bool[]) AS captured (name, needs)
), leaf AS (
    SELECT coalesce(relid::oid, captured.oid) AS oid, pg_partition_root(captured.oid) AS root,
           bool_or(stands) AS captured, bool_or(stands AND needs) AS needs
    FROM captured LEFT JOIN LATERAL pg_partition_tree(pg_partition_root(captured.oid)) ON isleaf,
        LATERAL (SELECT relid IS NULL OR captured.oid IN (SELECT pg_partition_ancestors(relid))) AS it (stands)
    GROUP BY 1, 2
)
SELECT nspname::text, relname::text, captured, needs, root::text, CASE relreplident
           WHEN 'd' THEN 'DEFAULT' WHEN 'n' THEN 'NOTHING' WHEN 'f' THEN 'FULL' ELSE 'USING INDEX' END,
       relreplident = 'i' OR (relreplident = 'd' AND EXISTS (
           SELECT FROM pg_index WHERE indrelid = leaf.oid AND indisprimary))
FROM leaf JOIN pg_class c ON c.oid = leaf.oid JOIN pg_namespace n ON n.oid = relnamespace
WHERE relkind = 'r'
ORDER BY 1, 2
"""


_HEIRS: Final = """
WITH RECURSIVE captured AS (
    SELECT to_regclass(name)::oid AS relation, name FROM unnest(%s::text[]) AS its (name)
), heir AS (
    SELECT relation, name FROM captured
    UNION
    SELECT inhrelid, name FROM heir JOIN pg_inherits ON inhparent = relation
)
SELECT DISTINCT ON (nspname, relname) nspname::text, relname::text, to_regclass(name)::text
FROM heir JOIN pg_class c ON c.oid = relation JOIN pg_namespace n ON n.oid = relnamespace
WHERE relkind = 'r' AND NOT relispartition AND relation NOT IN (
    SELECT relation FROM captured WHERE relation IS NOT NULL)
ORDER BY nspname, relname, name
"""


def replica_identity(look: Look) -> Iterator[Finding]:
    """Whether updates and deletes carry the old row, of partitions as well, and no partition or heir is forgotten."""
    yield from otherwise(_without_old_rows(look), "FULL where rules need old rows")


def _without_old_rows(look: Look) -> Iterator[Finding]:
    tables = [(sql.Identifier(*name).as_string(), table.needs_old_rows) for name, table in look.rules.items()]
    parameters = [name for name, _ in tables], [needs for _, needs in tables]
    for schema, relation, captured, needs, root, identity, keyed in look.connection.execute(_IDENTITIES, parameters):
        name = f"{schema}.{relation}"
        if not captured:
            yield warning(
                f"partition {name} of {root} isn't in the profile, as others are: nothing of it is recorded",
                f"give the profile a [tables.{section((schema, relation))}] like theirs; then: cdc-worker setup",
            )
        elif needs and identity != "FULL":
            fate = "become dead letters" if keyed else "are not sent at all, and lost"
            yield failed(
                f"replica identity of {name} is {identity}: its updates and deletes lack the old row, and {fate}",
                f"as its owner: ALTER TABLE {sql.Identifier(schema, relation).as_string()} REPLICA IDENTITY FULL",
            )
    for schema, relation, parent in look.connection.execute(_HEIRS, parameters[:1]):
        yield warning(
            f"table {schema}.{relation} inherits from {parent} and isn't in the profile: nothing of it is recorded",
            f"give the profile a [tables.{section((schema, relation))}] like its parent's; then: cdc-worker setup",
        )


def trackers(look: Look) -> Iterator[Finding]:
    """Whether each table is recorded, and once: by the worker, or as yet by triggers."""
    try:
        known = checkpoint.read(look.connection, look.settings.worker)
    except errors.NotSetUpError as error:
        yield unknown(f"who records can't be told: {error}", error.hint)
        return
    ends = checkpoint.scope(look.connection, known).open_ends({*cutover.recorded(look.rules)})
    tables = ", ".join(".".join(table) for table in cutover.recorded(look.rules))
    yield from otherwise(_unrecorded_or_twice(look, ends), f"the worker records {tables}, and no trigger does")


def _unrecorded_or_twice(look: Look, ends: OpenEnds) -> Iterator[Finding]:
    connection, worker = look.connection, look.settings.worker
    back = set(map(qualified, cutover.given_back(connection, worker)))
    by_table: dict[tuple[str, str], list[str]] = {}
    for tracker in cutover.trackers(connection, look.profile, look.rules):
        by_table.setdefault(tracker.table, []).append(tracker.name)
    new = set(map(qualified, cutover.not_captured(connection, worker, map(".".join, by_table))))
    for table in sorted(ends.fresh | ends.waiting | ends.marked | by_table.keys()):
        name, triggers = ".".join(table), ", ".join(by_table.get(table, ()))
        if table in ends.fresh:
            yield failed(f"{name} is not set up: the worker leaves it out", "cdc-worker setup")
        elif table in back:
            yield ok(f"{name} is left to its triggers since cutover --back: {triggers or 'they are gone'}")
        elif table in new:
            yield warning(
                f"{name} is recorded by {triggers}, and the worker has not run with it yet",
                "start the worker with this profile, or send it a SIGHUP; then: cdc-worker cutover",
            )
        elif table in ends.marked and not triggers:
            yield warning(
                f"of {name} only what follows a context message is recorded, and the rest is left to the application",
                "once no old code runs any more: cdc-worker cutover",
            )
        elif table in ends.waiting:
            recorded = f"recorded by {triggers}" if triggers else "recorded by nothing, for its triggers are gone"
            yield warning(f"{name} is {recorded}, until the cut-over", "cdc-worker cutover")
        else:
            yield failed(
                f"{name} is recorded by {triggers} and by the worker: all is there twice", "cdc-worker cutover"
            )
    for table in sorted(ends.others):
        forget = sql.SQL("DELETE FROM cdc_worker.excluded WHERE worker = {} AND table_name = {}")
        yield warning(
            f"{'.'.join(table)} is set up and no longer in the profile, so it isn't recorded; if it is to be, put"
            f" [tables.{section(table)}] back and send the worker a SIGHUP",
            f"if it isn't, as the owner of cdc_worker: {forget.format(worker, '.'.join(table)).as_string()}",
        )
    for trigger in cutover.unclear_triggers(connection, look.profile, look.rules):
        relation = sql.Identifier(*qualified(trigger.table)).as_string()
        said = f"{trigger.why}: see whether it records what the worker records"
        fix = f"if it does, as its owner: DROP TRIGGER {quoted(trigger.name)} ON {relation}"
        yield (warning if trigger.writes else unknown)(said, fix)


NEWEST: Final = 10_000
"""So many rows of the target are looked at."""

_PRIMARY: Final = """
SELECT attname::text FROM pg_index JOIN pg_attribute ON attrelid = indrelid AND attnum = indkey[0]
WHERE indrelid = to_regclass(%s) AND indisprimary AND indnkeyatts = 1
  AND atttypid IN ('smallint'::regtype, 'integer'::regtype, 'bigint'::regtype)
"""

# The keys of a worker sort as its commits do.
_ALIKE: Final = """
WITH newest AS MATERIALIZED (
    SELECT {id} AS id, {key}::text COLLATE "C" AS key, {type}::text AS type, {alike} AS alike
    FROM {table} ORDER BY {id} DESC LIMIT {limit}
), own AS (
    SELECT min(id) AS first FROM newest WHERE key >= {since} AND key < {until}
), other AS (
    SELECT id, type = ANY ({types}) AS told FROM newest, own WHERE key IS NULL AND alike AND id > first
)
SELECT count(*) FILTER (WHERE told), count(*) FILTER (WHERE NOT told), min(id) FILTER (WHERE told),
       max(id) FILTER (WHERE told)
FROM other
"""


def other_writers(look: Look) -> Iterator[Finding]:
    """Whether something else records what the worker records, in rows that look like its own."""
    connection, target = look.connection, look.profile.target
    if (fault := catalog.no_target(connection, target)) is not None:
        yield unknown(fault.message, fault.fix)
        return
    table = sql.Identifier(*qualified(target.table))
    columns = {field: column for column, field in target.columns.items()}
    primary = connection.execute(_PRIMARY, (table.as_string(),)).fetchone()
    if not target.constants or "type" not in columns:
        yield ok("the profile has no constants and type by which rows of others could be taken for the worker's")
        return
    if primary is None:
        yield unknown(f"{target.table} has no primary key of one integer, by which to know its newest rows")
        return
    key, key_column = catalog.row_key(target, catalog.target_table(connection, target)), catalog.key_column(target)
    if key is None:
        yield unknown(
            f"{target.table} has no numbered rows, by which to know those whose keys have a table of their own"
        )
        return
    names = {"id": primary[0], "type": columns["type"]}
    alike = sql.SQL(" AND ").join(
        sql.SQL("{} = {}").format(sql.Identifier(column), text(value)) for column, value in target.constants.items()
    )
    identifiers = {name: sql.Identifier(column) for name, column in names.items()}
    try:
        since, until, types = _own(look)
        query = sql.SQL(_ALIKE).format(
            **identifiers, key=key, table=table, alike=alike, limit=NEWEST, since=since, until=until, types=types
        )
        ((told, untold, first, last),) = connection.execute(query).fetchall()
    except errors.NotSetUpError as error:
        yield unknown(f"which rows are the worker's can't be told: {error}", error.hint)
        return
    except psycopg.errors.InsufficientPrivilege:
        of_key = [] if key_column is None else [key_column]
        read = sql.SQL(", ").join(
            map(sql.Identifier, dict.fromkeys([names["id"], *of_key, names["type"], *target.constants]))
        )
        grant = sql.SQL("GRANT SELECT ({}) ON {} TO {}").format(read, table, sql.Identifier(look.server.role))
        yield unknown(
            f'the role "{look.server.role}" may not read the newest rows of {target.table}',
            f"as its owner: {grant.as_string()}",
        )
        return
    others = f"{untold} of the newest {NEWEST:,} rows look like the worker's, and tell of what it doesn't record"
    if not told:
        yield ok(f"no row of others tells what the worker tells; {others}" if untold else "none that looks like ours")
        return
    these = sql.SQL("{} BETWEEN {} AND {} AND {} IS NULL AND {} AND {} = ANY ({})").format(
        identifiers["id"], first, last, key, alike, identifiers["type"], types
    )
    who = sql.SQL(", ").join(sql.Identifier(columns[field]) for field in ("created_by", "type") if field in columns)
    see = sql.SQL("SELECT {}, count(*) FROM {} WHERE {} GROUP BY {}").format(who, table, these, who)
    remove = sql.SQL("DELETE FROM {} WHERE {}").format(table, these)
    yield warning(
        f"{told} of the newest {NEWEST:,} rows of {target.table} look like the worker's, and have no"
        f" {key_column or 'key of its'}: something else tells what the worker tells, so it is there twice",
        f"see who does it, and stop it: {see.as_string()}; then, as its owner: {remove.as_string()}",
    )


def _own(look: Look) -> tuple[str, str, list[str]]:
    """From which key on, and up to which, rows are this worker's since its last cut-over, and of which types.

    Until then triggers wrote rows that nothing tells from later ones of others, and so they do of tables that are left
    to them.
    """
    known = checkpoint.read(look.connection, look.settings.worker)
    scope = checkpoint.scope(look.connection, known)
    ends = scope.open_ends({*cutover.recorded(look.rules)})
    found = (*scope.excluded.values(), *scope.marked.values())
    last = max((end or begin for stretches in found for begin, end in stretches), default=INVALID)
    types: dict[bool, set[str]] = {True: set(), False: set()}
    for name, table in look.profile.tables.items():
        types[qualified(name) in ends.fresh | ends.waiting | ends.marked] |= written.types(table)
    prefix = key_prefix(known.worker, known.system_identifier, last)
    until = key_prefix(known.worker, known.system_identifier, LSN(2**64 - 1))
    return prefix, until, sorted(types[False] - types[True])


CHECKS: Final[tuple[Check, ...]] = (profile, replica_identity, *target_checks.CHECKS, trackers, other_writers)
