"""What must hold of the decoders whatever they are given: for hypothesis, and for the fuzzer of `make fuzz`."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from decimal import Decimal
from typing import Final

from cdc_worker import decoders, pgoutput, wal2json
from cdc_worker.changes import Change, Commit, Decoded, Message, Row
from cdc_worker.documents import Documents
from cdc_worker.errors import MessageUnreadableError

_SIZE: Final = struct.Struct(">H")


def framed(messages: Iterable[bytes]) -> bytes:
    """Messages as one sequence of bytes, each behind its size. The longest are left out."""
    return b"".join(_SIZE.pack(len(message)) + message for message in messages if len(message) < 1 << 16)


def unframed(data: bytes) -> Iterator[bytes]:
    """Any bytes as messages: the last may be shorter than it says."""
    place = 0
    while place + _SIZE.size <= len(data):
        (size,) = _SIZE.unpack_from(data, place)
        place += _SIZE.size
        yield data[place : place + size]
        place += size


def _looked_at(row: Row) -> None:
    """Make all values of a row, and ask for them in all ways."""
    found = dict(row)
    assert list(row) == list(found)
    assert len(row) == len(found)
    assert row == found
    for name, value in found.items():
        assert name in row
        assert value is None or type(value) in (bool, int, float, Decimal, str), type(value)
        assert not isinstance(value, float) or math.isfinite(value)
        assert not isinstance(value, Decimal) or value.is_finite()
    assert "no such column" in row or row.get("no such column") is None


def look_at(message: Decoded | None) -> None:
    """Make everything of a message that is made when it is asked for."""
    for one in message if isinstance(message, tuple) else [message]:
        repr(one)
        if isinstance(one, Change):
            for row in (one.old, one.new):
                if row is not None:
                    _looked_at(row)
            assert one.new is None or set(one.changed) <= set(one.new) or one.operation == "insert"
            assert one.old_row_unknown in (True, False)


def decoded(decoder: decoders.Decoder, payload: bytes) -> Decoded | None:
    """What a message says, looked at; None also where it can't be read."""
    decoder.table_of(payload)
    decoder.is_message(payload)
    commits = decoder.is_commit(payload)
    decoders.read_again(Change("unreadable", "s", "t", None, None), decoder.raw(payload))
    try:
        message = decoder.decode(payload)
    except MessageUnreadableError:
        return None
    look_at(message)
    if isinstance(message, Commit) and commits:
        with suppress(MessageUnreadableError):  # of wal2json a commit need not say it
            decoder.decode(decoder.begin_told(payload))
    return message


def decoded_by_pgoutput(data: bytes) -> None:
    """Messages of one connection."""
    decoder = pgoutput.Decoder()
    for payload in unframed(data):
        message = decoded(decoder, payload)
        for one in message if isinstance(message, tuple) else [message]:
            if one is not None:
                recorded(decoder, one, payload)


def recorded(decoder: pgoutput.Decoder, message: Decoded, payload: bytes) -> None:
    """A recording says the same."""
    again = wal2json.decode(decoder.line(message, payload))
    look_at(again)
    if isinstance(message, Change | Message):
        assert again == message


def decoded_by_wal2json(data: bytes) -> None:
    """A line of format 2, also as one that need not say all, and masked."""
    message = decoded(wal2json.Decoder(), data)
    with suppress(MessageUnreadableError):
        wal2json.said(data)
    if isinstance(message, Change):
        try:
            again = wal2json.decode(wal2json.masked(data, dict.fromkeys))
        except MessageUnreadableError:
            return
        assert isinstance(again, Change)
        assert not any(value is not None for row in (again.old, again.new) if row for value in row.values())


def decoded_as_documents(data: bytes) -> None:
    """Documents of format 1, in order."""
    documents = Documents()
    for payload in unframed(data):
        with suppress(MessageUnreadableError):
            _, changes = documents.read(payload)
            for raw in changes:
                with suppress(MessageUnreadableError):
                    look_at(documents.message(raw))


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    "pgoutput": decoded_by_pgoutput,
    "wal2json": decoded_by_wal2json,
    "documents": decoded_as_documents,
}
"""What is fuzzed."""
