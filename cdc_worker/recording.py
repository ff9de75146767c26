"""The lines of a recording: those of the output plugin, and between them what else it takes to tell the same again.

A recording consists of frames, each of them what was written at once. A frame begins with a line that names it:

    {"action":"R","version":1,"number":0,"worker":"crm","system_identifier":"75…","database":"crm","after":"0/1A2B3C8",
     "until":"0/1A2F000","within":false,"tables":["public.lead"],"masked":{}}

So it holds all commits that were consumed of those that end after `after` and at or before `until`. What is `within` a
transaction goes on with the one that the frame before, by its `number` in the file, has not ended. Lines of the plugin
follow, as `pg_recvlogical -o format-version=2 -o include-lsn=1 -o include-timestamp=1` writes them (what comes by
pgoutput is written in lines that say the same; of a commit that is not whole in a frame, only its end says where it
ends), and before the changes that they are about two kinds of our own: a row that was looked up (of change 3 of the
transaction, counted from 0, by the lookup `owner`; `columns` is null for one that isn't there), and a table that is a
partition:

    {"action":"L","change":3,"lookup":"owner","schema":"public","table":"core_user",
     "where":[{"name":"id","value":7}],"columns":[{"name":"organization_id","value":1}]}
    {"action":"P","schema":"public","table":"lead_2026","root":["public","lead"]}

In the place of a message that couldn't be read, and was to be passed over, a line stands that can be; `raw` is the
message in base64, or null where it may not be kept. Without a table it names `cdc_worker.stream`:

    {"action":"X","of":"change","position":"0/1A2B3C8","schema":"public","table":"lead","reason":"…",
     "met_at":"2026-01-31T12:00:00Z","raw":"eyJhY3Rpb24iOiJV…"}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any, Final

import msgspec

from cdc_worker.changes import Part, Payload, Row, Unread
from cdc_worker.errors import MessageUnreadableError
from cdc_worker.lsn import LSN
from cdc_worker.transform import Answer
from cdc_worker.values import Value

VERSION: Final = 1
"""Of the lines that are our own."""

FLOAT: Final = 701
"""The type of numbers that are no exact ones: float8. Manual: "Object Identifier Types"."""


class Frame(msgspec.Struct, frozen=True, tag_field="action", tag="R", kw_only=True):
    """What was written at once, after so many others in its file.

    `masked` are columns whose values are not the true ones, by table.
    """

    version: int = VERSION
    number: int = 0
    worker: str
    system_identifier: str
    database: str
    after: str
    until: str
    within: bool = False
    tables: Sequence[str] = ()
    masked: Mapping[str, Sequence[str]] = {}


class Partition(msgspec.Struct, frozen=True, tag_field="action", tag="P"):
    """A table whose changes are those of its root."""

    schema: str
    table: str
    root: tuple[str, str]


class _Column(msgspec.Struct, frozen=True, omit_defaults=True):
    name: str
    value: Any
    typeoid: int = 0


class _Lookup(msgspec.Struct, frozen=True, tag_field="action", tag="L"):
    change: int
    lookup: str
    schema: str
    table: str
    where: list[_Column]
    columns: list[_Column] | None


class _Unread(msgspec.Struct, frozen=True, tag_field="action", tag="X", kw_only=True):
    of: Part
    position: str
    schema: str
    table: str
    partition: tuple[str, str] | None = None
    reason: str
    met_at: datetime
    raw: bytes | None


class Looked(msgspec.Struct, frozen=True):
    """A row of a table that was found by these values for the change `number`, by the lookup of this name."""

    number: int
    name: str
    table: tuple[str, str]
    where: Row
    row: Row | None


Own = Frame | Partition | Looked | Unread
"""A line of our own."""

_encode = msgspec.json.Encoder(decimal_format="number").encode
_decoder = msgspec.json.Decoder(Frame | Partition | _Lookup | _Unread, float_hook=Decimal)

_OWN: Final = (b'{"action":"R"', b'{"action":"L"', b'{"action":"P"', b'{"action":"X"')


def frame(named: Frame) -> bytes:
    """The line that begins a frame."""
    return _encode(named)


def partition(name: tuple[str, str], root: tuple[str, str]) -> bytes:
    """The line that tells whose the changes of a partition are."""
    return _encode(Partition(*name, root))


def looked(answer: Answer) -> bytes:
    """The line that tells what was found by a lookup."""
    lookup, values = answer.wanted
    where = dict(zip(lookup.theirs, values, strict=True))
    columns = None if answer.row is None else _columns(answer.row)
    return _encode(_Lookup(answer.number, answer.name, *lookup.table, _columns(where), columns))


def unread(of: Unread, *, raw: bool) -> bytes:
    """The line that stands for a message that couldn't be read, with what it was if that may be kept."""
    return _encode(
        _Unread(
            of=of.of,
            position=str(of.position),
            schema=of.schema,
            table=of.table,
            partition=of.partition,
            reason=of.reason,
            met_at=of.met_at,
            raw=of.raw if raw else None,
        )
    )


def _columns(row: Row) -> list[_Column]:
    return [_Column(name, value, FLOAT if type(value) is float else 0) for name, value in row.items()]


def _row(columns: Sequence[_Column]) -> Row:
    return {column.name: _value(column) for column in columns}


def _value(column: _Column) -> Value:
    value: Value = column.value
    return float(value) if column.typeoid == FLOAT and isinstance(value, Decimal | int | str) else value


def is_own(line: Payload) -> bool:
    """Whether a line is one of ours, and not the plugin's."""
    return bytes(line[:13]) in _OWN


def decode(line: Payload) -> Own:
    """Read one of our own lines. Raises MessageUnreadableError."""
    try:
        found: Frame | Partition | _Lookup | _Unread = _decoder.decode(line)
        if isinstance(found, _Lookup):
            row = None if found.columns is None else _row(found.columns)
            return Looked(found.change, found.lookup, (found.schema, found.table), _row(found.where), row)
        if isinstance(found, _Unread):
            return Unread(
                *("unreadable", found.schema, found.table, None, None),
                partition=found.partition,
                of=found.of,
                position=LSN.parse(found.position),
                reason=found.reason,
                met_at=found.met_at,
                raw=found.raw,
            )
        if isinstance(found, Frame) and found.version != VERSION:
            raise MessageUnreadableError(
                f"the recording is of version {found.version}, and {VERSION} is what can be read",
                hint="read it with the cdc-worker that is as new as the one that wrote it",
            )
    except (ValueError, ArithmeticError, RecursionError) as error:
        raise MessageUnreadableError(f"a line of the recording can't be read: {error}") from error
    return found
