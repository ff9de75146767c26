"""Columns of captured tables that change while the worker runs: what can be said is recorded, and nothing ends."""

from __future__ import annotations

from typing import Any, LiteralString

import pytest
from psycopg import sql
from support import Crm, WorkerProcess, eventually

from cdc_worker.errors import CatalogMismatchError


def letters(crm: Crm) -> list[tuple[Any, ...]]:
    """The dead letters: kind and rule."""
    return crm.execute(
        "SELECT kind, split_part(change_key, '/', 6) FROM cdc_worker.dead_letter ORDER BY dead_letter_id"
    )


def cut_off(crm: Crm, worker: WorkerProcess) -> None:
    """End its connections, and wait until it is back."""
    before = len(worker.events("replication_started"))
    crm.execute("SELECT pg_terminate_backend(%s)", crm.reader())
    eventually(lambda: len(worker.events("replication_started")) > before, what="it is back")


def settled(crm: Crm) -> None:
    """Wait until all that is committed by now has been dealt with."""
    uid = crm.value("SELECT count(*) + 1000 FROM customer")
    crm.execute("INSERT INTO customer (customer_uid, name) VALUES (%s, 'last')", uid)
    told = "SELECT count(*) FROM activity WHERE activity_type = 'customer_created' AND customer_uid = %s"
    eventually(lambda: crm.value(told, uid))


def of_leads(crm: Crm) -> list[dict[str, Any]]:
    """What has been recorded of leads, in order."""
    return [activity for activity in crm.activities() if activity["customer_uid"] is None]


LEAD: LiteralString = "INSERT INTO lead (full_name, source, bd_in_charge, type) VALUES ('Ann', 's', 'b', 't')"


def test_a_column_that_is_gone_ends_neither_the_stream_nor_the_next_connection(crm: Crm) -> None:
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        crm.execute("ALTER TABLE lead RENAME company_name TO firm")
        crm.execute("ALTER TABLE lead DROP title, ADD budget int DEFAULT 5")
        crm.execute(LEAD)
        crm.execute("UPDATE lead SET status = 'b', budget = 6")
        settled(crm)
        for _ in range(2):
            cut_off(crm, worker)
        crm.execute("UPDATE lead SET bd_in_charge = 'joe', firm = 'Engines'")
        settled(crm)
        (misfits,) = worker.events("profile_misfits")
        assert misfits["level"] == "warning"
        assert misfits["faults"] == ["captured table public.lead has no column company_name"]
        assert worker.terminate() == 0
    assert letters(crm) == []
    told = of_leads(crm)
    assert [activity["activity_type"] for activity in told] == [
        *("lead_created", "status_changed", "lead_updated", "assignment_changed", "lead_updated")
    ]
    assert told[2]["metadata"] == {
        "lead_id": 1,
        "lead_name": "Ann",
        "changes": {"budget": {"old": 5, "new": 6}},
        "context_source": "default",
    }
    assert told[4]["metadata"]["changes"] == {"firm": {"old": None, "new": "Engines"}}
    done = crm.command("run", "--once")
    assert done.returncode == CatalogMismatchError.exit_code, "at its start a worker must fit"


def test_what_cannot_be_said_without_a_column_is_a_dead_letter(crm: Crm) -> None:
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        crm.execute("ALTER TABLE lead RENAME full_name TO name")
        crm.execute("INSERT INTO lead (name, source, bd_in_charge, type) VALUES ('Ann', 's', 'b', 't')")
        crm.execute("UPDATE lead SET status = 'b', country = 'UK'")
        crm.execute("DELETE FROM lead")
        settled(crm)
        assert worker.terminate() == 0
    assert letters(crm) == [("rule_failed", name) for name in ("lead_created", "lead_updated", "lead_deleted")]
    assert [activity["description"] for activity in of_leads(crm)] == ['Lead status changed from "" to "b"']


TYPES: dict[str, tuple[LiteralString, list[str]]] = {
    "wider": (
        "ALTER TABLE lead ALTER full_name TYPE text, ALTER lead_id TYPE bigint, ALTER date_created TYPE timestamptz",
        [],
    ),
    "shorter": ("ALTER TABLE lead ALTER status TYPE varchar(1), ALTER source TYPE char(3)", []),
    "text": (
        "ALTER TABLE lead ALTER is_converted DROP DEFAULT, ALTER is_converted TYPE text,"
        " ALTER full_name TYPE bytea USING convert_to(full_name, 'UTF8')",
        ['rule lead_converted of public.lead is about is_converted = "true", which a text is never'],
    ),
    "numbers": ("ALTER TABLE lead ALTER country TYPE numeric USING 1.50, ALTER bd_in_charge TYPE int USING 7", []),
    "json": ("ALTER TABLE lead ALTER country TYPE jsonb USING 'null', ALTER type TYPE text[] USING ARRAY[type]", []),
}


def without_views(crm: Crm) -> None:
    """A type can't be changed under a view."""
    for (view,) in crm.execute("SELECT viewname FROM pg_views WHERE schemaname = 'public'"):
        crm.connection.execute(sql.SQL("DROP VIEW IF EXISTS {} CASCADE").format(sql.Identifier(view)))


@pytest.mark.parametrize("kind", TYPES)
def test_a_column_of_another_type_ends_nothing(crm: Crm, kind: str) -> None:
    alter, faults = TYPES[kind]
    crm.execute(LEAD)
    without_views(crm)
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        settled(crm)
        crm.execute(alter)
        crm.execute("UPDATE lead SET telegram = 'x'")
        cut_off(crm, worker)
        crm.execute("UPDATE lead SET country = NULL, telegram = 'y'")
        crm.execute("DELETE FROM lead")
        settled(crm)
        assert worker.terminate() == 0
        assert [event["faults"] for event in worker.events("profile_misfits")] == ([faults] if faults else [])
    assert letters(crm) == []
    assert [activity["activity_type"] for activity in of_leads(crm)] == [
        *("lead_created", "lead_updated", "lead_updated", "lead_deleted")
    ]


def test_keys_that_the_target_cannot_take_any_more_are_dead_letters(crm: Crm) -> None:
    crm.execute(LEAD)
    without_views(crm)
    crm.connection.execute("ALTER TABLE contact DROP CONSTRAINT contact_lead_id_fkey")
    crm.connection.execute("ALTER TABLE activity DROP CONSTRAINT activity_lead_id_fkey")
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        crm.execute("ALTER TABLE lead ALTER lead_id DROP DEFAULT, ALTER lead_id TYPE text USING 'L' || lead_id")
        crm.execute("UPDATE lead SET telegram = 'x'")
        cut_off(crm, worker)
        crm.execute("DELETE FROM lead")
        settled(crm)
        assert worker.terminate() == 0
    assert letters(crm) == [("refused", "lead_updated"), ("refused", "lead_deleted")]
    assert [activity["activity_type"] for activity in of_leads(crm)] == ["lead_created"]
