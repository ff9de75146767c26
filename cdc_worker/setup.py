"""Setting up, next to an application that goes on writing: what is missing is made, step by step.

Tables and target, replica identities, grants, the slot with the first checkpoint, and the cut-over from triggers that
have recorded changes so far: in this order, each step committed, so that it can be interrupted anywhere and repeated.
"""

from __future__ import annotations

import shlex
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from typing import Final

import psycopg
from psycopg import sql

from cdc_worker import (
    catalog,
    checkpoint,
    cutover,
    ddl,
    errors,
    failpoints,
    gap,
    pgoutput,
    postgres,
    publication,
    slot,
    wal2json,
)
from cdc_worker.config import Settings
from cdc_worker.ddl import Step
from cdc_worker.postgres import Connection
from cdc_worker.profile import Profile
from cdc_worker.rules import Rules, Table, qualified


@dataclass(frozen=True, slots=True)
class Wishes:
    """What an installation may have otherwise. `role` is the worker's, which then gets its grants.

    With `marked`, of tables that are new to the worker only what follows a context message is recorded, until cut-over.
    """

    role: str | None = None
    protect: bool = True
    failover: bool = False
    cutover: bool = True
    marked: bool = False


_PLAIN: Final = Wishes()


def setup(settings: Settings, profile: Profile, wishes: Wishes = _PLAIN) -> Iterator[str]:
    """Set up what is missing; yields a line for each thing done. May be repeated, also after an interruption.

    Raises ServerError, at the end, with the statements that need more than ownership and have not been done.
    """
    with ddl.connected(settings) as connection:
        ddl.one_at_a_time(connection)
        rules = settings.rules(profile)
        plugin, why = _plugin(connection, settings)
        changed = _changed(connection, settings, rules) if plugin == pgoutput.PLUGIN else []
        steps = _steps(connection, settings, profile, wishes, plugin)
        refused: list[str] = []
        try:
            yield from ddl.performing(connection, steps)
        except ddl.AdministratorError as error:
            # What comes next is about what isn't there yet, and nothing at all can be done without the schema.
            refused = [*error.statements, *(s.text for s in steps if s.administrator and not s.generates)]
            if not ddl.exists(connection, "cdc_worker.checkpoint"):
                raise
        catalog.check(connection, profile, rules, plugin=plugin)
        yield from _kept_keys(connection, profile)
        unpublished = yield from _unpublished(connection, settings, rules, plugin)
        refused += unpublished
        name = _slot_name(connection, settings)
        if slot.read(connection, name) is None and not postgres.server(connection).may_replicate:
            refused += _left_to_make(connection, name, plugin, wishes)
        elif not unpublished:  # a slot that begins before its publication could never be read
            if plugin == pgoutput.PLUGIN:
                publication.check(connection, settings.publication_name, rules)
            try:
                yield from _slot(connection, settings, wishes, plugin, why)
            except slot.RoleRefusedError:
                refused += _left_to_make(connection, name, plugin, wishes)
            else:
                if plugin == pgoutput.PLUGIN:
                    connection.execute(_noting(settings).encode())
        if changed:
            yield (
                f'note: the publication "{settings.publication_name}" was changed by others: what was meanwhile written'
                f" to {', '.join(changed)} is lost; wal2json, where it is, still has what was not read yet, before the"
                " worker runs: cdc-worker switch-plugin --to wal2json; what is missing is found by: cdc-worker verify"
            )
        if refused:
            raise ddl.AdministratorError(refused)
        trackers = cutover.trackers(connection, profile, rules)
        yield from cutover.unclear(connection, profile, rules)
        if wishes.cutover:
            left = cutover.given_back(connection, settings.worker)
            for table in left:
                yield f"note: {table} is left to its triggers since cutover --back; to take over: cdc-worker cutover"
            marked = cutover.marked_tables(connection, settings.worker)
            for table in marked:
                yield f"note: of {table} only what follows a context message is recorded, until: cdc-worker cutover"
            yield from cutover.not_yet(connection, settings.worker, trackers)
            steps = cutover.forward(connection, settings.worker, trackers, but={*left, *marked})
            yield from ddl.performing(connection, steps)


def plan(settings: Settings, profile: Profile, wishes: Wishes = _PLAIN) -> Iterator[str]:
    """What `setup` would do, as SQL with comments, from how things are now."""
    with ddl.connected(settings) as connection:
        yield ddl.header(connection)
        worker, rules = settings.worker, settings.rules(profile)
        plugin, why = _plugin(connection, settings)
        for step in _steps(connection, settings, profile, wishes, plugin):
            yield ddl.script(connection, step)
        name = _slot_name(connection, settings)
        if slot.read(connection, name) is None:
            step = _slot_step(name, plugin, failover=wishes.failover)
            yield ddl.script(connection, replace(step, title=f"{step.title} with {plugin}: {why}"))
        if _checkpoint(connection, worker) is None:
            yield ddl.script(connection, checkpoint.create(worker, name))
            if plugin == pgoutput.PLUGIN:
                yield ddl.script(connection, Step("it is noted how tables are published", _noting(settings)))
        if wishes.cutover:
            left = {*cutover.given_back(connection, worker), *cutover.marked_tables(connection, worker)}
            for step in cutover.forward(connection, worker, cutover.trackers(connection, profile, rules), but=left):
                yield ddl.script(connection, step)


def _plugin(connection: Connection, settings: Settings) -> tuple[str, str]:
    """The plugin that the slot has or is to have, and why."""
    found = slot.read(connection, _slot_name(connection, settings))
    if found is not None:
        return found.plugin, "the slot is there"
    known = _checkpoint(connection, settings.worker)
    if known is not None and known.plugin == pgoutput.PLUGIN and settings.plugin == "auto":
        return known.plugin, "the worker has read with it"  # what was had once it may have been switched from
    return slot.choose(connection, postgres.server(connection), settings.plugin)


def _slot_name(connection: Connection, settings: Settings) -> str:
    return slot.own(connection, settings.worker, settings.slot)


def _changed(connection: Connection, settings: Settings, rules: Rules) -> list[str]:
    """The relations of which pgoutput may leave out changes, for what others have done. Raises PublicationError."""
    try:
        noted = publication.noted(connection, settings.worker)
    except errors.NotSetUpError:
        return []
    if noted is None:
        return []
    publication.check_name(connection, settings.publication_name, noted)
    return publication.look(connection, settings.publication_name, rules).changed(noted)


def _noting(settings: Settings) -> str:
    return publication.note(settings.publication_name, settings.worker)


def tables(connection: Connection) -> Iterator[Step]:
    """The worker's own tables."""
    yield from _file(_TABLES, _applied(connection).get(_TABLES))


_TABLES: Final = "010_cdc_worker.sql"


def _applied(connection: Connection) -> dict[str, str]:
    """The files that were applied, with the checksums that they had."""
    if not ddl.exists(connection, "cdc_worker.schema_file"):
        return {}
    return dict(connection.execute("SELECT name, checksum FROM cdc_worker.schema_file").fetchall())


def _steps(connection: Connection, settings: Settings, profile: Profile, wishes: Wishes, plugin: str) -> Iterator[Step]:
    """All that can be done as statements, up to the slot."""
    files = [name for name in profile.target.prepare if wishes.protect or "protection" not in name]
    applied = _applied(connection)
    for name in (_TABLES, "015_context.sql", *files):
        yield from _file(name, applied.get(name))
    rules = settings.rules(profile)
    tracked = {tracker.table for tracker in cutover.trackers(connection, profile, rules)}
    marked = wishes.marked or bool(cutover.marked_tables(connection, settings.worker))
    published = publication.look(connection, settings.publication_name, rules)
    publishing = published.allowed and published.is_of(settings.worker)
    if publishing:
        yield from published.making(connection, settings.worker)
    for table in rules.values():
        yield from _table(
            connection,
            table,
            settings.worker,
            tracked=table.name in tracked,
            marked=marked,
            published=published.adding(table.name) if publishing else {},
            noting=_noting(settings),
            keyed=publishing or plugin == pgoutput.PLUGIN,
            sent=plugin == pgoutput.PLUGIN,
        )
    if publishing:
        yield from published.clearing()
    if wishes.role is not None:
        yield from _role(connection, wishes.role, plugin)
        yield from _file(GRANTS, applied.get(GRANTS), grantee(profile, rules, wishes.role))


GRANTS: Final = "080_grants.sql"


def grantee(profile: Profile, rules: Rules, role: str) -> dict[str, str]:
    """The variables of the file of grants."""
    target = qualified(profile.target.table)
    return {
        "role": role,
        "target": sql.Identifier(*target).as_string(),
        "key": catalog.key_column(profile.target) or "",
        "schemas": postgres.array(sorted({target[0], *(schema for schema, _ in rules)}))[1:-1],
        "lookups": postgres.array(
            sql.Identifier(*name).as_string() for name, table in rules.items() if table.looked_up
        )[1:-1],
    }


def check_grants(connection: Connection, profile: Profile, rules: Rules, role: str) -> None:
    """Raise TargetUnusableError if the role lacks a right that the worker needs, of those that setup grants."""
    steps = ddl.steps(ddl.schema(GRANTS), grantee(profile, rules, role))
    try:
        statements = [s for step in steps if step.generates for s in step.statements(connection)]
    except psycopg.errors.InsufficientPrivilege as error:
        # Without USAGE on a schema nothing in it can be looked at.
        raise errors.TargetUnusableError(
            f'role "{role}" lacks grants: {error.diag.message_primary}',
            hint=f"as the owner: cdc-worker setup --role {shlex.quote(role)} --no-cutover --no-protect",
        ) from error
    grants = [statement.partition("; INSERT INTO cdc_worker.replaced")[0] for statement in statements]
    if grants:
        lacking = ", ".join(grant.removeprefix("GRANT ").rpartition(" TO ")[0] for grant in grants)
        raise errors.TargetUnusableError(f'role "{role}" lacks {lacking}', hint=f"as the owner: {'; '.join(grants)}")


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


# Of a partitioned table its partitions, which store its rows.
_IDENTITIES: Final = """
SELECT nspname::text, relname::text, c.oid <> to_regclass(%(relation)s), CASE relreplident
           WHEN 'd' THEN 'DEFAULT' WHEN 'n' THEN 'NOTHING'
           ELSE coalesce((SELECT 'USING INDEX ' || quote_ident(i.relname)
                          FROM pg_index JOIN pg_class i ON i.oid = indexrelid
                          WHERE indrelid = c.oid AND indisreplident), 'NOTHING') END
FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace
WHERE (c.oid = to_regclass(%(relation)s)
       OR c.oid IN (SELECT relid FROM pg_partition_tree(to_regclass(%(relation)s)) WHERE isleaf))
    AND relkind = 'r' AND relreplident <> 'f' AND (%(old)s OR NOT {keyed})
ORDER BY 1, 2
""".replace("{keyed}", publication.KEYED)

_FOUND: Final = """\
INSERT INTO cdc_worker.replaced (kind, table_name, name, restore)
VALUES ('replica_identity', {}, '', {}) ON CONFLICT DO NOTHING"""

_BEGINS: Final = """\
INSERT INTO cdc_worker.excluded (worker, table_name, from_lsn, until_lsn, triggers)
VALUES ({}, {}, '0/0', {}, {}) ON CONFLICT DO NOTHING"""

# From where it is set up.
_MARKED: Final = """\
INSERT INTO cdc_worker.excluded (worker, table_name, from_lsn, marked)
SELECT worker, table_name, until_lsn, true FROM cdc_worker.excluded
WHERE worker = {} AND table_name = {} AND from_lsn = '0/0' AND system_identifier = cdc_worker.cluster()"""

_KNOWN: Final = """
SELECT 1 FROM cdc_worker.excluded
WHERE worker = %s AND table_name = %s AND from_lsn = '0/0' AND system_identifier = cdc_worker.cluster()
"""


def _table(
    connection: Connection,
    table: Table,
    worker: str,
    *,
    tracked: bool,
    marked: bool,
    published: dict[tuple[str, str], list[str]],
    noting: str,
    keyed: bool,
    sent: bool,
) -> Iterator[Step]:
    """Let a table's old rows be written to the WAL, publish it, and note from where on it is recorded, if it is.

    With the table locked, or each of its partitions in turn, everyone who wrote to it without its old rows has ended.
    Only when it is new to the worker is that where it begins (or at the cut-over, if it is `tracked` by triggers):
    otherwise such changes are its own, and become dead letters rather than being left out. A worker that runs hears of
    it by nonce and marker. If it is `marked`, only what follows a context message is recorded from there on.

    `published` are the statements that publish what stores its rows. For that these must be `keyed`: whatever rules
    need, old rows have a key at least. If the worker is `sent` only what is published, nothing before that is its own,
    and by `noting` that it hears what it is sent from then on.
    """
    relation = sql.Identifier(*table.name).as_string()
    recorded = any(table.rules.values())
    if not (recorded or table.needs_old_rows or keyed) or not ddl.exists(connection, relation):
        return
    name = ".".join(table.name)
    statements: list[sql.Composable | str] = []
    parameters = {"relation": relation, "old": table.needs_old_rows}
    unready = connection.execute(_IDENTITIES, parameters).fetchall() if table.needs_old_rows or keyed else []
    for schema, relname, partition, definition in unready:
        stored, alter = f"{schema}.{relname}", f"ALTER TABLE {sql.Identifier(schema, relname).as_string()}"
        found = sql.SQL(_FOUND).format(stored, f"{alter} REPLICA IDENTITY {definition}")
        altered: list[sql.Composable | str] = [f"{alter} REPLICA IDENTITY FULL", found]
        if partition:
            lock = f"ACCESS EXCLUSIVE on {sql.Identifier(schema, relname).as_string()}"
            yield Step(f"replica identity of {stored} is FULL", ddl.transaction(*altered), lock)
        else:
            statements += altered
    lock = f"ACCESS EXCLUSIVE on {relation}" if statements else ""
    title = f"replica identity of {name} is FULL" if statements else ""
    installed = ddl.exists(connection, "cdc_worker.excluded")
    begins = recorded and (not installed or connection.execute(_KNOWN, (worker, name)).fetchone() is None)
    late = begins and sent and _checkpoint(connection, worker) is not None
    if published and late and not lock:
        # Of a transaction that writes to it meanwhile a part would be sent.
        statements.append(f"LOCK TABLE {relation} IN SHARE ROW EXCLUSIVE MODE")
        lock = f"SHARE ROW EXCLUSIVE on {relation}"
    for (schema, relname), adding in published.items():
        added = sql.Identifier(schema, relname).as_string()
        if (schema, relname) == table.name or late:
            statements += adding
            title, lock = title or f"{name} is published", lock or f"SHARE UPDATE EXCLUSIVE on {added}"
        else:
            yield Step(
                f"{schema}.{relname} is published", ddl.transaction(*adding), f"SHARE UPDATE EXCLUSIVE on {added}"
            )
    if published and late:
        statements.append(noting)
    if begins:
        at = "pg_current_wal_insert_lsn()" if late or (unready and table.needs_old_rows) else "'0/1'"
        until = "NULL" if tracked else at
        statements.append(sql.SQL(_BEGINS).format(worker, name, sql.SQL(until), tracked))
        if marked and not tracked:
            statements.append(sql.SQL(_MARKED).format(worker, name))
        if _checkpoint(connection, worker) is not None:
            statements.insert(0, checkpoint.new_nonce(worker))
            statements.append(sql.SQL("SELECT cdc_worker.mark({}, {})").format(worker, name))
    if statements:
        yield Step(title or f"{name} is set up", ddl.transaction(*statements), lock)


def _unpublished(
    connection: Connection, settings: Settings, rules: Rules, plugin: str
) -> Generator[str, None, list[str]]:
    """What is left to do about the publication: yields a note where that can wait, and returns it where it can't."""
    found = publication.look(connection, settings.publication_name, rules)
    left = [step.text for step in found.steps(connection, settings.worker)] if found.is_of(settings.worker) else []
    if plugin == pgoutput.PLUGIN:
        publication.check_owner(found, settings.worker)
        return left
    if left:
        yield (
            f'note: the slot can\'t be switched to pgoutput without the publication "{found.name}"; that takes an'
            f" administrator: {'; '.join(left)}"
        )
    elif not found.is_of(settings.worker):
        yield (
            f'note: the slot can\'t be switched to pgoutput: the publication "{found.name}" is not of this worker;'
            " name another in CDC_WORKER_PUBLICATION"
        )
    elif found.missing:
        yield f"note: switched to pgoutput, the worker would miss {', '.join(found.missing)}"
    return []


_ROLE: Final = """
SELECT {may_replicate},
       (SELECT c FROM pg_db_role_setting s, unnest(s.setconfig) c
        WHERE s.setrole = r.oid AND s.setdatabase = 0 AND c LIKE 'output\\_plugin\\_libraries=%%')
FROM pg_roles r WHERE rolname = %s
""".replace("{may_replicate}", postgres.MAY_REPLICATE)

# What other roles have: ours may have a setting of its own.
_LIBRARIES: Final = """
SELECT CASE WHEN source LIKE '%user' THEN boot_val ELSE setting END
FROM pg_settings WHERE name = 'output_plugin_libraries'
"""

_HIDDEN: Final = "SELECT current_setting('output_plugin_libraries', true)"


def _role(connection: Connection, role: str, plugin: str) -> Iterator[Step]:
    """What only an administrator can give the worker's role."""
    name = sql.Identifier(role).as_string()
    found = connection.execute(_ROLE, (role,)).fetchone()
    right = postgres.replication_right(connection, role)
    if found is None:
        attributes = "LOGIN" if right.by_membership else f"LOGIN {right.name}"
        yield Step(f"role {role} is made", f"CREATE ROLE {name} {attributes}", administrator=True)
    if right.by_membership if found is None else not found[0]:
        yield Step(f"role {role} may replicate", right.statement, administrator=True)
    own = found[1].partition("=")[2] if found and found[1] else _libraries(connection)
    # Where we may not see what the server allows, a role that is there is believed to have been seen to.
    refused = own is not None and wal2json.PLUGIN not in postgres.listed(own) and (own or found is None)
    if plugin == wal2json.PLUGIN and own is not None and refused:
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


def _slot_step(name: str, plugin: str, *, failover: bool) -> Step:
    text = slot.creation(name, plugin, failover=failover).as_string()
    return Step(f'slot "{name}" is made', text, administrator=True)


def _left_to_make(connection: Connection, name: str, plugin: str, wishes: Wishes) -> Iterator[str]:
    """The statements by which somebody makes the slot who may."""
    if plugin == wal2json.PLUGIN and _libraries(connection) is not None:
        yield f"SET output_plugin_libraries = pgoutput, {wal2json.PLUGIN}"
    yield _slot_step(name, plugin, failover=wishes.failover).text


def _no_failover(server: postgres.Server, found: slot.Slot) -> Iterator[str]:
    slot.check_failover(server)
    if not found.failover:
        command = sql.SQL("ALTER_REPLICATION_SLOT {} (FAILOVER true)").format(sql.Identifier(found.name)).as_string()
        yield f'note: slot "{found.name}" is there, and is no failover slot; on a replication connection: {command}'


def _slot(connection: Connection, settings: Settings, wishes: Wishes, plugin: str, why: str) -> Iterator[str]:
    worker, name = settings.worker, _slot_name(connection, settings)
    server = postgres.server(connection)
    found, known = slot.read(connection, name), _checkpoint(connection, worker)
    if wishes.failover and found is not None:
        yield from _no_failover(server, found)
    if known is not None and gap.open_one(connection, worker) is None:
        known, found = slot.check_checkpoint(connection, worker, settings.slot)
        slot.check_plugin(found, settings.plugin)
        yield f'slot "{name}" is there, and its checkpoint at {known.position}'
        return
    if found is None:
        yield f"plugin: {plugin}, for {why}"
        position = slot.create(connection, name, plugin, server, failover=wishes.failover)
        failpoints.reach("slot_made")
        yield f'slot "{name}" created at {position}'
    else:
        # Made by an administrator, or by a set-up that was interrupted here: nothing has been read from it yet.
        checkpoint.check_unclaimed(connection, name, worker)
        position = slot.check_unread(found, database=connection.info.dbname)
        slot.check_plugin(found, settings.plugin)
    begin = checkpoint.create(worker, name) if known is None else gap.ending(worker, position)
    ddl.perform(connection, begin)
    failpoints.reach("checkpoint_made")
    yield begin.title if known is not None else f'worker "{worker}" begins at {position}'
