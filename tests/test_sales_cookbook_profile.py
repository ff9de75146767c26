"""Every line of what the Sales Cookbook profile records, told by the rows of the interaction log."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from decimal import Decimal
from functools import cache
from typing import Any

import pytest
from factories import COMMITTED_AT, assembled, deleted, inserted, said, truncated, updated

from cdc_worker.activities import Activity
from cdc_worker.changes import Change, Message, Row
from cdc_worker.profile import load
from cdc_worker.rules import Rules, compile_rules
from cdc_worker.templates import text
from cdc_worker.transform import Fetch, Told, Wanted, transform
from cdc_worker.values import Value

PROFILE = load("sales_cookbook")


@cache
def rules() -> Rules:
    return compile_rules(PROFILE)


# Sally (1) is of organization 10 and Otto (2) of none. What belongs to another organization has a number of its own.


def lead(**columns: Value) -> Row:
    stamps: Row = {"created_at": "2026-01-01 00:00:00+00", "updated_at": "2026-01-01 00:00:00+00"}
    reach: Row = {"email": "", "phone": "", "company": "Engines", "status": "new", "source": "web"}
    return {"id": 7, "name": "Ada", **reach, **stamps, "assigned_to_id": 1, "organization_id": 20, **columns}


def opportunity(**columns: Value) -> Row:
    deal: Row = {"name": "Looms", "amount": Decimal("12345.60"), "stage": "proposal", "close_date": "2026-12-31"}
    links: Row = {"account_id": 3, "contact_id": 4, "owner_id": 1, "organization_id": 30}
    return {"id": 8, **deal, "created_at": "2026-01-01 00:00:00+00", **links, **columns}


def quote(**columns: Value) -> Row:
    offer: Row = {"title": "Ten looms", "total_price": Decimal("1234567.00"), "notes": ""}
    links: Row = {"created_by_id": 1, "opportunity_id": 8, "organization_id": 40}
    return {"id": 9, **offer, "created_at": "2026-01-01 00:00:00+00", **links, **columns}


def task(**columns: Value) -> Row:
    work: Row = {"title": "Ask", "type": "call", "due_date": "2026-01-01 00:00:00+00", "status": "pending", "notes": ""}
    links: Row = {"owner_id": 1, "related_lead_id": 7, "related_opportunity_id": None, "organization_id": 50}
    return {"id": 5, **work, **links, **columns}


DATABASE: dict[str, list[Row]] = {
    "core_user": [{"id": 1, "organization_id": 10}, {"id": 2, "organization_id": None}],
    "core_lead": [lead()],
    "core_opportunity": [opportunity()],
}


def fetch_from(database: Mapping[str, list[Row]]) -> Fetch:
    def fetch(wanted: Collection[Wanted]) -> dict[Wanted, Row | None]:
        return {(lookup, values): _first(database, lookup.table[1], lookup.theirs, values) for lookup, values in wanted}

    return fetch


def _first(database: Mapping[str, list[Row]], table: str, theirs: tuple[str, ...], values: object) -> Row | None:
    return next((row for row in database.get(table, ()) if tuple(row[column] for column in theirs) == values), None)


def outcomes(*messages: Change | Message, database: Mapping[str, list[Row]] = DATABASE) -> list[Told]:
    transactions = assembled(messages)
    return transform(rules(), transactions, worker="w", system_identifier="1", fetch=fetch_from(database))


def logged(*messages: Change | Message, database: Mapping[str, list[Row]] = DATABASE) -> list[dict[str, Any]]:
    """The rows that one commit of these messages becomes; it may become nothing else."""
    came = outcomes(*messages, database=database)
    assert [outcome for outcome in came if not isinstance(outcome, Activity)] == []
    fields = [outcome.fields for outcome in came if isinstance(outcome, Activity)]
    return [{column: of.get(field) for column, field in PROFILE.target.columns.items()} for of in fields]


def note(summary: str, **columns: Any) -> dict[str, Any]:
    """A row of Sally's that is linked to nothing."""
    links = {"lead_id": None, "contact_id": None, "opportunity_id": None}
    user = {"user_id": 1, "organization_id": 10}
    return {"type": "note", "summary": summary, "timestamp": COMMITTED_AT, **links, **user, **columns}


def summaries(*messages: Change | Message, database: Mapping[str, list[Row]] = DATABASE) -> list[str]:
    return [row["summary"] for row in logged(*messages, database=database)]


def organizations(*messages: Change | Message, database: Mapping[str, list[Row]] = DATABASE) -> list[int | None]:
    return [row["organization_id"] for row in logged(*messages, database=database)]


# Leads


def test_lead_created() -> None:
    assert logged(inserted("core_lead", lead())) == [note("New lead created: Ada from Engines", lead_id=7)]


def test_lead_created_without_a_company() -> None:
    assert summaries(inserted("core_lead", lead(company=""))) == ["New lead created: Ada from Unknown Company"]


@pytest.mark.parametrize(
    ("status", "what"),
    [
        ("new", "marked as new"),
        ("contacted", "contacted for the first time"),
        ("qualified", "qualified as a potential customer"),
        ("converted", "successfully converted to opportunity"),
        ("disqualified", "disqualified from sales process"),
        ("on hold", "status changed to on hold"),
        ("New", "status changed to New"),
    ],
)
def test_lead_status(status: str, what: str) -> None:
    assert logged(updated("core_lead", lead(status="before"), status=status)) == [note(f"Lead Ada {what}", lead_id=7)]


def test_lead_status_is_told_of_whom_it_is_assigned_to_now() -> None:
    change = updated("core_lead", lead(assigned_to_id=1), status="qualified", assigned_to_id=2)
    assert logged(change) == [
        note("Lead Ada qualified as a potential customer", lead_id=7, user_id=2, organization_id=20)
    ]


@pytest.mark.parametrize(
    "change",
    [inserted("core_lead", lead(assigned_to_id=None)), updated("core_lead", lead(), status="x", assigned_to_id=None)],
)
def test_a_lead_that_nobody_is_assigned_to_is_not_logged(change: Change) -> None:
    assert outcomes(change) == []


def test_the_organization_of_a_lead_is_its_users_else_its_own() -> None:
    def found(**columns: Value) -> list[int | None]:
        return organizations(
            inserted("core_lead", lead(**columns)), updated("core_lead", lead(**columns), status="contacted")
        )

    assert found() == [10, 10]
    assert found(assigned_to_id=2) == [20, 20]
    assert found(assigned_to_id=2, organization_id=None) == [None, None]


def test_saving_a_lead_as_it_was_is_not_logged() -> None:
    """`updated_at` changes on every save; and `name`, which no signal was about."""
    assert outcomes(updated("core_lead", lead(), updated_at="2026-02-03 04:05:06+00")) == []
    assert outcomes(updated("core_lead", lead(), name="Ada Lovelace", updated_at="2026-02-03 04:05:06+00")) == []


# Opportunities


def of_opportunity(summary: str, **columns: Any) -> dict[str, Any]:
    return note(summary, **{"opportunity_id": 8, "contact_id": 4, **columns})


def test_opportunity_created() -> None:
    assert logged(inserted("core_opportunity", opportunity())) == [
        of_opportunity("New opportunity created: Looms worth $12,345.60")
    ]


@pytest.mark.parametrize(
    ("amount", "told"),
    [
        (Decimal("0.00"), "$0.00"),
        (Decimal("9999999999.99"), "$9,999,999,999.99"),
        (Decimal("-1234.50"), "$-1,234.50"),
        (1000, "$1,000.00"),
    ],
)
def test_amounts_are_exact(amount: Value, told: str) -> None:
    assert summaries(inserted("core_opportunity", opportunity(amount=amount))) == [
        f"New opportunity created: Looms worth {told}"
    ]


@pytest.mark.parametrize(
    ("stage", "what"),
    [
        ("qualification", "moved to qualification stage"),
        ("proposal", "moved to proposal stage - preparing quote"),
        ("negotiation", "entered negotiation phase"),
        ("won", "WON! 🎉 Deal closed successfully"),
        ("lost", "marked as lost - opportunity closed"),
        ("on hold", "stage changed to on hold"),
    ],
)
def test_opportunity_stage(stage: str, what: str) -> None:
    assert logged(updated("core_opportunity", opportunity(stage="before"), stage=stage)) == [
        of_opportunity(f"Opportunity Looms {what}")
    ]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("10000.00", "12000.00", "increased from $10,000.00 to $12,000.00"),
        ("12000.00", "10000.00", "decreased from $12,000.00 to $10,000.00"),
        ("10000.00", "11000.00", None),  # exactly 10 %
        ("10000.00", "11000.01", "increased from $10,000.00 to $11,000.01"),
        ("10000.00", "9000.00", None),
        ("10000.00", "8999.99", "decreased from $10,000.00 to $8,999.99"),
        ("5000.00", "6000.00", "increased from $5,000.00 to $6,000.00"),  # exactly 1000
        ("5000.00", "5999.99", None),
        ("5000.00", "4000.00", "decreased from $5,000.00 to $4,000.00"),
        ("5000.00", "4000.01", None),
        ("0.01", "1000.00", None),
        ("0.01", "1000.01", "increased from $0.01 to $1,000.01"),
        ("9999999999.99", "8999999999.99", "decreased from $9,999,999,999.99 to $8,999,999,999.99"),
        ("9999999999.90", "8999999999.91", None),  # exactly 10 %, which a float would miss
        ("0.00", "5000.00", None),
        ("5000.00", "0.00", None),
        ("-10000.00", "-12000.00", "decreased from $-10,000.00 to $-12,000.00"),
        ("-10000.00", "-11000.00", None),
        (None, "5000.00", None),  # NaN, which wal2json tells as null
        ("5000.00", None, None),
    ],
)
def test_opportunity_amount(old: str | None, new: str | None, told: str | None) -> None:
    before, after = (None if amount is None else Decimal(amount) for amount in (old, new))
    change = updated("core_opportunity", opportunity(amount=before), amount=after)
    assert logged(change) == ([] if told is None else [of_opportunity(f"Opportunity value {told}")])


def test_the_stage_of_an_opportunity_comes_before_its_amount() -> None:
    change = updated("core_opportunity", opportunity(), amount=Decimal("99999.00"), stage="won")
    assert summaries(change) == [
        "Opportunity Looms WON! 🎉 Deal closed successfully",
        "Opportunity value increased from $12,345.60 to $99,999.00",
    ]


@pytest.mark.parametrize(
    "change",
    [
        inserted("core_opportunity", opportunity(owner_id=None)),
        updated("core_opportunity", opportunity(owner_id=None), stage="won", amount=Decimal(99999)),
    ],
)
def test_an_opportunity_that_nobody_owns_is_not_logged(change: Change) -> None:
    assert outcomes(change) == []


def test_the_organization_of_an_opportunity_is_its_owners_else_its_own() -> None:
    def found(**columns: Value) -> list[int | None]:
        row = opportunity(**columns)
        new: Row = {"stage": "won", "amount": Decimal(99999)}
        return organizations(inserted("core_opportunity", row), updated("core_opportunity", row, **new))

    assert found() == [10, 10, 10]
    assert found(owner_id=2) == [30, 30, 30]
    assert found(owner_id=2, organization_id=None) == [None, None, None]


def test_an_opportunity_without_a_contact() -> None:
    assert logged(inserted("core_opportunity", opportunity(contact_id=None))) == [
        of_opportunity("New opportunity created: Looms worth $12,345.60", contact_id=None)
    ]


# Quotes


def test_quote_created() -> None:
    assert logged(inserted("core_quote", quote())) == [of_opportunity("Quote created: Ten looms for $1,234,567.00")]


def test_a_quote_that_nobody_created_is_not_logged() -> None:
    assert outcomes(inserted("core_quote", quote(created_by_id=None))) == []


def test_the_organization_of_a_quote_is_its_creators_else_its_opportunitys_else_its_own() -> None:
    bare = {**DATABASE, "core_opportunity": [opportunity(organization_id=None)]}
    assert organizations(inserted("core_quote", quote())) == [10]
    assert organizations(inserted("core_quote", quote(created_by_id=2))) == [30]
    assert organizations(inserted("core_quote", quote(created_by_id=2)), database=bare) == [40]
    assert organizations(inserted("core_quote", quote(created_by_id=2, organization_id=None)), database=bare) == [None]


def test_a_quote_of_an_opportunity_without_a_contact() -> None:
    bare = {**DATABASE, "core_opportunity": [opportunity(contact_id=None)]}
    assert [row["contact_id"] for row in logged(inserted("core_quote", quote()), database=bare)] == [None]


# Tasks


def completed(**columns: Value) -> Change:
    return updated("core_task", task(**columns), status="completed")


@pytest.mark.parametrize(
    ("kind", "type_", "action"),
    [
        ("call", "call", "completed call with"),
        ("email", "email", "sent email to"),
        ("meeting", "meeting", "held meeting with"),
        ("demo", "note", "conducted demo for"),
        ("visit", "visit", "completed visit task for"),
    ],
)
def test_task_completed(kind: str, type_: str, action: str) -> None:
    assert logged(completed(type=kind)) == [note(f"Task completed: {action} Ada", type=type_, lead_id=7)]


def test_task_completed_with_an_opportunity_for_target() -> None:
    assert logged(completed(related_lead_id=None, related_opportunity_id=8)) == [
        of_opportunity("Task completed: completed call with Looms", type="call")
    ]


def test_task_completed_with_both_is_the_leads() -> None:
    assert logged(completed(related_opportunity_id=8)) == [
        note("Task completed: completed call with Ada", type="call", lead_id=7)
    ]


def test_task_completed_with_nobody() -> None:
    assert logged(completed(related_lead_id=None)) == [
        note("Task completed: completed call with unknown contact", type="call")
    ]


@pytest.mark.parametrize(
    ("notes", "end"),
    [
        ("", ""),
        ("Likes looms", " - Notes: Likes looms"),
        ("x" * 100, f" - Notes: {'x' * 100}"),
        ("x" * 101, f" - Notes: {'x' * 100}..."),
        ("🎉" * 100, f" - Notes: {'🎉' * 100}"),
        ("🎉" * 101, f" - Notes: {'🎉' * 100}..."),
    ],
)
def test_task_completed_with_notes(notes: str, end: str) -> None:
    assert summaries(completed(notes=notes)) == [f"Task completed: completed call with Ada{end}"]


@pytest.mark.parametrize(
    ("old", "new", "came"),
    [
        ("pending", "completed", 1),
        ("overdue", "completed", 1),
        ("completed", "pending", 0),
        ("pending", "overdue", 0),
    ],
)
def test_a_task_is_completed_when_it_was_not(old: str, new: str, came: int) -> None:
    assert len(outcomes(updated("core_task", task(status=old), status=new))) == came
    assert outcomes(updated("core_task", task(status="completed"), notes="more")) == []
    assert outcomes(inserted("core_task", task(status="completed"))) == []


def test_a_task_that_nobody_owns_is_not_logged() -> None:
    assert outcomes(completed(owner_id=None)) == []


def test_the_organization_of_a_task_is_its_users_else_its_leads_else_its_opportunitys() -> None:
    def found(**columns: Value) -> list[int | None]:
        return organizations(completed(**columns))

    assert found() == [10]
    assert found(owner_id=2) == [20]
    assert found(owner_id=2, related_lead_id=None, related_opportunity_id=8) == [30]
    assert found(owner_id=2, related_lead_id=None) == [None]
    bare = {**DATABASE, "core_lead": [lead(organization_id=None)]}
    assert organizations(completed(owner_id=2, related_opportunity_id=8), database=bare) == [30]


# Looked-up rows

CHANGES: list[tuple[Change, str, int | None]] = [
    (inserted("core_lead", lead()), "New lead created: Ada from Engines", 20),
    (inserted("core_opportunity", opportunity()), "New opportunity created: Looms worth $12,345.60", 30),
    (inserted("core_quote", quote()), "Quote created: Ten looms for $1,234,567.00", 40),
    (completed(), "Task completed: completed call with unknown contact", None),
]


@pytest.mark.parametrize(("change", "summary", "organization"), CHANGES, ids=lambda found: text(found)[:16])
def test_what_is_gone_by_now_is_left_out_of_what_is_told(
    change: Change, summary: str, organization: int | None
) -> None:
    assert [(row["summary"], row["user_id"], row["organization_id"]) for row in logged(change, database={})] == [
        (summary, 1, organization)
    ]


def user(**columns: Value) -> Row:
    return {"id": 1, "username": "sally", "last_login": None, "organization_id": 11, **columns}


@pytest.mark.parametrize(
    "order", [lambda changes: changes, lambda changes: list(reversed(changes))], ids=["before", "after"]
)
def test_a_user_who_came_in_the_same_transaction(order: Callable[[list[Change]], list[Change]]) -> None:
    """Foreign keys are checked at the commit: the row that refers to another may be written first."""
    changes = order([inserted("core_user", user()), inserted("core_lead", lead())])
    assert organizations(*changes, database={**DATABASE, "core_user": [user()]}) == [11]


def test_a_user_has_the_organization_of_the_time_as_far_as_the_stream_tells() -> None:
    now: dict[str, list[Row]] = {"core_user": [user(organization_id=13)]}
    assert organizations(
        inserted("core_user", user()),
        inserted("core_lead", lead()),
        updated("core_user", user(), organization_id=12),
        inserted("core_lead", lead()),
        updated("core_user", user(organization_id=12), last_login="2026-02-03 04:05:06+00"),
        inserted("core_lead", lead()),
        updated("core_user", user(organization_id=12), organization_id=None),
        inserted("core_lead", lead()),
        deleted("core_user", user(organization_id=None)),
        database=now,
    ) == [11, 12, 12, 20]


def test_a_user_of_whom_the_stream_has_not_told_is_as_the_database_has_them_now() -> None:
    now: dict[str, list[Row]] = {"core_user": [user(organization_id=13)]}
    changes = (inserted("core_lead", lead()), updated("core_user", user(organization_id=12), organization_id=13))
    assert organizations(*changes, database=now) == [13]


def test_a_task_is_told_of_the_name_that_its_lead_has_by_then() -> None:
    assert summaries(
        inserted("core_lead", lead(assigned_to_id=None)),
        updated("core_lead", lead(assigned_to_id=None), name="Ada Lovelace"),
        completed(),
        database={},
    ) == ["Task completed: completed call with Ada Lovelace"]


# What is not recorded, and what is never done with values


def test_deletes_truncates_users_and_other_columns_are_not_logged() -> None:
    """No signal was about them."""
    rows = {"core_lead": lead(), "core_opportunity": opportunity(), "core_quote": quote(), "core_task": task()}
    for table, row in rows.items():
        assert outcomes(deleted(table, row), truncated(table)) == []
    assert outcomes(inserted("core_user", user()), deleted("core_user", user())) == []
    assert outcomes(updated("core_opportunity", opportunity(), contact_id=5, name="Mills")) == []
    assert outcomes(updated("core_quote", quote(), total_price=Decimal(1), title="One loom")) == []
    assert outcomes(updated("core_task", task(), due_date="2027-01-01 00:00:00+00", type="email")) == []
    assert outcomes(inserted("core_task", task())) == []


@pytest.mark.parametrize("name", ["{new.email}", "{0.__class__}", "{", "}}", "%s %(x)s", "\\", "🎉", "a\nb", "$1"])
def test_values_are_text_whatever_is_in_them(name: str) -> None:
    assert summaries(
        inserted("core_lead", lead(name=name, company=name)),
        updated("core_lead", lead(name=name), status=name),
        updated("core_opportunity", opportunity(name=name), stage=name),
        inserted("core_quote", quote(title=name)),
        completed(notes=name, type=name),
        database={**DATABASE, "core_lead": [lead(name=name)]},
    ) == [
        f"New lead created: {name} from {name}",
        f"Lead {name} status changed to {name}",
        f"Opportunity {name} stage changed to {name}",
        f"Quote created: {name} for $1,234,567.00",
        f"Task completed: completed {name} task for {name} - Notes: {name}",
    ]


def test_a_context_message_changes_nothing_of_the_log() -> None:
    """Its user is who a lead is assigned to: there is no column for who did it."""
    assert logged(said('{"changed_by": "otto"}'), inserted("core_lead", lead())) == [
        note("New lead created: Ada from Engines", lead_id=7)
    ]


def test_each_rule_of_one_change_has_a_key_of_its_own() -> None:
    change = updated("core_opportunity", opportunity(), amount=Decimal("99999.00"), stage="won")
    assert [outcome.change_key.rsplit("/", 1)[1] for outcome in outcomes(change)] == ["stage_changed", "amount_changed"]
