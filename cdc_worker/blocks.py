"""The lines of a file, plain or compressed, whole or damaged."""

from __future__ import annotations

import os
import stat
import zlib
from collections.abc import Callable, Iterator
from io import BufferedReader
from typing import Final, NamedTuple, Protocol

import zstandard

PIECE: Final = 1 << 12
"""Read at a time from what is compressed: a few bytes may stand for very many."""

PLAIN_PIECE: Final = 1 << 16

HELD: Final = 32 << 20
"""A frame of ours that is longer when decompressed isn't held whole."""

LONGEST: Final = 1 << 30
"""PostgreSQL has no longer messages."""

FRAME: Final = b'{"action":"R"'
"""How the first line of a frame of ours begins."""

Advance = Callable[[int], object]


class Lines(NamedTuple):
    """Lines as they follow each other; `number` is the first one's, from 1.

    What is `verified` is one of our own frames, whole and as it was written. The last line of a file may have no end.
    """

    lines: list[bytes]
    number: int
    verified: bool
    ended: bool = True


class Damage(NamedTuple):
    """Here is something that can't be read. What is only `cut` is as a kill leaves it."""

    reason: str
    cut: bool = False


class NotARecordingError(ValueError):
    """A file holds something else, which the message names."""


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


class _Codec(NamedTuple):
    name: str
    magic: bytes
    decompressor: Callable[[], _Decompressor]
    error: type[Exception]

    def begins(self, head: bytes) -> bool:
        whole = self.magic.startswith(head[: len(self.magic)]) and head != b""
        return whole or (self is ZSTANDARD and head[1:4] == b"\x2a\x4d\x18" and head[0] >> 4 == 5)


# RFC 8878, 3.1.1 and 3.1.2: a frame, or one to skip. RFC 1952, 2.3.1.
ZSTANDARD: Final = _Codec(
    "zstandard", b"\x28\xb5\x2f\xfd", lambda: zstandard.ZstdDecompressor().decompressobj(), zstandard.ZstdError
)
GZIP: Final = _Codec("gzip", b"\x1f\x8b\x08", lambda: zlib.decompressobj(wbits=31), zlib.error)

_LOOKS: Final = (
    (b"PGDMP", "an archive of pg_dump"),
    (b"\xfd7zXZ\0", "compressed with xz: give what it holds as -"),
    (b"BZh", "compressed with bzip2: give what it holds as -"),
    (b"\x04\x22\x4d\x18", "compressed with lz4: give what it holds as -"),
    (b"PK\x03\x04", "a zip archive: give what it holds as -"),
    (b"BEGIN", "what test_decoding writes: record with wal2json"),
    (b"table ", "what test_decoding writes: record with wal2json"),
    (b"B\0\0", "what pgoutput writes: record with wal2json"),
)


class File:
    """A file that is read in order, from which what was read can be put back. `advance` is told how much is read.

    Who is `careful` has what is compressed read twice where it can be, and gets nothing of what proves to be damaged.
    """

    def __init__(self, file: BufferedReader, advance: Advance = lambda size: None, *, careful: bool = True) -> None:
        self._file = file
        self._advance = advance
        self._furthest = self._place = 0  # of what was read from the file
        self._back = b""
        self.again = careful and stat.S_ISREG(os.fstat(file.fileno()).st_mode)
        self._base = file.tell() if self.again else 0

    @property
    def offset(self) -> int:
        """How much of it has been read."""
        return self._place - len(self._back)

    def read(self, size: int, *, quietly: bool = False) -> bytes:
        """The next bytes; none at the end."""
        if self._back:
            data, self._back = self._back[:size], self._back[size:]
            return data
        data = self._file.read1(size)  # what a pipe has by now
        self._place += len(data)
        if not quietly and self._place > self._furthest:
            self._advance(self._place - self._furthest)
            self._furthest = self._place
        return data

    def unread(self, data: bytes) -> None:
        """Put back what was read last."""
        self._back = data + self._back

    def peek(self) -> bytes:
        """The next bytes, at least four if there are, which are read again."""
        data = b""
        while len(data) < 4 and (more := self.read(PLAIN_PIECE)):
            data += more
        self.unread(data)
        return data

    def seek(self, offset: int) -> None:
        """Go there, in a regular file."""
        self._file.seek(self._base + offset)
        self._place, self._back = offset, b""


def blocks(file: File) -> Iterator[Lines | Damage]:
    """What a file holds, in order. Raises NotARecordingError, OSError."""
    head = file.peek()
    codec = next((codec for codec in (ZSTANDARD, GZIP) if codec.begins(head)), None)
    if codec is None and not _looks_plain(head):
        if ZSTANDARD.magic not in head:
            raise NotARecordingError(looks_like(head))
        codec = ZSTANDARD
    return _lines(_plain(file) if codec is None else _compressed(file, codec))


def _looks_plain(head: bytes) -> bool:
    # No line has these bytes behind its first, but a segment of ours whose first byte was damaged does.
    ours = head[1:4] == ZSTANDARD.magic[1:]
    return not ours and (head.lstrip()[:1] in (b"{", b"") or b'\n{"action":"' in head)


def looks_like(head: bytes) -> str:
    """What a file that begins like this may be."""
    text = all(c.isprintable() or c.isspace() for c in head[:1000].decode("utf-8", "ignore"))
    other = "text of another kind" if text else "binary data of another kind"
    return next((named for magic, named in _LOOKS if head.startswith(magic)), other)


class _Frame(NamedTuple):
    data: bytes


def _plain(file: File) -> Iterator[bytes]:
    while data := file.read(PLAIN_PIECE):
        yield data


def _compressed(file: File, codec: _Codec) -> Iterator[bytes | _Frame | Damage]:
    while head := file.peek():
        if codec.begins(head):
            yield from _decompressed(file, codec)
        else:
            start = file.offset
            _skip(file, codec)
            yield Damage(f"bytes {start} to {file.offset} are not what {codec.name} writes")


def _skip(file: File, codec: _Codec) -> None:
    """Go on to where something may begin, or to the end."""
    tail = b""
    while data := file.read(PLAIN_PIECE):
        data = tail + data
        if (place := data.find(codec.magic)) >= 0:
            file.unread(data[place:])
            return
        tail = data[1 - len(codec.magic) :]


def _decompressed(file: File, codec: _Codec) -> Iterator[bytes | _Frame | Damage]:
    """What one frame holds; what follows it is next to be read."""
    start, decompressor = file.offset, codec.decompressor()
    raw: list[bytes] = []
    held: list[bytes] = []
    size, own = 0, False
    try:
        while not decompressor.eof and size <= HELD and (own or size < len(FRAME)):
            data = file.read(PIECE)
            if not data:
                break
            raw.append(data)
            held.append(decompressor.decompress(data))
            size += len(held[-1])
            own = own or (codec is ZSTANDARD and b"".join(held).startswith(FRAME))
    except codec.error as error:
        file.unread(b"".join(raw)[1:])
        _skip(file, codec)
        yield Damage(_wrong(start, file.offset, error))
        return
    if own and size <= HELD:
        if decompressor.eof:
            file.unread(decompressor.unused_data)
            yield _Frame(b"".join(held))
            return
        # It may have swallowed what is whole: a wrong length reaches as far as there is anything.
        file.unread(b"".join(raw)[1:])
        _skip(file, codec)
        if file.peek():
            yield Damage(_wrong(start, file.offset, EOFError("it isn't whole")))
        else:
            yield Damage(f"the last of its frames, from byte {start} on, is cut", cut=True)
        return
    if file.again and codec is ZSTANDARD and not b"".join(held).lstrip().startswith(b"{"):
        # Nothing that is read begins like this, but a segment may have been damaged at its beginning.
        file.seek(start + 1)
        _skip(file, codec)
        if file.peek():
            yield Damage(_wrong(start, file.offset, ValueError("no lines come of it")))
            return
    if file.again:
        file.seek(start)
        if (damage := _check(file, codec)) is not None:
            file.seek(start + 1)
            _skip(file, codec)
            yield Damage(_wrong(start, file.offset, damage))
            return
        file.seek(start)
        decompressor = codec.decompressor()
    else:
        yield from held
    while not decompressor.eof:
        data = file.read(PIECE)
        if not data:
            yield Damage(f"what is compressed from byte {start} on is cut", cut=True)
            return
        try:
            yield decompressor.decompress(data)
        except codec.error as error:
            _skip(file, codec)
            yield Damage(_wrong(start, file.offset, error))
            return
    file.unread(decompressor.unused_data)


def _check(file: File, codec: _Codec) -> Exception | None:
    """What is wrong with a frame, if it isn't only cut: then what came before can't be told from what is wrong."""
    decompressor = codec.decompressor()
    try:
        while not decompressor.eof and (data := file.read(PIECE, quietly=True)):
            decompressor.decompress(data)
    except codec.error as error:
        return error
    return None


def _wrong(start: int, end: int, error: Exception) -> str:
    return f"bytes {start} to {end} can't be decompressed: {str(error).removeprefix('zstd decompressor error: ')}"


def _expect(beginning: bytes) -> None:
    """What is no JSON is nothing to look for lines in."""
    if beginning.strip() and not any(line.lstrip().startswith(b"{") for line in beginning.split(b"\n")):
        raise NotARecordingError(looks_like(beginning))


def _lines(pieces: Iterator[bytes | _Frame | Damage]) -> Iterator[Lines | Damage]:
    number, rest, size = 1, [b""], 0
    for piece in pieces:
        if number == 1 and not isinstance(piece, Damage):
            _expect(piece.data if isinstance(piece, _Frame) else b"".join([*rest, piece]))
        if isinstance(piece, Damage):
            rest, size = [b""], 0
            yield piece
        elif isinstance(piece, _Frame):
            if size:
                yield Damage(f"line {number} is cut")
            rest, size = [b""], 0
            lines = piece.data.split(b"\n")
            ended = not lines[-1]
            yield Lines(lines[:-1] if ended else lines, number, True)
            number += len(lines) - 1
        elif b"\n" not in piece:
            rest.append(piece)
            size += len(piece)
            if size > LONGEST:
                raise NotARecordingError("a line of more than a gigabyte")
        else:
            first, *others, last = piece.split(b"\n")
            yield Lines([b"".join([*rest, first]), *others], number, False)
            number += 1 + len(others)
            rest, size = [last], len(last)
    if size:
        yield Lines([b"".join(rest)], number, False, ended=False)
