"""The output of wal2json, format version 2: one JSON object for each message.

https://github.com/eulerto/wal2json#readme
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any, Final, NamedTuple

import msgspec

from cdc_worker import values
from cdc_worker.changes import Begin, Change, Commit, Decoded, Message, Payload, Row, update
from cdc_worker.errors import MessageUnreadableError
from cdc_worker.lsn import LSN
from cdc_worker.values import FLOATS, MAX_DIGITS, NUMBERS, Value, integer

PLUGIN: Final = "wal2json"

OPTIONAL: Final = ("include-xids", "include-type-oids", "add-msg-prefixes", "numeric-data-types-as-string")
"""Options that an old wal2json may not know, and without which it can still be read."""

RELEASES: Final = {"numeric-data-types-as-string": "2.6 or later", "include-pk": "2.3 to 2.5"}
"""Options that came with a release, the newest first, and what a plugin that knows them may be."""

_SPACES: Final = " \t\n\v\f\r"


def options(
    tables: Iterable[tuple[str, str]],
    message_prefixes: Iterable[str] = (),
    *,
    without: Iterable[tuple[str, str]] | None = None,
) -> dict[str, str]:
    """Options of START_REPLICATION for these (schema, table) pairs and messages of these prefixes.

    Where partitions come and go, all tables are asked for, also those that are yet to be made, but `without` some.

    Types as OIDs: their names can make the output invalid JSON (`"type":"My Sch"."My Enum"`).
    """
    asked = {"add-tables": _listed(tables)} if without is None else {"filter-tables": _listed(without)}
    return {
        "format-version": "2",
        "include-lsn": "1",
        "include-timestamp": "1",
        "include-xids": "1",
        "include-types": "0",
        "include-type-oids": "1",
        "numeric-data-types-as-string": "1",  # or NaN and the infinities are null
        **asked,
        # An empty list of prefixes would let every message through.
        "add-msg-prefixes": ",".join(map(_askable, message_prefixes)) or "cdc_worker.none",
    }


def _listed(tables: Iterable[tuple[str, str]]) -> str:
    return ",".join(f"{_escaped(schema)}.{_escaped(table)}" for schema, table in tables)


def _escaped(name: str) -> str:
    return "".join("\\" + c if c in _SPACES + "'\",.*\\" else c for c in name)


def _askable(prefix: str) -> str:
    # Prefixes are compared as they are: an escape would become part of them.
    if not prefix or any(c in _SPACES + "," for c in prefix):
        raise ValueError(f"wal2json can't be asked for messages of the prefix {prefix!r}")
    return prefix


class Column(msgspec.Struct, gc=False):
    """A column, as it is told of."""

    name: str
    value: Any  # a union with Decimal would read strings as numbers; see float_hook
    typeoid: int = 0
    type: str = ""  # in recordings that others have made


class _Begin(msgspec.Struct, tag_field="action", tag="B", gc=False):
    timestamp: str
    lsn: str
    nextlsn: str
    xid: int = 0


class _Commit(msgspec.Struct, tag_field="action", tag="C", gc=False):
    nextlsn: str  # said already by the begin


class _Said(msgspec.Struct, gc=False):
    timestamp: str | None = None
    lsn: str | None = None
    nextlsn: str | None = None
    xid: int = 0


class _Insert(msgspec.Struct, tag_field="action", tag="I", gc=False):
    schema: str
    table: str
    columns: list[Column]
    changed: list[str] = []  # by `masked`


class _Update(msgspec.Struct, tag_field="action", tag="U", gc=False):
    schema: str
    table: str
    columns: list[Column]
    identity: list[Column] = []
    changed: list[str] = []  # by `masked`


class _Delete(msgspec.Struct, tag_field="action", tag="D", gc=False):
    schema: str
    table: str
    identity: list[Column] = []


class _Truncate(msgspec.Struct, tag_field="action", tag="T", gc=False):
    schema: str
    table: str


class _Message(msgspec.Struct, tag_field="action", tag="M", gc=False):
    transactional: bool
    prefix: str
    content: str


_Line = _Begin | _Commit | _Insert | _Update | _Delete | _Truncate | _Message

_decoder = msgspec.json.Decoder(_Line, float_hook=Decimal)  # a float would lose digits of a numeric

_encode = msgspec.json.Encoder(decimal_format="number").encode

_MESSAGES: Final = b'{"action":"M"', b'{"kind":"message"'
"""How messages begin, by the versions of the format."""

_COMMIT: Final = Commit()

_FLOATS: Final = frozenset(("real", "double precision"))


_AS_TOLD: Final = frozenset((int, bool, type(None)))


def _value(column: Column) -> Value:
    value = column.value
    if isinstance(value, str):  # with numeric-data-types-as-string
        return values.value(column.typeoid, value)
    if not isinstance(value, Decimal):
        raise ValueError("a value is an array or an object")
    # float4 and float8 print an exponent where numeric prints every digit: a float prints it as Postgres does.
    if abs(value.adjusted()) > MAX_DIGITS:
        raise ValueError("a number has more digits than a numeric can have")
    return values.inexact(value) if column.typeoid in FLOATS or column.type in _FLOATS else value


def row_of(columns: Iterable[Column]) -> Row:
    """The values of columns by their names. Raises ValueError."""
    # Of all that is done for a change this takes the most time, and the order of the tests is that of what is there.
    return {
        c.name: value
        if ((kind := type(value := c.value)) is str and c.typeoid not in NUMBERS) or kind in _AS_TOLD
        else _value(c)
        for c in columns
    }


def _read_slowly(payload: Payload) -> _Line:
    """What the fast decoder refuses though Postgres may send it, and anyone who writes may cause it: integers of very
    many digits, and messages that aren't text, because `pg_logical_emit_message` takes bytes as well.
    """
    line: _Line = msgspec.convert(document_of(payload), _Line)
    return line


def document_of(payload: Payload) -> dict[str, Any]:
    """An object with all digits of its numbers. Raises ValueError."""
    text = bytes(payload)
    document: dict[str, Any] = json.loads(
        text.decode("utf-8", "replace" if text.startswith(_MESSAGES) else "strict"),
        parse_int=integer,
        parse_float=Decimal,
    )
    return document


def decode(payload: Payload) -> Begin | Change | Message | Commit:
    """Read one line of wal2json's output, in UTF-8. Raises MessageUnreadableError for what is none."""
    try:
        try:
            line = _decoder.decode(payload)
        except (msgspec.ValidationError, UnicodeDecodeError):
            line = _read_slowly(payload)
        if type(line) is _Update:  # by far the most frequent, with the ends of its transaction
            return update(line.schema, line.table, row_of(line.identity), row_of(line.columns), also=line.changed)
        if type(line) is _Begin:
            committed_at = datetime.fromisoformat(line.timestamp)
            return Begin(line.xid, LSN.parse(line.lsn), LSN.parse(line.nextlsn), committed_at)
        if type(line) is _Commit:
            return _COMMIT
        if type(line) is _Insert:
            return Change("insert", line.schema, line.table, None, row_of(line.columns), tuple(line.changed))
        if type(line) is _Delete:
            return Change("delete", line.schema, line.table, row_of(line.identity), None)
        if type(line) is _Truncate:
            return Change("truncate", line.schema, line.table, None, None)
        return Message(line.prefix, line.content, line.transactional)
    except (ValueError, ArithmeticError, RecursionError) as error:
        # The decoder's message names the place in the document, never what stands there.
        raise MessageUnreadableError(
            f"wal2json sent {len(payload)} bytes that can't be read: {error}",
            hint="format-version 2 is read, with include-lsn, include-timestamp, include-xids, include-type-oids",
        ) from error


_NAMED: Final = re.compile(
    rb'\{"action":"[IUDT]"(?:,"xid":\d+)?(?:,"timestamp":"[^"]*")?(?:,"lsn":"[^"]*")?'
    rb',"schema":("(?:[^"\\]|\\.)*"),"table":("(?:[^"\\]|\\.)*")[,}]',
)


def table_of(payload: Payload) -> tuple[str, str] | None:
    """The table of a change, told by the beginning of its line: also where the rest of it can't be read."""
    found = _NAMED.match(payload)
    try:
        return None if found is None else (json.loads(found[1]), json.loads(found[2]))
    except ValueError:
        return None


_COMMITS: Final = b'{"action":"C"'


def begin_told(commit: bytes) -> bytes:
    """The begin of a transaction, of which its commit says the same."""
    return b'{"action":"B"' + commit.removeprefix(_COMMITS)


class Decoder:
    """What the plugin sends, one message at a time; see `decoders.Decoder`."""

    plugin: Final = PLUGIN
    by_itself: Final = True

    def decode(self, payload: Payload) -> Decoded:
        """See `decode`."""
        return decode(payload)

    def line(self, message: Decoded, payload: Payload) -> Payload:
        """What a recording has of it: itself."""
        return payload

    def table_of(self, payload: Payload) -> tuple[str, str] | None:
        """See `table_of`."""
        return table_of(payload)

    def is_commit(self, payload: Payload) -> bool:
        """Whether a line begins as that of a commit."""
        return bytes(payload[:14]) == b'{"action":"C",'

    def is_message(self, payload: Payload) -> bool:
        """Whether a line begins as that of a logical message."""
        return bytes(payload[:14]) == b'{"action":"M",'

    def begin_told(self, commit: bytes) -> bytes:
        """See `begin_told`."""
        return begin_told(commit)

    def raw(self, payload: Payload) -> bytes:
        """All that it takes to read it later."""
        return bytes(payload)


def read_again(raw: Payload) -> Change | None:
    """The change of a message that couldn't be read, if it can be by now."""
    try:
        change = decode(raw)
    except MessageUnreadableError:
        return None
    return change if isinstance(change, Change) else None


class Said(NamedTuple):
    """What a begin or a commit says of its transaction, which depends on the plugin's options."""

    xid: int
    commit_lsn: LSN | None
    end_lsn: LSN | None
    committed_at: datetime | None


_said = msgspec.json.Decoder(_Said)


def said(payload: Payload) -> Said:
    """Read a begin or a commit that need not say everything. Raises MessageUnreadableError."""
    try:
        line = _said.decode(payload)
        return Said(
            line.xid,
            None if line.lsn is None else LSN.parse(line.lsn),
            None if line.nextlsn is None else LSN.parse(line.nextlsn),
            None if line.timestamp is None else datetime.fromisoformat(line.timestamp),
        )
    except (ValueError, RecursionError) as error:
        raise MessageUnreadableError(f"the beginning or the end of a transaction can't be read: {error}") from error


def masked(payload: Payload, mask: Callable[[Row], Row], *, moved: Sequence[str] = ()) -> bytes:
    """A line without the values that `mask` takes out of rows; what has changed of them is told by name.

    That is `moved` of an insert with which a row's move ends. Raises MessageUnreadableError.
    """
    change = decode(payload)
    if not isinstance(change, Change):
        return bytes(payload)
    try:
        document = document_of(payload)
        for row in ("columns", "identity"):
            columns = document.get(row, [])
            seen = row_of(msgspec.convert(columns, list[Column]))
            for column, before, after in zip(columns, seen.values(), mask(seen).values(), strict=True):
                if after is not before:
                    column["value"] = after
        if change.operation == "update" or moved:
            document["changed"] = moved or change.changed
        return _encode(document)
    except (ValueError, ArithmeticError, RecursionError) as error:  # in what nobody else looks at, or told twice
        raise MessageUnreadableError(f"a line of {len(payload)} bytes can't be masked: {error}") from error
