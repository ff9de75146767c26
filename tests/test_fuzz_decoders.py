"""The decoders read whatever they are given, or say that they can't: any bytes, and messages that are nearly right."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any, LiteralString

import psycopg
import pytest
from fuzzing import TARGETS, decoded, decoded_by_pgoutput, decoded_by_wal2json, framed, look_at
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pgoutput_messages import Column, begin, insert, relation, truncate
from support import Crm, crm_on

from cdc_worker import decoders, pgoutput, values, wal2json
from cdc_worker.changes import Change, Commit
from cdc_worker.cluster import Cluster
from cdc_worker.errors import MessageUnreadableError

SLOTS = "SELECT pg_create_logical_replication_slot(current_database() || '_' || %s, %s)"

WORK: tuple[LiteralString, ...] = (
    "CREATE TABLE every (id int PRIMARY KEY, small smallint, large bigint, exact numeric, inexact float8, less float4,"
    " yes boolean, raw bytea, told text, document jsonb, at timestamptz, many int[], mood interval)",
    "ALTER TABLE every REPLICA IDENTITY FULL",
    "CREATE TABLE keyed (id int PRIMARY KEY, told text)",
    'CREATE TABLE "Odd ""table" ("a b" int, "ä" text)',
    """ALTER TABLE "Odd ""table" REPLICA IDENTITY FULL""",
    "ALTER TABLE keyed ALTER told SET STORAGE EXTERNAL",
    'CREATE PUBLICATION fuzzed FOR TABLE every, keyed, "Odd ""table"',
    SLOTS,
    "INSERT INTO every VALUES (1, 2, 3, 1234567890.0987654321, 1e-300, 1.5, true, '\\x00ff', 'ä\"\\' || chr(10),"
    """ '{"a": [1, null]}', now(), '{1,2}', '1 day'), (3, -1, -1, 1e20, 1e300, 0, false, '', '', '[]',"""
    " 'infinity', '{}', '0')",
    "INSERT INTO every (id) VALUES (2)",
    "UPDATE every SET exact = exact + 1, told = NULL WHERE id = 1",
    "UPDATE every SET id = 20 WHERE id = 2",
    "INSERT INTO keyed SELECT n, repeat(n::text, 10000) FROM generate_series(1, 2) n",
    "UPDATE keyed SET id = id + 10",
    "DELETE FROM keyed WHERE id = 11",
    """INSERT INTO "Odd ""table" VALUES (1, 'x'); UPDATE "Odd ""table" SET "a b" = 2; DELETE FROM "Odd ""table" """,
    "SELECT pg_logical_emit_message(true, 'said', 'within'), pg_logical_emit_message(false, 'said', '\\xff00')",
    "TRUNCATE every, keyed",
)


@pytest.fixture(scope="module")
def real(server: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[bytes]]]:
    """What each plugin sends of the same work."""
    with crm_on(server, tmp_path_factory.mktemp("fuzzed")) as crm:
        plugins = []
        for statement in WORK:
            if statement != SLOTS:
                crm.execute(statement)
                continue
            for plugin in decoders.PLUGINS:
                with suppress(psycopg.errors.UndefinedFile, psycopg.errors.InsufficientPrivilege):
                    crm.execute(SLOTS, plugin, plugin)
                    plugins.append(plugin)
        yield {plugin: _sent(crm, plugin) for plugin in plugins}


def _sent(crm: Crm, plugin: str) -> list[bytes]:
    tables = [("public", name) for name in ("every", "keyed", 'Odd "table')]
    options, _ = decoders.options(plugin, tables, ("said",), publication="fuzzed")
    options.pop("numeric-data-types-as-string", None)  # not every wal2json has it
    found = crm.execute(
        "SELECT data FROM pg_logical_slot_peek_binary_changes(%s, NULL, NULL, VARIADIC %s)",
        f"{crm.connection.info.dbname}_{plugin}",
        [part for option in options.items() for part in option],
    )
    return [data for (data,) in found]


def decoder_of(plugin: str) -> decoders.Decoder:
    return decoders.decoder(plugin, None, ("said",), encoding="utf-8")


each_plugin = pytest.mark.parametrize("plugin", decoders.PLUGINS)
each_target = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)


@each_plugin
def test_what_plugins_send_is_read_to_the_last_value(real: dict[str, list[bytes]], plugin: str) -> None:
    decoder, changes = decoder_of(plugin), 0
    for payload in real[plugin]:
        message = decoder.decode(payload)
        look_at(message)
        for one in message if isinstance(message, tuple) else [message]:
            changes += isinstance(one, Change)
            assert one is None or decoder.line(one, payload)
    assert changes == 15


@each_target
@given(data=st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(target: Callable[[bytes], None], data: bytes) -> None:
    target(data)
    target(framed([data]))


@given(head=st.sampled_from([b"B", b"C", b"R", b"I", b"U", b"D", b"T", b"M", b"Y", b"O"]), rest=st.binary(max_size=100))
def test_any_bytes_behind_what_a_message_begins_with_are_read_or_refused(head: bytes, rest: bytes) -> None:
    columns: list[Column] = [
        ("a", values.INTEGER, True),
        ("b", values.NUMERIC),
        ("c", values.DOUBLE),
        ("d", values.BYTEA),
    ]
    known = [relation(*columns, oid=number) for number in (0, 1)]
    decoded_by_pgoutput(framed([*known, head + rest, head + bytes(4) + rest]))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)
COLUMN = st.fixed_dictionaries(
    {"name": st.sampled_from("abc") | JSON, "value": JSON},
    optional={
        "typeoid": st.sampled_from([*values.READERS]) | JSON,
        "type": st.sampled_from(["real", "numeric"]) | JSON,
    },
)
LINES = st.fixed_dictionaries(
    {"action": st.sampled_from("BCIUDTM"), "schema": st.just("s") | JSON, "table": st.just("t") | JSON},
    optional={
        "columns": st.lists(COLUMN, max_size=3) | JSON,
        "identity": st.lists(COLUMN, max_size=3) | JSON,
        "changed": st.lists(st.text(max_size=3)) | JSON,
        "timestamp": st.just("2026-01-01 00:00:00+00") | JSON,
        "lsn": st.just("0/1") | JSON,
        "nextlsn": st.just("0/2") | JSON,
        "xid": JSON,
        "transactional": JSON,
        "prefix": st.just("said") | JSON,
        "content": JSON,
    },
)


@given(document=LINES)
def test_any_document_is_read_or_refused(document: dict[str, Any]) -> None:
    decoded_by_wal2json(wal2json._encode(document))


@st.composite
def mangled(draw: st.DrawFn, messages: list[bytes]) -> list[bytes]:
    """Some messages, which may be cut, and have other bytes, also as counts and sizes."""
    found = []
    for message in draw(st.lists(st.sampled_from(messages), min_size=1, max_size=4)):
        data = bytearray(message[: draw(st.integers(0, len(message)) | st.just(len(message)))])
        for _ in range(draw(st.integers(0, 3))):
            place = draw(st.integers(0, len(data)))
            match draw(st.integers(0, 3)):
                case 0:
                    data[place : place + 1] = draw(st.binary(max_size=2))
                case 1:
                    data[place : place + 4] = draw(st.sampled_from([0, 1, 0x7FFFFFFF, 0xFFFFFFFF])).to_bytes(4)
                case 2:
                    data[place : place + draw(st.integers(0, 50))] = b""
                case _:
                    data[place:place] = draw(st.sampled_from(messages))[:50]
        found.append(bytes(data))
    return found


@each_plugin
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_messages_that_are_nearly_right_are_read_or_refused(
    real: dict[str, list[bytes]], plugin: str, data: st.DataObject
) -> None:
    messages = data.draw(mangled(real[plugin]))
    if plugin == pgoutput.PLUGIN:
        decoded_by_pgoutput(framed([*(m for m in real[plugin] if m[:1] == b"R"), *messages]))
    for message in messages:
        decoded_by_wal2json(message)


@each_plugin
def test_a_message_that_is_cut_anywhere_or_goes_on_is_refused(real: dict[str, list[bytes]], plugin: str) -> None:
    """Whatever is lost of it: never is a row read with less in it."""
    decoder = decoder_of(plugin)
    for payload in real[plugin]:
        told = decoder.decode(payload)
        if told is None or (isinstance(told, Commit) and plugin == pgoutput.PLUGIN):
            decoder.decode(payload)
        for end in {*range(min(len(payload), 400)), *range(400, len(payload), 997), len(payload) - 1}:
            if payload[:1] not in (b"Y", b"O"):
                with pytest.raises(MessageUnreadableError):
                    decoder.decode(payload[:end])
        if payload[:1] not in (b"Y", b"O"):
            with pytest.raises(MessageUnreadableError):
                decoder.decode(payload + b"\1")
        decoder.decode(payload)


LIES = {
    "columns of a table": relation(("a", values.INTEGER))[:22] + b"\xff\xff",
    "values of a row": b"I" + struct.pack(">I", 16384) + b"N\xff\xff" + b"n" * 100,
    "bytes of a value": b"I" + struct.pack(">I", 16384) + b"N\0\1t\xff\xff\xff\xff" + b"1" * 100,
    "tables": struct.pack(">cIB", b"T", 0xFFFFFFFF, 0) + bytes(100),
    "bytes of a message": b"M\0" + bytes(8) + b"said\0\xff\xff\xff\xff" + b"1" * 100,
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_number_that_is_a_lie_takes_no_memory(lie: bytes) -> None:
    decoder = pgoutput.Decoder()
    decoder.decode(relation(("a", values.INTEGER)))
    assert peak_of(lambda: decoded(decoder, lie)) < 1 << 16


@pytest.mark.parametrize(
    "number",
    ["1e999999999", "-1e-999999999", "1E+131073", "9" * 100_000, "0" * 5_000 + "1e9999999", "nan" + "1" * 5000],
)
@pytest.mark.parametrize("typeoid", [values.NUMERIC, values.DOUBLE, values.INTEGER])
def test_a_number_takes_no_more_memory_than_its_digits(number: str, typeoid: int) -> None:
    told = [relation(("a", typeoid)), insert(number)]
    text = {"name": "a", "typeoid": typeoid, "value": "%"}
    line = wal2json._encode({"action": "I", "schema": "s", "table": "t", "columns": [text]})
    for sent in (line.replace(b"%", number.encode()), line.replace(b'"%"', number.encode())):
        assert peak_of(partial(decoded_by_wal2json, sent)) < 1 << 21
    assert peak_of(lambda: decoded_by_pgoutput(framed(told))) < 1 << 21


@pytest.mark.parametrize("count", [100, 10_000])
def test_memory_is_in_proportion_to_a_message(count: int) -> None:
    columns = [(f"c{number}", values.NUMERIC) for number in range(count)]
    told, row = relation(*columns), insert(*["1.5"] * count)
    tables = truncate(*[16384] * count)
    decoder = pgoutput.Decoder()
    for payload in (told, row, tables):
        assert peak_of(partial(decoded, decoder, payload)) < 200 * len(payload)
    nested = b'{"action":"I","schema":"s","table":"t","columns":' + b"[" * count + b"]" * count + b"}"
    assert peak_of(lambda: decoded_by_wal2json(nested)) < 1 << 20


def peak_of(work: Callable[[], object]) -> int:
    """The most memory that something takes."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# What has been found.


@pytest.mark.parametrize("typeoid", [values.NUMERIC, values.DOUBLE])
@pytest.mark.parametrize("text", ["sNaN" + "1" * 5_000, "NaN" + "1" * 5_000, "0" * 5_000 + "1e9999999"])
def test_what_is_no_finite_number_stays_text_however_long_it_is(typeoid: int, text: str) -> None:
    assert values.value(typeoid, text) == text


@pytest.mark.parametrize("value", ["[1]", '{"a":1}', "[]"])
@pytest.mark.parametrize("typeoid", [values.INTEGER, 25])
def test_a_value_is_no_array_and_no_object(typeoid: int, value: str) -> None:
    line = f'{{"action":"I","schema":"s","table":"t","columns":[{{"name":"a","typeoid":{typeoid},"value":{value}}}]}}'
    with pytest.raises(MessageUnreadableError, match="a value is an array or an object"):
        wal2json.decode(line.encode())


def test_a_number_has_a_boolean_only_where_none_is_expected() -> None:
    line = b'{"action":"I","schema":"s","table":"t","columns":[{"name":"a","typeoid":23,"value":true}]}'
    assert wal2json.decode(line) == Change("insert", "s", "t", None, {"a": True})


def test_a_float_that_no_float_can_hold_is_text() -> None:
    line = b'{"action":"I","schema":"s","table":"t","columns":[{"name":"a","typeoid":701,"value":1e400}]}'
    assert wal2json.decode(line) == Change("insert", "s", "t", None, {"a": "1E+400"})


def test_a_line_that_has_a_column_twice_can_not_be_masked() -> None:
    """Of which of them would the value be to be masked?"""
    twice = b'{"action":"I","schema":"s","table":"t","columns":[{"name":"a","value":1},{"name":"a","value":2}]}'
    with pytest.raises(MessageUnreadableError, match="can't be masked"):
        wal2json.masked(twice, lambda row: row)


def test_a_line_is_not_masked_if_what_nobody_looks_at_can_not_be_read() -> None:
    line = b'{"action":"D","timestamp":"\xcf\xcb","schema":"s","table":"t","identity":[]}'
    assert wal2json.decode(line) == Change("delete", "s", "t", {}, None)
    with pytest.raises(MessageUnreadableError, match="can't be masked"):
        wal2json.masked(line, lambda row: row)


def test_no_transaction_is_committed_at_the_end_of_all_wal() -> None:
    """The position after it stands for its end, and would be none."""
    with pytest.raises(MessageUnreadableError, match="nothing comes after"):
        pgoutput.Decoder().decode(begin((1 << 64) - 1))
