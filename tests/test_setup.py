"""Setting up: from a fresh database to the first checkpoint, again and again, and with no more rights than needed."""

from __future__ import annotations

import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import psycopg
import pytest
from application import Application, everything, owed, told
from psycopg import sql
from storms import Faults, kill
from support import Crm, WorkerProcess, crm_on, eventually, grant, storm

from cdc_worker import config, ddl, errors, postgres, profile, slot
from cdc_worker.cluster import Cluster, find_binaries
from cdc_worker.lsn import LSN
from cdc_worker.setup import setup

LEADFI = profile.load("leadfi")
LEGACY = Path(__file__).parent / "legacy"


def names(crm: Crm) -> list[str]:
    return [activity["metadata"]["lead_name"] for activity in crm.activities()]


def test_a_fresh_database_is_set_up_in_one_go(bare_crm: Crm) -> None:
    said = bare_crm.succeed("setup").splitlines()
    begins = bare_crm.value("SELECT lsn::text FROM cdc_worker.checkpoint")
    assert said[:2] == ["schema cdc_worker is made", "010_cdc_worker.sql is applied"]
    assert said[-7:] == [
        f'publication "{bare_crm.slot}" is made',
        "replica identity of public.lead is FULL",
        "replica identity of public.customer is FULL",
        "public.contact is published",
        "plugin: wal2json, for the server has and allows it",
        f'slot "{bare_crm.slot}" created at {begins}',
        f'worker "{bare_crm.slot}" begins at {begins}',
    ]


def test_the_first_checkpoint_is_where_the_slot_begins(crm: Crm) -> None:
    (found,) = crm.execute(
        "SELECT worker, slot, c.plugin, lsn = confirmed_flush_lsn, slot_created_at = lsn, commit_lsn::text, changes,"
        " c.system_identifier = s.system_identifier::text, owner"
        " FROM cdc_worker.checkpoint c JOIN pg_replication_slots ON slot_name = slot, pg_control_system() s"
    )
    assert found == (crm.slot, crm.slot, "wal2json", True, True, "0/0", 0, True, None)


def test_what_is_committed_between_setup_and_the_first_run_is_recorded(bare_crm: Crm) -> None:
    bare_crm.add_leads(1)
    bare_crm.setup()
    bare_crm.execute("UPDATE lead SET status = '2. proposal'")
    bare_crm.record()
    assert bare_crm.types() == ["status_changed"]


def test_a_transaction_that_is_open_while_the_slot_is_made_is_not_recorded_in_part(bare_crm: Crm) -> None:
    unfinished(bare_crm, "replica identity of public.customer is FULL")
    with psycopg.connect(bare_crm.dsn) as other, ThreadPoolExecutor(1) as thread:
        other.execute("INSERT INTO lead (full_name, source, bd_in_charge, type) VALUES ('Ann', 's', 'b', 't')")
        done = thread.submit(bare_crm.command, "setup")
        eventually(
            lambda: bare_crm.value(
                "SELECT query LIKE '%%pg_create_logical_replication_slot%%' FROM pg_stat_activity"
                " WHERE datname = current_database() AND wait_event = 'transactionid'"
                " UNION ALL SELECT false LIMIT 1"
            )
        )
        other.execute("INSERT INTO lead (full_name, source, bd_in_charge, type) VALUES ('Bob', 's', 'b', 't')")
        other.commit()
        assert done.result().returncode == 0
    bare_crm.execute("INSERT INTO lead (full_name, source, bd_in_charge, type) VALUES ('Cid', 's', 'b', 't')")
    bare_crm.record()
    assert names(bare_crm) == ["Cid"]


def test_only_captured_tables_with_rules_on_old_rows_get_a_full_replica_identity(crm: Crm) -> None:
    found = crm.execute(
        "SELECT relname, relreplident::text FROM pg_class"
        " WHERE relname IN ('lead', 'customer', 'contact', 'activity') ORDER BY relname"
    )
    assert found == [("activity", "d"), ("contact", "d"), ("customer", "f"), ("lead", "f")]


def test_setting_up_again_changes_nothing(crm: Crm) -> None:
    crm.add_leads(1)
    crm.record()
    before = state(crm)
    said = crm.succeed("setup").splitlines()
    assert said == [f'slot "{crm.slot}" is there, and its checkpoint at {before[0][1]}']
    assert state(crm) == before
    header, *rest = [paragraph for paragraph in crm.succeed("setup", "--dry-run").split("\n\n") if paragraph.strip()]
    assert (header, rest) == ("\\set ON_ERROR_STOP on\nSET search_path = public;\nSET lock_timeout = 100;", [])


def state(crm: Crm) -> list[tuple[object, ...]]:
    """Checkpoint, slot, what was replaced, and the target's columns, constraints, triggers and indexes."""
    return [
        *crm.execute("SELECT slot, lsn::text, owner, nonce, written_at FROM cdc_worker.checkpoint"),
        *crm.execute("SELECT slot_name, plugin, confirmed_flush_lsn FROM pg_replication_slots ORDER BY slot_name"),
        *crm.execute("SELECT * FROM cdc_worker.excluded ORDER BY 1, 2, 4"),
        *crm.execute("SELECT * FROM cdc_worker.replaced ORDER BY 1, 2, 3"),
        *crm.execute("SELECT pubname, p.xmin::text FROM pg_publication p ORDER BY 1"),
        *crm.execute("SELECT prrelid::regclass::text, r.xmin::text FROM pg_publication_rel r ORDER BY 1"),
        *crm.execute("SELECT attname, attnum FROM pg_attribute WHERE attrelid = 'activity'::regclass ORDER BY attnum"),
        *crm.execute("SELECT conname FROM pg_constraint WHERE conrelid = 'activity'::regclass ORDER BY conname"),
        *crm.execute("SELECT oid FROM pg_trigger WHERE tgrelid = 'activity'::regclass ORDER BY oid"),
        *crm.execute("SELECT indexrelid FROM pg_index WHERE indrelid = 'activity'::regclass ORDER BY indexrelid"),
    ]


def lines_of_setup(crm: Crm) -> Iterator[str]:
    """Set up, line by line."""
    return setup(config.load(None, {"dsn": crm.dsn, "slot": crm.slot}), LEADFI)


def unfinished(crm: Crm, last: str) -> None:
    """Set up, as far as this line."""
    assert any(line == last for line in lines_of_setup(crm))


def test_setting_up_goes_on_where_it_was_interrupted_each_time(server: Cluster, tmp_path: Path) -> None:
    """After each line that is new, also after the slot is made and before there is a checkpoint."""
    with crm_on(server, tmp_path) as whole, crm_on(server, tmp_path) as crm:
        whole.setup()
        said: dict[str, None] = {}
        recorded = 0
        while (line := next((line for line in lines_of_setup(crm) if line not in said), None)) is not None:
            said[line] = None
            crm.add_leads(1)
            recorded += crm.value("SELECT count(*) FROM pg_replication_slots WHERE slot_name = %s", crm.slot)
        assert len(said) > 10
        assert shape(crm) == shape(whole)
        assert recorded > 1
        crm.record()
        assert len(crm.activities()) == recorded


@pytest.mark.chaos
def test_setting_up_goes_on_where_it_was_interrupted(server: Cluster, tmp_path: Path) -> None:
    """After each line. After the slot is made, and before there is a checkpoint, nothing is lost either."""
    steps, shapes = 0, set()
    while True:
        steps += 1
        with crm_on(server, tmp_path) as crm:
            done = len(list(islice(lines_of_setup(crm), steps))) < steps
            slot_made = crm.value("SELECT count(*) FROM pg_replication_slots WHERE slot_name = %s", crm.slot) == 1
            crm.add_leads(1)
            crm.setup()
            crm.add_leads(1)
            shapes.add(shape(crm))
            if slot_made:
                crm.record()
                assert len(crm.activities()) == 2
            if done:
                break
    assert steps > 10
    assert len(shapes) == 1


def shape(crm: Crm) -> tuple[tuple[object, ...], ...]:
    """What the target is made of."""
    return (
        *crm.execute("SELECT attname FROM pg_attribute WHERE attrelid = 'activity'::regclass ORDER BY 1"),
        *crm.execute(
            "SELECT conname, convalidated FROM pg_constraint WHERE conrelid = 'activity'::regclass ORDER BY 1"
        ),
        *crm.execute(
            "SELECT tgname FROM pg_trigger WHERE tgrelid = 'activity'::regclass AND NOT tgisinternal ORDER BY 1"
        ),
        *crm.execute("SELECT indexname FROM pg_indexes WHERE tablename = 'activity' ORDER BY 1"),
        *crm.execute("SELECT viewname FROM pg_views WHERE schemaname = 'public' ORDER BY 1"),
    )


@storm(3, chaos=40)
def test_set_up_killed_again_and_again_beside_an_application_that_writes(
    bare_crm: Crm, seed: int, faults: Faults, rounds: int
) -> None:
    chance = random.Random(seed)
    for name in ("legacy.sql", "old_migration.sql"):
        bare_crm.connection.execute((LEGACY / name).read_bytes())
    bare_crm.add_leads(100)
    bare_crm.execute(
        "INSERT INTO customer (customer_uid, name) SELECT n, 'Customer ' || n FROM generate_series(1, 10) n"
    )
    with Application(bare_crm, everything, rest=True) as application:
        for _ in range(rounds):
            with WorkerProcess(["setup"], bare_crm.environment(), bare_crm.directory / "setup.log") as process:
                time.sleep(chance.random())
                kill(process, faults)
            application.go_on(5)
        bare_crm.succeed("setup")
        with bare_crm.worker():
            application.go_on(50)
    bare_crm.record()
    assert told(bare_crm) == Counter(owed(application.done))
    assert bare_crm.value("SELECT count(*) FROM activity WHERE activity_type = 'call'") == sum(application.done)
    assert bare_crm.value("SELECT count(*) FROM cdc_worker.dead_letter") == 0


def test_several_at_once_set_up_once(bare_crm: Crm) -> None:
    with ThreadPoolExecutor(3) as threads:
        done = list(threads.map(lambda _: bare_crm.command("setup"), range(3)))
    assert [d.returncode for d in done] == [0, 0, 0], [d.stderr for d in done]
    assert sum("created at" in d.stdout for d in done) == 1


def test_a_slot_that_an_administrator_made_is_taken_as_it_is(bare_crm: Crm) -> None:
    unfinished(bare_crm, "replica identity of public.customer is FULL")
    bare_crm.execute("SELECT pg_create_logical_replication_slot(%s, 'wal2json')", bare_crm.slot)
    bare_crm.add_leads(1)
    bare_crm.setup()
    bare_crm.record()
    assert names(bare_crm) == ["Lead 1"]


def test_the_slot_of_another_worker_is_not_shared(crm: Crm) -> None:
    """Each would confirm what the other has yet to read."""
    done = crm.command("setup", name="another")
    assert done.returncode == 1
    assert done.stderr == (
        f'error: slot "{crm.slot}" is the slot of the worker "{crm.slot}"\n'
        f"hint: name another slot in CDC_WORKER_SLOT, or set CDC_WORKER_NAME to {crm.slot}\n"
    )


def test_two_workers_with_slots_of_their_own_record_side_by_side(crm: Crm) -> None:
    crm.succeed("setup", slot=f"{crm.slot}_b", name="b")
    crm.add_leads(1)
    crm.record()
    crm.record(slot=f"{crm.slot}_b", name="b")
    assert names(crm) == ["Lead 1", "Lead 1"]


def test_a_slot_that_is_older_than_the_replica_identities_yields_what_came_after_them(bare_crm: Crm) -> None:
    """What came before has no old values, and can't be told."""
    bare_crm.execute("SELECT pg_create_logical_replication_slot(%s, 'wal2json')", bare_crm.slot)
    bare_crm.add_leads(1)
    bare_crm.execute("UPDATE lead SET status = 'before'")
    bare_crm.setup()
    bare_crm.execute("UPDATE lead SET status = 'after'")
    bare_crm.record()
    assert [activity["metadata"]["new_status"] for activity in bare_crm.activities()] == ["after"]
    assert bare_crm.value("SELECT count(*) FROM cdc_worker.dead_letter") == 0


# Held up


def test_whoever_holds_what_setup_waits_for_is_not_ended_for_wanting_what_setup_holds(bare_crm: Crm) -> None:
    """A foreign key is moved with both tables locked: a deadlock with who has the lead, and comes to its activities."""
    bare_crm.connection.execute((LEGACY / "legacy.sql").read_bytes())
    bare_crm.add_leads(1)
    environment, log = bare_crm.environment(), bare_crm.directory / "setup.log"
    with psycopg.connect(bare_crm.dsn) as busy, WorkerProcess(["setup"], environment, log) as process:
        busy.execute("UPDATE lead SET status = 'x'")
        waiting = eventually(
            lambda: [event for event in process.events("waiting_for_lock") if "Foreign keys" in event["step"]]
        )
        assert waiting[0]["held_by"] == [f"process {busy.info.backend_pid} (client backend)"]
        for _ in range(20):
            busy.execute("INSERT INTO activity (lead_id, activity_type, bd) VALUES (1, 'call', 'jane')")
        busy.commit()
        assert process.wait() == 0
    assert bare_crm.value("SELECT count(*) FROM activity WHERE manual_lead_id = 1 AND bd_in_charge = 'jane'") == 20


def test_what_holds_up_the_slot_is_named(bare_crm: Crm) -> None:
    with psycopg.connect(bare_crm.dsn) as other, postgres.connect(bare_crm.dsn, "x") as connection:
        other.execute("INSERT INTO lead (full_name, source, bd_in_charge, type) VALUES ('Ann', 's', 'b', 't')")
        server = postgres.server(connection)
        with pytest.raises(errors.ServerError) as caught:
            slot.create(connection, bare_crm.slot, "wal2json", server, timeout=0.5)
        assert str(caught.value) == (
            f'slot "{bare_crm.slot}" could not be made within 0.5 s: '
            f"it waits for open transactions (process {other.info.backend_pid})"
        )
        assert caught.value.hint == "end them, then again: cdc-worker setup"
        assert slot.read(connection, bare_crm.slot) is None
        other.rollback()
        assert slot.create(connection, bare_crm.slot, "wal2json", server, timeout=30) > LSN(0)


def test_setup_waits_for_transactions_that_hold_up_the_slot(bare_crm: Crm) -> None:
    """Longer than for locks of tables: nobody queues behind it."""
    held_up = (
        "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%%pg_create_logical_replication_slot%%'"
        " AND wait_event_type = 'Lock' AND query_start < clock_timestamp() - interval '1 second'"
        " AND application_name = %s"
    )
    bare_crm.execute("CREATE TABLE elsewhere (n int)")
    log = bare_crm.directory / "setup.log"
    with psycopg.connect(bare_crm.dsn) as other:
        other.execute("INSERT INTO elsewhere VALUES (1)")
        with WorkerProcess(["setup"], bare_crm.environment(), log) as process:
            name = f"cdc-worker {bare_crm.slot}"
            eventually(lambda: bare_crm.value(held_up, name) or process.process.poll() is not None)
            assert process.process.poll() is None, process.said
            other.rollback()
            assert process.wait() == 0


def test_what_holds_up_the_slot_is_named_to_an_ordinary_role_too(bare_crm: Crm) -> None:
    role = sql.Identifier(f"maker_{bare_crm.slot}")
    bare_crm.connection.execute(sql.SQL("CREATE ROLE {} LOGIN REPLICATION").format(role))
    dsn = psycopg.conninfo.make_conninfo(bare_crm.dsn, user=f"maker_{bare_crm.slot}")
    try:
        with psycopg.connect(bare_crm.dsn) as other, postgres.connect(dsn, "x") as connection:
            other.execute("DELETE FROM lead")
            other.execute("SELECT pg_current_xact_id()")
            with pytest.raises(errors.ServerError, match=rf"\(process {other.info.backend_pid}\)"):
                slot.create(connection, bare_crm.slot, "wal2json", postgres.server(connection), timeout=0.5)
    finally:
        bare_crm.connection.execute(sql.SQL("DROP ROLE {}").format(role))


# Rights


def owned(crm: Crm) -> str:
    """Make a role that owns database and tables, and let the commands use it."""
    role, database = f"owner_{crm.slot}", crm.connection.info.dbname
    for statement in (
        "CREATE ROLE {role} LOGIN",
        "ALTER DATABASE {database} OWNER TO {role}",
        "ALTER SCHEMA public OWNER TO {role}",
        *(f"ALTER TABLE {table} OWNER TO {{role}}" for table in ("lead", "customer", "contact")),
    ):
        names = {"role": sql.Identifier(role), "database": sql.Identifier(database)}
        crm.connection.execute(sql.SQL(statement).format(**names))
    crm.settings["dsn"] = psycopg.conninfo.make_conninfo(crm.dsn, user=role)
    return role


def drop(crm: Crm, *roles: str) -> None:
    for role in map(sql.Identifier, roles):
        crm.connection.execute(sql.SQL("REASSIGN OWNED BY {} TO postgres").format(role))
        crm.connection.execute(sql.SQL("DROP OWNED BY {}").format(role))
        crm.connection.execute(sql.SQL("DROP ROLE {}").format(role))


def test_the_owner_of_database_and_tables_can_set_up_with_the_right_to_replicate(bare_crm: Crm) -> None:
    role = owned(bare_crm)
    bare_crm.connection.execute(sql.SQL("ALTER ROLE {} REPLICATION").format(sql.Identifier(role)))
    try:
        bare_crm.setup()
        bare_crm.add_leads(1)
        bare_crm.record()
        assert names(bare_crm) == ["Lead 1"]
    finally:
        drop(bare_crm, role)


@pytest.mark.parametrize(("setting", "plugin"), [("wal2json", "wal2json"), ("auto", "pgoutput")])
def test_what_needs_more_than_ownership_is_printed_for_an_administrator(
    bare_crm: Crm, setting: str, plugin: str
) -> None:
    """And accepted when it is done: the worker then runs with the grants that the owner could give.

    Who may not try wal2json can't know whether it is there; pgoutput is.
    """
    bare_crm.settings["plugin"] = setting
    role, owner = f"cdc_{bare_crm.slot}", owned(bare_crm)
    allowed, allowing = [], []
    if plugin == "wal2json" and bare_crm.value("SELECT current_setting('output_plugin_libraries', true)"):
        allowed = [f'  ALTER ROLE "{role}" SET output_plugin_libraries = "pgoutput", "wal2json";']
        allowing = ["  SET output_plugin_libraries = pgoutput, wal2json;"]
    try:
        done = bare_crm.command("setup", "--role", role)
        assert done.returncode == 1
        first, *statements, last = done.stderr.splitlines()
        assert first == "error: this needs more than the ownership of database and tables:"
        assert statements == [
            f'  CREATE ROLE "{role}" LOGIN REPLICATION;',
            *allowed,
            *allowing,
            f"  SELECT lsn FROM pg_create_logical_replication_slot('{bare_crm.slot}', '{plugin}');",
        ]
        assert last == "hint: have an administrator do it, then the same again"
        for statement in statements:
            bare_crm.connection.execute(statement.encode())
        bare_crm.add_leads(1)
        said = bare_crm.succeed("setup", "--role", role)
        assert "the worker's role has its grants on the target, which teardown takes back" in said
        bare_crm.settings["dsn"] = psycopg.conninfo.make_conninfo(bare_crm.dsn, user=role)
        bare_crm.execute("UPDATE lead SET status = 'x'")
        bare_crm.record()
        assert bare_crm.types() == ["lead_created", "status_changed"]
    finally:
        drop(bare_crm, owner, role)


def test_what_a_server_refuses_by_default_is_printed_for_an_administrator_as_well(tmp_path: Path) -> None:
    """An owner may not see what the server allows; what it prints must do in any case."""
    with Cluster(find_binaries(newest=True), allow_plugins=False) as server, crm_on(server, tmp_path) as crm:
        crm.settings["plugin"] = "wal2json"
        role, owner = f"cdc_{crm.slot}", owned(crm)
        try:
            statements = crm.command("setup", "--role", role).stderr.splitlines()[1:-1]
            assert statements[1] == f'  ALTER ROLE "{role}" SET output_plugin_libraries = "pgoutput", "wal2json";'
            assert statements[2] == "  SET output_plugin_libraries = pgoutput, wal2json;"
            with psycopg.connect(server.dsn(crm.connection.info.dbname), autocommit=True) as administrator:
                for statement in statements:
                    administrator.execute(statement.encode())
            crm.succeed("setup", "--role", role)
            crm.settings["dsn"] = psycopg.conninfo.make_conninfo(crm.dsn, user=role)
            crm.add_leads(1)
            crm.record()
            assert names(crm) == ["Lead 1"]
        finally:
            drop(crm, owner, role)


def test_the_schema_is_an_administrators_to_make_for_an_owner_of_the_tables_alone(bare_crm: Crm) -> None:
    owner, database = owned(bare_crm), sql.Identifier(bare_crm.connection.info.dbname)
    bare_crm.connection.execute(sql.SQL("ALTER DATABASE {} OWNER TO postgres").format(database))
    bare_crm.connection.execute(sql.SQL("ALTER ROLE {} REPLICATION").format(sql.Identifier(owner)))
    try:
        done = bare_crm.command("setup")
        assert done.returncode == 1
        _, statement, _ = done.stderr.splitlines()
        assert statement == f"  CREATE SCHEMA cdc_worker AUTHORIZATION {owner};"
        bare_crm.connection.execute(statement.encode())
        bare_crm.setup()
        bare_crm.add_leads(1)
        bare_crm.record()
        assert names(bare_crm) == ["Lead 1"]
    finally:
        drop(bare_crm, owner)


def test_a_role_may_use_the_schemas_that_the_profile_names(bare_crm: Crm) -> None:
    """And the sequence from which the target's key comes, whoever owns that."""
    role = f"cdc_{bare_crm.slot}"
    bare_crm.setup()
    bare_crm.execute("CREATE SCHEMA crm; ALTER TABLE lead SET SCHEMA crm; ALTER TABLE activity SET SCHEMA crm")
    bare_crm.execute("ALTER SEQUENCE crm.activity_activity_id_seq OWNED BY NONE")
    text = (Path(ddl.__file__).parent / "profiles" / "leadfi.toml").read_text("utf-8")
    text = text.replace('table = "activity"', 'table = "crm.activity"').replace("[tables.lead", '[tables."crm.lead"')
    text = text.replace("[[tables.lead", '[[tables."crm.lead"')
    path = bare_crm.directory / "profile.toml"
    path.write_text(re.sub(r"prepare = \[.*?\]\n", "", text, flags=re.DOTALL), "utf-8")
    bare_crm.settings["profile"] = str(path)
    try:
        bare_crm.succeed("setup", "--role", role)
        bare_crm.settings["dsn"] = psycopg.conninfo.make_conninfo(bare_crm.dsn, user=role)
        bare_crm.execute("INSERT INTO crm.lead (full_name, source, bd_in_charge, type) VALUES ('Ann', 's', 'b', 't')")
        bare_crm.record()
        assert bare_crm.value("SELECT description FROM crm.activity") == 'Lead "Ann" created by b'
    finally:
        drop(bare_crm, role)


def test_a_role_that_may_not_replicate_is_named_to_the_administrator(bare_crm: Crm) -> None:
    role, owner = f"cdc_{bare_crm.slot}", owned(bare_crm)
    bare_crm.connection.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(role)))
    try:
        assert f'  ALTER ROLE "{role}" REPLICATION;\n' in bare_crm.command("setup", "--role", role).stderr
    finally:
        drop(bare_crm, owner, role)


def test_setup_grants_the_role_of_the_worker_what_it_needs_and_no_more(bare_crm: Crm) -> None:
    role = f"cdc_{bare_crm.slot}"
    bare_crm.succeed("setup", "--role", role)
    try:
        assert bare_crm.succeed("setup", "--role", role).count("\n") == 1
        rights = bare_crm.execute(
            "SELECT table_schema || '.' || table_name, string_agg(DISTINCT privilege_type, ' ' ORDER BY privilege_type)"
            " FROM (SELECT table_schema, table_name, privilege_type, grantee FROM information_schema.column_privileges"
            "       UNION ALL SELECT table_schema, table_name, privilege_type, grantee"
            "       FROM information_schema.table_privileges) of WHERE grantee = %s GROUP BY 1 ORDER BY 1",
            role,
        )
        assert rights == [
            ("cdc_worker.backfill", "SELECT"),
            ("cdc_worker.checkpoint", "SELECT UPDATE"),
            ("cdc_worker.dead_letter", "INSERT SELECT"),
            ("cdc_worker.erased", "SELECT UPDATE"),
            ("cdc_worker.excluded", "SELECT"),
            ("cdc_worker.gap", "SELECT"),
            ("cdc_worker.partition", "INSERT SELECT UPDATE"),
            ("cdc_worker.process", "DELETE INSERT SELECT UPDATE"),
            ("cdc_worker.skip", "SELECT"),
            ("cdc_worker.skipped", "INSERT"),
            ("cdc_worker.tally", "DELETE INSERT SELECT"),
            ("public.activity", "INSERT SELECT"),
        ]
        attributes = bare_crm.execute(
            "SELECT rolsuper, rolcreatedb, rolcreaterole, rolbypassrls, rolreplication"
            " FROM pg_roles WHERE rolname = %s",
            role,
        )
        assert attributes == [(False, False, False, False, True)]
    finally:
        drop(bare_crm, role)


def test_on_a_server_that_refuses_the_plugin_setup_allows_it_to_the_role(tmp_path: Path) -> None:
    binaries = find_binaries(newest=True)
    assert binaries.plugin_list, f"{binaries.origin} is too old to refuse a plugin"
    with Cluster(binaries, allow_plugins=False) as server, crm_on(server, tmp_path) as crm:
        crm.execute("ALTER ROLE postgres SET output_plugin_libraries = pgoutput, wal2json")
        assert 'ALTER ROLE "cdc" SET output_plugin_libraries = ' in crm.succeed("setup", "--dry-run", "--role", "cdc")
        assert "role cdc may use wal2json" in crm.succeed("setup", "--role", "cdc")
        assert crm.succeed("setup", "--role", "cdc").count("\n") == 1
        crm.settings["dsn"] = psycopg.conninfo.make_conninfo(crm.dsn, user="cdc")
        crm.add_leads(1)
        crm.record()
        assert names(crm) == ["Lead 1"]


def test_where_the_plugin_is_refused_the_role_needs_no_more_for_the_other_one(tmp_path: Path) -> None:
    with Cluster(find_binaries(newest=True), allow_plugins=False) as server, crm_on(server, tmp_path) as crm:
        said = crm.succeed("setup", "--role", "cdc")
        assert (
            "plugin: pgoutput, for the server refuses the output plugin wal2json:"
            " output_plugin_libraries is pgoutput, test_decoding\n"
        ) in said
        assert "role cdc may use" not in said
        crm.settings["dsn"] = psycopg.conninfo.make_conninfo(crm.dsn, user="cdc")
        crm.add_leads(1)
        crm.record()
        assert names(crm) == ["Lead 1"]


def test_a_failover_slot_wants_a_server_that_has_them(bare_crm: Crm) -> None:
    version = bare_crm.value("SELECT current_setting('server_version_num')::int")
    done = bare_crm.command("setup", "--failover")
    if version >= 170000:
        assert done.returncode == 0
        assert bare_crm.value("SELECT failover FROM pg_replication_slots WHERE slot_name = %s", bare_crm.slot)
    else:
        assert done.stderr == (
            f"error: failover slots need PostgreSQL 17, and this is {version // 10000}\nhint: leave out --failover\n"
        )


def test_a_role_with_nothing_but_the_grants_records_everything(bare_crm: Crm) -> None:
    """A refused row among them, and one that is already there."""
    bare_crm.setup()
    bare_crm.execute("ALTER TABLE activity ADD CHECK (description NOT LIKE '%%Refused%%')")
    bare_crm.add_leads(2)
    role = f"cdc_{bare_crm.slot}"
    grant(bare_crm, role)
    try:
        begin = bare_crm.value("SELECT lsn::text FROM cdc_worker.checkpoint")
        with bare_crm.worker() as worker:
            eventually(lambda: len(bare_crm.activities()) == 2)
            bare_crm.execute(
                "INSERT INTO lead (full_name, source, bd_in_charge, type) VALUES ('Refused', 's', 'b', 't')"
            )
            worker.wait_for("change_dead_lettered")
            with bare_crm.worker() as successor:
                successor.wait_for("waiting_for_slot")
                worker.kill()
                successor.wait_for("replication_started")
                bare_crm.add_leads(1)
                eventually(lambda: len(bare_crm.activities()) == 3)
                assert successor.terminate() == 0
        assert '"dead_letters_waiting": 1' in bare_crm.succeed("status", "--json")
        assert bare_crm.value("SELECT lsn > %s::pg_lsn FROM cdc_worker.checkpoint", begin)
    finally:
        del bare_crm.settings["dsn"]
        bare_crm.connection.execute(sql.SQL("DROP OWNED BY {0}").format(sql.Identifier(role)))
        bare_crm.connection.execute(sql.SQL("DROP ROLE {0}").format(sql.Identifier(role)))
