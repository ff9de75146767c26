"""An installation whose target is another one altogether, described by a profile alone."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from doctoring import report
from support import Crm, eventually

HERE = Path(__file__).parent


@pytest.fixture
def installation(bare_crm: Crm) -> Crm:
    """Leads 1 and 2 are Ada, of jane, and Bea, of joe."""
    bare_crm.connection.execute((HERE / "lead_centric.sql").read_bytes())
    bare_crm.settings["profile"] = str(HERE / "profiles" / "lead_centric.toml")
    for name, bd in (("Ada", "jane"), ("Bea", "joe")):
        bare_crm.execute(
            "INSERT INTO lead (full_name, source, bd_in_charge, type) VALUES (%s, 'web', %s, 'exchange')", name, bd
        )
    bare_crm.setup()
    return bare_crm


def told(crm: Crm) -> list[Any]:
    """Of each activity whose it is and what it says, in order."""
    return crm.execute("SELECT lead_id, activity_type, description, assigned_to FROM activity ORDER BY activity_id")


def titled(crm: Crm, title: str) -> bool:
    """Whether it is recorded that a lead got this title."""
    query = "SELECT count(*) FROM activity WHERE activity_metadata -> 'changes' -> 'title' ->> 'new' = %s"
    return bool(crm.value(query, title))


def add_customer(crm: Crm, uid: int, **contacts: tuple[int, bool | None]) -> None:
    """A customer, and then its contacts: each the lead that it is, and whether it is primary."""
    with crm.connection.transaction():
        crm.execute("INSERT INTO customer (customer_uid, name) VALUES (%s, %s)", uid, f"Customer {uid}")
        for lead, primary in contacts.values():
            crm.execute(
                "INSERT INTO contact (customer_uid, lead_id, is_primary_contact) VALUES (%s, %s, %s)",
                uid,
                lead,
                primary,
            )


def test_a_leads_activities_fill_the_columns_that_this_target_has(installation: Crm) -> None:
    installation.execute("INSERT INTO activity (lead_id, activity_type) VALUES (1, 'call')")
    installation.execute(
        "UPDATE lead SET status = '2. proposal', bd_in_charge = 'joe', country = 'MT' WHERE lead_id = 1"
    )
    installation.execute("UPDATE lead SET status = '7. lost', bd_in_charge = 'jane' WHERE lead_id = 1")
    installation.record()
    columns = "activity_type, activity_category, assigned_to, created_by, is_visible_to_bd, task_status, task_priority"
    assert installation.execute(f"SELECT lead_id, {columns} FROM activity ORDER BY activity_id") == [
        (1, "call", "manual", None, None, True, None, None),
        (1, "status_changed", "system", "joe", "system", True, None, None),
        (1, "assignment_changed", "system", "joe", "system", True, "pending", "high"),
        (1, "lead_updated", "system", "joe", "system", True, None, None),
        (1, "status_changed", "system", "jane", "system", True, None, None),
        (1, "assignment_changed", "system", "jane", "system", True, "pending", "low"),
    ]
    (metadata,) = (
        row[0]
        for row in installation.execute(
            "SELECT activity_metadata FROM activity WHERE activity_type = 'lead_updated'",
        )
    )
    assert metadata["changes"] == {"country": {"old": None, "new": "MT"}}
    assert (metadata["lead_name"], metadata["company_name"]) == ("Ada", None)


def test_a_customers_activities_belong_to_the_lead_of_its_primary_contact(installation: Crm) -> None:
    add_customer(installation, 10, other=(1, False), primary=(2, True))
    installation.execute("UPDATE customer SET country = 'MT' WHERE customer_uid = 10")
    installation.record()
    assert told(installation) == [
        (2, "customer_created", 'Customer "Customer 10" created for Bea', "joe"),
        (2, "customer_updated", 'Customer "Customer 10" updated: country', "joe"),
    ]
    assert installation.value("SELECT activity_metadata ->> 'customer_uid' FROM activity LIMIT 1") == "10"


def test_of_several_primary_contacts_it_is_the_first(installation: Crm) -> None:
    add_customer(installation, 10, first=(2, True), second=(1, True))
    installation.record()
    assert [lead for lead, *_ in told(installation)] == [2]


def test_where_there_is_no_primary_contact_nothing_is_recorded(installation: Crm) -> None:
    add_customer(installation, 10)
    add_customer(installation, 11, other=(1, False), unknown=(2, None))
    installation.execute("UPDATE customer SET country = 'MT'")
    installation.record()
    assert told(installation) == []
    assert installation.value("SELECT count(*) FROM cdc_worker.dead_letter") == 0


def test_a_customer_that_gets_another_primary_contact_belongs_to_that_lead_from_then_on(installation: Crm) -> None:
    add_customer(installation, 10, first=(1, True), second=(2, False))
    steps = [
        "UPDATE contact SET is_primary_contact = NOT is_primary_contact",
        "UPDATE lead SET bd_in_charge = 'jim' WHERE lead_id = 2",
        "DELETE FROM contact WHERE lead_id = 2",
        "INSERT INTO contact (customer_uid, lead_id) VALUES (10, 1)",
        "TRUNCATE contact",
    ]
    with installation.worker() as worker:
        worker.wait_for("replication_started")
        for turn, step in enumerate(["SELECT", *steps]):
            installation.connection.execute(step.encode())
            installation.execute("UPDATE customer SET name = %s", f"Turn {turn}")
            installation.execute("UPDATE lead SET title = %s WHERE lead_id = 1", f"Turn {turn}")
            eventually(partial(titled, installation, f"Turn {turn}"))
        assert worker.terminate() == 0
    assert [(lead, said, to) for lead, type_, said, to in told(installation) if type_ == "customer_updated"] == [
        (1, 'Customer "Turn 0" updated: name', "jane"),
        (2, 'Customer "Turn 1" updated: name', "joe"),
        (2, 'Customer "Turn 2" updated: name', "jim"),
        (1, 'Customer "Turn 4" updated: name', "jane"),
    ]


def test_a_customer_that_is_deleted_takes_along_its_contacts_which_tell_whose_it_was(installation: Crm) -> None:
    """Of two thousand it isn't known whose they were until long after each was deleted."""
    installation.execute("INSERT INTO customer (customer_uid, name) SELECT n, 'x' FROM generate_series(1, 2001) n")
    installation.execute(
        "INSERT INTO contact (customer_uid, lead_id, is_primary_contact)"
        " SELECT n, n %% 2 + 1, n <= 2000 FROM generate_series(1, 2001) n"
    )
    installation.execute("DELETE FROM customer")
    installation.record()
    deleted = "SELECT lead_id, count(*) FROM activity WHERE activity_type = 'customer_deleted' GROUP BY 1 ORDER BY 1"
    assert installation.execute(deleted) == [(1, 1000), (2, 1000)]
    assert installation.value("SELECT count(*) FROM cdc_worker.dead_letter") == 0


def test_the_doctor_finds_nothing_that_fails(installation: Crm) -> None:
    assert [finding for finding in report(installation) if finding.outcome in ("failed", "unknown")] == []


def test_a_value_that_the_target_would_refuse_is_found_by_the_doctor(installation: Crm) -> None:
    path = installation.directory / "urgent.toml"
    text = (HERE / "profiles" / "lead_centric.toml").read_text("utf-8")
    path.write_text(text.replace('task_status = "pending"', 'task_status = "open"'), "utf-8")
    installation.settings["profile"] = str(path)
    failed = [finding.message for finding in report(installation) if finding.outcome == "failed"]
    assert len(failed) == 1
    assert "activity_task_status_check" in failed[0]
