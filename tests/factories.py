"""Rows, changes and transactions that state only what a test is about, and how hypothesis runs here."""

from __future__ import annotations

from collections.abc import Container, Sequence
from datetime import UTC, datetime
from functools import cache
from typing import Any

from hypothesis import HealthCheck, settings

from cdc_worker.activities import Activity, Origin
from cdc_worker.changes import Assembler, Begin, Change, Commit, Message, Row, Transaction, update
from cdc_worker.context import PREFIX
from cdc_worker.lsn import LSN
from cdc_worker.profile import Profile, load, parse
from cdc_worker.rules import Rules, compile_rules
from cdc_worker.transform import Told, transform
from cdc_worker.values import Value

# A failure prints the blob that repeats it. The machine's speed is no failure.
settings.register_profile(
    "core", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow], max_examples=100
)
settings.load_profile("core")

COMMITTED_AT = datetime(2026, 2, 3, 4, 5, 6, 789000, tzinfo=UTC)

_LEAD: Row = {
    "lead_id": 7,
    "full_name": "Ada Lovelace",
    "title": None,
    "email": "ada@example.org",
    "telegram": None,
    "phone_number": None,
    "source": "web",
    "status": "1. lead generated",
    "date_created": "2026-01-01 00:00:00",
    "linkedin_url": None,
    "company_name": "Engines",
    "country": None,
    "bd_in_charge": "jane",
    "background": None,
    "is_converted": False,
    "type": "exchange",
}

_CUSTOMER: Row = {
    "customer_uid": 42,
    "registered_email": None,
    "type": "exchange",
    "name": "Engines Ltd",
    "is_closed": False,
    "date_closed": None,
    "country": None,
    "date_created": "2026-01-01 00:00:00",
}

_CONTACT: Row = {
    "contact_id": 1,
    "customer_uid": 42,
    "lead_id": 7,
    "is_primary_contact": True,
    "date_added": "2026-01-01 00:00:00",
}


def lead(**columns: Value) -> Row:
    return {**_LEAD, **columns}


def customer(**columns: Value) -> Row:
    return {**_CUSTOMER, **columns}


def contact(**columns: Value) -> Row:
    return {**_CONTACT, **columns}


def inserted(table: str, row: Row) -> Change:
    return Change("insert", "public", table, None, row)


def updated(table: str, old: Row, **columns: Value) -> Change:
    """`old` with these columns changed, as it comes under REPLICA IDENTITY FULL."""
    return update("public", table, old, {**old, **columns})


def deleted(table: str, row: Row) -> Change:
    return Change("delete", "public", table, row, None)


def converted(lead_id: int = 7) -> Change:
    return updated("lead", lead(lead_id=lead_id), is_converted=True)


def truncated(table: str) -> Change:
    return Change("truncate", "public", table, None, None)


def said(content: str, *, prefix: str = PREFIX, transactional: bool = True) -> Message:
    return Message(prefix, content, transactional)


def begin(commit_lsn: int = 0x1000) -> Begin:
    return Begin(700, LSN(commit_lsn), LSN(commit_lsn + 0x30), COMMITTED_AT)


ORIGIN = Origin(700, LSN(0x1000), LSN(0x1030))
"""Of what comes of that transaction, if nothing was said in it."""


def assembled(
    messages: Sequence[Change | Message], *, cuts: Container[int] = (), commit_lsn: int = 0x1000
) -> list[Transaction]:
    """One commit of these messages, in slices: cut after the changes whose numbers, from 0, are in `cuts`."""
    assembler, slices, number = Assembler(), [], 0
    first = begin(commit_lsn)
    assembler.feed(first, b"B")
    for message in messages:
        size = 1
        if isinstance(message, Change):
            size = Assembler.MAX_BYTES if number in cuts else 1
            number += 1
        slices.append(assembler.feed(message, bytes(size)))
    slices.append(assembler.feed(Commit(), b"C"))
    return [transaction for transaction in slices if transaction is not None]


@cache
def leadfi() -> Rules:
    return compile_rules(load("leadfi"))


def outcomes(
    *messages: Change | Message, rules: Rules | None = None, cuts: Container[int] = (), commit_lsn: int = 0x1000
) -> list[Told]:
    """What one commit of these messages becomes."""
    return transform(
        leadfi() if rules is None else rules,
        assembled(messages, cuts=cuts, commit_lsn=commit_lsn),
        worker="w",
        system_identifier="1",
    )


def activities(*messages: Change | Message, rules: Rules | None = None) -> list[dict[str, Any]]:
    """The fields of all activities that one commit of these messages becomes; it may become nothing else.

    That nobody said who did it is told of all of them, and left out here.
    """
    came = outcomes(*messages, rules=rules)
    assert [outcome for outcome in came if not isinstance(outcome, Activity)] == []
    return [
        {**fields, "metadata": {name: value for name, value in metadata.items() if (name, value) != NOBODY}}
        for fields in (outcome.fields for outcome in came if isinstance(outcome, Activity))
        for metadata in [fields["metadata"]]
    ]


NOBODY = ("context_source", "default")


TARGET = """
name = "test"
[target]
table = "activity"
columns = { type = "type", key = "change_key" }
"""


def profile(tables: str) -> Profile:
    """A profile of these tables, as TOML."""
    return parse(TARGET + tables, source="test")


def rules(tables: str, *, mask_key: str | None = None) -> Rules:
    return compile_rules(profile(tables), mask_key=mask_key)
