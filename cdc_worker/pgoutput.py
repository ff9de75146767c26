"""The output of pgoutput, protocol version 1: binary messages, of which rows are read as far as they are looked at.

Manual: "Logical Replication Message Formats". What a tuple has is cut into texts, and a text becomes a value when
somebody asks for it. Other than wal2json the plugin sends the names and types of a table's columns once, before the
first change that has them: a `Decoder` remembers them, and reads all messages of a connection in order.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, Final, Literal, Protocol, cast

import msgspec

from cdc_worker.changes import Begin, Change, Commit, Decoded, Message, Payload, Row
from cdc_worker.errors import MessageUnreadableError
from cdc_worker.lazy import Layout, lazy_row
from cdc_worker.lsn import LSN
from cdc_worker.protocol import EPOCH
from cdc_worker.values import READERS, Value

PLUGIN: Final = "pgoutput"


def options(publication: str) -> dict[str, str]:
    """Options of START_REPLICATION for what is in a publication. PostgreSQL knows all of them from version 14 on.

    Never `origin`: `none` would hide the rows that a subscription writes.
    """
    quoted = '"' + publication.replace('"', '""') + '"'
    return {"proto_version": "1", "publication_names": quoted, "messages": "true"}


class _Unsent:
    """In the place of a value that wasn't sent: it is unknown, which is not NULL."""


_UNSENT: Final = _Unsent()

_Texts = list[str | _Unsent | None]


class _Text(Protocol):
    """Reads bytes of the server's encoding. Raises UnicodeDecodeError, unless it is to replace `errors`."""

    def __call__(self, data: bytes, /, *, errors: str = "strict") -> str: ...


_BEGIN: Final = struct.Struct(">xQqI")
_COMMIT: Final = struct.Struct(">xBQQq")
_MESSAGE: Final = struct.Struct(">xBQ")
_NUMBER: Final = struct.Struct(">I").unpack_from
_COUNT: Final = struct.Struct(">H").unpack_from
_COLUMN: Final = struct.Struct(">Ii")

_LAST: Final = (1 << 64) - 1

_TEXT, _NULL, _UNCHANGED = b"tnu"

_TRANSACTIONAL: Final = 1
_KEY: Final = 1


class _Relation:
    """A table, as changes have it from here on."""

    __slots__ = ("columns", "full", "key", "layout", "name", "payload", "readers", "typeoids", "wanted")

    def __init__(
        self,
        name: tuple[str, str],
        columns: Sequence[tuple[str, int, bool]],
        *,
        full: bool,
        wanted: bool,
        payload: bytes,
    ) -> None:
        self.name = name
        self.columns = [column for column, _, _ in columns]
        self.typeoids = {column: typeoid for column, typeoid, _ in columns}
        self.readers = [READERS.get(typeoid) for _, typeoid, _ in columns]
        self.layout = Layout(self.columns, self.readers)
        self.key = [place for place, (_, _, key) in enumerate(columns) if key]
        self.full = full
        self.wanted = wanted
        self.payload = payload


def _row(relation: _Relation, texts: _Texts) -> Row:
    """A row: of one that was sent whole nothing is read before it is asked for."""
    if _UNSENT not in texts:
        return lazy_row(relation.layout, texts)
    columns = zip(relation.columns, relation.readers, texts, strict=True)
    return {
        column: cast(str | None, text) if read is None or text is None else read(cast(str, text))
        for column, read, text in columns
        if text is not _UNSENT
    }


class Decoder:
    """What the plugin sends over one connection, one message after the other; see `decoders.Decoder`."""

    plugin: Final = PLUGIN
    by_itself: Final = False

    def __init__(
        self,
        tables: Collection[tuple[str, str]] | None = None,
        prefixes: Collection[str] | None = None,
        *,
        encoding: str = "utf-8",
    ) -> None:
        """Changes of other `tables`, and messages with other `prefixes`, are passed over; None stands for all.

        `encoding` is Python's name of the server's, in which all texts are.
        """
        self._tables = None if tables is None else frozenset(tables)
        self._prefixes = None if prefixes is None else frozenset(prefixes)
        self._encoding = encoding
        self._text: _Text = bytes.decode if encoding == "utf-8" else partial(_recoded, encoding)
        self._relations: dict[int, _Relation] = {}

    def decode(self, payload: Payload) -> Decoded | None:
        """Read a message; None for one that only prepares others, or isn't wanted. Raises MessageUnreadableError."""
        data = bytes(payload)
        try:
            match data[:1]:
                case b"U":
                    return self._update(data)
                case b"B":
                    return _begin(data)
                case b"C":
                    return _commit(data)
                case b"I":
                    return self._insert(data)
                case b"D":
                    return self._delete(data)
                case b"R":
                    self._learn(data)
                    return None
                case b"M":
                    return self._message(data)
                case b"T":
                    return self._truncate(data)
                case b"Y" | b"O":
                    return None
            raise ValueError(f"it begins with {data[:1]!r}")
        except (ValueError, IndexError, OverflowError, struct.error) as error:
            raise MessageUnreadableError(
                f"pgoutput sent {len(data)} bytes that can't be read: {_reason(error)}",
                hint="proto_version 1 is read, without binary, streaming and two_phase",
            ) from error

    def _relation(self, data: bytes) -> _Relation:
        (number,) = _NUMBER(data, 1)
        relation = self._relations.get(number)
        if relation is None:
            raise ValueError(f"nothing was said of relation {number}")
        return relation

    def _insert(self, data: bytes) -> Change | None:
        relation = self._relation(data)
        if not relation.wanted:
            return None
        _expect(data, 5, b"N")
        row, end = _tuple(data, 6, relation, self._text)
        _expect_end(data, end)
        return Change("insert", *relation.name, None, _row(relation, row))

    def _update(self, data: bytes) -> Change | None:
        relation = self._relation(data)
        if not relation.wanted:
            return None
        old, place = None, 5
        kind = data[5:6]
        if kind != b"N":
            old, place = _old(data, 5, relation, self._text)
        _expect(data, place, b"N")
        new, end = _tuple(data, place + 1, relation, self._text)
        _expect_end(data, end)
        if old is None:
            old = _only(relation.key, new) if not relation.full else _only([], new)
        changed = []
        if old != new:
            for index, (before, after) in enumerate(zip(old, new, strict=True)):
                if after is before:
                    continue
                if after is _UNSENT:
                    new[index] = before  # an unchanged TOASTed column isn't sent
                elif before != after and not _same(relation.readers[index], before, after):
                    changed.append(relation.columns[index])
        return Change("update", *relation.name, _row(relation, old), _row(relation, new), tuple(changed))

    def _delete(self, data: bytes) -> Change | None:
        relation = self._relation(data)
        if not relation.wanted:
            return None
        row, end = _old(data, 5, relation, self._text)
        _expect_end(data, end)
        return Change("delete", *relation.name, _row(relation, row), None)

    def _truncate(self, data: bytes) -> tuple[Change, ...] | None:
        (count,) = _NUMBER(data, 1)
        _expect_end(data, 6 + 4 * count)
        found = []
        for place in range(6, len(data), 4):
            (number,) = _NUMBER(data, place)
            relation = self._relations.get(number)
            if relation is None:
                raise ValueError(f"nothing was said of relation {number}")
            if relation.wanted:
                found.append(Change("truncate", *relation.name, None, None))
        return tuple(found) or None

    def _learn(self, data: bytes) -> None:
        (number,) = _NUMBER(data, 1)
        schema, place = _string(data, 5, self._text)
        table, place = _string(data, place, self._text)
        identity = data[place]
        (count,) = _COUNT(data, place + 1)
        place += 3
        columns = []
        for _ in range(count):
            flags = data[place]
            column, place = _string(data, place + 1, self._text)
            typeoid, _modifier = _COLUMN.unpack_from(data, place)
            place += _COLUMN.size
            columns.append((column, typeoid, bool(flags & _KEY)))
        _expect_end(data, place)
        name = (schema or "pg_catalog", table)
        self._relations[number] = _Relation(
            name,
            columns,
            full=identity == ord("f"),
            wanted=self._tables is None or name in self._tables,
            payload=data,
        )

    def _message(self, data: bytes) -> Message | None:
        flags, _lsn = _MESSAGE.unpack_from(data)
        prefix, place = _string(data, _MESSAGE.size, self._text)
        (size,) = _NUMBER(data, place)
        _expect_end(data, place + 4 + size)
        if self._prefixes is not None and prefix not in self._prefixes:
            return None
        # As wal2json has it: up to the first NUL. What isn't text must not stop anybody, for everyone may send it.
        content = self._text(data[place + 4 :].partition(b"\0")[0], errors="replace")
        return Message(prefix, content, transactional=bool(flags & _TRANSACTIONAL))

    def line(self, message: Decoded, payload: Payload) -> bytes:
        """What a recording has of it: a line as wal2json writes it."""
        match message:
            case Begin():
                lsns = {"lsn": str(message.commit_lsn), "nextlsn": str(message.end_lsn)}
                told = {"action": "B", "xid": message.xid, "timestamp": str(message.committed_at), **lsns}
            case Commit():
                told = {"action": "C", "nextlsn": str(message.end_lsn)}
            case Message():
                told = {"action": "M", **msgspec.structs.asdict(message)}
            case Change():
                data = bytes(payload)
                told = _told(message, {} if message.operation == "truncate" else self._relation(data).typeoids)
            case _:
                raise TypeError(f"{message!r} is no line")
        return _encode(told)

    def table_of(self, payload: Payload) -> tuple[str, str] | None:
        """The table of a change, also where the rest of it can't be read."""
        data = bytes(payload)
        if data[:1] not in (b"I", b"U", b"D") or len(data) < 5:
            return None
        relation = self._relations.get(_NUMBER(data, 1)[0])
        return None if relation is None else relation.name

    def is_commit(self, payload: Payload) -> bool:
        """Whether it begins as a commit."""
        return bytes(payload[:1]) == b"C"

    def is_message(self, payload: Payload) -> bool:
        """Whether it begins as a logical message."""
        return bytes(payload[:1]) == b"M"

    def begin_told(self, commit: bytes) -> bytes:
        """The begin of a transaction, of which its commit says nearly the same: the transaction's number is lost."""
        _flags, commit_lsn, _end_lsn, at = _COMMIT.unpack(commit)
        return b"B" + _BEGIN.pack(commit_lsn, at, 0)[1:]

    def raw(self, payload: Payload) -> bytes:
        """All that it takes to read it later: what is said of its table stands before it, and the encoding before that.

        UTF-8 goes without saying.
        """
        data = bytes(payload)
        if self.table_of(data) is None:
            return data
        encoding = b"" if self._encoding == "utf-8" else self._encoding.encode() + b"\0"
        return encoding + self._relations[_NUMBER(data, 1)[0]].payload + data


def read_again(raw: bytes) -> Change | None:
    """The change of a message that couldn't be read, as `Decoder.raw` has kept it, if it can be read by now."""
    encoding = "utf-8"
    if raw[:1] != b"R":
        name, _, raw = raw.partition(b"\0")
        encoding = name.decode("ascii", "replace")
    decoder = Decoder(encoding=encoding)
    try:
        place = _end_of_relation(raw)
        decoder.decode(raw[:place])
        change = decoder.decode(raw[place:])
    except (MessageUnreadableError, ValueError, LookupError, struct.error):
        return None
    return change if isinstance(change, Change) else None


def _end_of_relation(data: bytes) -> int:
    if data[:1] != b"R":
        raise ValueError("no relation stands before it")
    place = data.index(b"\0", data.index(b"\0", 5) + 1) + 2
    (count,) = _COUNT(data, place)
    place += 2
    for _ in range(count):
        place = data.index(b"\0", place + 1) + 1 + _COLUMN.size
    return place


_encode: Final = msgspec.json.Encoder(decimal_format="number").encode

_ACTIONS: Final = {"insert": "I", "update": "U", "delete": "D", "truncate": "T"}


def _told(change: Change, typeoids: Mapping[str, int]) -> dict[str, Any]:
    rows: dict[Literal["columns", "identity"], Row | None] = {"columns": change.new, "identity": change.old}
    told: dict[str, Any] = {"action": _ACTIONS[change.operation], "schema": change.schema, "table": change.table}
    for name, row in rows.items():
        if row is not None:
            told[name] = [{"name": c, "typeoid": typeoids[c], "value": value} for c, value in row.items()]
    return told


def _reason(error: Exception) -> str:
    # What isn't text is shown by its error: the bytes may be a person's.
    return "it isn't text in the server's encoding" if isinstance(error, UnicodeDecodeError) else str(error)


def _expect(data: bytes, place: int, kind: bytes) -> None:
    if data[place : place + 1] != kind:
        raise ValueError(f"{data[place : place + 1]!r} stands at byte {place}, and not {kind!r}")


def _expect_end(data: bytes, place: int) -> None:
    if len(data) != place:
        raise ValueError(f"it should be of {place} bytes")


def _begin(data: bytes) -> Begin:
    commit_lsn, at, xid = _BEGIN.unpack(data)
    committed_at = EPOCH + timedelta(microseconds=at)
    if commit_lsn == _LAST:
        raise ValueError("nothing comes after where it was committed")
    return Begin(xid, LSN(commit_lsn), LSN(commit_lsn + 1), committed_at)


def _commit(data: bytes) -> Commit:
    _flags, _commit_lsn, end_lsn, _at = _COMMIT.unpack(data)
    return Commit(LSN(end_lsn))


def _recoded(encoding: str, data: bytes, *, errors: str = "strict") -> str:
    """A text in another encoding, as `Replication.receive` has it: what is in none may still be in UTF-8."""
    return data.decode(encoding, "surrogateescape").encode("utf-8", "surrogateescape").decode("utf-8", errors)


def _string(data: bytes, place: int, text: _Text) -> tuple[str, int]:
    end = data.index(b"\0", place)
    return text(data[place:end]), end + 1


def _tuple(data: bytes, place: int, relation: _Relation, text: _Text) -> tuple[_Texts, int]:
    """The texts of a tuple, and where it ends."""
    (count,) = _COUNT(data, place)
    if count != len(relation.columns):
        raise ValueError(f"a tuple has {count} values, and its table {len(relation.columns)} columns")
    place += 2
    texts: list[bytes] = []
    others: list[tuple[int, _Unsent | None]] = []
    for index in range(count):
        kind = data[place]
        if kind == _TEXT:
            begin = place + 5
            place = begin + _NUMBER(data, place + 1)[0]
            texts.append(data[begin:place])
        elif kind == _NULL:
            place += 1
            texts.append(b"")
            others.append((index, None))
        elif kind == _UNCHANGED:
            place += 1
            texts.append(b"")
            others.append((index, _UNSENT))
        else:
            raise ValueError(f"a value of the kind {chr(kind)!r} stands at byte {place}")
    # Postgres has no text with a NUL: all of them are decoded at once.
    found = cast(_Texts, text(b"\0".join(texts)).split("\0")) if count else []
    if len(found) != count:
        raise ValueError("a value has a NUL in it")
    for index, other in others:
        found[index] = other
    return found, place


def _old(data: bytes, place: int, relation: _Relation, text: _Text) -> tuple[_Texts, int]:
    """What was sent of an old row: all of it, or its key."""
    kind = data[place : place + 1]
    if kind not in (b"K", b"O"):
        raise ValueError(f"{kind!r} stands at byte {place}, and no old row")
    row, end = _tuple(data, place + 1, relation, text)
    return (row if kind == b"O" else _only(relation.key, row)), end


def _only(places: Sequence[int], row: _Texts) -> _Texts:
    """A row of which only these columns are known."""
    kept: _Texts = [_UNSENT] * len(row)
    for place in places:
        kept[place] = row[place]
    return kept


def _same(read: Callable[[str], Value] | None, before: str | _Unsent | None, after: str | _Unsent | None) -> bool:
    """Whether two texts are one value, as 1.0 and 1.00 are."""
    return read is not None and isinstance(before, str) and isinstance(after, str) and read(before) == read(after)
