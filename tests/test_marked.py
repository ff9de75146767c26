"""A cut-over from an application that recorded by itself, whose new code comes gradually: each change is told once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from application import Application, owed, statuses, told
from doctoring import findings
from factories import assembled, customer, inserted, lead, leadfi, said
from support import Crm, eventually

from cdc_worker.activities import OpenEnds, Scope
from cdc_worker.changes import Change, Message
from cdc_worker.lsn import LSN
from cdc_worker.transform import transform

SAYS = "SELECT pg_logical_emit_message(true, 'cdc_worker.context', '{\"changed_by\": \"jane\"}')"

LOGS = """
INSERT INTO activity (lead_id, activity_type, metadata)
VALUES (1, 'status_changed', jsonb_build_object('new_status', %s::text))
"""


class Fleet:
    """Sessions of which those in `new` run new code, which says who it is; the others run old code, which logs."""

    def __init__(self) -> None:
        self.new: set[int] = set()

    def __call__(self, connection: psycopg.Connection[Any], session: int, turn: int) -> None:
        is_new = session in self.new
        if is_new:
            connection.execute(SAYS)
        statuses(connection, session, turn)
        if not is_new:
            connection.execute(LOGS, (f"{session}.{turn}",))


def by_the_worker(crm: Crm) -> int:
    return len([activity for activity in crm.activities() if activity["activity_type"] == "status_changed"])


@contextmanager
def busy(crm: Crm, fleet: Fleet, sessions: int = 4) -> Iterator[Application]:
    with Application(crm, fleet, sessions=sessions) as application:
        yield application


@pytest.fixture
def logging_crm(bare_crm: Crm) -> Crm:
    """LeadFi as if its application logged by itself, with forty leads."""
    bare_crm.succeed("setup", "--marked")
    with bare_crm.connection.transaction():
        bare_crm.execute(SAYS)
        bare_crm.add_leads(40)
    return bare_crm


def test_new_code_deployed_gradually_and_a_worker_that_is_killed_leave_nothing_out_and_nothing_twice(
    bare_crm: Crm,
) -> None:
    bare_crm.add_leads(40)
    fleet = Fleet()
    bare_crm.connection.execute(b"""
        CREATE TABLE activity (activity_id serial PRIMARY KEY, lead_id integer, activity_type varchar(50) NOT NULL,
                               metadata jsonb, date_created timestamp NOT NULL DEFAULT now())""")
    with busy(bare_crm, fleet) as application:
        application.go_on(20)
        bare_crm.succeed("setup", "--marked")
        application.go_on(20)
        fleet.new = {0, 1}
        application.go_on(20)
        with bare_crm.worker() as worker:
            application.go_on(50)
            fleet.new = {0, 1, 2}
            application.go_on(50)
            worker.kill()
        with bare_crm.worker() as worker:
            application.go_on(20)
            fleet.new = {0, 1, 2, 3}
            application.go_on(2)  # no turn of old code is left
            bare_crm.succeed("cutover")
            application.go_on(50)
            worker.kill()
    bare_crm.execute("UPDATE lead SET status = 'unsaid' WHERE lead_id = 1")
    bare_crm.record()
    assert told(bare_crm) == Counter({*owed(application.done), "unsaid"})
    assert 200 < by_the_worker(bare_crm) < sum(application.done)


def test_what_the_worker_records_already_goes_back_to_old_code_and_comes_again(crm: Crm) -> None:
    crm.add_leads(40)
    fleet = Fleet()
    fleet.new = {0, 1, 2, 3}
    with crm.worker() as worker, busy(crm, fleet) as application:
        application.go_on(20)
        crm.succeed("cutover", "--marked")
        application.go_on(20)
        fleet.new = {0}
        application.go_on(20)
        fleet.new = {0, 1, 2, 3}
        application.go_on(2)
        crm.succeed("cutover")
        application.go_on(20)
        assert worker.terminate() == 0
    crm.record()
    assert told(crm) == Counter(owed(application.done))


def test_a_transaction_of_old_code_that_is_open_at_the_end_is_left_to_it(logging_crm: Crm) -> None:
    with psycopg.connect(logging_crm.dsn) as old, logging_crm.cutting_over() as cutting:
        old.execute("UPDATE lead SET status = 'old' WHERE lead_id = 1")
        cutting.wait_for("waiting_for_lock")
        old.execute(LOGS, ("old",))
        old.commit()
        assert cutting.wait() == 0
    logging_crm.execute("UPDATE lead SET status = 'new' WHERE lead_id = 1")
    logging_crm.record()
    assert told(logging_crm) == Counter(["old", "new"])


def test_a_running_worker_hears_of_both_ends(crm: Crm) -> None:
    crm.add_leads(1)
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        crm.succeed("cutover", "--marked")
        crm.execute("UPDATE lead SET status = 'unsaid'")
        with crm.connection.transaction():
            crm.execute(SAYS)
            crm.execute("UPDATE lead SET status = 'said'")
        eventually(lambda: told(crm)["said"])
        event = worker.wait_for("cutover_pending")
        assert (event["tables"], event["mend"]) == (
            ["public.customer", "public.lead"],
            "once no old code runs any more: cdc-worker cutover",
        )
        crm.succeed("cutover")
        crm.execute("UPDATE lead SET status = 'unsaid later'")
        eventually(lambda: told(crm)["unsaid later"])
    assert told(crm) == Counter(["said", "unsaid later"])


def test_what_is_done_is_told_in_words(crm: Crm) -> None:
    assert crm.succeed("cutover", "--marked") == (
        "public.customer, public.lead: the worker records what follows a context message,"
        " and the application the rest\n"
    )
    assert crm.succeed("cutover", "--marked") == (
        "nothing to do: of all tables that could be, only what follows a context message is recorded already\n"
    )
    assert crm.succeed("cutover").splitlines() == [
        f"{table}: the worker records in place of the application's old code: from here on, all that is committed"
        for table in ("public.customer", "public.lead")
    ]
    assert crm.succeed("cutover") == (
        "nothing to do: no trigger of a captured table writes activity, and none is waited for\n"
    )
    both = crm.command("cutover", "--marked", "--back")
    assert (both.returncode, "--marked about an application that records by itself" in both.stderr) == (2, True)


def test_a_dry_run_prints_what_begins_it_and_changes_nothing(crm: Crm) -> None:
    script = crm.succeed("cutover", "--marked", "--dry-run")
    assert "INSERT INTO cdc_worker.excluded (worker, table_name, from_lsn, marked)" in script
    assert crm.value("SELECT count(*) FROM cdc_worker.excluded WHERE marked") == 0
    crm.connection.execute(script.partition("\n\n")[2].encode())
    assert crm.value("SELECT count(*) FROM cdc_worker.excluded WHERE marked AND until_lsn IS NULL") == 2


def test_setting_up_again_ends_nothing_and_begins_new_tables_alike(logging_crm: Crm) -> None:
    logging_crm.execute("DELETE FROM cdc_worker.excluded WHERE table_name = 'public.customer'")
    said = logging_crm.succeed("setup").splitlines()
    assert "public.customer is set up" in said
    for table in ("lead", "customer"):
        note = f"note: of public.{table} only what follows a context message is recorded, until: cdc-worker cutover"
        assert note in said
    logging_crm.execute("UPDATE lead SET status = 'unsaid'")
    logging_crm.execute("INSERT INTO customer (customer_uid, name) VALUES (1, 'unsaid')")
    logging_crm.record()
    assert set(logging_crm.types()) == {"lead_created"}


def test_setting_up_marked_changes_nothing_of_what_is_recorded_already(crm: Crm) -> None:
    crm.succeed("setup", "--marked")
    crm.add_leads(1)
    crm.record()
    assert crm.types() == ["lead_created"]


def test_tables_that_triggers_record_stay_with_them(crm: Crm) -> None:
    crm.execute(
        "CREATE FUNCTION track() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO activity (activity_type,"
        " description) VALUES ('lead_created', 'by a trigger'); RETURN NEW; END $$"
    )
    crm.execute("CREATE TRIGGER track AFTER INSERT ON lead FOR EACH ROW EXECUTE FUNCTION track()")
    assert crm.succeed("cutover", "--marked").splitlines() == [
        "note: public.lead is recorded by its triggers, whoever writes to it; to take over: cdc-worker cutover",
        "public.customer: the worker records what follows a context message, and the application the rest",
    ]


def test_another_worker_ends_its_own_stretch_alone(logging_crm: Crm) -> None:
    other = {"name": "b", "slot": f"{logging_crm.slot}_b"}
    logging_crm.succeed("setup", **other)
    logging_crm.succeed("cutover", "--marked", **other)
    logging_crm.succeed("cutover", **other)
    logging_crm.execute("UPDATE lead SET status = 'unsaid' WHERE lead_id = 1")
    logging_crm.record()
    logging_crm.record(**other)
    assert [a["change_key"].split("/")[0] for a in logging_crm.activities() if a["lead_id"] == 1] == [
        logging_crm.slot,
        "b",
    ]


def test_doctor_and_status_say_that_it_is_open(logging_crm: Crm) -> None:
    said = logging_crm.succeed("status")
    assert "cut-over:     of public.customer, public.lead only what follows a context message is recorded\n" in said
    (found,) = (f for f in findings(logging_crm, "trackers") if "public.lead" in f.message)
    assert (found.outcome, found.message, found.fix) == (
        "warning",
        "of public.lead only what follows a context message is recorded, and the rest is left to the application",
        "once no old code runs any more: cdc-worker cutover",
    )


def test_an_installation_of_before_learns_of_it_from_setup(crm: Crm) -> None:
    crm.execute("ALTER TABLE cdc_worker.excluded DROP COLUMN marked")
    crm.execute("DELETE FROM cdc_worker.schema_file WHERE name = '010_cdc_worker.sql'")
    assert "cut-over:" not in crm.succeed("status")
    assert 'column "marked" does not exist' in crm.command("run", "--once").stderr
    assert "ADD COLUMN IF NOT EXISTS marked" in crm.succeed("setup", "--dry-run")
    crm.setup()
    crm.record()


# What follows a message

MARKED = Scope(
    {("public", "lead"): [(LSN(0), LSN(1))], ("public", "customer"): [(LSN(0), LSN(1))]},
    marked={("public", "lead"): [(LSN(1), None)]},
)


def keys(*messages: Change | Message, cut: bool = False) -> list[str]:
    transactions = assembled(messages, cuts={0} if cut else ())
    found = transform(leadfi(), transactions, worker="w", system_identifier="1", scope=MARKED)
    return [outcome.change_key.split("/", 3)[3] for outcome in found]


@pytest.mark.parametrize("content", ['{"changed_by": "jane"}', "{}", "", "no JSON"])
def test_new_code_is_known_by_its_message_whatever_that_says(content: str) -> None:
    assert keys(said(content), inserted("lead", lead())) == ["public.lead/0/lead_created"]


def test_what_comes_before_the_message_and_without_one_is_left_to_the_application() -> None:
    assert keys(inserted("lead", lead()), said("{}"), inserted("lead", lead())) == ["public.lead/1/lead_created"]
    assert keys(inserted("lead", lead())) == []
    assert keys(said("{}", prefix="cdc_worker.marker"), inserted("lead", lead())) == []


def test_a_message_holds_for_the_slices_after_it() -> None:
    assert keys(said("{}"), inserted("lead", lead()), inserted("lead", lead()), cut=True) == [
        "public.lead/0/lead_created",
        "public.lead/1/lead_created",
    ]


def test_other_tables_are_recorded_in_any_case() -> None:
    assert keys(inserted("customer", customer())) == ["public.customer/0/customer_created"]


def test_the_next_transaction_has_to_say_so_itself() -> None:
    transactions = [
        *assembled([said("{}"), inserted("lead", lead())], commit_lsn=0x1000),
        *assembled([inserted("lead", lead())], commit_lsn=0x2000),
    ]
    found = transform(leadfi(), transactions, worker="w", system_identifier="1", scope=MARKED)
    assert [outcome.change_key.split("/")[2] for outcome in found] == ["0000000000001000"]


def test_an_open_stretch_is_told_apart_from_one_that_waits() -> None:
    captured = {("public", "lead"), ("public", "customer"), ("public", "contact")}
    assert MARKED.open_ends(captured) == OpenEnds(
        fresh={("public", "contact")}, waiting=set(), marked={("public", "lead")}, others=set()
    )
