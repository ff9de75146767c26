"""Cut-over: what triggers recorded so far the worker records from one position on, whoever writes meanwhile."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import psycopg
import pytest
from application import Application, everything, owed, statuses, told
from support import Crm, eventually

from cdc_worker import config, cutover, ddl, errors, postgres, profile
from cdc_worker.rules import compile_rules

LEGACY = Path(__file__).parent / "legacy"
LEADFI = profile.load("leadfi")


@pytest.fixture
def tracked_crm(bare_crm: Crm) -> Crm:
    """LeadFi with its old activity table, which triggers write."""
    for name in ("legacy.sql", "old_migration.sql"):
        bare_crm.connection.execute((LEGACY / name).read_bytes())
    bare_crm.add_leads(100)
    bare_crm.execute(
        "INSERT INTO customer (customer_uid, name) SELECT n, 'Customer ' || n FROM generate_series(1, 10) n"
    )
    return bare_crm


def triggers(crm: Crm) -> list[tuple[str, str, str]]:
    """Of the captured tables, with their definitions."""
    rows = crm.execute(
        "SELECT tgname, tgenabled, pg_get_triggerdef(oid) FROM pg_trigger"
        " WHERE tgrelid IN ('lead'::regclass, 'customer'::regclass) AND NOT tgisinternal ORDER BY 1"
    )
    return [(str(name), str(enabled), str(definition)) for name, enabled, definition in rows]


def found(crm: Crm) -> list[tuple[str, str]]:
    with postgres.connect(crm.dsn, "test") as connection:
        trackers = cutover.trackers(connection, LEADFI, compile_rules(LEADFI))
    return [(tracker.table[1], tracker.name) for tracker in trackers]


def caught_up(crm: Crm) -> None:
    """Until the daemon has written all that is committed now."""
    now = crm.value("SELECT pg_current_wal_lsn()::text")
    crm.execute("UPDATE lead SET source = 'now' || random()")  # the checkpoint moves with what is recorded
    eventually(lambda: crm.value("SELECT bool_and(lsn >= %s::pg_lsn) FROM cdc_worker.checkpoint", now))


# Finding them


def test_triggers_that_write_the_target_through_other_functions_are_found(tracked_crm: Crm) -> None:
    assert found(tracked_crm) == [("customer", "customer_activity_tracker"), ("lead", "lead_activity_tracker")]


def test_only_triggers_that_record_are_taken_for_trackers(bare_crm: Crm) -> None:
    bare_crm.setup()
    writes = "RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {} RETURN NEW; END $$"
    bodies = {
        "direct": "INSERT INTO activity (activity_type) VALUES ('x');",
        "qualified": 'insert  into "public" . "activity"(activity_type) values (1);',
        "elsewhere": "INSERT INTO activity_archive VALUES (1);",
        "reads": "PERFORM 1 FROM activity;",
    }
    for name, body in bodies.items():
        bare_crm.connection.execute(f"CREATE FUNCTION {name}() {writes.format(body)}".encode())
    made = (
        ("a_direct", "AFTER INSERT", "lead", "direct"),
        ("b_qualified", "AFTER UPDATE", "lead", "qualified"),
        ("c_elsewhere", "AFTER INSERT", "lead", "elsewhere"),
        ("d_reads", "AFTER INSERT", "lead", "reads"),
        ("e_before", "BEFORE INSERT", "lead", "direct"),
        ("f_disabled", "AFTER INSERT", "lead", "direct"),
        ("g_not_captured", "AFTER INSERT", "contact", "direct"),
    )
    for name, when, table, function in made:
        bare_crm.connection.execute(
            f"CREATE TRIGGER {name} {when} ON {table} FOR EACH ROW EXECUTE FUNCTION {function}()".encode()
        )
    bare_crm.execute("ALTER TABLE lead DISABLE TRIGGER f_disabled")
    assert found(bare_crm) == [("lead", "a_direct"), ("lead", "b_qualified")]


@pytest.mark.parametrize(
    ("body", "taken"),
    [
        ("PERFORM writes(1);", True),
        ('PERFORM public."writes" (1);', True),
        ("PERFORM atomic(1);", True),
        ("PERFORM other.writes(1);", False),
        ("-- formerly: INSERT INTO activity (lead_id)\n", False),
        ("/* INSERT INTO activity\n SELECT writes(1) */", False),
        ("PERFORM rewrites(1);", False),
        ("INSERT INTO other.activity VALUES (1);", False),
    ],
)
def test_what_a_trigger_writes_is_read_from_the_text_of_functions(bare_crm: Crm, body: str, taken: bool) -> None:
    bare_crm.setup()
    bare_crm.execute("CREATE SCHEMA other")
    inserts = "INSERT INTO activity (activity_type, lead_id) VALUES ('x', n)"
    for function in (
        f"writes(n integer) RETURNS void LANGUAGE plpgsql AS $$ BEGIN {inserts}; END $$",
        f"atomic(n integer) RETURNS void LANGUAGE sql BEGIN ATOMIC {inserts}; END",
        "other.writes(n integer) RETURNS void LANGUAGE sql AS 'SELECT'",
        "rewrites(n integer) RETURNS void LANGUAGE sql AS 'SELECT'",
        f"fires() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body} RETURN NEW; END $$",
    ):
        bare_crm.connection.execute(f"CREATE FUNCTION {function}".encode())
    bare_crm.execute("CREATE TRIGGER fires AFTER INSERT ON lead FOR EACH ROW EXECUTE FUNCTION fires()")
    assert found(bare_crm) == [("lead", "fires")] * taken


def test_triggers_that_may_record_and_are_not_taken_away_are_told_of(crm: Crm) -> None:
    for name, body in (
        ("runs", "EXECUTE 'SELECT 1';"),
        ("writes", "INSERT INTO activity (activity_type) VALUES ('x');"),
    ):
        crm.connection.execute(
            f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body} RETURN NEW; END $$".encode()
        )
    crm.execute("CREATE TRIGGER runs AFTER INSERT ON lead FOR EACH ROW EXECUTE FUNCTION runs()")
    crm.execute("CREATE TRIGGER writes BEFORE INSERT ON lead FOR EACH ROW EXECUTE FUNCTION writes()")
    see = "see whether it records what the worker records"
    assert crm.succeed("cutover").splitlines()[:2] == [
        f"note: trigger runs of public.lead runs statements that its text doesn't tell: {see}",
        "note: trigger writes of public.lead writes activity before the row is changed, and may change the row as well:"
        f" {see}",
    ]


# Cutting over


def test_setup_takes_over_from_triggers_and_nothing_is_recorded_twice_or_never(tracked_crm: Crm) -> None:
    with Application(tracked_crm, statuses, sessions=4) as application:
        application.go_on(100)
        said = tracked_crm.succeed("setup")
        application.go_on(100)
        with tracked_crm.worker() as worker:
            application.go_on(300)
            worker.kill()
        with tracked_crm.worker():
            application.go_on(300)
    tracked_crm.record()
    assert "public.lead: the worker records in place of lead_activity_tracker" in said
    assert "public.customer: the worker records in place of customer_activity_tracker" in said
    assert sum(application.done) > 2_000
    assert told(tracked_crm) == Counter(owed(application.done))
    by_triggers = tracked_crm.value(
        "SELECT count(*) FROM activity WHERE activity_type = 'status_changed' AND change_key IS NULL"
    )
    assert 400 <= by_triggers <= sum(application.done) - 2_000 + 400


def test_a_running_worker_hears_of_each_cut_over_in_time(tracked_crm: Crm) -> None:
    """To the triggers and back again, under load, with a daemon that writes all the time."""
    tracked_crm.succeed("setup", "--no-cutover")
    with tracked_crm.worker() as worker, Application(tracked_crm, statuses, sessions=4) as application:
        assert worker.wait_for("cutover_pending")["tables"] == ["public.customer", "public.lead"]
        application.go_on(50)
        for _ in range(3):
            tracked_crm.succeed("cutover")
            application.go_on(150)
            tracked_crm.succeed("cutover", "--back")
            application.go_on(100)
        tracked_crm.succeed("cutover")
        application.go_on(50)
        caught_up(tracked_crm)
        assert worker.events("scope_changed")
        assert worker.terminate() == 0
    tracked_crm.record()
    assert told(tracked_crm) == Counter(owed(application.done))


def test_a_quiet_worker_hears_of_it_without_having_anything_to_write(tracked_crm: Crm) -> None:
    """Else what comes after would be left out until there is enough of it to note a position."""
    tracked_crm.succeed("setup", "--no-cutover")
    with tracked_crm.worker() as worker:
        worker.wait_for("replication_started")
        tracked_crm.succeed("cutover")
        tracked_crm.execute("UPDATE lead SET status = 'x' WHERE lead_id = 1")
        eventually(tracked_crm.activities)
        assert 1 <= len(worker.events("scope_changed")) <= 2
    assert told(tracked_crm) == Counter(["x"])


def test_a_marker_of_somebody_else_changes_nothing(tracked_crm: Crm) -> None:
    tracked_crm.setup()
    with tracked_crm.worker() as worker:
        worker.wait_for("replication_started")
        for content in ("", "{}", '{"table": "public.lead", "nonce": "00000000-0000-0000-0000-000000000000"}'):
            tracked_crm.execute("SELECT pg_logical_emit_message(true, 'cdc_worker.marker', %s)", content)
        tracked_crm.execute("UPDATE lead SET status = 'x' WHERE lead_id = 1")
        eventually(tracked_crm.activities)
        assert not worker.events("scope_changed")
        assert len(worker.events("replication_started")) == 1


def test_a_worker_that_lags_behind_several_cut_overs_divides_the_commits_alike(tracked_crm: Crm) -> None:
    tracked_crm.succeed("setup", "--no-cutover")
    with Application(tracked_crm, statuses) as application:
        for arguments in (["cutover"], ["cutover", "--back"], ["cutover"]):
            application.go_on(50)
            tracked_crm.succeed(*arguments)
        application.go_on(50)
    tracked_crm.record()
    assert told(tracked_crm) == Counter(owed(application.done))


def test_until_cut_over_the_worker_leaves_everything_to_the_triggers(tracked_crm: Crm) -> None:
    tracked_crm.succeed("setup", "--no-cutover")
    tracked_crm.execute("UPDATE lead SET status = 'first' WHERE lead_id = 1")
    tracked_crm.record()
    tracked_crm.execute("UPDATE lead SET status = 'second' WHERE lead_id = 1")
    tracked_crm.succeed("cutover")
    tracked_crm.execute("UPDATE lead SET status = 'third' WHERE lead_id = 1")
    tracked_crm.record()
    assert told(tracked_crm) == Counter(["first", "second", "third"])
    assert [a["metadata"]["new_status"] for a in tracked_crm.activities()] == ["third"]


def test_a_set_up_that_was_interrupted_before_the_cut_over_goes_on_with_it(tracked_crm: Crm) -> None:
    tracked_crm.succeed("setup", "--no-cutover")
    assert found(tracked_crm) == [("customer", "customer_activity_tracker"), ("lead", "lead_activity_tracker")]
    said = tracked_crm.succeed("setup").splitlines()
    assert said[-2:] == [
        "public.customer: the worker records in place of customer_activity_tracker",
        "public.lead: the worker records in place of lead_activity_tracker",
    ]
    assert tracked_crm.succeed("cutover") == (
        "nothing to do: no trigger of a captured table writes activity, and none is waited for\n"
    )


def test_a_table_whose_trigger_somebody_dropped_is_recorded_from_the_cut_over_on(tracked_crm: Crm) -> None:
    tracked_crm.succeed("setup", "--no-cutover")
    tracked_crm.execute("DROP TRIGGER lead_activity_tracker ON lead")
    said = tracked_crm.succeed("cutover").splitlines()
    assert said[1] == "public.lead: the worker records in place of triggers that are gone"
    tracked_crm.execute("UPDATE lead SET status = 'x' WHERE lead_id = 1")
    tracked_crm.record()
    assert told(tracked_crm) == Counter(["x"])


# Back


def test_going_back_restores_the_triggers_as_they_were(tracked_crm: Crm) -> None:
    tracked_crm.execute("ALTER TABLE lead ENABLE ALWAYS TRIGGER lead_activity_tracker")
    before = triggers(tracked_crm)
    tracked_crm.setup()
    assert len(triggers(tracked_crm)) == len(before) - 2
    assert tracked_crm.succeed("cutover", "--back").splitlines() == [
        "public.customer: recorded by customer_activity_tracker again",
        "public.lead: recorded by lead_activity_tracker again",
    ]
    assert triggers(tracked_crm) == before
    said = tracked_crm.succeed("cutover", "--back")
    assert said == "nothing to do: no trigger of a captured table has been taken away\n"


def test_a_cut_over_that_waited_for_another_finds_what_that_has_left(tracked_crm: Crm) -> None:
    tracked_crm.succeed("setup", "--no-cutover")
    with postgres.connect(tracked_crm.dsn, "another") as another:
        ddl.one_at_a_time(another)
        with tracked_crm.cutting_over() as cutting:
            cutting.wait_for("waiting_for_another_setup")
            tracked_crm.execute("DROP TRIGGER lead_activity_tracker ON lead")
            another.close()
            assert cutting.wait() == 0
    assert found(tracked_crm) == []


def test_setting_up_again_does_not_take_back_what_was_given_back(tracked_crm: Crm) -> None:
    tracked_crm.setup()
    tracked_crm.succeed("cutover", "--back")
    before = triggers(tracked_crm)
    assert "note: public.lead is left to its triggers since cutover --back; to take over: cdc-worker cutover" in (
        tracked_crm.succeed("setup").splitlines()
    )
    assert triggers(tracked_crm) == before
    tracked_crm.succeed("cutover")
    assert len(triggers(tracked_crm)) == len(before) - 2


def test_workers_that_leave_a_table_to_its_triggers_take_over_together(tracked_crm: Crm) -> None:
    other = {"name": "b", "slot": f"{tracked_crm.slot}_b"}
    tracked_crm.succeed("setup", "--no-cutover")
    tracked_crm.succeed("setup", "--no-cutover", **other)

    def change(status: str) -> None:
        tracked_crm.connection.execute("UPDATE lead SET status = %s WHERE lead_id = 1", (status,))

    with tracked_crm.worker() as worker:
        worker.wait_for("replication_started")
        change("triggers")
        tracked_crm.succeed("cutover", **other)
        change("workers")
        tracked_crm.succeed("cutover", "--back")
        change("triggers again")
        tracked_crm.succeed("cutover", **other)
        change("workers again")
        eventually(lambda: told(tracked_crm)["workers again"])
    tracked_crm.record()
    tracked_crm.record(**other)
    assert told(tracked_crm) == Counter({"triggers": 1, "workers": 2, "triggers again": 1, "workers again": 2})


def test_a_table_that_is_new_to_a_worker_stays_with_its_triggers_until_it_captures_it(crm: Crm) -> None:
    """Else nobody would record it between the cut-over and the profile's arrival."""
    leadfi = (Path(ddl.__file__).parent / "profiles" / "leadfi.toml").read_text("utf-8")
    rule = '[[tables.contact.rules]]\non = "insert"\ntype = "contact_added"\ndescription = "{new.contact_id}"\n'
    path = crm.directory / "profile.toml"
    path.write_text(leadfi + rule, "utf-8")
    crm.execute(
        "CREATE FUNCTION track() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO activity (activity_type,"
        " activity_category, description) VALUES ('contact_added', 'system', NEW.contact_id); RETURN NEW; END $$"
    )
    crm.execute("CREATE TRIGGER track AFTER INSERT ON contact FOR EACH ROW EXECUTE FUNCTION track()")
    crm.add_leads(1)
    crm.execute("INSERT INTO customer (customer_uid, name) VALUES (1, 'Acme')")
    contacts = (crm.execute("INSERT INTO contact VALUES (%s, 1, 1)", number) for number in itertools.count(1))
    with crm.worker() as worker:
        eventually(crm.activities)
        next(contacts)
        said = crm.succeed("setup", profile=str(path))
        assert "note: public.contact stays with its triggers, for the worker has not run with it yet" in said
        next(contacts)
        assert worker.terminate() == 0
    next(contacts)
    assert "note: public.contact stays" in crm.succeed("cutover", profile=str(path))
    with crm.worker(profile=str(path)) as worker:
        worker.wait_for("replication_started")
        next(contacts)
        assert "public.contact: the worker records in place of track" in crm.succeed("cutover", profile=str(path))
        next(contacts)
        eventually(lambda: crm.value("SELECT count(*) FROM activity WHERE activity_type = 'contact_added'") == 5)
    crm.record(profile=str(path))
    added = crm.execute(
        "SELECT description, change_key IS NOT NULL FROM activity WHERE activity_type = 'contact_added' ORDER BY 1"
    )
    assert added == [("1", False), ("2", False), ("3", False), ("4", False), ("5", True)]


def test_positions_of_another_cluster_exclude_nothing_on_this_one(tracked_crm: Crm) -> None:
    """A dump carries them along, and the WAL of where it is restored may be shorter or longer."""
    tracked_crm.setup()
    tracked_crm.execute("UPDATE cdc_worker.excluded SET system_identifier = '1', until_lsn = 'FFFF/0'")
    tracked_crm.execute("DELETE FROM cdc_worker.checkpoint")
    tracked_crm.execute("SELECT pg_drop_replication_slot(%s)", tracked_crm.slot)
    tracked_crm.setup()
    tracked_crm.execute("UPDATE lead SET status = 'x' WHERE lead_id = 1")
    tracked_crm.record()
    assert told(tracked_crm) == Counter(["x"])


def test_cutting_over_needs_the_slot_that_keeps_what_comes_after(tracked_crm: Crm) -> None:
    tracked_crm.succeed("setup", "--no-cutover")
    before = triggers(tracked_crm)
    tracked_crm.execute("SELECT pg_drop_replication_slot(%s)", tracked_crm.slot)
    done = tracked_crm.command("cutover")
    assert (done.returncode, "does not exist: changes from" in done.stderr) == (1, True)
    assert triggers(tracked_crm) == before


def test_without_a_checkpoint_the_statements_take_no_trigger_away(tracked_crm: Crm) -> None:
    """Whoever runs a dry run's script by hand may run it too late."""
    tracked_crm.succeed("setup", "--no-cutover")
    before = triggers(tracked_crm)
    script = tracked_crm.succeed("cutover", "--dry-run").partition("\n\n")[2]
    tracked_crm.execute("DELETE FROM cdc_worker.checkpoint")
    with pytest.raises(psycopg.errors.NoDataFound, match=r"has no checkpoint: nobody would record public\.customer"):
        tracked_crm.connection.execute(script.encode())
    tracked_crm.connection.execute("ROLLBACK")
    assert triggers(tracked_crm) == before


def test_a_dry_run_prints_the_sql_and_changes_nothing(tracked_crm: Crm) -> None:
    tracked_crm.succeed("setup", "--no-cutover")
    before = triggers(tracked_crm)
    script = tracked_crm.succeed("cutover", "--dry-run")
    assert 'DROP TRIGGER "lead_activity_tracker" ON "public"."lead";' in script
    assert '-- lock: ACCESS EXCLUSIVE on "public"."lead" (lead: ' in script
    assert triggers(tracked_crm) == before
    tracked_crm.connection.execute(script.partition("\n\n")[2].encode())
    assert len(triggers(tracked_crm)) == len(before) - 2
    assert "CREATE TRIGGER lead_activity_tracker" in tracked_crm.succeed("cutover", "--back", "--dry-run")


def test_cutting_over_before_setting_up_is_refused(bare_crm: Crm) -> None:
    done = bare_crm.command("cutover")
    assert done.returncode == 1
    assert done.stderr == "error: the database has no tables of cdc-worker\nhint: run: cdc-worker setup\n"


# Beside the application


def test_the_application_neither_waits_nor_fails_while_cut_over_waits_for_it(tracked_crm: Crm) -> None:
    tracked_crm.succeed("setup", "--no-cutover")
    with psycopg.connect(tracked_crm.dsn) as busy, tracked_crm.cutting_over() as cutting:
        busy.execute("UPDATE lead SET status = 'busy' WHERE lead_id = 100")
        cutting.wait_for("waiting_for_lock")
        with Application(tracked_crm, everything, rest=True) as application:
            application.go_on(50)
        assert cutting.process.poll() is None
        busy.commit()
        assert cutting.wait() == 0
    tracked_crm.record()
    assert told(tracked_crm) == Counter({*owed(application.done), "busy"})


def test_in_a_deadlock_it_is_never_the_application_that_fails(tracked_crm: Crm) -> None:
    """It holds the lead when it comes to the customer, as LeadFi's conversions do; and the other way round."""

    def crosswise(connection: psycopg.Connection[tuple[object, ...]], session: int, turn: int) -> None:
        statements = [
            ("UPDATE lead SET source = %s WHERE lead_id = %s", (f"{turn}", session + 1)),
            ("UPDATE customer SET country = %s WHERE customer_uid = %s", (f"{turn}", session + 1)),
            ("INSERT INTO activity (lead_id, activity_type) VALUES (%s, 'call')", (session + 1,)),
        ]
        for query, parameters in statements if session % 2 else reversed(statements):
            connection.execute(query, parameters)

    with Application(tracked_crm, crosswise, sessions=4) as application:
        application.go_on(20)
        tracked_crm.succeed("setup")
        for _ in range(3):
            tracked_crm.succeed("cutover", "--back")
            tracked_crm.succeed("cutover")
        application.go_on(20)


def test_a_step_gives_up_when_it_never_gets_its_lock(tracked_crm: Crm) -> None:
    tracked_crm.succeed("setup", "--no-cutover")
    with psycopg.connect(tracked_crm.dsn) as busy, postgres.connect(tracked_crm.dsn, "test") as connection:
        busy.execute("LOCK TABLE lead IN ACCESS SHARE MODE")
        step = ddl.Step("", "ALTER TABLE lead REPLICA IDENTITY FULL", "ACCESS EXCLUSIVE on lead")
        with pytest.raises(errors.ServerError) as caught:
            ddl.perform(connection, step, patience=0.5)
        assert str(caught.value) == (
            "ACCESS EXCLUSIVE on lead: not to be had within 0.5 s, for these hold it:"
            f" process {busy.info.backend_pid} (client backend)"
        )


def test_an_autovacuum_that_is_in_the_way_gives_way(own_crm: Crm) -> None:
    """Which it does only for who waits until a deadlock is looked for: a superuser looks early."""
    own_crm.add_leads(20_000)
    own_crm.execute(
        "ALTER TABLE lead SET (autovacuum_vacuum_threshold = 1, autovacuum_vacuum_scale_factor = 0,"
        " autovacuum_vacuum_cost_delay = 100, autovacuum_vacuum_cost_limit = 1)"
    )
    own_crm.execute("UPDATE lead SET status = 'x'")
    own_crm.execute("ALTER SYSTEM SET autovacuum_naptime = '1s'")
    own_crm.execute("SELECT pg_reload_conf()")
    eventually(
        lambda: own_crm.execute(
            "SELECT pid FROM pg_locks JOIN pg_stat_activity USING (pid)"
            " WHERE backend_type = 'autovacuum worker' AND relation = 'lead'::regclass AND granted"
        )
    )
    with ddl.connected(config.load(None, {"dsn": own_crm.dsn, "slot": own_crm.slot})) as connection:
        step = ddl.Step("", "ALTER TABLE lead REPLICA IDENTITY FULL", "ACCESS EXCLUSIVE on lead")
        assert ddl.perform(connection, step) == [step.text]
