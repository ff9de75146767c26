"""Setting up: from a fresh database to the first checkpoint, again and again, and with no more rights than needed."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import psycopg
import pytest
from psycopg import sql
from support import Crm, eventually, grant

from cdc_worker import config, errors, postgres, profile, slot
from cdc_worker.lsn import LSN
from cdc_worker.setup import setup

LEADFI = profile.load("leadfi")


def names(crm: Crm) -> list[str]:
    return [activity["metadata"]["lead_name"] for activity in crm.activities()]


def test_a_fresh_database_is_set_up_in_one_go(bare_crm: Crm) -> None:
    said = bare_crm.succeed("setup").splitlines()
    begins = bare_crm.value("SELECT lsn::text FROM cdc_worker.checkpoint")
    assert said == [
        "tables of the worker are in schema cdc_worker",
        "target public.activity is prepared",
        "replica identity of public.lead is FULL",
        "replica identity of public.customer is FULL",
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
    unfinished(bare_crm, 4)
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
    assert said[-1] == f'slot "{crm.slot}" is there, and its checkpoint at {before[0][1]}'
    assert not [line for line in said if "replica identity" in line or "created" in line]
    assert state(crm) == before


def state(crm: Crm) -> list[tuple[object, ...]]:
    """Checkpoint, slot and the target's columns, constraints and indexes."""
    return [
        *crm.execute("SELECT slot, lsn::text, owner, written_at FROM cdc_worker.checkpoint"),
        *crm.execute("SELECT slot_name, plugin, confirmed_flush_lsn FROM pg_replication_slots ORDER BY slot_name"),
        *crm.execute("SELECT attname, attnum FROM pg_attribute WHERE attrelid = 'activity'::regclass ORDER BY attnum"),
        *crm.execute("SELECT conname FROM pg_constraint WHERE conrelid = 'activity'::regclass ORDER BY conname"),
        *crm.execute("SELECT indexrelid FROM pg_index WHERE indrelid = 'activity'::regclass ORDER BY indexrelid"),
    ]


def lines_of_setup(crm: Crm) -> Iterator[str]:
    """Set up, line by line."""
    return setup(config.load(None, {"dsn": crm.dsn, "slot": crm.slot}), LEADFI)


def unfinished(crm: Crm, steps: int) -> None:
    """Set up, as far as this many lines of what it says."""
    assert len(list(islice(lines_of_setup(crm), steps))) == steps


@pytest.mark.parametrize("steps", range(1, 7))
def test_setting_up_goes_on_where_it_was_interrupted(bare_crm: Crm, steps: int) -> None:
    """The fifth is a slot without a checkpoint."""
    unfinished(bare_crm, steps)
    slots = bare_crm.execute("SELECT slot_name FROM pg_replication_slots WHERE slot_name = %s", bare_crm.slot)
    assert len(slots) == (steps >= 5)
    bare_crm.add_leads(1)
    list(lines_of_setup(bare_crm))
    bare_crm.add_leads(1)
    bare_crm.record()
    assert len(bare_crm.activities()) == (2 if steps >= 5 else 1)


def test_several_at_once_set_up_once(bare_crm: Crm) -> None:
    with ThreadPoolExecutor(3) as threads:
        done = list(threads.map(lambda _: bare_crm.command("setup"), range(3)))
    assert [d.returncode for d in done] == [0, 0, 0], [d.stderr for d in done]
    assert sum("created at" in d.stdout for d in done) == 1


def test_a_slot_that_an_administrator_made_is_taken_as_it_is(bare_crm: Crm) -> None:
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


# Held up


def test_a_locked_table_is_not_queued_for_until_nobody_gets_through(
    bare_crm: Crm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdc_worker.setup.LOCK_TIMEOUT", "100ms")
    with psycopg.connect(bare_crm.dsn) as other:
        other.execute("LOCK TABLE lead IN ACCESS SHARE MODE")
        with pytest.raises(psycopg.errors.LockNotAvailable) as caught:
            list(lines_of_setup(bare_crm))
    failure = postgres.failure(caught.value)
    assert str(failure) == "the server refused: canceling statement due to lock timeout (SQLSTATE 55P03)"
    assert failure.hint == "run it again when whoever holds the lock has ended"
    bare_crm.setup()


def test_what_holds_up_the_slot_is_named(bare_crm: Crm) -> None:
    with psycopg.connect(bare_crm.dsn) as other, postgres.connect(bare_crm.dsn, "x") as connection:
        other.execute("INSERT INTO lead (full_name, source, bd_in_charge, type) VALUES ('Ann', 's', 'b', 't')")
        server = postgres.server(connection)
        with pytest.raises(errors.ServerError) as caught:
            slot.create(connection, bare_crm.slot, server, timeout=0.5)
        assert str(caught.value) == (
            f'slot "{bare_crm.slot}" could not be made within 0.5 s: '
            f"it waits for open transactions (process {other.info.backend_pid})"
        )
        assert caught.value.hint == "end them, then again: cdc-worker setup"
        assert slot.read(connection, bare_crm.slot) is None
        other.rollback()
        assert slot.create(connection, bare_crm.slot, server, timeout=30) > LSN(0)


def test_what_holds_up_the_slot_is_named_to_an_ordinary_role_too(bare_crm: Crm) -> None:
    role = sql.Identifier(f"maker_{bare_crm.slot}")
    bare_crm.connection.execute(sql.SQL("CREATE ROLE {} LOGIN REPLICATION").format(role))
    dsn = psycopg.conninfo.make_conninfo(bare_crm.dsn, user=f"maker_{bare_crm.slot}")
    try:
        with psycopg.connect(bare_crm.dsn) as other, postgres.connect(dsn, "x") as connection:
            other.execute("DELETE FROM lead")
            other.execute("SELECT pg_current_xact_id()")
            with pytest.raises(errors.ServerError, match=rf"\(process {other.info.backend_pid}\)"):
                slot.create(connection, bare_crm.slot, postgres.server(connection), timeout=0.5)
    finally:
        bare_crm.connection.execute(sql.SQL("DROP ROLE {}").format(role))


# Rights


def test_the_owner_of_database_and_tables_can_set_up_with_the_right_to_replicate(bare_crm: Crm) -> None:
    role = sql.Identifier(f"owner_{bare_crm.slot}")
    database = sql.Identifier(bare_crm.connection.info.dbname)
    for statement in (
        "CREATE ROLE {role} LOGIN REPLICATION",
        "ALTER DATABASE {database} OWNER TO {role}",
        "ALTER SCHEMA public OWNER TO {role}",
        *(f"ALTER TABLE {table} OWNER TO {{role}}" for table in ("lead", "customer", "contact")),
    ):
        bare_crm.connection.execute(sql.SQL(statement).format(role=role, database=database))
    bare_crm.settings["dsn"] = psycopg.conninfo.make_conninfo(bare_crm.dsn, user=f"owner_{bare_crm.slot}")
    try:
        bare_crm.setup()
        bare_crm.add_leads(1)
        bare_crm.record()
        assert names(bare_crm) == ["Lead 1"]
    finally:
        bare_crm.connection.execute(sql.SQL("REASSIGN OWNED BY {} TO postgres").format(role))
        bare_crm.connection.execute(sql.SQL("DROP ROLE {}").format(role))


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
        assert '"dead_letters": 1' in bare_crm.succeed("status", "--json")
        assert bare_crm.value("SELECT lsn > %s::pg_lsn FROM cdc_worker.checkpoint", begin)
    finally:
        del bare_crm.settings["dsn"]
        bare_crm.connection.execute(sql.SQL("DROP OWNED BY {0}").format(sql.Identifier(role)))
        bare_crm.connection.execute(sql.SQL("DROP ROLE {0}").format(sql.Identifier(role)))
