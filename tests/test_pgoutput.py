"""pgoutput's messages, as the manual has them: what is read, what is left for later, and what can't be read."""

from __future__ import annotations

import pickle
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial
from typing import Any

import pytest
from factories import rules
from hypothesis import given
from hypothesis import strategies as st
from pgoutput_messages import (
    UNCHANGED,
    begin,
    commit,
    delete,
    insert,
    message,
    relation,
    truncate,
    update,
)

from cdc_worker import decoders, pgoutput, values, wal2json
from cdc_worker.activities import Activity
from cdc_worker.changes import Assembler, Begin, Change, Commit, Decoded, Message, Unread
from cdc_worker.errors import MessageUnreadableError
from cdc_worker.lsn import LSN
from cdc_worker.pgoutput import Decoder, options, read_again
from cdc_worker.transform import transform

TEXT, JSON = 25, 114
LEAD = relation(("lead_id", values.INTEGER, True), ("name", TEXT), ("value", values.NUMERIC))
KEYED = relation(("lead_id", values.INTEGER, True), ("name", TEXT), ("value", values.NUMERIC), identity="d")


def decode(*payloads: bytes, decoder: Decoder | None = None) -> list[Decoded | None]:
    decoder = Decoder() if decoder is None else decoder
    return [decoder.decode(payload) for payload in payloads]


def test_a_transaction() -> None:
    at = 820_540_800_123_456
    found = decode(begin(0x1000, at=at, xid=7), LEAD, insert("1", "Ann", "1.50"), commit(0x1000, 0x1030))
    assert found == [
        Begin(7, LSN(0x1000), LSN(0x1001), datetime(2026, 1, 1, 0, 0, 0, 123456, UTC)),
        None,
        Change("insert", "public", "lead", None, {"lead_id": 1, "name": "Ann", "value": Decimal("1.50")}),
        Commit(LSN(0x1030)),
    ]


def test_a_transaction_ends_where_its_commit_says() -> None:
    """Until then the position after the commit stands for it: no record begins or ends in between."""
    decoder, assembler = Decoder(), Assembler(LSN(0x1000))
    messages = begin(0x1000), LEAD, insert("1", None, None), commit(0x1000, 0x1030)
    found = [
        assembler.feed(decoded, payload) for payload in messages if (decoded := decoder.decode(payload)) is not None
    ]
    (transaction,) = filter(None, found)
    assert (transaction.commit_lsn, transaction.end_lsn, assembler.received) == (0x1000, 0x1030, 0x1030)
    done = Assembler(LSN(0x1030))
    assert [done.feed(decoded, b"") for decoded in map(decoder.decode, messages) if decoded is not None] == [None] * 3
    assert done.received == 0x1030


def test_an_update_has_what_has_changed() -> None:
    _, change = decode(LEAD, update(["1", "Bob", "2"], old=["1", "Ann", "1.50"]))
    old: dict[str, Any] = {"lead_id": 1, "name": "Ann", "value": Decimal("1.50")}
    assert change == Change(
        "update", "public", "lead", old, {"lead_id": 1, "name": "Bob", "value": 2}, ("name", "value")
    )


def test_numbers_are_compared_and_not_their_texts() -> None:
    _, change = decode(LEAD, update(["1", "1.0", "1.50"], old=["1", "1.00", "1.5"]))
    assert isinstance(change, Change)
    assert change.changed == ("name",)


def test_an_unchanged_toasted_column_under_full_identity_is_the_old_one() -> None:
    _, change = decode(LEAD, update(["1", UNCHANGED, None], old=["1", "Ann", "1"]))
    expected: dict[str, Any] = {"lead_id": 1, "name": "Ann", "value": None}
    assert change == Change("update", "public", "lead", {**expected, "value": 1}, expected, ("value",))
    assert isinstance(change, Change)
    assert not change.old_row_unknown


@pytest.mark.parametrize("sent", [{}, {"key": ["1", None, None]}])
def test_under_default_identity_what_was_before_is_unknown(sent: dict[str, Any]) -> None:
    new = ["1" if not sent else "2", UNCHANGED, None]
    _, change = decode(KEYED, update(new, **sent))
    assert isinstance(change, Change)
    assert change.old == {"lead_id": 1}
    assert change.new == {"lead_id": int(str(new[0])), "value": None}, "unknown is not NULL"
    assert list(change.new or ()) == ["lead_id", "value"]
    assert "name" not in (change.new or {})
    assert (change.new or {}).get("name", "-") == "-"
    assert change.changed == (("lead_id", "value") if sent else ("value",))
    assert change.old_row_unknown
    _, deleted = decode(KEYED, delete(key=["1", None, None]))
    assert deleted == Change("delete", "public", "lead", {"lead_id": 1}, None)
    assert decode(LEAD, delete(old=["1", None, "2"]))[1] == Change(
        "delete", "public", "lead", {"lead_id": 1, "name": None, "value": 2}, None
    )


def test_one_truncate_of_two_tables_is_two_changes() -> None:
    other = relation(("id", values.INTEGER), oid=2, table="other")
    found = decode(LEAD, other, truncate(16384, 2, options=3))[-1]
    assert found == (
        Change("truncate", "public", "lead", None, None),
        Change("truncate", "public", "other", None, None),
    )
    assembler = Assembler(keep=True, line=Decoder().line, by_itself=False)
    assert isinstance(found, tuple)
    fed = [assembler.feed(one, b"") for one in (Begin(1, LSN(1), LSN(2), datetime.now(UTC)), found, Commit(LSN(9)))]
    (transaction,) = filter(None, fed)
    assert (transaction.changes, transaction.payloads) == ([*found], [*found])
    assert [wal2json.decode(of.payload) for of in transaction.received[1:-1]] == [*found]


RAISED = rules("""
[tables.lead]
key = ["lead_id"]
[[tables.lead.rules]]
on = "update"
changed = "amount"
type = "raised"
description = "{old.amount} to {new.amount}"
""")


def test_no_value_is_made_of_what_no_rule_and_no_difference_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def asking(typeoid: int, text: str) -> values.Value:
        asked.append((typeoid, text))
        return values.value(typeoid, text)

    monkeypatch.setattr(pgoutput, "READERS", {typeoid: partial(asking, typeoid) for typeoid in values.READERS})
    types = (values.INTEGER, values.NUMERIC, values.DOUBLE, values.BOOLEAN, values.BYTEA)
    names = ("lead_id", "amount", "weight", "won", "photo")
    before, after = ["1", "1.50", "0.1", "t", "\\x00"], ["1", "2.50", "0.1", "t", "\\x00"]
    messages = [begin(), insert(*before), update(after, old=before), delete(old=after), commit()]
    decoder, assembler = Decoder(), Assembler(by_itself=False)
    decoder.decode(relation(*zip(names, types, strict=True)))
    fed = [assembler.feed(decoded, b"") for decoded in map(decoder.decode, messages) if decoded is not None]
    (told,) = transform(RAISED, [*filter(None, fed)], worker="w", system_identifier="1")
    assert isinstance(told, Activity)
    assert {*asked} == {(values.NUMERIC, "1.50"), (values.NUMERIC, "2.50")}


def test_what_is_not_wanted_is_not_even_looked_at() -> None:
    decoder = Decoder({("public", "other")}, {"ours"})
    garbage = insert("1", None, None)[:-3]
    assert decode(LEAD, garbage, truncate(16384), decoder=decoder) == [None, None, None]
    assert decode(message("theirs", b"x"), message("ours", b"x"), decoder=decoder) == [
        None,
        Message("ours", "x", transactional=True),
    ]


def test_all_texts_are_in_the_encoding_of_the_server() -> None:
    latin = Decoder(encoding="iso8859-1")
    table = relation(("größe", TEXT, True), table="straße")
    for name in ("größe", "straße"):
        table = table.replace(name.encode(), name.encode("latin-1"))
    assert latin.decode(table) is None
    payload = b"I" + (16384).to_bytes(4) + b"N\0\1t\0\0\0\1\xfc"
    assert latin.decode(payload) == read_again(latin.raw(payload))
    assert latin.decode(payload) == Change("insert", "public", "straße", None, {"größe": "ü"})
    assert latin.decode(message("p", b"J\xfcrgen\0more")) == Message("p", "Jürgen", transactional=True)
    assert Decoder().decode(message("p", b"J\xfcrgen", transactional=False)) == Message(
        "p", "J\ufffdrgen", transactional=False
    )


def test_a_column_that_comes_or_goes_does_so_from_the_next_change_on() -> None:
    first = relation(("id", values.INTEGER, True), ("name", TEXT))
    second = relation(("id", values.INTEGER, True), ("renamed", JSON), ("more", values.BOOLEAN))
    _, before, _, after = decode(first, insert("1", "a"), second, insert("2", "{}", "t"))
    assert isinstance(before, Change)
    assert isinstance(after, Change)
    assert (before.new, after.new) == ({"id": 1, "name": "a"}, {"id": 2, "renamed": "{}", "more": True})


def test_what_says_nothing_itself_is_passed_by() -> None:
    assert decode(b"O" + bytes(8) + b"origin\0", b"Y" + bytes(4) + b"s\0t\0") == [None, None]


def test_a_row_outlives_the_decoder_and_becomes_a_plain_one() -> None:
    _, change = decode(LEAD, insert("1", "Ann", "NaN"))
    assert isinstance(change, Change)
    row = change.new
    assert row == {"lead_id": 1, "name": "Ann", "value": "NaN"}
    assert pickle.loads(pickle.dumps(row)) == row  # noqa: S301
    assert type(pickle.loads(pickle.dumps(row))) is dict  # noqa: S301
    assert {**(row or {}), "name": "Bob"} == {"lead_id": 1, "name": "Bob", "value": "NaN"}
    assert len(row or ()) == 3


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"", "it begins with b''"),
        (b"S" + bytes(5), "it begins with b'S'"),
        (begin()[:-1], "requires a buffer of 21 bytes"),
        (begin() + b"x", "requires a buffer of 21 bytes"),
        (insert("1", oid=3), "nothing was said of relation 3"),
        (truncate(3), "nothing was said of relation 3"),
        (truncate(16384)[:-1], "it should be of 10 bytes"),
        (insert("1", "a"), "a tuple has 2 values, and its table 3 columns"),
        (insert("1", "a", None)[:-1], "index out of range"),
        (insert("1", "a", None) + b"n", "it should be of 21 bytes"),
        (insert("1", "a", None)[:-1] + b"b", "a value of the kind 'b' stands at byte 20"),
        (insert("1", "a", "22")[:-1], "it should be of"),
        (insert("1", b"\xff", None), "it isn't text in the server's encoding"),
        (insert("1", b"a\0b", None), "a value has a NUL in it"),
        (delete(key=["1", None, None]).replace(b"K", b"N"), "b'N' stands at byte 5, and no old row"),
        (relation(("a", 23), ("a", 23)), "two columns have one name"),
        (relation(("a", 23))[:-1], "requires a buffer"),
        (relation(("a", 23)) + b"x", "it should be of"),
        (message("p", b"x") + b"x", "it should be of"),
        (begin(2**64 - 1, at=2**63 - 1), "date value out of range|too large"),
    ],
)
def test_what_is_no_message_is_refused_with_a_reason_and_without_values(payload: bytes, reason: str) -> None:
    decoder = Decoder()
    decoder.decode(LEAD)
    with pytest.raises(
        MessageUnreadableError, match=f"^pgoutput sent {len(payload)} bytes that can't be read: .*{reason}"
    ):
        decoder.decode(payload)


def test_options_name_the_publication_as_it_is() -> None:
    assert options('a "b", c')["publication_names"] == '"a ""b"", c"'


def printed(typeoid: int) -> st.SearchStrategy[str]:
    """What Postgres prints of a type, or what it doesn't."""
    text = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
    if typeoid == values.NUMERIC:
        return st.decimals().map("{:f}".format) | text
    if typeoid in values.FLOATS:
        return st.floats().map(str) | text
    return st.integers().map(str) | text if typeoid in values.NUMBERS else text


@given(st.data())
def test_a_recording_has_of_it_what_was_decoded(data: st.DataObject) -> None:
    oids = st.sampled_from([TEXT, *values.READERS])
    table = [(f"c{n}", oid, n == 0) for n, oid in enumerate(data.draw(st.lists(oids, min_size=1, max_size=6)))]
    rows = st.tuples(*(st.none() | printed(typeoid) for _, typeoid, _ in table))
    unchanged = st.tuples(*(st.just(UNCHANGED) | printed(typeoid) for _, typeoid, _ in table))
    identity = data.draw(st.sampled_from("df"))
    sent = data.draw(
        st.one_of(
            rows.map(lambda new: insert(*new)),
            st.tuples(rows | unchanged, rows).map(
                lambda of: update(of[0], old=of[1]) if identity == "f" else update(of[0], key=of[1])
            ),
            rows.map(lambda old: delete(old=old) if identity == "f" else delete(key=old)),
        )
    )
    decoder = Decoder()
    _, change = decode(relation(*table, identity=identity, table='l"é'), sent, decoder=decoder)
    assert isinstance(change, Change)
    line = decoder.line(change, sent)
    found = wal2json.decode(line)
    assert found == change
    assert wal2json.table_of(line) == ("public", 'l"é')
    for before, after in ((change.old, found.old), (change.new, found.new)):
        assert [type(value) for value in (before or {}).values()] == [type(value) for value in (after or {}).values()]


def test_the_ends_of_a_transaction_are_recorded_as_well() -> None:
    decoder = Decoder()
    for payload in (begin(at=123_456), message("p", b'{"a": "\xc3\xa9"}')):
        decoded = decoder.decode(payload)
        assert decoded is not None
        assert wal2json.decode(decoder.line(decoded, payload)) == decoded
    assert decoder.line(Commit(LSN(0x1030)), b"") == b'{"action":"C","nextlsn":"0/1030"}'
    assert wal2json.said(decoder.line(Commit(LSN(0x1030)), b"")).end_lsn == LSN(0x1030)


def test_a_begin_is_known_from_its_commit() -> None:
    decoder = Decoder()
    assert decoder.decode(decoder.begin_told(commit(0x1000, 0x1030, at=5))) == decoder.decode(begin(at=5, xid=0))


def test_a_message_that_could_not_be_read_is_kept_with_what_it_takes_to_read_it() -> None:
    decoder = Decoder()
    decoder.decode(LEAD)
    payload = insert("1", "Ann", None)
    raw = decoder.raw(payload)
    assert decoder.table_of(payload[:7]) == ("public", "lead")
    change = Change("insert", "public", "lead", None, {"lead_id": 1, "name": "Ann", "value": None})
    assert read_again(raw) == change
    unread = Unread(
        "unreadable", "public", "lead", None, None, position=LSN(1), reason="?", met_at=datetime.now(UTC), raw=raw
    )
    assert decoders.read_again(unread, raw) == change
    for other in (payload, LEAD, raw[:-1], b"", b"R", begin()):
        assert read_again(other) is None
