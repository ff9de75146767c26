"""A row that the target refuses becomes a dead letter, and the stream goes on."""

from __future__ import annotations

import pytest
from support import Crm, eventually

POISON = "INSERT INTO lead (full_name, source, bd_in_charge, type) VALUES ('poison', 's', 'jane', 't')"

BY_CHECK = "ALTER TABLE activity ADD CONSTRAINT no_poison CHECK (metadata ->> 'lead_name' <> 'poison')"

BY_TRIGGER = """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.metadata ->> 'lead_name' = 'poison' THEN RAISE EXCEPTION 'not this one'; END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER refuse AFTER INSERT ON activity FOR EACH ROW EXECUTE FUNCTION refuse();
"""

DEFERRED = """
CREATE TABLE known (name text PRIMARY KEY);
INSERT INTO known SELECT 'Lead ' || n FROM generate_series(1, 1000) n;
ALTER TABLE activity ADD COLUMN name text GENERATED ALWAYS AS (metadata ->> 'lead_name') STORED
    REFERENCES known DEFERRABLE INITIALLY DEFERRED;
"""


@pytest.mark.parametrize(
    ("how", "sqlstate", "constraint"),
    [(BY_CHECK, "23514", "no_poison"), (BY_TRIGGER, "P0001", None), (DEFERRED, "23503", "activity_name_fkey")],
    ids=["check", "trigger", "deferred foreign key"],
)
def test_one_bad_row_in_a_thousand_is_one_dead_letter(
    crm: Crm, how: str, sqlstate: str, constraint: str | None
) -> None:
    crm.connection.execute(how.encode())
    with crm.connection.transaction():
        crm.add_leads(500)
        crm.execute(POISON)
        crm.add_leads(499)
    crm.record()
    assert crm.types() == ["lead_created"] * 999
    ((kind, state, named, key, change, fields),) = crm.execute(
        "SELECT kind, sqlstate, constraint_name, change_key, change, fields FROM cdc_worker.dead_letter"
    )
    assert (kind, state, named) == ("refused", sqlstate, constraint)
    assert key.endswith("/public.lead/500/lead_created")
    assert change["operation"] == "insert"
    assert change["new"]["full_name"] == "poison"
    assert fields["description"] == 'Lead "poison" created by jane'


def test_the_other_activities_of_a_refused_change_are_written(crm: Crm) -> None:
    crm.execute("ALTER TABLE activity ADD CHECK (activity_type <> 'assignment_changed')")
    crm.add_leads(200)
    crm.execute("UPDATE lead SET status = '2. proposal', bd_in_charge = 'bob', title = 'CTO'")
    crm.record()
    assert crm.types() == ["lead_created"] * 200 + ["status_changed", "lead_updated"] * 200
    assert crm.value("SELECT count(*) FROM cdc_worker.dead_letter") == 200


def test_an_update_without_its_old_row_is_a_dead_letter_of_its_own_kind(crm: Crm) -> None:
    crm.add_leads(2)
    crm.execute("ALTER TABLE lead REPLICA IDENTITY DEFAULT")
    crm.execute("UPDATE lead SET status = '7. lost' WHERE full_name = 'Lead 1'")
    crm.execute("ALTER TABLE lead REPLICA IDENTITY FULL")
    crm.execute("UPDATE lead SET status = '7. lost' WHERE full_name = 'Lead 2'")
    crm.record()
    assert crm.types() == ["lead_created", "lead_created", "status_changed"]
    assert crm.execute("SELECT kind FROM cdc_worker.dead_letter") == [("old_values_unknown",)]


def test_a_dead_letter_is_logged_without_the_values_of_its_row(crm: Crm) -> None:
    crm.connection.execute(BY_CHECK.encode())
    crm.execute(POISON)
    with crm.worker("--once") as worker:
        assert worker.wait() == 0
    (event,) = worker.events("change_dead_lettered")
    assert (event["table"], event["sqlstate"], event["constraint"]) == ("lead", "23514", "no_poison")
    assert "poison" not in worker.said.replace("no_poison", "")


def test_a_thousand_refusals_in_a_row_stop_the_worker(crm: Crm) -> None:
    crm.connection.execute(BY_CHECK.encode())
    crm.execute(
        "INSERT INTO lead (full_name, source, bd_in_charge, type)"
        " SELECT 'poison', 's', 'b', 't' FROM generate_series(1, 3000)"
    )
    done = crm.command("run", "--once")
    assert done.returncode == 22
    assert "23514" in done.stderr
    assert crm.value("SELECT count(*) FROM cdc_worker.dead_letter") < 1000
    crm.execute("ALTER TABLE activity DROP CONSTRAINT no_poison")
    crm.record()
    letters = crm.value("SELECT count(*) FROM cdc_worker.dead_letter")
    assert crm.value("SELECT count(*) FROM activity") == 3000 - letters


def test_many_refusals_with_rows_between_them_do_not_stop_it(crm: Crm) -> None:
    crm.connection.execute(BY_CHECK.encode())
    crm.execute(
        "INSERT INTO lead (full_name, source, bd_in_charge, type)"
        " SELECT CASE WHEN mod(n, 2) = 0 THEN 'poison' ELSE 'Lead' END, 's', 'b', 't' FROM generate_series(1, 3000) n"
    )
    crm.record()
    assert crm.types() == ["lead_created"] * 1500
    assert crm.value("SELECT count(*) FROM cdc_worker.dead_letter") == 1500


def test_a_target_that_refuses_every_write_stops_the_worker_without_a_dead_letter(crm: Crm) -> None:
    crm.add_leads(3)
    crm.execute(
        "CREATE FUNCTION count_it() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN INSERT INTO counted VALUES (1); RETURN NEW; END $$"
    )
    crm.execute("CREATE TRIGGER count_it BEFORE INSERT ON activity FOR EACH ROW EXECUTE FUNCTION count_it()")
    done = crm.command("run", "--once")
    assert done.returncode == 21
    crm.execute("DROP TRIGGER count_it ON activity")
    crm.record()
    assert crm.types() == ["lead_created"] * 3
    assert crm.value("SELECT count(*) FROM cdc_worker.dead_letter") == 0


def test_a_dead_letter_that_cannot_be_written_stops_the_worker_and_loses_nothing(crm: Crm) -> None:
    crm.connection.execute(BY_CHECK.encode())
    crm.execute("ALTER TABLE cdc_worker.dead_letter ADD CONSTRAINT none CHECK (kind IS NULL)")
    crm.add_leads(2)
    crm.execute(POISON)
    done = crm.command("run", "--once")
    assert done.returncode == 21
    assert "Traceback" not in done.stderr
    crm.execute("ALTER TABLE cdc_worker.dead_letter DROP CONSTRAINT none")
    crm.record()
    assert crm.types() == ["lead_created"] * 2
    assert crm.value("SELECT count(*) FROM cdc_worker.dead_letter") == 1


def test_what_may_heal_while_a_batch_is_divided_is_tried_again(crm: Crm) -> None:
    crm.connection.execute(BY_CHECK.encode())
    crm.connection.execute(b"""
        CREATE SEQUENCE attempt;
        CREATE FUNCTION conflict() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF NEW.metadata ->> 'lead_name' = 'Lead 1' AND nextval('attempt') IN (1, 2) THEN
                RAISE EXCEPTION 'try again' USING ERRCODE = '40001';
            END IF;
            RETURN NULL;
        END $$;
        CREATE TRIGGER conflict AFTER INSERT ON activity FOR EACH ROW EXECUTE FUNCTION conflict();
    """)
    with crm.connection.transaction():
        crm.execute(POISON)
        crm.add_leads(2)
    with crm.worker() as worker:
        eventually(lambda: len(crm.types()) == 2)
        assert {event["sqlstate"] for event in worker.events("connection_lost")} == {"40001"}
        assert worker.terminate() == 0
    assert crm.value("SELECT count(*) FROM cdc_worker.dead_letter") == 1
