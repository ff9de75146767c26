"""The messages inside COPY BOTH, as bytes in and values out.

Layouts: PostgreSQL manual, "Streaming Replication Protocol", https://www.postgresql.org/docs/current/protocol-replication.html
"""

from __future__ import annotations

import struct
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import msgspec

from cdc_worker.errors import MessageUnreadableError
from cdc_worker.lsn import INVALID, LSN

EPOCH = datetime(2000, 1, 1, tzinfo=UTC)

_XLOG_DATA = struct.Struct(">cQQq")

HEADER = _XLOG_DATA.size
"""So many bytes stand before what the output plugin wrote."""

XLOG_DATA = ord("w")
"""With which a message begins in which that is."""

_KEEPALIVE = struct.Struct(">cQqB")
_STATUS_UPDATE = struct.Struct(">cQQQqB")


class XLogData(msgspec.Struct, frozen=True, gc=False):
    """`w`: a piece of the stream. `wal_start` is where its record lies; `payload` is what the output plugin wrote."""

    wal_start: LSN
    wal_end: LSN
    payload: memoryview


class PrimaryKeepalive(NamedTuple):
    """`k`: everything before `wal_end` has been sent. Answer at once when `reply_requested`, or be cut off."""

    wal_end: LSN
    sent_at: datetime
    reply_requested: bool


def parse(data: memoryview) -> XLogData | PrimaryKeepalive:
    """Read one CopyData message. Raises MessageUnreadableError for a kind or length that the protocol doesn't have."""
    if len(data) < HEADER or data[0] != XLOG_DATA:
        return keepalive(data)
    _, start, end, _ = _XLOG_DATA.unpack_from(data)
    return XLogData(LSN(start), LSN(end), data[HEADER:])


def keepalive(data: memoryview) -> PrimaryKeepalive:
    """Read a primary keepalive message. Raises MessageUnreadableError for anything else."""
    kind = bytes(data[:1])
    if kind not in (b"k", b"w", b""):
        raise MessageUnreadableError(f"unknown kind of replication message: {kind!r}")
    if kind != b"k" or len(data) != _KEEPALIVE.size:
        raise MessageUnreadableError(f"a replication message of {len(data)} bytes has the wrong length")
    _, end, sent_at, reply = _KEEPALIVE.unpack(data)
    try:
        return PrimaryKeepalive(LSN(end), EPOCH + timedelta(microseconds=sent_at), bool(reply))
    except OverflowError as error:
        raise MessageUnreadableError("a keepalive was sent at a time beyond the calendar") from error


def standby_status_update(
    *, written: LSN, flushed: LSN = INVALID, applied: LSN = INVALID, at: datetime, reply_requested: bool = False
) -> bytes:
    """Report progress. `flushed` lets the server discard WAL: pass only what is durable, or 0 for "unknown"."""
    microseconds = (at - EPOCH) // timedelta(microseconds=1)
    return _STATUS_UPDATE.pack(b"r", written, flushed, applied, microseconds, reply_requested)
