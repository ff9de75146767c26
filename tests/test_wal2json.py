"""Lines of wal2json 2.5 on PostgreSQL 15, and what they mean.

`recordings/types.jsonl` is the output of

    pg_recvlogical --start --slot s --no-loop --endpos "$(psql -Atc 'SELECT pg_current_wal_lsn()')" -f - -o NAME=VALUE

with the options that `options()` gives for the four tables of `recordings/types.sql` and the prefix
`cdc_worker.context`, after the second half of that file; the slot was made between its halves.
"""

from __future__ import annotations

import json
from contextlib import suppress
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path

import factories  # noqa: F401  # hypothesis runs by its profile
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cdc_worker.changes import Begin, Change, Commit, Message, Row, update
from cdc_worker.errors import MessageUnreadableError
from cdc_worker.lsn import LSN
from cdc_worker.values import Value
from cdc_worker.wal2json import decode, options

RECORDING = Path(__file__).parent / "recordings" / "types.jsonl"
ODD = "Odd, *.\"\\ 'name"


def recorded(table: str) -> list[Change]:
    """The changes of one table in the recording."""
    decoded = [decode(line) for line in RECORDING.read_bytes().splitlines()]
    return [message for message in decoded if isinstance(message, Change) and message.table == table]


def value(typeoid: int, printed: str) -> Value:
    """A value of this type, as wal2json prints it."""
    line = f'{{"action":"I","schema":"s","table":"t","columns":[{{"name":"n","typeoid":{typeoid},"value":{printed}}}]}}'
    change = decode(line.encode())
    assert isinstance(change, Change)
    assert change.new is not None
    return change.new["n"]


def test_the_frame_of_a_transaction() -> None:
    """The bytes of a conversation: begin tells at once where the commit lies and where it ends."""
    assert decode(
        b'{"action":"B","xid":734,"timestamp":"2026-11-21 21:44:39.861984+00","lsn":"0/15417E8","nextlsn":"0/1541818"}'
    ) == Begin(734, LSN(0x15417E8), LSN(0x1541818), datetime(2026, 11, 21, 21, 44, 39, 861984, tzinfo=UTC))
    line = (
        b'{"action":"C","xid":734,"timestamp":"2026-11-21 21:44:39.861984+00","lsn":"0/15417E8","nextlsn":"0/1541818"}'
    )
    assert decode(line) == Commit()


@pytest.mark.parametrize(
    ("printed", "at"),
    [
        ("2026-11-21 21:44:39+00", datetime(2026, 11, 21, 21, 44, 39, tzinfo=UTC)),
        ("2026-11-21 21:44:39.5+00", datetime(2026, 11, 21, 21, 44, 39, 500000, tzinfo=UTC)),
        (
            "2026-11-21 21:44:39.00001-03:30",
            datetime(2026, 11, 21, 21, 44, 39, 10, tzinfo=timezone(-timedelta(hours=3, minutes=30))),
        ),
    ],
)
def test_the_time_of_a_commit_in_all_its_lengths(printed: str, at: datetime) -> None:
    line = f'{{"action":"B","xid":1,"timestamp":"{printed}","lsn":"0/1","nextlsn":"0/2"}}'
    assert decode(line.encode()) == Begin(1, LSN(1), LSN(2), at)


def test_an_update_under_full_identity() -> None:
    assert decode(
        b'{"action":"U","xid":5,"timestamp":"2026-11-21 21:44:39.865286+00","lsn":"0/1543028","schema":"public",'
        b'"table":"toasted","columns":[{"name":"id","typeoid":23,"value":1},{"name":"name","typeoid":25,"value":"b"}],'
        b'"identity":[{"name":"id","typeoid":23,"value":1},{"name":"name","typeoid":25,"value":null}]}'
    ) == Change("update", "public", "toasted", {"id": 1, "name": None}, {"id": 1, "name": "b"}, ("name",))


def test_an_unchanged_toasted_column_under_full_identity_is_the_old_one_and_not_changed() -> None:
    insert, renamed, rewritten, truncate = recorded("toasted")
    long = "x" * 3000
    first: Row = {"id": 1, "name": "a", "body": long, "last": 7}
    second: Row = {"id": 1, "name": "b", "body": long, "last": 7}
    third: Row = {"id": 1, "name": "b", "body": "short", "last": 7}
    assert (
        b'"columns":[{"name":"id","typeoid":23,"value":1},{"name":"name","typeoid":25,"value":"b"},{"name":"last"'
        in (RECORDING.read_bytes())
    ), "body is not sent"
    assert insert == Change("insert", "public", "toasted", None, first)
    assert renamed == Change("update", "public", "toasted", first, second, ("name",))
    assert list(renamed.new or ()) == ["id", "name", "body", "last"]
    assert rewritten == Change("update", "public", "toasted", second, third, ("body",))
    assert truncate == Change("truncate", "public", "toasted", None, None)


def test_under_default_identity_what_was_before_is_unknown() -> None:
    insert, renamed, rekeyed, delete, _truncate, last = recorded("keyed")
    assert insert == Change("insert", "public", "keyed", None, {"id": 1, "name": "a", "body": "x" * 3000})
    assert renamed == update("public", "keyed", {"id": 1}, {"id": 1, "name": "b"})
    assert rekeyed == update("public", "keyed", {"id": 1}, {"id": 2, "name": "b"})
    assert "body" not in (renamed.new or {}), "unknown is not NULL"
    assert renamed.old_row_unknown
    assert rekeyed.old_row_unknown
    assert delete == Change("delete", "public", "keyed", {"id": 2}, None)
    assert last == Change("insert", "public", "keyed", None, {"id": 9, "name": None, "body": None})


def test_one_truncate_of_two_tables_is_two_changes() -> None:
    assert [change.operation for table in ("keyed", "toasted") for change in recorded(table)].count("truncate") == 2


def test_a_table_and_a_column_of_odd_names() -> None:
    assert recorded(ODD) == [Change("insert", "public", ODD, None, {'a "col"': 1, "ü": "x"})]


def test_messages() -> None:
    messages = [m for m in map(decode, RECORDING.read_bytes().splitlines()) if isinstance(m, Message)]
    assert messages == [
        Message("cdc_worker.context", "at once", transactional=False),
        Message("cdc_worker.context", '{"changed_by": "jane \\"q\\" 😀"}', transactional=True),
        Message("cdc_worker.context", "a\ufffd", transactional=True),
    ]


def test_a_message_that_is_not_text_does_not_stop_the_worker() -> None:
    """Anyone may send one: pg_logical_emit_message takes bytea, and every role may call it."""
    line = b'{"action":"M","xid":1,"lsn":"0/1","transactional":true,"prefix":"p","content":"a\xff\\"\x7f\xc3"}'
    assert decode(line) == Message("p", 'a\ufffd"\x7f\ufffd', transactional=True)
    assert decode(memoryview(line)) == decode(line)


def test_a_row_that_is_not_text_in_utf_8_is_unreadable() -> None:
    """Then the stream isn't in the encoding that was asked for: every later row would be wrong as well."""
    with pytest.raises(MessageUnreadableError, match="can't decode byte 0xff"):
        decode(b'{"action":"I","schema":"s","table":"t","columns":[{"name":"n","typeoid":25,"value":"\xff"}]}')


def test_every_type_arrives_as_postgres_prints_it() -> None:
    full, empty, *_ = recorded("kinds")
    assert full.new == {
        "id": 1,
        "flag": True,
        "small": -32768,
        "big": 9223372036854775807,
        "exact": 123456789012345678901234567890,
        "fixed": Decimal("-0.0000000001"),
        "f4": 1.5,
        "f8": 1e20,
        "note": 'tab\t quote" backslash\\ newline\n brace{} %s bell\x07 del\x7f 😀 é',
        "short": "",
        "padded": "ab   ",
        "day": "0044-03-15 BC",
        "at": "24:00:00",
        "moment": "infinity",
        "instant": "2026-02-03 02:05:06.789+00",
        "span": "1 year 2 mons -3 days +04:05:06",
        "blob": "deadbeef00",
        "doc": '{"a": [1, "x"] }',
        "docb": '{"b": 1.10}',
        "list": "{1,NULL,3}",
        "words": '{"a b",NULL,"NULL","q\\"q"}',
        "within": "[1,5)",
        "uid": "00000000-0000-0000-0000-000000000001",
        "addr": "10.0.0.1/8",
        "feeling": 'it\'s "ok"',
        "amount": "1234.50",
    }
    assert list(full.new)[:3] == ["id", "flag", "small"], "columns in the table's order"
    assert empty.new == {name: None if name != "id" else 2 for name in full.new}


def test_numbers_keep_every_digit() -> None:
    numbers = [(row["exact"], row["f4"], row["f8"]) for change in recorded("kinds")[2:7] if (row := change.new)]
    # NaN and the infinities are null.
    assert list(map(repr, numbers)) == [
        "(None, None, None)",
        "(Decimal('0.1000'), 1e-10, 1000000000000000.0)",
        "(1000000000000000000000000000000, 1000000.0, 0.1)",
        "(Decimal('0E-7'), None, None)",
        "(Decimal('123456789.123456789012345678901234567890'), None, None)",
    ]


def test_updates_and_deletes_of_every_type() -> None:
    rewritten, no_op, deleted = recorded("kinds")[7:]
    assert rewritten.changed == ("flag", "big", "exact")
    assert rewritten.new == {**(rewritten.old or {}), "flag": False, "big": -(2**63), "exact": None}
    assert no_op.changed == ()
    assert no_op.old == no_op.new == deleted.old
    assert (deleted.operation, deleted.new) == ("delete", None)


@given(st.decimals(allow_nan=False, allow_infinity=False, places=30, min_value=-(10**60), max_value=10**60))
def test_any_numeric_is_exact(number: Decimal) -> None:
    got = value(1700, f"{number:f}")
    assert isinstance(got, Decimal)
    assert got.as_tuple() == number.as_tuple()


@pytest.mark.parametrize("digits", [19, 4_300, 4_301, 131_072])
def test_an_integer_of_any_length_a_numeric_can_have_is_exact(digits: int) -> None:
    """int() refuses more than 4,300 digits; whoever writes such a row would stop the worker for good."""
    got = value(1700, "-" + "9" * digits)
    assert isinstance(got, (int, Decimal))
    assert Decimal(got).as_tuple() == Decimal("-" + "9" * digits).as_tuple()
    assert value(1700, "9" * digits + ".50") == Decimal("9" * digits + ".50")


def test_the_same_long_number_before_and_after_is_no_change() -> None:
    column = b'[{"name":"n","typeoid":1700,"value":' + b"9" * 5000 + b"}]"
    line = b'{"action":"U","schema":"s","table":"t","columns":' + column + b',"identity":' + column + b"}"
    change = decode(line)
    assert isinstance(change, Change)
    assert change.changed == ()


@given(st.integers(-(2**63), 2**63 - 1))
def test_any_int8_is_exact(number: int) -> None:
    got = value(20, str(number))
    assert type(got) is int
    assert got == number


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
@example('{"a": "\\u0000 \\" \\\\"}')
@example("\x01\x1f\x7f\u2028😀")
def test_any_text_is_untouched(text: str) -> None:
    assert value(25, json.dumps(text)) == text
    assert value(25, json.dumps(text, ensure_ascii=False)) == text


@pytest.mark.parametrize("number", ["1e999999999", "-1e-999999999"])
def test_a_number_that_no_numeric_can_be_fills_no_memory(number: str) -> None:
    """In a recording from elsewhere it would have, as soon as it was printed."""
    with pytest.raises(MessageUnreadableError, match="more digits than a numeric can have"):
        value(1700, number)


def test_text_that_looks_like_a_number_stays_text() -> None:
    assert value(25, '"1.10"') == "1.10"
    assert value(1043, '"007"') == "007"


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'{"action":"Z"}',
        b'{"action":1}',
        b'{"action":"B"}',
        b'{"action":"C","nextlsn":5}',
        b'{"action":"B","xid":1,"timestamp":"yesterday","lsn":"0/1","nextlsn":"0/2"}',
        b'{"action":"B","xid":1,"timestamp":"2026-01-01 00:00:00+00","lsn":"0/1"}',
        b'{"action":"I","schema":"s","table":"t"}',
        b'{"action":"I","schema":"s","table":"t","columns":[{"name":"n","typeoid":1700,"value":1e9999999999999999999}]}',
        b'{"action":"I","schema":"s","table":"t","columns":[{"name":"n","typeoid":25,"value":' + b"[" * 100_000,
        b'{"action":"I","schema":"s","table":"t","columns":[{"name":"n","typeoid":25,"value":"\\ud800"}]}',
        b'{"action":"M","transactional":true,"prefix":"p","content":"\xff',
        b'{"action":"M","transactional":true,"prefix":"p","content":"\xff"} {}',
    ],
)
def test_a_line_that_is_none_is_unreadable(line: bytes) -> None:
    with pytest.raises(MessageUnreadableError, match=f"^wal2json sent {len(line)} bytes that can't be read: "):
        decode(line)


def test_the_reason_tells_the_place_and_no_value() -> None:
    line = b'{"action":"I","schema":"s","table":"t","columns":[{"name":"n","typeoid":25,"value":"secret"},{"name":7}]}'
    with pytest.raises(MessageUnreadableError) as caught:
        decode(line)
    assert "$.columns[1].name" in str(caught.value)
    assert "secret" not in f"{caught.value} {caught.value.hint}"


@given(st.binary(max_size=60))
def test_arbitrary_bytes_are_unreadable_and_nothing_else(data: bytes) -> None:
    with pytest.raises(MessageUnreadableError):
        decode(data)


LINES = [line for line in RECORDING.read_bytes().splitlines() if len(line) < 2000]


@given(st.sampled_from(LINES), st.data())
def test_a_damaged_line_is_read_or_unreadable_and_nothing_else(line: bytes, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(line)))
    damaged = line[:start] + data.draw(st.binary(max_size=4)) + line[start + data.draw(st.integers(0, 4)) :]
    with suppress(MessageUnreadableError):
        decode(damaged)


def test_the_options_say_what_decode_reads() -> None:
    assert options([("public", "lead"), ("crm", "customer")], ["cdc_worker.context", "other"]) == {
        "format-version": "2",
        "include-lsn": "1",
        "include-timestamp": "1",
        "include-xids": "1",
        "include-types": "0",
        "include-type-oids": "1",
        "numeric-data-types-as-string": "1",
        "add-tables": "public.lead,crm.customer",
        "add-msg-prefixes": "cdc_worker.context,other",
    }


@pytest.mark.parametrize(
    ("table", "escaped"),
    [
        ("Lead", "public.Lead"),
        ("a b", r"public.a\ b"),
        ("a\tb\nc", "public.a\\\tb\\\nc"),
        ("it's", r"public.it\'s"),
        ('say "x"', r"public.say\ \"x\""),
        ("a,b", r"public.a\,b"),
        ("a.b", r"public.a\.b"),
        ("*", r"public.\*"),
        ("a\\b", r"public.a\\b"),
        ("日本😀", "public.日本😀"),
        (ODD, r"public.Odd\,\ \*\.\"\\\ \'name"),
    ],
)
def test_odd_names_of_tables_are_escaped(table: str, escaped: str) -> None:
    """Each of these was tried on a server: the insert into such a table arrived, and no other."""
    assert options([("public", table)])["add-tables"] == escaped


def test_no_tables_and_no_prefixes_let_nothing_through() -> None:
    """wal2json lets no table through for an empty list, and every message: so that list is never empty."""
    assert options([])["add-tables"] == ""
    assert options([])["add-msg-prefixes"] == "cdc_worker.none"


def test_prefixes_are_taken_as_they_are() -> None:
    """wal2json unescapes names of tables and not these: with a backslash before its dot, no context ever arrived."""
    assert options([], ["cdc_worker.context"])["add-msg-prefixes"] == "cdc_worker.context"
    assert options([], ["a\\b'\"*"])["add-msg-prefixes"] == "a\\b'\"*"


@pytest.mark.parametrize("prefix", ["a,b", "a b", "a\tb", ""])
def test_a_prefix_that_cannot_be_asked_for_is_refused(prefix: str) -> None:
    with pytest.raises(ValueError, match="prefix"):
        options([], [prefix])


def test_what_an_old_wal2json_leaves_out_is_not_missed() -> None:
    line = b'{"action":"I","schema":"s","table":"t","columns":[{"name":"n","type":"text","value":"x"}]}'
    assert decode(line) == Change("insert", "s", "t", None, {"n": "x"})
