"""A person who is to be forgotten: nothing that the worker wrote, or will write, tells of them."""

from __future__ import annotations

import json
import os
import pty
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from storms import Faults, kill
from support import HOLD_ROWS_UP, Crm, WorkerProcess, eventually, grant, let_rows_wait, storm

from cdc_worker import shadow
from cdc_worker.erasure import OUT_OF_REACH, Erasure

NAME = "Ada Secret"

TOLD = """
SELECT (SELECT count(*) FROM activity WHERE activity::text ~ %(name)s AND change_key IS NOT NULL)
     + (SELECT count(*) FROM cdc_worker.dead_letter WHERE dead_letter::text ~ %(name)s)
"""

REGISTER = "SELECT field, key, until_lsn IS NULL FROM cdc_worker.erased ORDER BY erased_lsn"


def add_lead(crm: Crm, lead_id: int = 7, name: str = NAME) -> None:
    crm.execute(
        "INSERT INTO lead (lead_id, full_name, source, bd_in_charge, type) VALUES (%s, %s, 'web', 'jane', 't')",
        lead_id,
        name,
    )


def add_customer(crm: Crm, name: str = NAME) -> None:
    crm.execute("INSERT INTO customer (customer_uid, name) VALUES (42, %s)", name)


def convert(crm: Crm) -> None:
    """Lead 7 becomes customer 42."""
    with crm.connection.transaction():
        add_customer(crm)
        crm.execute("UPDATE lead SET is_converted = true WHERE lead_id = 7")
        crm.execute("INSERT INTO contact (customer_uid, lead_id) VALUES (42, 7)")


def unprotected(crm: Crm) -> None:
    """Let this session change what the worker wrote."""
    crm.execute("SET cdc_worker.protect = off")


def forget(crm: Crm, *arguments: str, **settings: str) -> Erasure:
    return Erasure.model_validate_json(crm.succeed("forget", "--yes", "--json", *arguments, **settings))


def told(crm: Crm, name: str = NAME) -> int:
    """In how many rows that the worker wrote the name stands, anywhere."""
    with crm.connection.cursor() as cursor:
        ((count,),) = cursor.execute(TOLD, {"name": name})
    return int(count)


def blank(activity: dict[str, Any]) -> dict[str, Any]:
    return {**activity, "description": "", "metadata": {"erased": True}}


# What was recorded


def test_what_was_recorded_of_a_person_is_blank_and_its_keys_stay(crm: Crm) -> None:
    add_lead(crm)
    add_lead(crm, 70, "Grace")
    crm.execute("UPDATE lead SET status = '7. lost', title = 'CTO'")
    crm.record()
    before = crm.activities()
    assert told(crm) == 3
    assert forget(crm, "--lead", "7") == Erasure(
        worker=crm.slot,
        persons={"lead": "7"},
        activities=3,
        dead_letters=0,
        application_activities=0,
        linked={},
        out_of_reach=list(OUT_OF_REACH),
    )
    assert crm.activities() == [blank(row) if row["lead_id"] == 7 else row for row in before]
    assert [row["lead_id"] for row in before] == [7, 70, 7, 7, 70, 70]
    assert crm.execute(REGISTER) == [("lead", "7", True)]


def test_to_forget_again_finds_nothing_to_do(crm: Crm) -> None:
    crm.execute("ALTER TABLE activity ADD CHECK (activity_type <> 'lead_updated')")
    add_lead(crm)
    crm.execute("UPDATE lead SET title = 'CTO'")
    crm.record()
    first = forget(crm, "--lead", "7")
    assert (first.activities, first.dead_letters) == (1, 1)
    crm.execute("UPDATE lead SET status = '7. lost', title = 'CEO'")
    crm.record()
    second = forget(crm, "--lead", "7")
    assert (second.activities, second.dead_letters) == (0, 0)
    assert crm.types() == ["lead_created", "status_changed"]
    assert told(crm) == 0


def test_a_row_whose_link_became_null_is_known_by_its_identity(crm: Crm) -> None:
    unprotected(crm)
    for number, name in ((7, NAME), (8, "Grace")):
        add_lead(crm, number, name)
    crm.record()
    crm.execute("UPDATE activity SET lead_id = NULL")
    assert forget(crm, "--lead", "7").activities == 1
    assert told(crm) == 0
    assert told(crm, "Grace") == 1


def test_a_row_that_was_written_without_its_link_is_known_by_it_all_the_same(crm: Crm) -> None:
    """The target has a foreign key of its own, and the lead is gone when the worker comes."""
    crm.execute("ALTER TABLE activity ADD CONSTRAINT own_key FOREIGN KEY (lead_id) REFERENCES lead")
    add_lead(crm)
    add_customer(crm)
    with crm.connection.transaction():
        crm.execute("UPDATE lead SET is_converted = true")
        crm.execute("INSERT INTO contact (customer_uid, lead_id) VALUES (42, 7)")
    crm.execute("DELETE FROM lead")
    crm.record()
    assert [activity["lead_id"] for activity in crm.activities()] == [None] * 4
    assert forget(crm, "--lead", "7").activities == 3
    add_lead(crm, 7, "Grace")
    crm.execute("DELETE FROM lead")
    assert forget(crm, "--lead", "7").activities == 0
    crm.record()
    assert forget(crm, "--lead", "7").activities == 0
    assert [row["metadata"] for row in crm.activities()[4:]] == [{"erased": True, "unlinked": {"lead_id": 7}}] * 2
    assert (told(crm), told(crm, "Grace")) == (1, 0), "the customer's"


def test_a_name_that_means_several_things_is_no_identity(crm: Crm, tmp_path: Path) -> None:
    path = tmp_path / "profile.toml"
    path.write_text(
        """
        name = "some"
        [target]
        table = "activity"
        constants = { activity_category = "system" }
        [target.columns]
        activity_type = "type"
        metadata = "metadata"
        lead_id = "lead"
        customer_uid = "customer"
        change_key = "change_key"
        [tables.lead]
        identity = { id = "{row.lead_id}", name = "{row.full_name}" }
        fields = { lead = "{row.lead_id}" }
        rules = [{ on = "insert", type = "t", description = "" }]
        [tables.customer]
        identity = { id = "{row.customer_uid}", name = "{row.name}" }
        fields = { customer = "{row.customer_uid}" }
        rules = [{ on = "insert", type = "t", description = "" }]
        """
    )
    crm.settings["profile"] = str(path)
    add_lead(crm, 42, "Grace")
    add_customer(crm)
    crm.record()
    assert forget(crm, "--lead", "42").activities == 1
    assert (told(crm), told(crm, "Grace")) == (1, 0)


def test_rows_that_are_read_only_are_blanked_all_the_same(crm: Crm) -> None:
    add_lead(crm)
    crm.record()
    crm.execute("UPDATE activity SET description = 'changed'")
    assert crm.value("SELECT description FROM activity") != "changed"
    assert forget(crm, "--lead", "7").activities == 1
    assert told(crm) == 0


def test_what_the_application_wrote_is_left_to_it(crm: Crm) -> None:
    add_lead(crm)
    crm.execute("INSERT INTO activity (lead_id, activity_type, description) VALUES (7, 'call', 'rang Ada')")
    crm.record()
    done = forget(crm, "--lead", "7")
    assert (done.activities, done.application_activities) == (1, 1)
    assert crm.value("SELECT description FROM activity WHERE change_key IS NULL") == "rang Ada"


def test_what_another_worker_wrote_is_left_to_it(crm: Crm) -> None:
    """Its name differs where a pattern would not tell."""
    unprotected(crm)
    add_lead(crm)
    crm.record()
    crm.execute("UPDATE activity SET change_key = %s || change_key", crm.slot.replace("_", "x") + "/")
    assert forget(crm, "--lead", "7").activities == 0
    assert told(crm) == 1


def test_it_names_others_to_whom_the_activities_link(crm: Crm) -> None:
    add_lead(crm)
    convert(crm)
    crm.record()
    done = forget(crm, "--lead", "7")
    assert (done.activities, done.linked) == (2, {"customer": ["42"]})
    assert crm.value("SELECT description FROM activity WHERE activity_type = 'customer_created'") != ""
    done = forget(crm, "--customer", "42")
    assert (done.activities, done.linked) == (1, {}), "the lead is forgotten already"
    assert told(crm) == 0


def test_a_customer_is_forgotten_with_the_conversion_to_it(crm: Crm) -> None:
    add_lead(crm)
    convert(crm)
    crm.record()
    assert forget(crm, "--customer", "42").linked == {"lead": ["7"]}
    assert [row["activity_type"] for row in crm.activities() if row["description"]] == ["lead_created"]


def test_two_may_be_forgotten_at_once(crm: Crm) -> None:
    add_lead(crm)
    convert(crm)
    crm.record()
    done = forget(crm, "--lead", "7", "--customer", "42")
    assert (done.persons, done.activities, done.linked) == ({"lead": "7", "customer": "42"}, 3, {})
    assert told(crm) == 0


def test_dead_letters_of_a_person_are_blank(crm: Crm) -> None:
    """Those of a change of the person, and those whose activity would have linked to them."""
    crm.execute("ALTER TABLE activity ADD CHECK (activity_type IN ('lead_created', 'customer_created'))")
    add_lead(crm)
    add_lead(crm, 8, "Grace")
    convert(crm)
    crm.execute("UPDATE lead SET title = 'CTO', lead_id = lead_id + 100 WHERE lead_id = 8")
    crm.execute("ALTER TABLE lead REPLICA IDENTITY DEFAULT")
    crm.execute("UPDATE lead SET status = '7. lost'")
    crm.record()
    assert told(crm) == 4
    letters = "SELECT kind, change, fields, reason FROM cdc_worker.dead_letter ORDER BY change_key"
    before = crm.execute(letters)
    assert [kind for kind, *_ in before] == ["refused", "refused", "old_values_unknown", "old_values_unknown"]
    assert forget(crm, "--customer", "42").dead_letters == 1
    assert told(crm) == 2
    assert forget(crm, "--lead", "7").dead_letters == 1, "the conversion is blank already"
    assert told(crm) == 0
    kept = {"lead_id": 7}
    converted, renamed, unknown, other = crm.execute(letters)
    assert (converted[1]["old"], converted[1]["new"], *converted[2:]) == (kept, kept, None, "the person was erased")
    assert converted[1].keys() == before[0][1].keys()
    assert (unknown[1]["old"], unknown[1]["new"], *unknown[2:]) == (kept, kept, None, "the person was erased")
    assert [renamed, other] == [before[1], before[3]]
    assert forget(crm, "--lead", "8").dead_letters == 1, "of who has another key now"
    assert told(crm, "Grace") == 1
    assert forget(crm, "--lead", "108").dead_letters == 1
    assert told(crm, "Grace") == 0


def test_a_dead_letter_whose_activity_would_have_linked_to_a_person_by_a_row_that_was_found(
    crm: Crm, tmp_path: Path
) -> None:
    """It is known by that row, be it there before they are forgotten or after."""
    path = tmp_path / "profile.toml"
    path.write_text(
        """
        name = "some"
        [target]
        table = "activity"
        columns.activity_type = "type"
        columns.description = "description"
        columns.lead_id = "lead"
        columns.change_key = "change_key"
        [tables.lead]
        identity = { id = "{row.lead_id}" }
        fields = { lead = "{row.lead_id}" }
        [tables.contact]
        lookups.lead = { table = "lead", match = { lead_id = "lead_id" } }
        [[tables.contact.rules]]
        on = "insert"
        type = "contact_made"
        description = "{lookup.lead.full_name:d}"
        fields = { lead = "{lookup.lead.lead_id or row.lead_id}" }
        """
    )
    crm.settings["profile"] = str(path)
    crm.setup()
    add_lead(crm)
    crm.execute("INSERT INTO customer (customer_uid, name) VALUES (42, 'Acme'), (43, 'Acme')")
    crm.execute("INSERT INTO contact (customer_uid, lead_id) VALUES (42, 7)")
    crm.record()
    assert told(crm) == 1
    assert forget(crm, "--lead", "7").dead_letters == 1
    crm.execute("INSERT INTO contact (customer_uid, lead_id) VALUES (43, 7)")
    crm.record()
    assert told(crm) == 0
    assert crm.execute("SELECT DISTINCT reason FROM cdc_worker.dead_letter") == [("the person was erased",)]
    assert crm.value("SELECT count(*) FROM cdc_worker.dead_letter") == 2


# What will be recorded


def test_a_backlog_is_recorded_blank(crm: Crm) -> None:
    add_lead(crm)
    add_lead(crm, 70, "Grace")
    crm.record()
    crm.execute("UPDATE lead SET status = '2. proposal'")
    assert forget(crm, "--lead", "7").activities == 1
    crm.record()
    assert told(crm) == 0
    assert told(crm, "Grace") == 2
    assert crm.types() == ["lead_created", "lead_created", "status_changed", "status_changed"]


def test_before_the_first_run(crm: Crm) -> None:
    add_lead(crm)
    assert forget(crm, "--lead", "7").activities == 0
    crm.record()
    assert told(crm) == 0
    (activity,) = crm.activities()
    assert activity == blank(activity)
    assert (activity["lead_id"], activity["bd_in_charge"], activity["created_by"]) == (7, "jane", "system")


def test_the_persons_own_erasure_in_the_application_is_recorded_blank(crm: Crm) -> None:
    add_lead(crm)
    crm.record()
    forget(crm, "--lead", "7")
    crm.execute("UPDATE lead SET full_name = 'anonymous', company_name = NULL WHERE lead_id = 7")
    crm.execute("DELETE FROM lead WHERE lead_id = 7")
    crm.record()
    assert crm.types() == ["lead_created", "lead_updated", "lead_deleted"]
    assert [activity["lead_id"] for activity in crm.activities()] == [7, 7, 7]
    assert told(crm) == 0


def test_a_row_that_is_refused_later_is_a_blank_dead_letter(crm: Crm) -> None:
    crm.execute("ALTER TABLE activity ADD CHECK (activity_type <> 'lead_updated')")
    add_lead(crm)
    forget(crm, "--lead", "7")
    crm.execute("UPDATE lead SET title = 'CTO'")
    crm.execute("ALTER TABLE lead REPLICA IDENTITY DEFAULT")
    crm.execute("UPDATE lead SET title = 'CEO'")
    crm.record()
    changes = crm.execute("SELECT kind, change -> 'old', change -> 'new' FROM cdc_worker.dead_letter ORDER BY 1 DESC")
    assert changes == [
        ("refused", {"lead_id": 7}, {"lead_id": 7}),
        ("old_values_unknown", {"lead_id": 7}, {"lead_id": 7}),
    ]
    assert told(crm) == 0


def test_an_unknown_person_is_registered_all_the_same(crm: Crm) -> None:
    """And whoever gets the key afterwards is told of."""
    done = forget(crm, "--lead", "7")
    assert (done.activities, done.dead_letters, done.application_activities) == (0, 0, 0)
    assert crm.execute(REGISTER) == [("lead", "7", True)]
    add_lead(crm, 7, "Grace")
    crm.record()
    assert told(crm, "Grace") == 1
    assert crm.execute(REGISTER) == [("lead", "7", False)]


@pytest.mark.parametrize("apart", [True, False], ids=["in transactions of their own", "in one transaction"])
def test_somebody_who_is_given_the_key_is_told_of_and_stays_so(crm: Crm, apart: bool) -> None:
    add_customer(crm)
    crm.record()
    forget(crm, "--customer", "42")
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        with crm.connection.transaction(force_rollback=False) if not apart else contextmanager(_nothing)():
            crm.execute("UPDATE customer SET type = 'broker'")
            crm.execute("DELETE FROM customer")
            add_customer(crm, "Grace")
            crm.execute("UPDATE customer SET type = 'exchange'")
        eventually(lambda: len(crm.types()) == 5)
        worker.kill()
    assert [bool(row["description"]) for row in crm.activities()] == [False, False, False, True, True]
    assert crm.execute(REGISTER) == [("customer", "42", False)]
    crm.execute("UPDATE customer SET type = 'bank'")
    crm.record()
    crm.execute("DELETE FROM customer")
    crm.record()
    assert [bool(row["description"]) for row in crm.activities()[5:]] == [True, True]
    assert told(crm) == 0
    forget(crm, "--customer", "42")
    assert told(crm, "Grace") == 0
    assert crm.execute(REGISTER) == [("customer", "42", False), ("customer", "42", True)]


def _nothing() -> Iterator[None]:
    yield


def test_that_a_key_was_given_is_kept_where_nothing_else_is_written(crm: Crm, tmp_path: Path) -> None:
    """No rule is about the insert, and the worker is killed as soon as it is known."""
    path = tmp_path / "profile.toml"
    path.write_text(
        """
        name = "some"
        [target]
        table = "activity"
        constants = { activity_category = "system" }
        [target.columns]
        activity_type = "type"
        description = "description"
        customer_uid = "customer"
        change_key = "change_key"
        [tables.customer]
        identity = { customer_uid = "{row.customer_uid}" }
        fields = { customer = "{row.customer_uid}" }
        rules = [{ on = "update", changed = "*", type = "changed", description = "{new.name}" }]
        """
    )
    crm.settings["profile"] = str(path)
    add_customer(crm)
    forget(crm, "--customer", "42")
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        crm.execute("UPDATE customer SET type = 'broker'")
        crm.execute("DELETE FROM customer")
        add_customer(crm, "Grace")
        eventually(lambda: crm.execute(REGISTER) == [("customer", "42", False)])
        worker.kill()
    crm.execute("UPDATE customer SET type = 'exchange'")
    crm.record()
    assert [row["description"] for row in crm.activities()] == ["", "Grace"]


# While the worker runs


def test_nothing_is_told_of_a_person_who_changes_all_the_while(crm: Crm) -> None:
    """Also where some of it is refused. What is told of others is not touched."""
    crm.execute("ALTER TABLE activity ADD CHECK (activity_type <> 'assignment_changed')")
    shadow.install(crm.connection)
    add_lead(crm)
    add_lead(crm, 8, "Grace")
    with crm.worker() as worker, changing(crm) as changes:
        eventually(lambda: told(crm) > 20)
        done = forget(crm, "--lead", "7")
        assert done.activities > 0
        assert done.dead_letters > 0
        since = changes.count
        eventually(lambda: changes.count > since + 20)
        assert told(crm) == 0
        worker.wait_for("scope_changed")
        assert worker.process.poll() is None
        changes.stop()
        count = "SELECT (SELECT count(*) FROM activity) + (SELECT count(*) FROM cdc_worker.dead_letter)"
        owed = shadow.counts(crm.connection)[0]
        eventually(lambda: crm.value(count) == owed)
        assert worker.terminate() == 0
    assert told(crm) == 0
    about = "SELECT count(*) FROM activity WHERE lead_id = %s AND (description <> '') = %s"
    assert crm.value(about, 7, True) == crm.value(about, 8, False) == 0
    assert crm.value(about, 7, False) == crm.value(about, 8, True)
    assert crm.value("SELECT count(*) FROM cdc_worker.dead_letter WHERE change::text ~ 'Grace'") == changes.count


class Changes:
    """Changes of two leads, again and again, each an activity of its status and one of its assignment."""

    def __init__(self, crm: Crm) -> None:
        self.count = 0
        self._crm = crm
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with psycopg.connect(self._crm.dsn, autocommit=True) as connection:
            while not self._stop.wait(0.005):
                statement = "UPDATE lead SET status = %s, bd_in_charge = %s WHERE lead_id IN (7, 8)"
                connection.execute(statement, (f"status {self.count}", f"bd {self.count}"))
                self.count += 1

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


@contextmanager
def changing(crm: Crm) -> Iterator[Changes]:
    changes = Changes(crm)
    try:
        yield changes
    finally:
        changes.stop()


def test_an_erasure_waits_for_the_batch_in_hand(crm: Crm) -> None:
    """What the worker has sent before is either blanked or comes again."""
    add_lead(crm)
    let_rows_wait(crm)
    with crm.worker() as worker, psycopg.connect(crm.dsn) as locker:
        worker.wait_for("replication_started")
        eventually(crm.activities)
        locker.execute(HOLD_ROWS_UP)
        crm.execute("UPDATE lead SET title = 'CTO'")
        waiting = (
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        )
        eventually(lambda: crm.value(waiting) == 1)
        command = ["forget", "--yes", "--json", "--lead", "7"]
        with WorkerProcess(command, crm.environment(), crm.directory / "forget.log") as forgetting:
            eventually(lambda: crm.value(waiting) == 2)
            locker.rollback()
            assert forgetting.wait() == 0
            done = Erasure.model_validate_json(forgetting.printed.read_text())
        assert done.activities == 2
        assert told(crm) == 0
        assert worker.terminate() == 0


@storm(4, chaos=40)
def test_kills_and_erasures_lose_and_double_nothing(crm: Crm, seed: int, faults: Faults, rounds: int) -> None:
    dice = random.Random(seed)
    shadow.install(crm.connection)
    add_lead(crm)
    add_lead(crm, 8, "Grace")
    with changing(crm) as changes:
        for turn in range(rounds):
            with crm.worker() as worker:
                worker.wait_for("replication_started")
                if turn == 2:
                    eventually(lambda: told(crm) > 0)
                    forget(crm, "--lead", "7")
                threading.Event().wait(dice.random() * 0.2)
                kill(worker, faults)
            if turn >= 2:
                assert told(crm) == 0
        changes.stop()
    crm.record()
    expected, recorded = shadow.counts(crm.connection)
    assert expected == recorded > 0
    assert told(crm) == 0
    missing = {fault.partition(":")[2] for fault in shadow.faults(crm.connection, limit=100_000)}
    assert not [fault for fault in missing if "lead 8" in fault]
    assert crm.value("SELECT count(*) FROM cdc_worker.dead_letter") == 0


HALT = """
CREATE FUNCTION halt() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_advisory_xact_lock_shared(NEW.lead_id);
    RETURN NEW;
END $$;
CREATE TRIGGER halt BEFORE INSERT ON activity FOR EACH ROW
    WHEN (NEW.metadata @> '{"changes": {"title": {"new": "HALT"}}}') EXECUTE FUNCTION halt();
"""


def test_the_worker_is_killed_within_the_transaction_that_gives_the_key(crm: Crm) -> None:
    """Before the insert that does it, and after."""
    crm.connection.execute(HALT.encode())
    add_customer(crm)
    crm.record()
    forget(crm, "--customer", "42")
    crm.add_leads(3_000)
    with crm.connection.transaction():
        crm.execute("UPDATE customer SET type = 'broker'")
        crm.execute("UPDATE lead SET title = 'CTO'")
        crm.execute("UPDATE lead SET title = 'HALT' WHERE lead_id = 1")
        crm.execute("DELETE FROM customer")
        add_customer(crm, "Grace")
        crm.execute("UPDATE lead SET title = 'CEO'")
        crm.execute("UPDATE lead SET title = 'HALT' WHERE lead_id = 2")
        crm.execute("UPDATE customer SET type = 'exchange'")
    crm.execute("SELECT pg_advisory_lock(1), pg_advisory_lock(2)")
    waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND objid = %s"
    for lead_id, given in ((1, False), (2, True)):
        with crm.worker() as worker:
            eventually(lambda: crm.value(waiting, lead_id))  # noqa: B023  # called before the loop goes on
            worker.kill()
        assert crm.value("SELECT changes FROM cdc_worker.checkpoint") > 0, "within the transaction"
        assert crm.execute(REGISTER) == [("customer", "42", not given)]
        crm.execute("SELECT pg_advisory_unlock(%s)", lead_id)
    crm.record()
    of_customer = "SELECT activity_type, description FROM activity WHERE customer_uid = 42 ORDER BY activity_id"
    assert crm.execute(of_customer) == [
        ("customer_created", ""),
        ("customer_updated", ""),
        ("customer_deleted", ""),
        ("customer_created", 'Customer "Grace" created (ID: 42)'),
        ("customer_updated", 'Customer "Grace" updated'),
    ]
    assert crm.value("SELECT count(*) FROM activity") == 5 + 3 * 3_000 + 2


# The command


def test_it_says_what_it_did_and_what_it_cannot_reach(crm: Crm) -> None:
    add_lead(crm)
    convert(crm)
    crm.record()
    assert crm.succeed("forget", "--yes", "--lead", "7").splitlines() == [
        "forgotten: lead 7",
        "2 of their activities and 0 of their dead letters were blanked",
        "0 of their activities are the application's, and left to it",
        "an activity of theirs links to customer 42 as well: cdc-worker forget --person customer 42",
        "out of reach:",
        *(f"  {what}" for what in OUT_OF_REACH),
    ]
    assert any("recordings" in what and "backups" in what for what in OUT_OF_REACH)


def test_the_fields_of_the_json_are_those_of_the_model_and_told_there(crm: Crm) -> None:
    found = json.loads(crm.succeed("forget", "--yes", "--json", "--lead", "7"))
    assert list(found) == list(Erasure.model_fields)
    assert {name for name, field in Erasure.model_fields.items() if not field.description} == {"worker"}


def asked(crm: Crm, answer: str) -> tuple[int, str]:
    """Run it on a terminal, and answer; returns exit code and output."""
    ours, theirs = pty.openpty()
    try:
        os.write(ours, f"{answer}\n".encode())
        done = subprocess.run(
            [sys.executable, "-m", "cdc_worker", "forget", "--lead", "7"],
            env=crm.environment(),
            stdin=theirs,
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        os.close(ours)
        os.close(theirs)
    return done.returncode, done.stdout


def test_it_asks_before_it_does_what_cannot_be_undone(crm: Crm) -> None:
    add_lead(crm)
    crm.record()
    code, said = asked(crm, "n")
    assert (code, said) == (1, "Blank all that was recorded of lead 7? It can't be undone. [y/N]: ")
    assert (told(crm), crm.execute(REGISTER)) == (1, [])
    code, said = asked(crm, "y")
    assert code == 0
    assert "forgotten: lead 7\n" in said
    assert told(crm) == 0


@pytest.mark.parametrize(
    ("arguments", "told_off"),
    [
        (["--lead", "7"], "there is no terminal to ask on: --yes does it"),
        (["--yes"], "it takes --lead, --customer or --person to say who"),
        (["--yes", "--lead", "7", "--person", "lead", "8"], "it takes one key of a field at a time"),
        (["--yes", "--person", "deal", "7"], 'the profile "leadfi" has no persons "deal"\nhint: those it has:'),
        (["--yes", "--lead", "Ada"], '"Ada" can\'t be the key of a lead, which is of type integer'),
        (["--yes", "--lead", ""], '"" can\'t be the key of a lead, which is of type integer'),
        (["--yes", "--lead", "99999999999"], '"99999999999" can\'t be the key of a lead, which is of type integer'),
    ],
)
def test_a_misused_command_erases_nothing(crm: Crm, arguments: list[str], told_off: str) -> None:
    done = crm.command("forget", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert told_off in done.stderr
    assert crm.execute(REGISTER) == []


def test_a_key_is_read_as_the_database_reads_it(crm: Crm) -> None:
    add_lead(crm)
    crm.record()
    assert forget(crm, "--lead", " 007").persons == {"lead": "7"}
    crm.execute("UPDATE lead SET title = 'CTO'")
    crm.record()
    assert told(crm) == 0


def test_persons_are_whoever_the_profile_has(crm: Crm, tmp_path: Path) -> None:
    path = tmp_path / "profile.toml"
    path.write_text(
        """
        name = "some"
        [target]
        table = "activity"
        columns = { activity_type = "type", description = "description", lead_id = "keeper", change_key = "change_key" }
        [tables.lead]
        identity = { id = "{row.lead_id}" }
        fields = { keeper = "{row.lead_id}" }
        rules = [{ on = "insert", type = "made", description = "{row.full_name}" }]
        """
    )
    crm.settings["profile"] = str(path)
    crm.setup()
    add_lead(crm)
    crm.record()
    assert forget(crm, "--person", "keeper", "7").activities == 1
    assert told(crm) == 0


def test_a_profile_without_such_persons_names_those_it_has(crm: Crm, tmp_path: Path) -> None:
    path = tmp_path / "profile.toml"
    path.write_text(
        """
        name = "some"
        [target]
        table = "activity"
        columns = { activity_type = "type", lead_id = "lead", customer_uid = "customer", change_key = "change_key" }
        [tables.lead]
        identity = { id = "{row.lead_id}" }
        fields = { lead = "{row.lead_id}", customer = "{row.title}" }
        """
    )
    done = crm.command("forget", "--yes", "--customer", "42", profile=str(path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == 'error: the profile "some" has no persons "customer"\nhint: those it has: lead\n'


def test_who_may_not_change_activities_erases_nothing(crm: Crm) -> None:
    """The worker's own role may not."""
    add_lead(crm)
    crm.record()
    grant(crm, f"{crm.slot}_role")
    done = crm.command("forget", "--yes", "--lead", "7")
    assert (done.returncode, done.stdout) == (1, "")
    assert "permission denied for table backfill (SQLSTATE 42501)\nhint: " in done.stderr
    assert (told(crm), crm.execute(REGISTER)) == (1, [])


def test_rows_that_a_policy_hides_are_not_passed_over(crm: Crm) -> None:
    add_lead(crm)
    crm.record()
    role = f"{crm.slot}_role"
    grant(crm, role)
    for statement in (
        "GRANT ALL ON ALL TABLES IN SCHEMA cdc_worker TO {}",
        "GRANT ALL ON activity TO {}",
        "ALTER TABLE activity ENABLE ROW LEVEL SECURITY",
        "CREATE POLICY hidden ON activity USING (lead_id <> 7)",
    ):
        crm.connection.execute(sql.SQL(statement).format(sql.Identifier(role)))
    done = crm.command("forget", "--yes", "--lead", "7")
    assert (done.returncode, done.stdout) == (1, "")
    assert 'row-level security policy for table "activity"' in done.stderr
    assert (told(crm), crm.execute(REGISTER)) == (1, [])


def test_the_workers_role_may_record_that_a_key_was_given(crm: Crm) -> None:
    add_customer(crm)
    forget(crm, "--customer", "42")
    grant(crm, f"{crm.slot}_role")
    crm.execute("DELETE FROM customer")
    add_customer(crm, "Grace")
    crm.record()
    assert crm.execute(REGISTER) == [("customer", "42", False)]


def test_what_is_not_set_up_is_told(bare_crm: Crm) -> None:
    done = bare_crm.command("forget", "--yes", "--lead", "7")
    assert (done.returncode, done.stdout) == (1, "")
    assert "run: cdc-worker setup" in done.stderr


def test_by_which_key_a_row_is_followed_is_kept(crm: Crm) -> None:
    """Without it nobody knew what became of the row: verify would miss its deletion."""
    add_lead(crm)
    crm.execute("UPDATE lead SET lead_id = 8, email = 'ada@example.com' WHERE lead_id = 7")
    crm.record()
    forget(crm, "--lead", "8")
    assert crm.activities()[-1]["metadata"] == {"erased": True, "changes": {"lead_id": {"old": 7, "new": 8}}}
    crm.execute("UPDATE lead SET lead_id = 9 WHERE lead_id = 8")
    crm.record()
    assert crm.activities()[-1]["metadata"] == {"erased": True, "changes": {"lead_id": {"old": 8, "new": 9}}}
