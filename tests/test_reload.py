"""A profile that grows while the worker runs: set up again, SIGHUP, and the new table is recorded from then on."""

from __future__ import annotations

import signal
from pathlib import Path

from application import Application, owed, statuses, told
from support import Crm, eventually

from cdc_worker import ddl

LEADFI = (Path(ddl.__file__).parent / "profiles" / "leadfi.toml").read_text("utf-8")

WITH_CONTACTS = LEADFI.replace(
    "[tables.contact]",
    """[tables.contact]
identity = { contact_id = "{row.contact_id}" }
fields = { lead = "{row.lead_id}", customer = "{row.customer_uid}" }

[[tables.contact.rules]]
on = "insert"
type = "contact_added"
description = "Contact {new.contact_id} added"

[[tables.contact.rules]]
on = "update"
changed = "*"
type = "contact_updated"
description = "Contact {new.contact_id} updated: {columns}"
""",
)


def with_profile(crm: Crm, text: str) -> Path:
    """Let the commands use a profile with this text."""
    path = crm.directory / "profile.toml"
    path.write_text(text, "utf-8")
    crm.settings["profile"] = str(path)
    return path


def contact(crm: Crm, number: int) -> None:
    crm.execute("INSERT INTO contact (contact_id, customer_uid, lead_id) VALUES (%s, 1, 1)", number)
    crm.execute("UPDATE contact SET is_primary_contact = false WHERE contact_id = %s", number)


def test_a_table_that_is_added_to_a_running_worker_is_recorded_from_then_on(crm: Crm) -> None:
    with_profile(crm, LEADFI)
    crm.add_leads(100)
    crm.execute("INSERT INTO customer (customer_uid, name) VALUES (1, 'Acme')")
    contact(crm, 1)
    with crm.worker() as worker, Application(crm, statuses) as application:
        worker.wait_for("replication_started")
        application.go_on(10)
        contact(crm, 2)
        path = with_profile(crm, WITH_CONTACTS)
        assert crm.succeed("setup").splitlines()[0] == "replica identity of public.contact is FULL"
        contact(crm, 3)
        worker.process.send_signal(signal.SIGHUP)
        tables = worker.wait_for("profile_reloaded")["tables"]
        assert tables == ["public.contact", "public.customer", "public.lead"]
        contact(crm, 4)
        application.go_on(10)
        path.write_text("name = 'broken'", "utf-8")
        worker.process.send_signal(signal.SIGHUP)
        assert 'profile "' in worker.wait_for("profile_refused")["reason"]
        contact(crm, 5)
        path.write_text(WITH_CONTACTS.replace('table = "activity"', 'table = "nowhere"'), "utf-8")
        worker.process.send_signal(signal.SIGHUP)
        eventually(lambda: len(worker.events("profile_refused")) == 2)
        assert "target table public.nowhere does not exist" in worker.events("profile_refused")[1]["reason"]
        application.go_on(10)
    path.write_text(WITH_CONTACTS, "utf-8")
    crm.record()
    assert told(crm) == dict.fromkeys(owed(application.done), 1)
    contacts = [a["description"] for a in crm.activities() if a["activity_type"].startswith("contact")]
    # The third was there before the signal, and may have been read before it.
    assert contacts[-4:] == [
        "Contact 4 added",
        "Contact 4 updated: is_primary_contact",
        "Contact 5 added",
        "Contact 5 updated: is_primary_contact",
    ]
    assert {text.split(":")[0] for text in contacts[:-4]} <= {"Contact 3 added", "Contact 3 updated"}
    assert crm.value("SELECT count(*) FROM cdc_worker.dead_letter") == 0


def test_a_table_is_recorded_from_its_full_replica_identity_on_however_far_the_worker_lags(crm: Crm) -> None:
    """What was changed before carries no old values: it is left out, and is no dead letter."""
    crm.add_leads(1)
    crm.execute("INSERT INTO customer (customer_uid, name) VALUES (1, 'Acme')")
    contact(crm, 1)
    with_profile(crm, WITH_CONTACTS)
    crm.succeed("setup")
    contact(crm, 2)
    crm.record()
    assert [activity["description"] for activity in crm.activities()][2:] == [
        "Contact 2 added",
        "Contact 2 updated: is_primary_contact",
    ]
    assert crm.value("SELECT count(*) FROM cdc_worker.dead_letter") == 0


def test_an_identity_that_is_mended_on_a_table_that_was_recorded_before_loses_nothing(crm: Crm) -> None:
    """An insert before it is recorded, an update without old values is a dead letter."""
    crm.execute("ALTER TABLE lead REPLICA IDENTITY DEFAULT")
    crm.add_leads(1)
    crm.execute("UPDATE lead SET status = 'unknown before'")
    crm.succeed("setup")
    crm.execute("UPDATE lead SET status = 'known'")
    crm.record()
    assert crm.types() == ["lead_created", "status_changed"]
    assert crm.execute("SELECT kind FROM cdc_worker.dead_letter") == [("old_values_unknown",)]


def test_a_signal_within_a_large_transaction_waits_for_its_end(crm: Crm) -> None:
    with_profile(crm, LEADFI)
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        crm.execute("BEGIN")
        crm.add_leads(20_000)
        crm.execute("UPDATE lead SET status = 'x'")
        crm.execute("COMMIT")
        eventually(lambda: crm.value("SELECT commit_lsn <> '0/0' FROM cdc_worker.checkpoint"))
        with_profile(crm, LEADFI.replace("Lead status changed", "Status changed"))
        worker.process.send_signal(signal.SIGHUP)
        worker.wait_for("profile_reloaded")
        crm.execute("UPDATE lead SET status = 'y' WHERE lead_id = 1")
        eventually(lambda: crm.value("SELECT count(*) FROM activity") == 40_001)
    texts = crm.execute("SELECT description, count(*) FROM activity WHERE activity_type = 'status_changed' GROUP BY 1")
    assert sorted(texts) == [
        ('Lead status changed from "1. lead generated" to "x"', 20_000),
        ('Status changed from "x" to "y"', 1),
    ]
