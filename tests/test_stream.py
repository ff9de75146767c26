"""The main job on a real server: what is committed becomes activities, whatever the values and settings."""

from __future__ import annotations

import json

import psycopg
import pytest
from psycopg import sql
from support import Crm, either_plugin, eventually, leadfi

pytestmark = either_plugin


def test_a_transaction_becomes_activities_in_the_order_of_its_changes(crm: Crm) -> None:
    with crm.connection.transaction():
        crm.add_leads(1)
        crm.execute("UPDATE lead SET status = '2. proposal'")
        crm.execute("UPDATE lead SET bd_in_charge = 'bob', title = 'CTO'")
        crm.execute("DELETE FROM lead")
    crm.record()
    assert [(a["activity_type"], a["description"]) for a in crm.activities()] == [
        ("lead_created", 'Lead "Lead 1" created by jane'),
        ("status_changed", 'Lead status changed from "1. lead generated" to "2. proposal"'),
        ("assignment_changed", 'Lead assignment changed from "jane" to "bob"'),
        ("lead_updated", 'Lead "Lead 1" updated: title'),
        ("lead_deleted", 'Lead "Lead 1" deleted'),
    ]


def test_every_column_of_an_activity_is_filled(crm: Crm) -> None:
    with crm.connection.transaction():
        crm.execute("SELECT pg_logical_emit_message(true, 'cdc_worker.context', '{\"changed_by\": \"jane_doe\"}')")
        crm.add_leads(1)
        committed_at = crm.value("SELECT now()::timestamp")
    crm.record()
    (activity,) = crm.activities()
    assert activity.pop("date_created") >= committed_at
    assert activity.pop("change_key").endswith("/public.lead/0/lead_created")
    lead_id = crm.value("SELECT lead_id FROM lead")
    assert activity == {
        "activity_id": activity["activity_id"],
        "lead_id": lead_id,
        "customer_uid": None,
        "activity_type": "lead_created",
        "activity_category": "system",
        "description": 'Lead "Lead 1" created by jane',
        "metadata": {
            "lead_id": lead_id,
            "lead_name": "Lead 1",
            "company_name": "Company c4n4ry 1",
            "source": "website",
            "type": "exchange",
            "status": "1. lead generated",
            "bd_in_charge": "jane",
            "changed_by": "jane_doe",
            "context_source": "message",
        },
        "bd_in_charge": "jane",
        "created_by": "jane_doe",
        "is_visible_to_bd": True,
        "manual_lead_id": None,
        "manual_customer_uid": None,
    }


def test_rolled_back_changes_and_savepoints_leave_nothing(crm: Crm) -> None:
    with crm.connection.transaction(force_rollback=True):
        crm.add_leads(3)
    with crm.connection.transaction():
        crm.add_leads(1)
        with crm.connection.transaction(force_rollback=True):
            crm.execute("UPDATE lead SET status = 'never'")
    crm.record()
    assert crm.types() == ["lead_created"]


@pytest.mark.parametrize(
    "name",
    [
        "tab\there",
        "new\nline",
        "back\\slash",
        "\\N",
        "{braces} {0} {new.status}",
        "100 %s %",
        "\"quotes\" 'too'",
        "🎉 é",
    ],
)
def test_text_survives_as_it_is(crm: Crm, name: str) -> None:
    crm.execute("INSERT INTO lead (full_name, source, bd_in_charge, type) VALUES (%s, 's', 'b', 't')", name)
    crm.record()
    (activity,) = crm.activities()
    assert activity["description"] == f'Lead "{name}" created by b'
    assert activity["metadata"]["lead_name"] == name


def test_an_unchanged_toasted_value_is_neither_a_change_nor_null(crm: Crm) -> None:
    crm.add_leads(1)
    crm.execute("ALTER TABLE lead ALTER background SET STORAGE EXTERNAL")
    crm.execute("UPDATE lead SET background = repeat('long ', 10000)")
    crm.record()
    crm.execute("UPDATE lead SET title = 'CTO'")
    crm.execute("UPDATE lead SET background = NULL")
    crm.record()
    changes = [a["metadata"]["changes"] for a in crm.activities()[2:]]
    assert changes == [
        {"title": {"old": None, "new": "CTO"}},
        {"background": {"old": ("long " * 40) + "…", "new": None}},
    ]


def test_settings_of_role_and_database_do_not_change_what_is_recorded(crm: Crm) -> None:
    database = sql.Identifier(crm.connection.info.dbname)
    for setting in (
        "datestyle = 'German'",
        "intervalstyle = 'sql_standard'",
        "bytea_output = 'escape'",
        "extra_float_digits = 0",
        "timezone = 'Asia/Tokyo'",
        "statement_timeout = '1ms'",
        "synchronous_commit = off",
        "client_encoding = 'LATIN1'",
        "default_transaction_isolation = 'serializable'",
    ):
        crm.connection.execute(sql.SQL("ALTER DATABASE {} SET " + setting).format(database))
    crm.connection.execute("SET timezone = 'Asia/Tokyo'")
    crm.execute(
        "INSERT INTO lead (full_name, source, bd_in_charge, type, date_created)"
        " VALUES ('Ann é', 's', 'b', 't', '2026-01-31 12:00:00.123456')"
    )
    crm.execute("UPDATE lead SET date_created = '2026-02-01 12:00:00'")
    crm.record()
    created, updated = crm.activities()
    assert created["description"] == 'Lead "Ann é" created by b'
    assert updated["metadata"]["changes"] == {
        "date_created": {"old": "2026-01-31 12:00:00.123456", "new": "2026-02-01 12:00:00"}
    }
    # The commit time, in the database's zone.
    assert crm.value("SELECT bool_and(abs(extract(epoch FROM now()::timestamp - date_created)) < 600) FROM activity")


def test_the_time_zone_of_timestamps_can_be_set(crm: Crm) -> None:
    crm.add_leads(1)
    crm.record(time_zone="America/Lima")
    assert crm.value(
        "SELECT abs(extract(epoch FROM (now() AT TIME ZONE 'America/Lima') - date_created)) < 600 FROM activity"
    )


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_a_database_in_another_encoding_is_read_right(crm: Crm, encoding: str) -> None:
    name = sql.Identifier(f"{crm.connection.info.dbname}_other")
    create = sql.SQL("CREATE DATABASE {} ENCODING {} LOCALE 'C' TEMPLATE template0")
    crm.connection.execute(create.format(name, encoding))
    dsn = psycopg.conninfo.make_conninfo(crm.dsn, dbname=name.as_string().strip('"'))
    other = Crm(psycopg.conninfo.make_conninfo(dsn, client_encoding="UTF8"), f"{crm.slot}_other", crm.directory)
    other.settings["dsn"] = dsn
    try:
        leadfi(other.connection)
        other.setup()
        other.execute("INSERT INTO lead (full_name, source, bd_in_charge, type) VALUES ('Jürgen é', 's', 'b', 't')")
        other.record()
        assert other.activities()[0]["metadata"]["lead_name"] == "Jürgen é"
    finally:
        other.close()
        crm.execute("SELECT pg_drop_replication_slot(%s)", other.slot)
        crm.connection.execute(sql.SQL("DROP DATABASE {}").format(name))


def test_a_conversion_is_linked_to_its_customer(crm: Crm) -> None:
    crm.add_leads(1)
    with crm.connection.transaction():
        crm.execute("INSERT INTO customer (customer_uid, name) VALUES (77, 'Acme')")
        crm.execute("UPDATE lead SET is_converted = true")
        crm.execute("INSERT INTO contact (customer_uid, lead_id) SELECT 77, lead_id FROM lead")
    crm.record()
    converted = crm.activities()[-1]
    assert converted["activity_type"] == "lead_converted"
    assert converted["customer_uid"] == converted["metadata"]["customer_uid"] == 77


def test_rows_of_one_copy_share_an_lsn_and_are_all_recorded(crm: Crm) -> None:
    with crm.connection.cursor().copy("COPY lead (full_name, source, bd_in_charge, type) FROM STDIN") as copy:
        for number in range(1000):
            copy.write_row((f"Lead {number}", "import", "jane", "exchange"))
    crm.record()
    names = [activity["metadata"]["lead_name"] for activity in crm.activities()]
    assert names == [f"Lead {number}" for number in range(1000)]


def test_manual_activities_are_left_alone(crm: Crm) -> None:
    crm.add_leads(1)
    crm.execute(
        "INSERT INTO activity (lead_id, activity_type, description, bd_in_charge)"
        " SELECT lead_id, 'call', 'x', 'jane' FROM lead"
    )
    before = crm.execute("SELECT * FROM activity")
    crm.record()
    assert crm.execute("SELECT * FROM activity WHERE activity_category = 'manual'") == before
    assert crm.types() == ["lead_created"]


def test_the_daemon_writes_what_is_committed_while_it_runs(crm: Crm) -> None:
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        crm.add_leads(2)
        eventually(lambda: len(crm.activities()) == 2)
        crm.execute("UPDATE lead SET status = '7. lost'")
        eventually(lambda: len(crm.activities()) == 4)
        assert worker.terminate() == 0
    assert json.loads(crm.succeed("status", "--json"))["streaming"] is False
