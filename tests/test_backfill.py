"""History for rows that were there before the worker: each creation once, whoever tells of it, and no more than is known."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support import Crm, eventually

from cdc_worker import config, log, profile
from cdc_worker.backfill import Backfilled, Wishes, backfill


def add_leads(crm: Crm, *lead_ids: int, status: str | None = "2. proposal", converted: bool = False) -> None:
    for lead_id in lead_ids:
        crm.execute(
            "INSERT INTO lead (lead_id, full_name, source, bd_in_charge, type, status, is_converted, date_created)"
            " VALUES (%s, %s, 'web', 'jane', 'exchange', %s, %s, timestamp '2020-01-01 12:00' + %s * interval '1 day')",
            lead_id,
            f"Lead {lead_id}",
            status,
            converted,
            lead_id,
        )


def add_customer(crm: Crm, customer_uid: int, *, lead_id: int | None = None) -> None:
    crm.execute(
        "INSERT INTO customer (customer_uid, name, type, date_created) VALUES (%s, 'Acme', 'fund', '2021-05-06 07:08:09')",
        customer_uid,
    )
    if lead_id is not None:
        crm.execute(
            "INSERT INTO contact (customer_uid, lead_id, date_added) VALUES (%s, %s, '2021-06-07 08:09:10.123456')",
            customer_uid,
            lead_id,
        )


def fill(crm: Crm, *tables: str, dry_run: bool = False, **wishes: Any) -> dict[str, Backfilled]:
    """`cdc-worker backfill`, in this process; what was done by table."""
    settings = config.load(None, {"dsn": crm.dsn, "slot": crm.slot} | crm.settings)
    given = profile.load(settings.profile)
    done = backfill(settings, given, tables, Wishes(**wishes), log=log.get(), dry_run=dry_run)
    return {table.table.removeprefix("public."): table for table in done}


def told(crm: Crm) -> list[tuple[str, int | None, int | None]]:
    """Type and links of what the worker wrote, in order of the subjects."""
    found = crm.execute(
        "SELECT activity_type, lead_id, customer_uid FROM activity WHERE change_key IS NOT NULL"
        " ORDER BY lead_id, customer_uid, activity_type"
    )
    return [(kind, lead_id, customer_uid) for kind, lead_id, customer_uid in found]


def test_rows_that_were_there_before_get_the_history_that_is_known(bare_crm: Crm) -> None:
    crm = bare_crm
    add_leads(crm, 1, 2)
    add_leads(crm, 3, status=None, converted=True)
    add_leads(crm, 4, converted=True)  # nobody knows when
    add_customer(crm, 70, lead_id=3)
    crm.setup()
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        done = fill(crm)
        assert fill(crm)["lead"].activities == {}  # once is enough
        worker.terminate()
    assert {name: (table.rows, table.activities) for name, table in done.items()} == {
        "lead": (4, {"lead_created": 4, "lead_converted": 1}),
        "customer": (1, {"customer_created": 1}),
    }
    assert told(crm) == [
        ("lead_created", 1, None),
        ("lead_created", 2, None),
        ("lead_converted", 3, 70),
        ("lead_created", 3, None),
        ("lead_created", 4, None),
        ("customer_created", None, 70),
    ]
    by_type = {activity["activity_type"]: activity for activity in crm.activities() if activity["lead_id"] in (3, None)}
    created = by_type["lead_created"]
    as_of, lsn = (created["metadata"].pop(name) for name in ("as_of", "as_of_lsn"))
    assert crm.value("SELECT %s::timestamptz BETWEEN now() - interval '5 minutes' AND now()", as_of)
    assert crm.value("SELECT %s::pg_lsn < pg_current_wal_lsn()", lsn)
    cluster = crm.value("SELECT cdc_worker.cluster()")
    assert created == {
        "activity_id": created["activity_id"],
        "lead_id": 3,
        "customer_uid": None,
        "activity_type": "lead_created",
        "activity_category": "system",
        "description": 'Lead "Lead 3" created',
        "metadata": {
            "lead_id": 3,
            "lead_name": "Lead 3",
            "company_name": None,
            "context_source": "default",
            "backfilled": True,
            "values": {"source": "web", "type": "exchange", "status": None, "bd_in_charge": "jane"},
        },
        "date_created": crm.value("SELECT date_created FROM lead WHERE lead_id = 3"),
        "bd_in_charge": None,
        "created_by": "system",
        "is_visible_to_bd": True,
        "change_key": f"{crm.slot}/{cluster}/backfill/public.lead/3/lead_created/0",
    } | {name: created[name] for name in created.keys() - {*CREATED}}
    converted = by_type["lead_converted"]
    assert converted["description"] == 'Lead "Lead 3" converted to customer'
    assert converted["date_created"] == crm.value("SELECT date_added FROM contact")
    assert converted["metadata"]["values"] == {"status": None, "customer_uid": 70}
    assert by_type["customer_created"]["date_created"] == crm.value("SELECT date_created FROM customer")


CREATED = (
    *("activity_id", "lead_id", "customer_uid", "activity_type", "activity_category", "description", "metadata"),
    *("date_created", "bd_in_charge", "created_by", "is_visible_to_bd", "change_key"),
)


def test_what_the_stream_has_told_or_will_tell_is_not_told_again(bare_crm: Crm) -> None:
    crm = bare_crm
    add_leads(crm, 1)
    crm.setup()
    add_leads(crm, 2)
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        add_leads(crm, 3)
        fill(crm, "lead")
        add_leads(crm, 4)
        worker.terminate()
    crm.record()
    assert told(crm) == [("lead_created", lead_id, None) for lead_id in (1, 2, 3, 4)]
    assert [a["lead_id"] for a in crm.activities() if a["metadata"].get("backfilled")] == [1]
