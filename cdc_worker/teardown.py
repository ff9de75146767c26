"""Tearing down: the slot, which would fill the disk when forgotten, and if wished all else that setup made.

Activities stay, and with them the columns, keys, indexes and views of their table: they are the application's now.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import psycopg
from psycopg import sql

from cdc_worker import ddl, errors, slot
from cdc_worker.config import Settings
from cdc_worker.ddl import Step
from cdc_worker.postgres import Connection
from cdc_worker.profile import Profile
from cdc_worker.rules import qualified


def teardown(
    settings: Settings, profile: Profile, *, everything: bool = False, restore_triggers: bool = False
) -> Iterator[str]:
    """Take down; yields a line for each thing done. May be repeated, also after an interruption."""
    with ddl.connected(settings) as connection:
        for step in _steps(connection, settings, profile, everything=everything, restore_triggers=restore_triggers):
            try:
                ddl.perform(connection, step)
            except psycopg.errors.InsufficientPrivilege as error:
                if not step.administrator:
                    raise
                raise errors.ServerError(
                    f"this needs more than the ownership of database and tables:\n  {step.text};",
                    hint="have an administrator do it, then again: cdc-worker teardown",
                ) from error
            yield step.title


def plan(
    settings: Settings, profile: Profile, *, everything: bool = False, restore_triggers: bool = False
) -> Iterator[str]:
    """What `teardown` would do, as SQL with comments."""
    with ddl.connected(settings) as connection:
        for step in _steps(connection, settings, profile, everything=everything, restore_triggers=restore_triggers):
            yield ddl.script(connection, step)


_OTHERS: Final = "SELECT worker FROM cdc_worker.checkpoint WHERE worker <> %s ORDER BY worker"


def _steps(
    connection: Connection, settings: Settings, profile: Profile, *, everything: bool, restore_triggers: bool
) -> Iterator[Step]:
    worker, name = settings.worker, settings.slot
    found = slot.read(connection, name)
    if found is not None and found.active_pid is not None:
        raise slot.taken(found)
    installed = ddl.exists(connection, "cdc_worker.replaced")
    if everything and installed:
        others = [other for (other,) in connection.execute(_OTHERS, (worker,))]
        if others:
            raise errors.ServerError(
                f"other workers are set up here as well: {', '.join(others)}",
                hint="tear these down first, or leave out --all",
            )
    if found is not None:
        slot.check_disposable(found, database=connection.info.dbname)
        text = sql.SQL("SELECT pg_drop_replication_slot({})").format(name).as_string()
        yield Step(f'slot "{name}" is dropped', text, administrator=True)
    if not installed:
        return
    yield Step(
        f'worker "{worker}" has no checkpoint any more',
        ddl.transaction(*(sql.SQL(statement).format(worker) for statement in _STATE)),
    )
    if everything:
        yield from _everything(connection, profile, restore_triggers=restore_triggers)


_STATE: Final = (
    "DELETE FROM cdc_worker.checkpoint WHERE worker = {}",
    "DELETE FROM cdc_worker.excluded WHERE worker = {}",
)

_PROTECTION: Final = """
SELECT tgname::text FROM pg_trigger JOIN pg_proc p ON p.oid = tgfoid
WHERE tgrelid = to_regclass(%s) AND pronamespace = to_regnamespace('cdc_worker') ORDER BY tgname
"""

_REPLACED: Final = """
SELECT kind, table_name, name, restore FROM cdc_worker.replaced
ORDER BY array_position(ARRAY['trigger', 'tracker', 'replica_identity', 'grant'], kind), table_name, name
"""

_FULL: Final = "SELECT relreplident = 'f' FROM pg_class WHERE oid = to_regclass(%s)"

_REMOVE: Final = "DELETE FROM cdc_worker.replaced WHERE kind = {} AND table_name = {} AND name = {}"

_WITH_IT: Final = """
SELECT 'dead letters', count(*) FROM cdc_worker.dead_letter
UNION ALL
SELECT 'erased persons', count(*) FROM cdc_worker.erased
"""

_OBJECTS: Final = """
SELECT format('DROP TABLE %s', string_agg(c.oid::regclass::text, ', ' ORDER BY relname))
FROM pg_class c WHERE relnamespace = to_regnamespace('cdc_worker') AND relkind IN ('r', 'p') HAVING count(*) > 0
UNION ALL
SELECT format('DROP FUNCTION %s', string_agg(oid::regprocedure::text, ', ' ORDER BY proname))
FROM pg_proc WHERE pronamespace = to_regnamespace('cdc_worker') HAVING count(*) > 0
"""


def _everything(connection: Connection, profile: Profile, *, restore_triggers: bool) -> Iterator[Step]:
    """In the order that leaves nothing broken: what stands on the schema first, the schema last."""
    target = sql.Identifier(*qualified(profile.target.table)).as_string()
    for (name,) in connection.execute(_PROTECTION, (target,)).fetchall():
        text = sql.SQL("DROP TRIGGER {} ON {}").format(sql.Identifier(name), sql.SQL(target)).as_string()
        yield Step(f"system rows are no longer protected ({name})", text, f"ACCESS EXCLUSIVE on {target}")
    for kind, table, name, restore in connection.execute(_REPLACED).fetchall():
        on = "" if kind == "grant" else sql.Identifier(*qualified(table)).as_string()
        remove = sql.SQL(_REMOVE).format(kind, table, name)
        text, lock = ddl.transaction(restore, remove), f"ACCESS EXCLUSIVE on {on}"
        match kind:
            case "trigger":
                yield Step(f"{table}: trigger {name} is as it was", text, lock)
            case "tracker" if restore_triggers:
                yield Step(f"{table}: {name} records again", text, lock)
            case "replica_identity" if connection.execute(_FULL, (on,)).fetchone() == (True,):
                yield Step(f"{table}: replica identity is as it was", text, lock)
            case "grant":
                yield Step(f"taken back: {name}", text)
            case "tracker":
                yield Step(f"{table}: {name} is not restored; it was: {restore}", remove.as_string())
            case _:
                pass
    with_it = [f"{what}: {count:,}" for what, count in connection.execute(_WITH_IT) if count]
    objects = [statement for (statement,) in connection.execute(_OBJECTS)]
    title = "schema cdc_worker is dropped" + (f", and what it held ({', '.join(with_it)})" if with_it else "")
    yield Step(title, ddl.transaction(*objects, "DROP SCHEMA cdc_worker"))
