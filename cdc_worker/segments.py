"""Reads recordings, whole or damaged: segments that the worker wrote, and what pg_recvlogical writes.

What is whole is read, and each commit once, in however many files it is: of segments from the one that was begun last,
for only what it had told was passed by the checkpoint. What can't be read is left out up to where
something whole begins again, and is missing if it wasn't found elsewhere either.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from io import BufferedReader
from itertools import takewhile
from pathlib import Path
from stat import S_ISREG
from typing import Final, Literal, NamedTuple, cast

from cdc_worker.blocks import Advance, Damage, File, NotARecordingError, blocks
from cdc_worker.changes import RootOf
from cdc_worker.coverage import Coverage
from cdc_worker.errors import MessageUnreadableError, RecordingUnreadableError
from cdc_worker.ledger import Bound, Ledger, Missing, Place, Range, Table
from cdc_worker.lsn import INVALID, LSN
from cdc_worker.reading import FileReader, Recorded, Wanted, first_frame
from cdc_worker.recording import Frame
from cdc_worker.rules import Rules, qualified

__all__ = ["STDIN", "SUFFIXES", "Bound", "Missing", "Recorded", "Source"]

STDIN: Final = "-"

SUFFIXES: Final = (".jsonl", ".jsonl.gz", ".jsonl.zst")
"""Of the files that a directory's recording consists of."""

_NAME: Final = re.compile(r".+-([0-9A-F]{16})-[0-9a-f]{8}\.jsonl\.zst")

_WHAT: Final = "what is read is what the worker records, and what pg_recvlogical writes of wal2json"


class _Named(NamedTuple):
    """A file, and the first frame of ours in it. One that is `given` was not found in a directory.

    Of a pipe neither size nor frame is known.
    """

    path: Path | Literal["-"]
    name: str
    given: bool
    size: int | None = None
    written_at: float = 0.0
    first: Frame | None = None

    @property
    def after(self) -> LSN | None:
        """Where it begins, by its name."""
        named = _NAME.fullmatch(self.path.name) if isinstance(self.path, Path) else None
        return None if named is None else LSN(int(named[1], 16))

    @property
    def begins(self) -> LSN:
        """Where it begins, by its first frame."""
        with suppress(ValueError):
            return INVALID if self.first is None else LSN.parse(self.first.after)
        return INVALID

    @property
    def order(self) -> tuple[bool, str, int, float, str]:
        """What lets files be read in the order of their commits, as far as frames tell that.

        Of those that begin at one place that is last which was written to last.
        """
        first = self.first
        if first is None:
            return True, "", 0, 0, self.name
        return False, first.system_identifier, self.begins, self.written_at, self.name


class _Ahead:
    """Which commits a segment that is still to be read has whole. It is looked at as far as that is asked for."""

    def __init__(self, named: _Named) -> None:
        self.cluster = "" if named.first is None else named.first.system_identifier
        self.begins = named.begins
        self._whole: defaultdict[tuple[Place, Table], Coverage] = defaultdict(Coverage)
        self._until = INVALID
        self._frames = _frames(named)

    def has(self, place: Place, tables: Collection[Table], end: LSN) -> bool:
        """Whether it has what is of these tables in the commit with this end."""
        while self._until < end and (frame := next(self._frames, None)) is not None:
            after, self._until = LSN.parse(frame.after), LSN.parse(frame.until)
            for table in frame.tables:
                key = Place(frame.system_identifier, frame.database), qualified(table)
                self._whole[key].add(after, self._until)
        return all(self._whole[place, table].covers(LSN(end - 1), end) for table in tables)


def _frames(named: _Named) -> Iterator[Frame]:
    """The frames of a segment that are whole, but those that go on with one that isn't."""
    assert isinstance(named.path, Path)
    number = -1
    with suppress(OSError, ValueError, MessageUnreadableError), named.path.open("rb") as file:
        for block in blocks(File(file)):
            frame = None if isinstance(block, Damage) or not block.verified else first_frame(block.lines)
            if frame is not None and (not frame.within or frame.number == number + 1):
                number = frame.number
                yield frame


class Source:
    """The transactions of recordings, in the order of their commits as far as files tell it.

    What has no frames of ours is taken to be of this cluster and database. `roots` tells whose partitions are where the
    recording doesn't; rows that move between them are recognised by `keys`, if not those of the rules. What the
    checkpoint, if given, hasn't passed isn't missing. Only commits from `since` on and before `until` are read. With
    `strict` the first that is missing is an error. `advance` is told how many bytes were read, of `total` if that is
    known.
    """

    def __init__(
        self,
        paths: Sequence[Path | Literal["-"]],
        *,
        worker: str,
        cluster: str,
        database: str | None,
        rules: Rules,
        roots: RootOf | None = None,
        keys: Mapping[Table, tuple[str, ...]] | None = None,
        checkpoint: LSN | None = None,
        strict: bool = False,
        since: Bound | None = None,
        until: Bound | None = None,
        advance: Advance = lambda size: None,
    ) -> None:
        """Raises RecordingUnreadableError."""
        self.others: list[str] = []
        """Files in which frames of other workers were left out."""
        keys = {name: table.key for name, table in rules.items()} if keys is None else keys
        place, range_ = Place(cluster, database), Range(since, until)
        self._wanted = Wanted(worker, place, rules, roots, keys, range_)
        self._ledger = Ledger(rules, range_, place, checkpoint=checkpoint, strict=strict)
        self._strict = strict
        self._advance = advance
        self._number = 0
        self._ahead: list[_Ahead] = []
        self._files = _named(paths)
        sizes = [file.size for file in self._files if file.size is not None]
        self.total = sum(sizes) if len(sizes) == len(self._files) else None

    @property
    def transactions(self) -> int:
        """How many were read so far, wholly or in part."""
        return self._ledger.transactions

    @property
    def repeated(self) -> int:
        """How many were left out because they had been read already."""
        return self._ledger.repeated

    @property
    def missing(self) -> list[Missing]:
        """What could not be read of what was asked for; at the end, all of it."""
        return self._ledger.missing

    def __iter__(self) -> Iterator[Recorded]:
        """Read all files, once. Raises RecordingUnreadableError."""
        ahead = [_Ahead(file) for file in self._files if self._is_ours(file)]
        for file in self._files:
            if self._is_ours(file):
                del ahead[0]
            self._ahead = ahead
            with ExitStack() as stack:
                try:
                    opened = stack.enter_context(file.path.open("rb")) if isinstance(file.path, Path) else _stdin()
                    yield from self._read(file, File(opened, self._advance))
                except OSError as error:
                    raise _unreadable(file.name, error) from error
        self._ledger.end()

    def _read(self, named: _Named, file: File) -> Iterator[Recorded]:
        reader = FileReader(
            named.name, self._wanted, self._ledger, after=named.after, positions=self._positions, later=self._comes
        )
        try:
            for block in blocks(file):
                if isinstance(block, Damage):
                    reader.lose(block.reason, more=True, cut=block.cut)
                else:
                    yield from reader.take(block)
        except NotARecordingError as error:
            if named.given:
                raise _no_recording(named.name, error) from error
            reader.lose(f"it is no recording: it is {error}", more=True)
        reader.close()
        if reader.others:
            self.others.append(named.name)

    def _is_ours(self, named: _Named) -> bool:
        return named.first is not None and named.first.worker == self._wanted.worker

    def _comes(self, place: Place, tables: Collection[Table], end: LSN) -> bool:
        """Whether a segment that was begun later has what is of these tables in the commit with this end."""
        cluster = place.system_identifier  # by which they are sorted, and by where they begin
        ahead = takewhile(lambda of: of.cluster == cluster and of.begins < end, self._ahead)
        return any(of.has(place, tables, end) for of in ahead)

    def _positions(self) -> tuple[LSN, LSN]:
        """Of a commit that has none, so that it is after those before it."""
        self._number += 2
        return LSN(self._number - 1), LSN(self._number)


def _stdin() -> BufferedReader:
    return cast(BufferedReader, sys.stdin.buffer)


def _named(paths: Sequence[Path | Literal["-"]]) -> list[_Named]:
    """All files in the order in which they are to be read, each once."""
    found: list[_Named] = []
    known: set[tuple[int, int]] = set()
    for path in paths:
        if not isinstance(path, Path):
            continue
        try:
            for file in _files(path) if path.is_dir() else [path]:
                status = file.stat()
                if (status.st_dev, status.st_ino) not in known:
                    known.add((status.st_dev, status.st_ino))
                    named = _Named(file, str(file), file == path, written_at=status.st_mtime)
                    regular = S_ISREG(status.st_mode)
                    found.append(named._replace(size=status.st_size, first=_first(named)) if regular else named)
        except OSError as error:
            raise _unreadable(str(error.filename or path), error) from error
    stdin = [_Named("-", "standard input", True)] if STDIN in paths else []
    return sorted(found, key=lambda named: named.order) + stdin


def _files(directory: Path) -> list[Path]:
    found = sorted(file for file in directory.iterdir() if file.name.endswith(SUFFIXES) and file.is_file())
    if not found:
        endings = ", ".join(SUFFIXES)
        raise RecordingUnreadableError(
            f'there is no recording in "{directory}"', hint=f"files are read whose names end in {endings}"
        )
    return found


def _first(named: _Named) -> Frame | None:
    """The first frame of ours in a file, if it has any. Raises OSError, RecordingUnreadableError."""
    assert isinstance(named.path, Path)
    with named.path.open("rb") as file:
        try:
            for block in blocks(File(file, careful=False)):
                if not isinstance(block, Damage) and block.lines:
                    return first_frame(block.lines)
        except NotARecordingError as error:
            if named.given:
                raise _no_recording(named.name, error) from error
    return None


def _unreadable(name: str, error: OSError) -> RecordingUnreadableError:
    return RecordingUnreadableError(f'"{name}" can\'t be read: {error.strerror or error}')


def _no_recording(name: str, error: NotARecordingError) -> RecordingUnreadableError:
    return RecordingUnreadableError(f'"{name}" is no recording: it is {error}', hint=_WHAT)
