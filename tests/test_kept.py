"""What is kept of a change comes back as it was."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import psycopg
import pytest

from cdc_worker import kept
from cdc_worker.activities import DeadLetter, Origin
from cdc_worker.changes import Change, Row, update
from cdc_worker.context import Collapse, Context
from cdc_worker.kept import Kept
from cdc_worker.lsn import LSN

AT = datetime(2026, 1, 31, 12, tzinfo=UTC)

ROW: Row = {
    "zeta": 1,
    "id": 2**70,
    "price": Decimal("1.10"),
    "long": Decimal("7" * 5_000),
    "exact": Decimal("12345678901234567890.1234567890"),
    "weight": 1e22,
    "tiny": 1e-7,
    "third": 1 / 3,
    "least": 5e-324,
    "text": 'a\t"b"\\ \n\u2028 ä 😀',
    "number as text": "1.50",
    "nothing": None,
    "yes": True,
}

KEPT = """
SELECT change_key, kind, reason, sqlstate, constraint_name, committed_at, change::text, fields::text, xid,
       commit_lsn::text, end_lsn::text, context::text, found::text, masked, decode(raw, 'hex')
FROM jsonb_to_recordset(%s) AS letter (change_key text, kind text, reason text, sqlstate text, constraint_name text,
    committed_at timestamptz, change jsonb, fields jsonb, xid bigint, commit_lsn pg_lsn, end_lsn pg_lsn, context jsonb,
    found jsonb, masked text[], raw text)
"""


def letter(change: Change, **more: Any) -> DeadLetter:
    """A dead letter about a change."""
    return DeadLetter("crm/1/0/public.deal/0/r", "rule_failed", "why", change, 0, AT, **more)


def typed(value: Any) -> Any:
    """A value in which numbers of different types are different."""
    match value:
        case dict():
            return [(key, typed(of)) for key, of in value.items()]
        case _:
            return type(value), value


LETTERS = [
    letter(Change("insert", "public", "deal", None, ROW)),
    letter(Change("delete", "Far, away", 'de"al.x', ROW, None, partition=("public", "part"))),
    letter(Change("truncate", "public", "deal", None, None)),
    letter(update("public", "deal", {**ROW, "weight": 1, "price": 1}, {**ROW, "tiny": 3})),
    letter(Change("update", "public", "deal", {"id": 1}, {"name": "x", "id": 1})),
    letter(update("public", "deal", {"phone": "***"}, {"phone": "***"}, also=["phone"])),
    letter(
        Change("insert", "public", "deal", None, {"id": 1}),
        sqlstate="23514",
        constraint="c",
        fields={"description": "x", "metadata": '{"a": 1.50}', "lead_id": None},
        found={"team": {"rate": 1e20, "name": "x"}, "head": None},
        origin=Origin(
            7,
            LSN(10),
            LSN(20),
            Context(
                said={"changed_by": "jane", "share": 0.5, "large": 1e300, "many": 2**66, "off": None},
                claimed={"request": "a", "whole": 1e20},
                collapse=Collapse("t"),
                refused=frozenset({"skip"}),
            ),
            {("public", "deal"): frozenset({"phone"}), ("public", "team"): frozenset({"name", "mail"})},
        ),
        raw=b"\x00\xff{",
    ),
]


@pytest.fixture(scope="module")
def read_back(server: Any) -> list[DeadLetter]:
    """The dead letters, after the server has had them."""
    with psycopg.connect(server.dsn()) as connection:
        rows = connection.execute(KEPT, (kept.encoded("crm", LETTERS).decode(),)).fetchall()
    return [Kept(*row).letter() for row in rows]


@pytest.mark.parametrize("place", range(len(LETTERS)))
def test_a_dead_letter_comes_back_as_it_was(read_back: list[DeadLetter], place: int) -> None:
    before, after = LETTERS[place], read_back[place]
    assert after == before
    for row in ("old", "new"):
        assert typed(getattr(after.change, row)) == typed(getattr(before.change, row))
    assert {name: found and dict(typed(found)) for name, found in after.found.items()} == {
        name: found and dict(typed(found)) for name, found in before.found.items()
    }
    for said in ("said", "claimed"):
        was, now = (dict(getattr(of.origin.context, said)) for of in (before, after))
        assert {name: typed(value) for name, value in now.items()} == {
            name: typed(value) for name, value in was.items()
        }


def test_a_column_that_was_ignored_counts_once_it_is_not() -> None:
    change = Change(
        "update", "public", "deal", {"id": 1, "seen": 1, "name": "a"}, {"id": 1, "seen": 2, "name": "b"}, ("name",)
    )
    assert kept.change(kept.encoded_change(change)).changed == ("seen", "name")


def test_what_an_older_version_kept_is_read() -> None:
    document = {"operation": "insert", "schema": "public", "table": "lead", "old": None, "new": {"id": 1.5}}
    text = json.dumps({**document, "changed": [], "partition": None})
    assert kept.change(text) == Change("insert", "public", "lead", None, {"id": Decimal("1.5")})
