"""Setting up, next to an application that goes on writing: what is missing is made, step by step.

Tables and target, replica identities, grants, the slot with the first checkpoint, and the cut-over from triggers that
have recorded changes so far: in this order, each step committed, so that it can be interrupted anywhere and repeated.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import psycopg
from psycopg import sql

from cdc_worker import checkpoint, cutover, ddl, errors, postgres, slot, wal2json
from cdc_worker.config import Settings
from cdc_worker.ddl import Step
from cdc_worker.postgres import Connection, fetch_one
from cdc_worker.profile import Profile
from cdc_worker.rules import Table, compile_rules, qualified

# Who waited for it in the server would have a snapshot, and CREATE INDEX CONCURRENTLY waits for all who have one.
_ONE_AT_A_TIME: Final = "SELECT pg_try_advisory_lock(hashtext('cdc-worker setup'))"


@dataclass(frozen=True, slots=True)
class Wishes:
    """What an installation may have otherwise. `role` is the worker's, which then gets its grants."""

    role: str | None = None
    protect: bool = True
    failover: bool = False
    cutover: bool = True


_PLAIN: Final = Wishes()


def setup(settings: Settings, profile: Profile, wishes: Wishes = _PLAIN) -> Iterator[str]:
    """Set up what is missing; yields a line for each thing done. May be repeated, also after an interruption.

    Raises ServerError, at the end, with the statements that need more than ownership and have not been done.
    """
    with ddl.connected(settings) as connection:
        while fetch_one(connection, _ONE_AT_A_TIME) != (True,):
            time.sleep(0.2)
        warnings: list[str] = []
        connection.add_notice_handler(lambda notice: warnings.append(_warning(notice)))
        refused: list[Step] = []
        for step in _steps(connection, settings, profile, wishes):
            if refused:  # what follows is about a role that isn't there yet
                if step.administrator:
                    refused.append(step)
                continue
            try:
                done = ddl.perform(connection, step)
            except psycopg.errors.InsufficientPrivilege:
                if not step.administrator:
                    raise
                refused.append(step)
                continue
            if done and step.title:
                yield step.title
            yield from filter(None, warnings)
            warnings.clear()
        rules = compile_rules(profile)
        postgres.check_catalog(connection, profile, rules)
        yield from _kept_keys(connection, profile)
        trackers = cutover.trackers(connection, profile, rules)
        slot_step = _slot_step(settings.slot, failover=wishes.failover)
        may_replicate = postgres.server(connection).may_replicate
        if not may_replicate and slot.read(connection, settings.slot) is None:
            if _libraries(connection) is not None:
                refused.append(Step("", f"SET output_plugin_libraries = pgoutput, {wal2json.PLUGIN}"))
            refused.append(slot_step)
        else:
            yield from _slot(connection, settings, trackers, wishes)
        if refused:
            raise errors.ServerError(
                "this needs more than the ownership of database and tables:\n"
                + "\n".join(f"  {step.text};" for step in refused),
                hint="have an administrator do it, then again: cdc-worker setup",
            )
        if wishes.cutover:
            yield from cutover.perform(connection, cutover.forward(connection, settings.worker, trackers))


def plan(settings: Settings, profile: Profile, wishes: Wishes = _PLAIN) -> Iterator[str]:
    """What `setup` would do, as SQL with comments, from how things are now."""
    with ddl.connected(settings) as connection:
        yield f"SET search_path = public;\nSET lock_timeout = {ddl.brief(connection)};\n"
        worker, rules = settings.worker, compile_rules(profile)
        for step in _steps(connection, settings, profile, wishes):
            yield ddl.script(connection, step)
        name = settings.slot
        if slot.read(connection, name) is None:
            yield ddl.script(connection, _slot_step(name, failover=wishes.failover))
        found = cutover.trackers(connection, profile, rules)
        if _checkpoint(connection, worker) is None:
            yield ddl.script(connection, checkpoint.create(worker, name, [t.table for t in found]))
        if wishes.cutover:
            for step in cutover.forward(connection, worker, found):
                yield ddl.script(connection, step)


def _warning(notice: psycopg.errors.Diagnostic) -> str:
    # 25P01 is what a ROLLBACK says where nothing was begun.
    told = notice.severity_nonlocalized == "WARNING" and notice.sqlstate != "25P01"
    return f"note: {notice.message_primary}" if told else ""


def _steps(connection: Connection, settings: Settings, profile: Profile, wishes: Wishes) -> Iterator[Step]:
    """All that can be done as statements, up to the slot."""
    files = [name for name in profile.target.prepare if wishes.protect or "protection" not in name]
    applied: dict[str, str] = {}
    if ddl.exists(connection, "cdc_worker.schema_file"):
        applied = dict(connection.execute("SELECT name, checksum FROM cdc_worker.schema_file").fetchall())
    for name in ("010_cdc_worker.sql", *files):
        yield from _file(name, applied.get(name))
    rules = compile_rules(profile)
    for table in rules.values():
        yield from _table(connection, table, settings.worker)
    if wishes.role is not None:
        yield from _role(connection, wishes.role)
        key = next(column for column, field in profile.target.columns.items() if field == "change_key")
        target = sql.Identifier(*qualified(profile.target.table)).as_string()
        yield from _file(
            "080_grants.sql", applied.get("080_grants.sql"), {"role": wishes.role, "target": target, "key": key}
        )


_APPLIED: Final = (
    "INSERT INTO cdc_worker.schema_file (name, checksum) VALUES ({}, {})"
    " ON CONFLICT (name) DO UPDATE SET checksum = EXCLUDED.checksum, applied_at = now()"
)


def _file(name: str, applied: str | None, variables: dict[str, str] | None = None) -> Iterator[Step]:
    """The steps of a file. What generates statements is asked each time, the rest is for each version of the file."""
    text = ddl.schema(name)
    version = ddl.checksum(text)
    for step in ddl.steps(text, variables):
        if step.generates:
            yield step
        elif applied != version:
            yield replace(step, title="")
    if applied != version:
        yield Step(
            f"{name} is applied",
            sql.SQL(_APPLIED).format(name, version).as_string(),
        )


_IDENTITY: Final = """
SELECT relreplident::text, CASE relreplident
           WHEN 'd' THEN 'DEFAULT' WHEN 'n' THEN 'NOTHING' WHEN 'f' THEN 'FULL'
           ELSE 'USING INDEX ' || (SELECT quote_ident(i.relname) FROM pg_index JOIN pg_class i ON i.oid = indexrelid
                                   WHERE indrelid = c.oid AND indisreplident) END
FROM pg_class c WHERE oid = to_regclass(%s)
"""

_FOUND: Final = """\
INSERT INTO cdc_worker.replaced (kind, table_name, name, restore)
VALUES ('replica_identity', {}, '', {}) ON CONFLICT DO NOTHING"""

_BEGINS: Final = """\
INSERT INTO cdc_worker.excluded (worker, table_name, from_lsn, until_lsn)
VALUES ({}, {}, '0/0', {}) ON CONFLICT DO NOTHING"""

_KNOWN: Final = "SELECT 1 FROM cdc_worker.excluded WHERE worker = %s AND table_name = %s AND from_lsn = '0/0'"


def _table(connection: Connection, table: Table, worker: str) -> Iterator[Step]:
    """Let a table's old rows be written to the WAL, and note from where on it is recorded.

    With the table locked, everyone who wrote to it without its old rows has ended. Only when it is new to the worker
    is that where it begins: otherwise such changes are its own, and become dead letters rather than being left out.
    """
    relation = sql.Identifier(*table.name).as_string()
    found = connection.execute(_IDENTITY, (relation,)).fetchone()
    if not any(table.rules.values()) or found is None:
        return
    identity, definition = found
    name = ".".join(table.name)
    if table.needs_old_rows and identity != "f":
        restore = f"ALTER TABLE {relation} REPLICA IDENTITY {definition}"
        text = ddl.transaction(
            f"ALTER TABLE {relation} REPLICA IDENTITY FULL",
            sql.SQL(_FOUND).format(name, restore),
            sql.SQL(_BEGINS).format(worker, name, sql.SQL("pg_current_wal_insert_lsn()")),
        )
        yield Step(f"replica identity of {name} is FULL", text, f"ACCESS EXCLUSIVE on {relation}")
    elif not (ddl.exists(connection, "cdc_worker.excluded") and connection.execute(_KNOWN, (worker, name)).fetchone()):
        yield Step("", sql.SQL(_BEGINS).format(worker, name, "0/1").as_string())


_ROLE: Final = """
SELECT rolreplication OR rolsuper,
       (SELECT c FROM pg_db_role_setting s, unnest(s.setconfig) c
        WHERE s.setrole = r.oid AND s.setdatabase = 0 AND c LIKE 'output\\_plugin\\_libraries=%%')
FROM pg_roles r WHERE rolname = %s
"""

# What other roles have: ours may have a setting of its own.
_LIBRARIES: Final = """
SELECT CASE WHEN source LIKE '%user' THEN boot_val ELSE setting END
FROM pg_settings WHERE name = 'output_plugin_libraries'
"""

_HIDDEN: Final = "SELECT current_setting('output_plugin_libraries', true)"


def _role(connection: Connection, role: str) -> Iterator[Step]:
    """What only an administrator can give the worker's role."""
    name = sql.Identifier(role).as_string()
    found = connection.execute(_ROLE, (role,)).fetchone()
    if found is None:
        yield Step(f"role {role} is made", f"CREATE ROLE {name} LOGIN REPLICATION", administrator=True)
    elif not found[0]:
        yield Step(f"role {role} may replicate", f"ALTER ROLE {name} REPLICATION", administrator=True)
    own = found[1].partition("=")[2] if found and found[1] else _libraries(connection)
    # Where we may not see what the server allows, a role that is there is believed to have been seen to.
    if own is not None and wal2json.PLUGIN not in postgres.listed(own) and (own or found is None):
        statement = slot.allow(role, postgres.listed(own) or ["pgoutput"])
        yield Step(f"role {role} may use {wal2json.PLUGIN}", statement, administrator=True)


def _libraries(connection: Connection) -> str | None:
    """What output_plugin_libraries lets other roles use; empty if that is hidden from us, None if all may be used."""
    try:
        connection.execute(_HIDDEN)
    except psycopg.errors.InsufficientPrivilege:
        return ""
    found = connection.execute(_LIBRARIES).fetchone()
    return str(found[0]) if found else None


_KEPT_KEYS: Final = """
SELECT conname, a.attname, CASE confdeltype WHEN 'n' THEN 'ON DELETE SET NULL' WHEN 'd' THEN 'ON DELETE SET DEFAULT'
                                            ELSE 'ON UPDATE CASCADE' END, confrelid::regclass::text
FROM pg_constraint JOIN pg_attribute a ON a.attrelid = conrelid AND a.attnum = ANY (conkey)
WHERE contype = 'f' AND conrelid = to_regclass(%s) AND a.attname = ANY (%s) AND a.attgenerated = ''
ORDER BY conname
"""


def _kept_keys(connection: Connection, profile: Profile) -> Iterator[str]:
    target = sql.Identifier(*qualified(profile.target.table)).as_string()
    if profile.target.prepare:
        for key, column, action, other in connection.execute(_KEPT_KEYS, (target, [*profile.target.columns])):
            yield (
                f'note: foreign key "{key}" stays on {column}, for a generated column can\'t carry its {action}:'
                f" system rows are not protected, and are written without a link once their {other} is gone"
            )


def _checkpoint(connection: Connection, worker: str) -> checkpoint.Checkpoint | None:
    try:
        return checkpoint.read(connection, worker)
    except errors.NotSetUpError:
        return None


def _slot_step(name: str, *, failover: bool) -> Step:
    text = slot.creation(name, failover=failover).as_string()
    return Step(f'slot "{name}" is made', text, administrator=True)


_FAILOVER: Final = "SELECT to_jsonb(s) -> 'failover' FROM pg_replication_slots s WHERE slot_name = %s"


def _no_failover(connection: Connection, server: postgres.Server, name: str) -> Iterator[str]:
    slot.check_failover(server)
    if fetch_one(connection, _FAILOVER, name) == (False,):
        command = sql.SQL("ALTER_REPLICATION_SLOT {} (FAILOVER true)").format(sql.Identifier(name)).as_string()
        yield f'note: slot "{name}" is there, and is no failover slot; on a replication connection: {command}'


def _slot(connection: Connection, settings: Settings, trackers: list[cutover.Tracker], wishes: Wishes) -> Iterator[str]:
    worker, name = settings.worker, settings.slot
    server = postgres.server(connection)
    found, known = slot.read(connection, name), _checkpoint(connection, worker)
    if wishes.failover and found is not None:
        yield from _no_failover(connection, server, name)
    if known is not None:
        (system_identifier,) = fetch_one(connection, "SELECT system_identifier::text FROM pg_control_system()")
        wal_end = slot.committed_so_far(connection)
        checkpoint.check(known, slot=name, system_identifier=system_identifier, wal_end=wal_end)
        slot.check(found, name=name, database=connection.info.dbname, checkpoint=known.position.lsn)
        yield f'slot "{name}" is there, and its checkpoint at {known.position}'
        return
    if found is None:
        position = slot.create(connection, name, server, failover=wishes.failover)
        yield f'slot "{name}" created at {position}'
    else:
        # Made by an administrator, or by a set-up that was interrupted here: nothing has been read from it yet.
        checkpoint.check_unclaimed(connection, name)
        position = slot.check_unread(found, database=connection.info.dbname)
    ddl.perform(connection, checkpoint.create(worker, name, [tracker.table for tracker in trackers]))
    yield f'worker "{worker}" begins at {position}'
