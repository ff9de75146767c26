"""Every line of what the LeadFi profile records.

`recordings/leadfi.jsonl` is the output of

    pg_recvlogical --start --slot s --no-loop --endpos "$(psql -Atc 'SELECT pg_current_wal_lsn()')" -f - -o NAME=VALUE

with the options that `wal2json.options` gives for lead, customer and contact and the prefix `cdc_worker.context`, after
the second half of `recordings/leadfi.sql`; the slot was made between its halves. The activities beside it were read
line by line against the profile's table when they were made.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from factories import (
    COMMITTED_AT,
    activities,
    contact,
    customer,
    deleted,
    inserted,
    lead,
    leadfi,
    outcomes,
    said,
    truncated,
    updated,
)

from cdc_worker import wal2json
from cdc_worker.activities import Activity
from cdc_worker.changes import Assembler, Change, Message
from cdc_worker.profile import load
from cdc_worker.transform import Transformer
from cdc_worker.values import Value

RECORDINGS = Path(__file__).parent / "recordings"

LEAD = {"lead_id": 7, "lead_name": "Ada Lovelace", "company_name": "Engines"}
CUSTOMER = {"customer_uid": 42, "customer_name": "Engines Ltd"}


def of_lead(type_: str, description: str, metadata: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """An activity of the lead that `lead()` is, by the system."""
    return {
        "type": type_,
        "description": description,
        "metadata": {**LEAD, **metadata},
        "occurred_at": COMMITTED_AT,
        "created_by": "system",
        "lead": 7,
        "owner": "jane",
        **fields,
    }


def of_customer(type_: str, description: str, metadata: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """An activity of the customer that `customer()` is, by the system."""
    return {
        "type": type_,
        "description": description,
        "metadata": {**CUSTOMER, **metadata},
        "occurred_at": COMMITTED_AT,
        "created_by": "system",
        "customer": 42,
        **fields,
    }


def types(*messages: Change | Message) -> list[str]:
    return [fields["type"] for fields in activities(*messages)]


# Leads


def test_a_new_lead() -> None:
    assert activities(inserted("lead", lead())) == [
        of_lead(
            "lead_created",
            'Lead "Ada Lovelace" created by jane',
            {"source": "web", "type": "exchange", "status": "1. lead generated", "bd_in_charge": "jane"},
        )
    ]


def test_another_status() -> None:
    assert activities(updated("lead", lead(status="2. proposal"), status="3. negotiation")) == [
        of_lead(
            "status_changed",
            'Lead status changed from "2. proposal" to "3. negotiation"',
            {"old_status": "2. proposal", "new_status": "3. negotiation"},
        )
    ]


@pytest.mark.parametrize(
    ("old", "new", "description"),
    [
        (None, "2. proposal", 'Lead status changed from "" to "2. proposal"'),
        ("2. proposal", None, 'Lead status changed from "2. proposal" to ""'),
        ("", None, 'Lead status changed from "" to ""'),
    ],
)
def test_a_status_that_comes_from_or_goes_to_null(old: str | None, new: str | None, description: str) -> None:
    """The triggers' `!=` was silent: a first status was never recorded."""
    assert activities(updated("lead", lead(status=old), status=new)) == [
        of_lead("status_changed", description, {"old_status": old, "new_status": new})
    ]


def test_another_assignment_is_told_with_the_new_bd() -> None:
    assert activities(updated("lead", lead(bd_in_charge="jane"), bd_in_charge="joe")) == [
        of_lead(
            "assignment_changed",
            'Lead assignment changed from "jane" to "joe"',
            {"old_bd": "jane", "new_bd": "joe"},
            owner="joe",
        )
    ]


@pytest.mark.parametrize(
    ("old", "new", "came"),
    [
        (None, None, []),
        (None, False, ["lead_updated"]),
        (None, True, ["lead_converted"]),
        (False, None, ["lead_updated"]),
        (False, False, []),
        (False, True, ["lead_converted"]),
        (True, None, ["lead_updated"]),
        (True, False, ["lead_updated"]),
        (True, True, []),
    ],
)
def test_a_conversion_is_from_not_true_to_true(old: Value, new: Value, came: list[str]) -> None:
    assert types(updated("lead", lead(is_converted=old), is_converted=new)) == came


def test_a_conversion_whose_customer_nobody_tells() -> None:
    assert activities(updated("lead", lead(status="6. closed won"), is_converted=True)) == [
        of_lead(
            "lead_converted",
            'Lead "Ada Lovelace" converted to customer',
            {"final_status": "6. closed won"},
            customer=None,
        )
    ]


def test_a_conversion_is_linked_to_the_customer_that_the_contact_of_its_transaction_tells() -> None:
    assert activities(
        inserted("customer", customer()), updated("lead", lead(), is_converted=True), inserted("contact", contact())
    ) == [
        of_customer("customer_created", 'Customer "Engines Ltd" created (ID: 42)', {"type": "exchange"}),
        of_lead(
            "lead_converted",
            'Lead "Ada Lovelace" converted to customer',
            {"final_status": "1. lead generated", "customer_uid": 42},
            customer=42,
        ),
    ]


def test_a_conversion_with_its_status_takes_the_new_one_as_final() -> None:
    status, conversion = activities(updated("lead", lead(), status="6. closed won", is_converted=True))
    assert status["type"] == "status_changed"
    assert conversion["metadata"] == {**LEAD, "final_status": "6. closed won"}


def test_other_columns() -> None:
    assert activities(updated("lead", lead(title=None, country="UK"), country=None, title="Countess")) == [
        of_lead(
            "lead_updated",
            'Lead "Ada Lovelace" updated: title, country',
            {"changes": {"title": {"old": None, "new": "Countess"}, "country": {"old": "UK", "new": None}}},
        )
    ]


@pytest.mark.parametrize(
    "column",
    [
        *("title", "email", "telegram", "phone_number", "source", "date_created", "linkedin_url", "country"),
        *("background", "type"),
    ],
)
def test_each_other_column_is_recorded(column: str) -> None:
    assert activities(updated("lead", lead(), **{column: "new"})) == [
        of_lead(
            "lead_updated",
            f'Lead "Ada Lovelace" updated: {column}',
            {"changes": {column: {"old": lead()[column], "new": "new"}}},
        )
    ]


def test_a_name_and_a_company_are_other_columns_and_identity_is_the_new_one() -> None:
    assert activities(updated("lead", lead(), full_name="Ada King", company_name=None)) == [
        of_lead(
            "lead_updated",
            'Lead "Ada King" updated: full_name, company_name',
            {
                "lead_name": "Ada King",
                "company_name": None,
                "changes": {
                    "full_name": {"old": "Ada Lovelace", "new": "Ada King"},
                    "company_name": {"old": "Engines", "new": None},
                },
            },
        )
    ]


def test_is_converted_back_is_an_update() -> None:
    (fields,) = activities(updated("lead", lead(is_converted=True), is_converted=False))
    assert fields["metadata"] == {**LEAD, "changes": {"is_converted": {"old": True, "new": False}}}
    assert fields["description"] == 'Lead "Ada Lovelace" updated: is_converted'


def test_a_new_primary_key_links_to_the_new_one_and_tells_both() -> None:
    assert activities(updated("lead", lead(), lead_id=8)) == [
        of_lead(
            "lead_updated",
            'Lead "Ada Lovelace" updated: lead_id',
            {"lead_id": 8, "changes": {"lead_id": {"old": 7, "new": 8}}},
            lead=8,
        )
    ]


def test_long_texts_are_shortened() -> None:
    (fields,) = activities(updated("lead", lead(background="a" * 50_000), background="b" * 201))
    assert fields["metadata"]["changes"] == {"background": {"old": "a" * 200 + "…", "new": "b" * 200 + "…"}}


def test_everything_at_once_is_told_in_the_order_of_the_profile() -> None:
    change = updated("lead", lead(), title="x", is_converted=True, bd_in_charge="joe", status=None, lead_id=8)
    came = activities(change)
    assert [fields["type"] for fields in came] == [
        *("status_changed", "assignment_changed", "lead_converted", "lead_updated"),
    ]
    assert [(fields["lead"], fields["owner"]) for fields in came] == [(8, "joe")] * 4
    assert came[3]["description"] == 'Lead "Ada Lovelace" updated: lead_id, title'
    assert list(came[3]["metadata"]["changes"]) == ["lead_id", "title"]


def test_a_deleted_lead_keeps_the_old_rows_bd() -> None:
    assert activities(deleted("lead", lead(status=None))) == [
        of_lead(
            "lead_deleted",
            'Lead "Ada Lovelace" deleted',
            {"status": None, "bd_in_charge": "jane", "source": "web", "type": "exchange"},
        )
    ]


# Customers


def test_a_new_customer() -> None:
    assert activities(inserted("customer", customer(type=None))) == [
        of_customer("customer_created", 'Customer "Engines Ltd" created (ID: 42)', {"type": None})
    ]


@pytest.mark.parametrize(
    ("old", "new", "status"),
    [
        (None, None, None),
        (None, False, None),
        (None, True, ("open", "closed")),
        (False, None, None),
        (False, False, None),
        (False, True, ("open", "closed")),
        (True, None, ("closed", "open")),
        (True, False, ("closed", "open")),
        (True, True, None),
    ],
)
def test_a_customer_is_closed_when_is_closed_is_true(old: Value, new: Value, status: tuple[str, str] | None) -> None:
    """Both rows are written, as the triggers wrote the second; from NULL to false and back only the second."""
    expected = []
    if status:
        expected.append(
            of_customer(
                "status_changed",
                f'Customer status changed from "{status[0]}" to "{status[1]}"',
                {"old_status": status[0], "new_status": status[1]},
            )
        )
    if old is not new:
        expected.append(
            of_customer(
                "customer_updated",
                'Customer "Engines Ltd" updated',
                {
                    "old_name": "Engines Ltd",
                    "new_name": "Engines Ltd",
                    "old_closed": old,
                    "new_closed": new,
                    "changes": {"is_closed": {"old": old, "new": new}},
                },
            )
        )
    assert activities(updated("customer", customer(is_closed=old), is_closed=new)) == expected


@pytest.mark.parametrize("column", ["registered_email", "type", "date_closed", "country", "date_created"])
def test_each_other_column_of_a_customer_is_recorded_with_both_values(column: str) -> None:
    """A change of type recorded neither."""
    assert activities(updated("customer", customer(), **{column: "new"})) == [
        of_customer(
            "customer_updated",
            'Customer "Engines Ltd" updated',
            {
                "old_name": "Engines Ltd",
                "new_name": "Engines Ltd",
                "old_closed": False,
                "new_closed": False,
                "changes": {column: {"old": customer()[column], "new": "new"}},
            },
        )
    ]


def test_another_name() -> None:
    (fields,) = activities(updated("customer", customer(), name="Engines & Sons"))
    assert fields["description"] == 'Customer "Engines & Sons" updated'
    assert fields["metadata"] == {
        "customer_uid": 42,
        "customer_name": "Engines & Sons",
        "old_name": "Engines Ltd",
        "new_name": "Engines & Sons",
        "old_closed": False,
        "new_closed": False,
        "changes": {"name": {"old": "Engines Ltd", "new": "Engines & Sons"}},
    }


def test_a_customers_new_primary_key_links_to_the_new_one_and_tells_both() -> None:
    (fields,) = activities(updated("customer", customer(), customer_uid=43))
    assert (fields["customer"], fields["metadata"]["customer_uid"]) == (43, 43)
    assert fields["metadata"]["changes"] == {"customer_uid": {"old": 42, "new": 43}}


def test_a_deleted_customer() -> None:
    assert activities(deleted("customer", customer(is_closed=None))) == [
        of_customer(
            "customer_deleted",
            'Customer "Engines Ltd" deleted (ID: 42)',
            {"type": "exchange", "is_closed": None},
        )
    ]


# Both


@pytest.mark.parametrize(
    ("table", "type_", "description", "links"),
    [
        ("lead", "lead_deleted", "All leads removed (TRUNCATE)", {"lead": None, "owner": None}),
        ("customer", "customer_deleted", "All customers removed (TRUNCATE)", {"customer": None}),
    ],
)
def test_a_truncate_is_one_activity_without_a_link(
    table: str, type_: str, description: str, links: dict[str, None]
) -> None:
    assert activities(truncated(table)) == [
        {
            "type": type_,
            "description": description,
            "metadata": {"truncated": True},
            "occurred_at": COMMITTED_AT,
            "created_by": "system",
            **links,
        }
    ]


EVERY_CHANGE = [
    inserted("lead", lead()),
    updated("lead", lead(), status="x", bd_in_charge="joe", is_converted=True, title="x"),
    deleted("lead", lead()),
    truncated("lead"),
    inserted("customer", customer()),
    updated("customer", customer(), is_closed=True),
    deleted("customer", customer()),
    truncated("customer"),
]


def test_the_one_who_did_it_is_credited_in_every_activity() -> None:
    """Never the assignee of the row, as the triggers had it."""
    nobody, jane = activities(*EVERY_CHANGE), activities(said('{"changed_by": "jane_doe"}'), *EVERY_CHANGE)
    assert len(nobody) == len(jane) == 12
    assert {fields["created_by"] for fields in nobody} == {"system"}
    assert not any("changed_by" in fields["metadata"] for fields in nobody)
    by_jane = {"changed_by": "jane_doe", "context_source": "message"}
    assert jane == [{**fields, "created_by": "jane_doe", "metadata": fields["metadata"] | by_jane} for fields in nobody]


def test_every_activity_of_a_row_carries_its_identity() -> None:
    for fields in activities(*EVERY_CHANGE):
        if "truncated" not in fields["metadata"]:
            identity = LEAD if "lead" in fields else CUSTOMER
            assert fields["metadata"].items() >= identity.items()


def test_updates_that_change_nothing_and_contacts_are_no_activities() -> None:
    assert activities(updated("lead", lead()), updated("customer", customer())) == []
    assert (
        activities(
            inserted("contact", contact()),
            updated("contact", contact(), is_primary_contact=False),
            truncated("contact"),
        )
        == []
    )


def test_values_of_customers_are_untouched() -> None:
    name = "{new.status} {0} 100% %s \"quotes\" 'more' \\ $1 \n\t😀"
    (created,) = activities(inserted("lead", lead(full_name=name, company_name=name)))
    assert created["description"] == f'Lead "{name}" created by jane'
    assert created["metadata"]["company_name"] == name


def test_each_rule_of_one_change_has_a_key_of_its_own() -> None:
    came = outcomes(*EVERY_CHANGE)
    assert len({outcome.change_key for outcome in came}) == len(came)


def test_the_target_is_written_as_leadfi_has_it() -> None:
    target = load("leadfi").target
    assert target.columns == {
        "activity_type": "type",
        "description": "description",
        "metadata": "metadata",
        "date_created": "occurred_at",
        "bd_in_charge": "owner",
        "created_by": "created_by",
        "lead_id": "lead",
        "customer_uid": "customer",
        "change_key": "change_key",
    }
    assert target.constants == {"activity_category": "system", "is_visible_to_bd": True}


def test_a_recorded_day_becomes_the_activities_beside_it() -> None:
    assembler = Assembler()
    transformer = Transformer(leadfi(), worker="cdc_worker", system_identifier="7000000000000000000")
    came = []
    for line in (RECORDINGS / "leadfi.jsonl").read_bytes().splitlines():
        transaction = assembler.feed(wal2json.decode(line), line)
        if transaction is not None:
            came += transformer.feed(transaction)
    expected = json.loads((RECORDINGS / "leadfi.activities.json").read_text("utf-8"))
    assert [
        {
            "change_key": outcome.change_key,
            **outcome.fields,
            "occurred_at": outcome.fields["occurred_at"].isoformat().replace("+00:00", "Z"),
        }
        for outcome in came
        if isinstance(outcome, Activity)
    ] == expected
    assert len(came) == len(expected) == 25
    assert {(fields["type"], fields["change_key"].rpartition("/")[2]) for fields in expected} == {
        ("lead_created", "lead_created"),
        ("status_changed", "status_changed"),
        ("assignment_changed", "assignment_changed"),
        ("lead_converted", "lead_converted"),
        ("lead_updated", "lead_updated"),
        ("lead_deleted", "lead_deleted"),
        ("lead_deleted", "leads_truncated"),
        ("customer_created", "customer_created"),
        ("customer_updated", "customer_updated"),
        ("customer_deleted", "customer_deleted"),
        ("customer_deleted", "customers_truncated"),
    }
