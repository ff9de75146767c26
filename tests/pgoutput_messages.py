"""Messages of pgoutput, byte for byte. Manual: "Logical Replication Message Formats"."""

from __future__ import annotations

import struct
from collections.abc import Sequence

UNCHANGED = object()
"""In the place of a value: it is TOASTed, and wasn't sent."""

Column = tuple[str, int] | tuple[str, int, bool]


def begin(commit_lsn: int = 0x1000, *, at: int = 0, xid: int = 700) -> bytes:
    return b"B" + struct.pack(">QqI", commit_lsn, at, xid)


def commit(commit_lsn: int = 0x1000, end_lsn: int = 0x1030, *, at: int = 0) -> bytes:
    return b"C" + struct.pack(">BQQq", 0, commit_lsn, end_lsn, at)


def relation(
    *columns: Column, oid: int = 16384, schema: str = "public", table: str = "lead", identity: str = "f"
) -> bytes:
    """What is said of a table: columns with the OIDs of their types, and whether they are of the identity."""
    found = b"".join(
        struct.pack(">B", bool(key and key[0])) + name.encode() + b"\0" + struct.pack(">Ii", typeoid, -1)
        for name, typeoid, *key in columns
    )
    head = struct.pack(">I", oid) + schema.encode() + b"\0" + table.encode() + b"\0" + identity.encode()
    return b"R" + head + struct.pack(">H", len(columns)) + found


def row(values: Sequence[object]) -> bytes:
    """A tuple, of texts, None and UNCHANGED."""
    found = [
        b"n"
        if value is None
        else b"u"
        if value is UNCHANGED
        else b"t" + struct.pack(">I", len(_text(value))) + _text(value)
        for value in values
    ]
    return struct.pack(">H", len(values)) + b"".join(found)


def _text(value: object) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


def insert(*values: object, oid: int = 16384) -> bytes:
    return b"I" + struct.pack(">I", oid) + b"N" + row(values)


def update(
    new: Sequence[object], *, old: Sequence[object] | None = None, key: Sequence[object] | None = None, oid: int = 16384
) -> bytes:
    before = b"O" + row(old) if old is not None else b"K" + row(key) if key is not None else b""
    return b"U" + struct.pack(">I", oid) + before + b"N" + row(new)


def delete(*, old: Sequence[object] | None = None, key: Sequence[object] = (), oid: int = 16384) -> bytes:
    return b"D" + struct.pack(">I", oid) + (b"O" + row(old) if old is not None else b"K" + row(key))


def truncate(*oids: int, options: int = 0) -> bytes:
    return b"T" + struct.pack(f">IB{len(oids)}I", len(oids), options, *oids)


def message(prefix: str, content: bytes, *, transactional: bool = True) -> bytes:
    head = struct.pack(">BQ", transactional, 0x900) + prefix.encode() + b"\0"
    return b"M" + head + struct.pack(">I", len(content)) + content
