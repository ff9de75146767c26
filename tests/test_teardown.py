"""Tearing down: the slot goes, and if wished all that setup made, in an order that leaves nothing broken."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import psycopg
import pytest
from application import Application, everything, owed, told
from support import Crm, eventually

LEGACY = Path(__file__).parent / "legacy"


def reader(crm: Crm) -> list[tuple[object, ...]]:
    return crm.execute("SELECT active_pid FROM pg_replication_slots WHERE slot_name = %s AND active", crm.slot)


def structure(crm: Crm) -> list[tuple[object, ...]]:
    """What setup changes and teardown brings back: replica identities, triggers, grants, schema and slot."""
    return [
        *crm.execute(
            "SELECT relname, relreplident::text FROM pg_class WHERE relname IN ('lead', 'customer') ORDER BY 1"
        ),
        *crm.execute(
            "SELECT tgrelid::regclass::text, tgenabled::text, pg_get_triggerdef(oid) FROM pg_trigger"
            " WHERE NOT tgisinternal AND tgname NOT LIKE '%%in_step%%' ORDER BY 1, 3"
        ),
        *crm.execute("SELECT nspname FROM pg_namespace WHERE nspname = 'cdc_worker'"),
        *crm.execute("SELECT slot_name FROM pg_replication_slots WHERE slot_name = %s", crm.slot),
        *crm.execute(
            "SELECT grantee, privilege_type FROM information_schema.column_privileges"
            " WHERE table_name = 'activity' AND grantee <> 'postgres' AND grantee <> 'PUBLIC'"
        ),
    ]


@pytest.fixture
def tracked_crm(bare_crm: Crm) -> Crm:
    """LeadFi with its old activity table, which triggers write, and replica identities of its own."""
    for name in ("legacy.sql", "old_migration.sql"):
        bare_crm.connection.execute((LEGACY / name).read_bytes())
    bare_crm.add_leads(100)
    bare_crm.execute("INSERT INTO customer (customer_uid, name) SELECT n, 'C' FROM generate_series(1, 10) n")
    bare_crm.execute("ALTER TABLE lead REPLICA IDENTITY USING INDEX lead_pkey")
    bare_crm.execute("ALTER TABLE customer REPLICA IDENTITY NOTHING")
    return bare_crm


def test_tearing_down_drops_slot_and_checkpoint_and_keeps_the_rest(crm: Crm) -> None:
    crm.add_leads(1)
    crm.record()
    ends = crm.value("SELECT lsn::text FROM cdc_worker.checkpoint")
    assert crm.succeed("teardown", "--yes").splitlines() == [
        f'slot "{crm.slot}" is dropped',
        f'publication "{crm.slot}" is dropped',
        f'worker "{crm.slot}" ends at {ends}: what was committed after it is not recorded',
    ]
    assert crm.value("SELECT count(*) FROM pg_replication_slots WHERE slot_name = %s", crm.slot) == 0
    assert crm.types() == ["lead_created"]
    crm.add_leads(1)
    crm.setup()
    crm.add_leads(1)
    crm.record()
    assert crm.types() == ["lead_created", "lead_created"]


def test_tearing_down_all_leaves_everything_as_it_was_found_and_nothing_unrecorded(tracked_crm: Crm) -> None:
    """The triggers are back before the slot goes, and what the worker owes until then it records first."""
    role = f"cdc_{tracked_crm.slot}"
    before = structure(tracked_crm)
    tracked_crm.succeed("setup", "--role", role)
    try:
        with Application(tracked_crm, everything, rest=True) as application:
            with tracked_crm.worker() as worker:
                application.go_on(20)
                eventually(tracked_crm.activities)
                worker.kill()
            eventually(lambda: not reader(tracked_crm))
            application.go_on(20)
            done = tracked_crm.command("teardown", "--all", "--restore-triggers", "--yes")
            assert done.returncode == 1
            assert "public.lead: recorded by lead_activity_tracker again" in done.stdout
            assert "hint: run: cdc-worker run --once; then the same again" in done.stderr
            application.go_on(20)
            tracked_crm.record()
            tracked_crm.succeed("teardown", "--all", "--restore-triggers", "--yes")
            application.go_on(20)
        assert structure(tracked_crm) == before
        assert told(tracked_crm) == Counter(owed(application.done))
        assert tracked_crm.succeed("teardown", "--all", "--yes") == ""
    finally:
        tracked_crm.connection.execute(f"DROP ROLE {role}".encode())


def test_triggers_that_are_not_restored_are_told_of_before_their_definitions_go(tracked_crm: Crm) -> None:
    tracked_crm.setup()
    said = tracked_crm.succeed("teardown", "--all", "--yes")
    assert (
        "public.lead: lead_activity_tracker is not restored; it was: CREATE TRIGGER lead_activity_tracker"
        " AFTER INSERT OR UPDATE ON public.lead FOR EACH ROW EXECUTE FUNCTION track_lead_changes()\n"
    ) in said


def test_what_goes_with_the_schema_is_told(crm: Crm) -> None:
    crm.add_leads(1)
    crm.succeed("forget", "--lead", "1", "--yes")
    said = crm.succeed("teardown", "--all", "--yes").splitlines()
    assert said[-1] == ("schema cdc_worker is dropped, and what it held (erased persons: 1)")


def test_an_identity_that_somebody_changed_since_is_left_alone(crm: Crm) -> None:
    crm.execute("ALTER TABLE lead REPLICA IDENTITY NOTHING")
    crm.succeed("teardown", "--all", "--yes")
    assert crm.execute("SELECT relname, relreplident::text FROM pg_class WHERE relname IN ('lead', 'customer')") == [
        ("lead", "n"),
        ("customer", "d"),
    ]


@pytest.mark.parametrize("arguments", [("--yes",), ("--all", "--yes")])
def test_tearing_down_goes_on_where_it_was_interrupted(tracked_crm: Crm, arguments: tuple[str, ...]) -> None:
    """The dry run's script, statement by statement, is where it can be interrupted."""
    tracked_crm.setup()
    script = tracked_crm.succeed("teardown", *arguments[:-1], "--dry-run").partition("\n\n")[2]
    assert structure(tracked_crm)[-1] == (tracked_crm.slot,)
    for paragraph in filter(str.strip, script.split("\n\n")):
        tracked_crm.connection.execute(paragraph.encode())
        tracked_crm.connection.execute("SELECT 1")
        rest = tracked_crm.succeed("teardown", *arguments[:-1], "--dry-run")
        assert paragraph not in rest or "DELETE FROM cdc_worker.checkpoint" in paragraph
    tracked_crm.succeed("teardown", *arguments)
    assert tracked_crm.value("SELECT count(*) FROM pg_replication_slots WHERE slot_name = %s", tracked_crm.slot) == 0


def test_a_slot_that_is_being_read_is_not_dropped(crm: Crm) -> None:
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        done = crm.command("teardown", "--yes")
        assert done.returncode == 1
        assert f'slot "{crm.slot}" is read by process' in done.stderr
        crm.add_leads(1)
        eventually(lambda: crm.types() == ["lead_created"])


def test_a_slot_that_one_may_not_drop_is_an_administrators_to_drop_first(crm: Crm) -> None:
    """Without its checkpoint nobody would miss it, and it would keep WAL for ever."""
    role = f"owner_{crm.slot}"
    crm.connection.execute(f"CREATE ROLE {role} LOGIN".encode())
    for relation in ("checkpoint", "excluded", "replaced"):
        crm.connection.execute(f"GRANT ALL ON cdc_worker.{relation} TO {role}".encode())
    crm.connection.execute(f"GRANT USAGE ON SCHEMA cdc_worker TO {role}".encode())
    try:
        done = crm.command("teardown", "--yes", dsn=psycopg.conninfo.make_conninfo(crm.dsn, user=role))
        assert done.returncode == 1
        assert done.stderr == (
            "error: this needs more than the ownership of database and tables:\n"
            f"  SELECT pg_drop_replication_slot('{crm.slot}');\n"
            "hint: have an administrator do it, then the same again\n"
        )
        assert crm.value("SELECT count(*) FROM cdc_worker.checkpoint") == 1
        crm.execute("SELECT pg_drop_replication_slot(%s)", crm.slot)
        crm.connection.execute(f"ALTER PUBLICATION {crm.slot} OWNER TO {role}".encode())
        crm.succeed("teardown", "--yes", dsn=psycopg.conninfo.make_conninfo(crm.dsn, user=role))
        assert crm.value("SELECT count(*) FROM cdc_worker.checkpoint") == 0
    finally:
        crm.connection.execute(f"DROP OWNED BY {role}; DROP ROLE {role}".encode())


def test_what_other_workers_need_is_not_torn_down(crm: Crm) -> None:
    crm.succeed("setup", slot=f"{crm.slot}_b", name="b")
    done = crm.command("teardown", "--all", "--yes")
    assert done.returncode == 1
    assert done.stderr == (
        "error: other workers are set up here as well: b\nhint: tear these down first, or leave out --all\n"
    )
    crm.succeed("teardown", "--yes", slot=f"{crm.slot}_b", name="b")
    crm.succeed("teardown", "--all", "--yes")


def test_the_slot_of_something_else_is_not_dropped(crm: Crm) -> None:
    crm.execute("SELECT pg_create_logical_replication_slot(%s, 'test_decoding')", f"{crm.slot}_other")
    done = crm.command("teardown", "--yes", slot=f"{crm.slot}_other")
    assert done.returncode == 1
    assert f'slot "{crm.slot}_other" is of the plugin "test_decoding"' in done.stderr


def test_worker_and_slot_that_are_no_pair_are_not_torn_down(crm: Crm) -> None:
    crm.succeed("setup", slot=f"{crm.slot}_b", name="b")
    for name, slot, other in ((crm.slot, f"{crm.slot}_b", "b"), ("c", crm.slot, crm.slot), ("b", "none", "b")):
        done = crm.command("teardown", "--yes", name=name, slot=slot)
        assert done.returncode == 1
        assert f'error: the worker "{other}" reads the slot ' in done.stderr or f'"{name}" reads' in done.stderr
    assert crm.value("SELECT count(*) FROM cdc_worker.checkpoint") == 2
    assert crm.value("SELECT count(*) FROM pg_replication_slots WHERE database = current_database()") == 2


def test_what_can_not_be_brought_back_any_more_holds_nothing_up(tracked_crm: Crm) -> None:
    role = f"cdc_{tracked_crm.slot}"
    tracked_crm.succeed("setup", "--role", role)
    tracked_crm.connection.execute(f"DROP OWNED BY {role}; DROP ROLE {role}".encode())
    tracked_crm.execute("ALTER TABLE lead DROP CONSTRAINT lead_pkey CASCADE")
    tracked_crm.execute("DROP TRIGGER set_timestamp ON activity")
    tracked_crm.execute(
        "CREATE TRIGGER lead_activity_tracker AFTER INSERT ON lead FOR EACH ROW EXECUTE FUNCTION track_lead_changes()"
    )
    tracked_crm.succeed("cutover", "--back")
    tracked_crm.record()
    said = tracked_crm.succeed("teardown", "--all", "--yes").splitlines()
    assert f'note: not brought back: role "{role}" does not exist' in said
    assert 'note: not brought back: index "lead_pkey" for table "lead" does not exist' in said
    assert said[-1].startswith("schema cdc_worker is dropped")
    assert not tracked_crm.execute(
        "SELECT 1 FROM pg_trigger WHERE tgrelid = 'activity'::regclass AND tgname = 'set_timestamp'"
    )


def test_without_a_terminal_it_wants_to_be_told_yes(crm: Crm) -> None:
    done = crm.command("teardown")
    assert done.returncode == 2
    assert "there is no terminal to ask on: --yes does it, --dry-run shows it" in done.stderr
    assert crm.value("SELECT count(*) FROM pg_replication_slots WHERE slot_name = %s", crm.slot) == 1
    done = crm.command("teardown", "--restore-triggers", "--yes")
    assert (done.returncode, "is for --all" in done.stderr) == (2, True)
