"""The lines of a recording that are our own, and lines of the plugin without what may not be seen."""

from __future__ import annotations

import json
from collections.abc import Sequence
from decimal import Decimal

import pytest
from factories import begin, rules

from cdc_worker import recording, wal2json
from cdc_worker.changes import Assembler, Change, Commit, Payload, Row, Transaction, update
from cdc_worker.errors import MessageUnreadableError
from cdc_worker.recording import Frame, Looked, Partition
from cdc_worker.transform import Answer

LOOKING = """
[tables.task]
key = "task_id"
lookups.person = { table = "person", match = { person_id = "person_id" } }

[[tables.task.rules]]
on = "insert"
type = "task"
description = "{lookup.person.name}"
"""

FRAME = Frame(
    worker="crm",
    system_identifier="7500000000000000001",
    database="sales",
    after="0/1A2B3C8",
    until="0/1A2F000",
    within=True,
    tables=("public.lead",),
    masked={"public.lead": ("email",)},
)


def test_a_frame_is_named_by_its_first_line() -> None:
    line = recording.frame(FRAME)
    assert line == (
        b'{"action":"R","version":1,"number":0,"worker":"crm","system_identifier":"7500000000000000001",'
        b'"database":"sales","after":"0/1A2B3C8","until":"0/1A2F000","within":true,"tables":["public.lead"],'
        b'"masked":{"public.lead":["email"]}}'
    )
    assert recording.is_own(line)
    found = recording.decode(line)
    assert isinstance(found, Frame)
    assert (found.after, found.until, found.within) == ("0/1A2B3C8", "0/1A2F000", True)
    assert ([*found.tables], {name: [*of] for name, of in found.masked.items()}) == (
        ["public.lead"],
        {"public.lead": ["email"]},
    )


def test_a_partition_is_told_with_its_root() -> None:
    line = recording.partition(("far, away", "lead_2026"), ("public", "lead"))
    assert line == b'{"action":"P","schema":"far, away","table":"lead_2026","root":["public","lead"]}'
    assert recording.decode(line) == Partition("far, away", "lead_2026", ("public", "lead"))


@pytest.mark.parametrize(
    "row",
    [
        {"name": "Jörg", "rate": Decimal("10.50"), "score": 0.1, "since": None, "is_head": True},
        {"score": 1e20, "rate": Decimal("12345678901234567890.123456789")},
        {},
        None,
    ],
    ids=["values", "numbers", "no columns", "no row"],
)
def test_what_a_lookup_has_found_is_read_as_it_was(row: Row | None) -> None:
    (table,) = (table for name, table in rules(LOOKING).items() if name == ("public", "task"))
    lookup = table.references["person"].lookup
    line = recording.looked(Answer(3, "person", (lookup, (7,)), row))
    assert recording.is_own(line)
    found = recording.decode(line)
    assert found == Looked(3, "person", ("public", "person"), {"person_id": 7}, row)
    assert isinstance(found, Looked)
    assert {name: type(value) for name, value in (found.row or {}).items()} == {
        name: type(value) for name, value in (row or {}).items()
    }


@pytest.mark.parametrize(
    "line",
    [b'{"action":"R"}', b'{"action":"L","change":"x"}', b'{"action":"P","schema":"a"', b"", b"\xff"],
)
def test_a_line_that_cannot_be_read_says_so(line: bytes) -> None:
    with pytest.raises(MessageUnreadableError):
        recording.decode(line)


def test_a_recording_of_a_later_version_is_not_read() -> None:
    line = recording.frame(FRAME).replace(b'"version":1', b'"version":2')
    with pytest.raises(MessageUnreadableError) as raised:
        recording.decode(line)
    assert raised.value.hint == "read it with the cdc-worker that is as new as the one that wrote it"


@pytest.mark.parametrize("action", ["B", "I", "U", "D", "T", "M", "C"])
def test_lines_of_the_plugin_are_not_our_own(action: str) -> None:
    assert not recording.is_own(json.dumps({"action": action}, separators=(",", ":")).encode())


# Lines without what is masked


def hidden(row: Row) -> Row:
    return {name: "…" if name == "email" and value is not None else value for name, value in row.items()}


UPDATE = (
    b'{"action":"U","xid":7,"lsn":"0/1","schema":"public","table":"lead","columns":['
    b'{"name":"lead_id","typeoid":23,"value":7},{"name":"email","typeoid":25,"value":"new@example.org"},'
    b'{"name":"amount","typeoid":1700,"value":12345678901234567890.120},{"name":"rate","typeoid":701,"value":0.1}],'
    b'"identity":[{"name":"lead_id","typeoid":23,"value":7},{"name":"email","typeoid":25,"value":"old@example.org"},'
    b'{"name":"amount","typeoid":1700,"value":12345678901234567890.120},{"name":"rate","typeoid":701,"value":0.1}]}'
)


def test_a_masked_line_tells_that_a_value_has_changed_and_not_which() -> None:
    line = wal2json.masked(UPDATE, hidden)
    assert b"example.org" not in line
    row: Row = {"lead_id": 7, "email": "…", "amount": Decimal("12345678901234567890.120"), "rate": 0.1}
    assert wal2json.decode(line) == update("public", "lead", row, row, also=("email",))
    change = wal2json.decode(line)
    assert isinstance(change, Change)
    assert change.changed == ("email",)


def test_a_masked_line_has_all_else_as_it_was() -> None:
    line = wal2json.masked(UPDATE, hidden)
    expected = UPDATE.replace(b'"new@example.org"', '"…"'.encode()).replace(b'"old@example.org"', '"…"'.encode())
    assert line == expected[:-1] + b',"changed":["email"]}'


def test_a_masked_line_is_masked_to_the_same() -> None:
    line = wal2json.masked(UPDATE, hidden)
    assert wal2json.masked(line, hidden) == line


@pytest.mark.parametrize(
    "line",
    [
        b'{"action":"I","schema":"public","table":"lead","columns":[{"name":"email","typeoid":25,"value":"x@x.org"}]}',
        b'{"action":"D","schema":"public","table":"lead","identity":[{"name":"email","typeoid":25,"value":"x@x.org"}]}',
    ],
    ids=["insert", "delete"],
)
def test_rows_that_come_and_go_are_masked(line: bytes) -> None:
    assert wal2json.masked(line, hidden) == line.replace(b'"x@x.org"', '"…"'.encode())


@pytest.mark.parametrize(
    "line",
    [
        b'{"action":"T","xid":7,"lsn":"0/1","schema":"public","table":"lead"}',
        b'{"action":"M","xid":7,"lsn":"0/1","transactional":true,"prefix":"p","content":"x@x.org"}',
        b'{"action":"I","schema":"public","table":"lead","columns":[{"name":"email","typeoid":25,"value":null}]}',
    ],
    ids=["truncate", "message", "NULL"],
)
def test_what_has_no_value_to_mask_stays_as_it_is(line: bytes) -> None:
    assert wal2json.masked(line, hidden) == line


def test_a_masked_row_that_moves_to_another_partition_tells_what_has_changed() -> None:
    columns = b'[{"name":"lead_id","typeoid":23,"value":7},{"name":"email","typeoid":25,"value":"%s@example.org"}]'
    line = b'{"action":"%s","schema":"public","table":"lead_%s","%s":' + columns + b"}"
    lines = [line % (b"D", b"a", b"identity", b"old"), line % (b"I", b"b", b"columns", b"new")]
    lead = ("public", "lead")

    def assembled(lines: Sequence[Payload]) -> Transaction:
        assembler = Assembler(root_of=lambda change, _: lead, keys={lead: ("lead_id",)}, keep=True)
        assembler.feed(begin(), b"B")
        for line in lines:
            assembler.feed(wal2json.decode(line), line)
        transaction = assembler.feed(Commit(), b"C")
        assert transaction is not None
        return transaction

    _, *received, _ = assembled(lines).received
    masked = [wal2json.masked(of.payload, hidden, moved=of.changed) for of in received]
    assert b"example.org" not in b"".join(masked)
    (change,) = assembled(masked).changes
    assert (change.operation, change.changed) == ("update", ("email",))


def test_a_line_that_cannot_be_read_is_not_masked() -> None:
    with pytest.raises(MessageUnreadableError):
        wal2json.masked(b'{"action":"I"', hidden)
