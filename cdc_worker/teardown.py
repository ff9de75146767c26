"""Tearing down: slot and publication, which would do harm when forgotten, and if wished all else that setup made.

Activities stay, and with them the columns, keys, indexes and views of their table: they are the application's now.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from psycopg import sql

from cdc_worker import cutover, ddl, errors, publication, slot
from cdc_worker.config import Settings
from cdc_worker.ddl import Step
from cdc_worker.postgres import Connection
from cdc_worker.profile import Profile
from cdc_worker.rules import qualified


def teardown(
    settings: Settings, profile: Profile, *, everything: bool = False, restore_triggers: bool = False
) -> Iterator[str]:
    """Take down; yields a line for each thing done. May be repeated, also after an interruption.

    With `restore_triggers` these record again first, and what was committed before is the worker's to record: raises
    ServerError when it has not done so yet.
    """
    with ddl.connected(settings) as connection:
        ddl.one_at_a_time(connection)
        yield from ddl.performing(
            connection, _steps(connection, settings, profile, everything=everything, restore_triggers=restore_triggers)
        )


def plan(
    settings: Settings, profile: Profile, *, everything: bool = False, restore_triggers: bool = False
) -> Iterator[str]:
    """What `teardown` would do, as SQL with comments."""
    with ddl.connected(settings) as connection:
        yield ddl.header(connection)
        for step in _steps(connection, settings, profile, everything=everything, restore_triggers=restore_triggers):
            yield ddl.script(connection, step)


_WORKERS: Final = "SELECT worker, slot, lsn FROM cdc_worker.checkpoint ORDER BY worker"


def _steps(
    connection: Connection, settings: Settings, profile: Profile, *, everything: bool, restore_triggers: bool
) -> Iterator[Step]:
    worker, name = settings.worker, slot.own(connection, settings.worker, settings.slot)
    found = slot.read(connection, name)
    if found is not None:
        slot.check_disposable(found, database=connection.info.dbname)
    installed = ddl.exists(connection, "cdc_worker.replaced")
    workers = {of: rest for of, *rest in connection.execute(_WORKERS)} if installed else {}
    _check(workers, worker, settings.slot, everything=everything)
    if installed and restore_triggers:
        yield from cutover.back(connection, worker, settings.rules(profile))
        if worker in workers and found is not None:
            _check_recorded(connection, worker)
    if found is not None:
        if found.active_pid is not None:
            raise slot.taken(found)
        text = sql.SQL("SELECT pg_drop_replication_slot({})").format(name).as_string()
        yield Step(f'slot "{name}" is dropped', text, administrator=True)
    spare = slot.spare(connection, worker) if installed else None
    if spare is not None:
        text = sql.SQL("SELECT pg_drop_replication_slot({})").format(spare.name).as_string()
        yield Step(f'slot "{spare.name}", which a switch of the plugin has left, is dropped', text, administrator=True)
    # Before replica identities are as they were, without which the application could not update what is published.
    yield from publication.dropping(connection, settings.publication_name, worker)
    if not installed:
        return
    if worker in workers:
        yield Step(
            f'worker "{worker}" ends at {workers[worker][1]}: what was committed after it is not recorded',
            ddl.transaction(*(sql.SQL(statement).format(worker) for statement in _STATE)),
        )
    if everything:
        yield from _everything(connection, profile)


def _check(workers: dict[str, list[str]], worker: str, base: str, *, everything: bool) -> None:
    for other, (its_slot, _) in workers.items():
        if (other == worker) != (its_slot in slot.names(base)):
            raise errors.SlotMismatchError(
                f'the worker "{other}" reads the slot "{its_slot}": "{worker}" and "{base}" are no pair',
                hint="name worker and slot as they were set up, in CDC_WORKER_NAME and CDC_WORKER_SLOT",
            )
    others = ", ".join(sorted(workers.keys() - {worker}))
    if everything and others:
        raise errors.ServerError(
            f"other workers are set up here as well: {others}", hint="tear these down first, or leave out --all"
        )


_RECORDED: Final = """
SELECT e.from_lsn FROM cdc_worker.excluded e JOIN cdc_worker.checkpoint c USING (worker, system_identifier)
WHERE worker = %s AND triggers AND until_lsn IS NULL AND e.from_lsn > c.lsn ORDER BY 1 DESC LIMIT 1
"""


def _check_recorded(connection: Connection, worker: str) -> None:
    found = connection.execute(_RECORDED, (worker,)).fetchone()
    if found is not None:
        raise errors.ServerError(
            f"the triggers record again from {found[0]} on, and what was committed before is not all recorded yet",
            hint="run: cdc-worker run --once; then the same again",
        )


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


_THERE: Final = "SELECT 1 FROM pg_trigger WHERE tgrelid = to_regclass(%s) AND tgname = %s"


def _everything(connection: Connection, profile: Profile) -> Iterator[Step]:
    """In the order that leaves nothing broken: what stands on the schema first, the schema last."""
    target = sql.Identifier(*qualified(profile.target.table)).as_string()
    for (name,) in connection.execute(_PROTECTION, (target,)).fetchall():
        text = sql.SQL("DROP TRIGGER {} ON {}").format(sql.Identifier(name), sql.SQL(target)).as_string()
        yield Step(f"system rows are no longer protected ({name})", text, f"ACCESS EXCLUSIVE on {target}")
    for kind, table, name, restore in connection.execute(_REPLACED).fetchall():
        on = "" if kind == "grant" else sql.Identifier(*qualified(table)).as_string()
        remove = sql.SQL(_REMOVE).format(kind, table, name)
        text, lock = ddl.transaction(ddl.attempt(restore), remove), f"ACCESS EXCLUSIVE on {on}"
        match kind:
            case "trigger" if connection.execute(_THERE, (on, name)).fetchone():
                yield Step(f"{table}: trigger {name} is as it was", text, lock)
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
