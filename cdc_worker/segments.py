"""Reads recordings, whole or damaged: segments that the worker wrote, and what pg_recvlogical writes.

What is whole is read, and each commit once, in however many files it is. What can't be read is left out up to where
something whole begins again, and is `missing` if it wasn't found elsewhere either.
"""

from __future__ import annotations

import re
import sys
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from enum import Enum, auto
from pathlib import Path
from typing import BinaryIO, Final, Literal, NamedTuple

import msgspec
from pydantic import BaseModel, Field

from cdc_worker import recording, wal2json
from cdc_worker.blocks import Advance, Damage, File, Lines, NotARecordingError, blocks, looks_like
from cdc_worker.changes import Assembler, Begin, BeginToldError, Change, Commit, Masked, RootOf, Transaction, Unread
from cdc_worker.coverage import Coverage, Seen
from cdc_worker.errors import MessageUnreadableError, RecordingUnreadableError
from cdc_worker.lsn import INVALID, LSN
from cdc_worker.recording import Frame, Looked, Partition
from cdc_worker.rules import Rules, qualified
from cdc_worker.wal2json import Said

Table = tuple[str, str]

Bound = LSN | datetime
"""Of a range of commits: by where they are, or by when they were."""

STDIN: Final = "-"

SUFFIXES: Final = (".jsonl", ".jsonl.gz", ".jsonl.zst")
"""Of the files that a directory's recording consists of."""

_NAME: Final = re.compile(r".+-([0-9A-F]{16})-[0-9a-f]{8}\.jsonl\.zst")

_ACTION: Final = b'{"action":"'
_STRUCTURE: Final = b"BCRP"
"""The lines that are read also of what nobody wants."""

_BEGIN: Final = b'{"action":"B"'
_COMMIT: Final = b'{"action":"C"'

_UNKNOWN: Final = datetime.fromtimestamp(0, UTC)
"""In place of the time of a commit that doesn't tell it."""


class Recorded(NamedTuple):
    """A transaction of a recording, or a slice of one. A commit that breaks off has no last slice.

    `looked` is what was found by lookups for the changes of this slice, counted as they are now. Without LSN a
    transaction has positions that only say what came first; without time, that of its commit is no true one. Of the
    tables that it `holds` all changes of the commit come; of others that isn't known.
    """

    system_identifier: str
    database: str | None
    transaction: Transaction
    looked: Sequence[Looked] = ()
    has_lsn: bool = True
    has_time: bool = True
    file: str = ""
    holds: Set[Table] = frozenset()

    @property
    def exact(self) -> bool:
        """Whether it is known where and when the commit was."""
        return self.has_lsn and self.has_time


class Missing(BaseModel, frozen=True):
    """What a recording lacks: commits that end after `after` and at or before `until`, as far as that is known."""

    file: str = Field(description="the file that is damaged, or before which files are missing")
    after: str | None = Field(default=None, description="LSN: what ends after it is missing")
    until: str | None = Field(default=None, description="LSN: what ends after it is there, or came later")
    reason: str = Field(description="what is wrong")

    def __str__(self) -> str:
        stretch = [f"from {self.after}"] * (self.after is not None) + [f"to {self.until}"] * (self.until is not None)
        return f"{self.file}{', ' if stretch else ''}{' '.join(stretch)}: {self.reason}"


class _Place(NamedTuple):
    """Whose commits these are."""

    system_identifier: str
    database: str | None


class _Loss(NamedTuple):
    """What a file lacks. Without an end it is what was last in there."""

    file: str
    place: _Place
    tables: Collection[Table]
    after: LSN | None
    until: LSN | None
    reason: str
    last: bool = False


class _At(Enum):
    """Where in a file its reader is."""

    OUTSIDE = auto()
    INSIDE = auto()  # a transaction
    PASSING = auto()  # one that nobody wants
    LOST = auto()  # until something whole begins


_UNREAD: Final = frozenset((_At.PASSING, _At.LOST))


class _Named(NamedTuple):
    """A file, and what it begins with."""

    path: Path | Literal["-"]
    name: str
    given: bool  # by name, and not found in a directory
    size: int
    first: Frame | None = None


class Source:
    """The transactions of recordings, in the order of their commits as far as that is known.

    What has no frames of ours is taken to be of this cluster and database. `roots` tells whose partitions are where the
    recording doesn't; rows that move between them are recognised by `keys`, if not those of the rules. What the
    checkpoint, if given, hasn't passed need not be recorded. Only commits from `since` on and before `until` are read.
    Of what is missing `strict` makes the first an error. `advance` is told how many bytes were read, of `total` if that
    is known.
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
        self.worker = worker
        self.place = _Place(cluster, database)
        self.rules = rules
        self.roots = roots
        self.keys = {name: table.key for name, table in rules.items()} if keys is None else keys
        self.since = since
        self.until = until
        self.transactions = 0
        """How many were read, wholly or in part."""
        self.repeated = 0
        """How many were left out because they had been read already."""
        self.others: list[str] = []
        """Files of other workers, which were left out."""
        self._checkpoint = checkpoint
        self._strict = strict
        self._advance = advance
        self._losses: list[_Loss] = []
        self._whole: defaultdict[tuple[_Place, Table], Coverage] = defaultdict(Coverage)
        self._framed: defaultdict[tuple[_Place, Table], Coverage] = defaultdict(Coverage)
        self._claimed: defaultdict[tuple[_Place, Table], Coverage] = defaultdict(Coverage)
        self._seen: defaultdict[tuple[_Place, Table], Seen] = defaultdict(Seen)
        self._begins: dict[tuple[_Place, LSN], str] = {}  # which file goes on after a gap
        self._early: dict[_Place, LSN] = {}  # up to where commits were before `since`
        self._late: dict[_Place, LSN] = {}  # from where on they were not before `until`
        self._number = 0
        self._files = self._named(paths)
        sizes = [file.size for file in self._files]
        self.total = None if STDIN in paths else sum(sizes)

    def __iter__(self) -> Iterator[Recorded]:
        """Read all files once. Raises RecordingUnreadableError, OSError."""
        for file in self._files:
            with ExitStack() as stack:
                opened = File(_opened(file.path, stack), self._advance)
                yield from self._read(file, opened)
        if self._strict:
            self._stop_at(self.missing)

    def _read(self, file: _Named, opened: File) -> Iterator[Recorded]:
        reader = _Reader(self, file)
        try:
            for block in blocks(opened):
                if isinstance(block, Damage):
                    reader.lose(block.reason)
                else:
                    yield from reader.take(block)
        except NotARecordingError as error:
            reader.lose(f"it is no recording: {error}")
        reader.close()
        if reader.others:
            self.others.append(file.name)

    # The files

    def _named(self, paths: Sequence[Path | Literal["-"]]) -> list[_Named]:
        """All files in the order in which they are read."""
        found: list[_Named] = []
        stdin: list[_Named] = []
        known: set[tuple[int, int]] = set()
        for path in paths:
            if path == STDIN:
                stdin = [_Named(STDIN, "standard input", True, 0)]
                continue
            assert isinstance(path, Path)
            try:
                files = self._files_of(path) if path.is_dir() else [path]
                for file in files:
                    status = file.stat()
                    if (status.st_dev, status.st_ino) not in known:
                        known.add((status.st_dev, status.st_ino))
                        named = _Named(file, str(file), file == path, status.st_size)
                        found.append(named._replace(first=self._first(named)))
            except OSError as error:
                raise RecordingUnreadableError(
                    f'"{error.filename or path}" can\'t be read: {error.strerror}'
                ) from error
        return sorted(found, key=_order) + stdin

    def _files_of(self, directory: Path) -> list[Path]:
        found = sorted(file for file in directory.iterdir() if file.name.endswith(SUFFIXES) and file.is_file())
        if not found:
            raise RecordingUnreadableError(
                f'there is no recording in "{directory}"', hint=f"files are read that end in {', '.join(SUFFIXES)}"
            )
        return found

    def _first(self, named: _Named) -> Frame | None:
        """The first frame of ours in a file, if it has any."""
        assert isinstance(named.path, Path)
        with named.path.open("rb") as file:
            try:
                for block in blocks(File(file, careful=False)):
                    if isinstance(block, Lines) and block.lines:
                        if not block.lines[0].lstrip().startswith(b"{"):
                            raise NotARecordingError(looks_like(block.lines[0]))
                        return _frame(block.lines[0])
            except NotARecordingError as error:
                if named.given:
                    raise RecordingUnreadableError(
                        f'"{named.path}" is no recording: it is {error}',
                        hint="what is read is what the worker records, and what pg_recvlogical writes with wal2json",
                    ) from error
        return None

    # What has been read

    def known(self, place: _Place, table: Table, end: LSN) -> bool:
        """Whether the changes of a table in the commit with this end were read already."""
        key = place, table
        return (key in self._whole and self._whole[key].covers(LSN(end - 1), end)) or (
            key in self._seen and end in self._seen[key]
        )

    def cover(
        self,
        place: _Place,
        tables: Iterable[Table],
        after: LSN,
        until: LSN,
        file: str,
        *,
        framed: bool,
        whole: bool,
    ) -> None:
        """Note that all commits with these ends have been read: so frames of ours say, of which some are `whole`."""
        for table in tables:
            if table in self.rules:
                key = place, table
                self._claimed[key].add(after, until)
                if framed:
                    end = self._framed[key].until
                    if end is not None and end < after:
                        self._begins[place, after] = file
                    self._framed[key].add(after, until)
                if whole:
                    self._whole[key].add(after, until)

    def see(self, place: _Place, tables: Iterable[Table], end: LSN) -> None:
        """Note a commit of which nobody knows whether it comes again."""
        for table in tables:
            self._seen[place, table].add(end)

    def lose(self, loss: _Loss) -> None:
        """Note what can't be read."""
        self._losses.append(loss)
        if self._strict and not loss.last:
            self._stop_at(self.missing)

    def before(self, place: _Place, tables: Iterable[Table], after: LSN) -> None:
        """Note that nothing earlier than this will come any more; an error if something is missing, where strict."""
        if not self._strict:
            return
        self._stop_at(found for found in self.missing if found.after is None or LSN.parse(found.after) < after)
        for table in tables:
            end = self._framed[place, table].until if (place, table) in self._framed else None
            if end is not None and end < after and self._wanted(place, end, after):
                self._stop_at([self._gap(place, end, after, [table])])

    def _stop_at(self, missing: Iterable[Missing]) -> None:
        for one in missing:
            raise RecordingUnreadableError(
                f"the recording isn't whole: {one}", hint="what is whole is read if not strict"
            )

    def outside(self, place: _Place, begin: Begin, *, has_lsn: bool, has_time: bool, file: str) -> bool:
        """Whether a transaction is not in the range."""
        early, late = (self._passed(bound, begin, has_lsn, has_time, file) for bound in (self.since, self.until))
        if early is False and has_lsn:
            self._early[place] = max(self._early.get(place, INVALID), begin.end_lsn)
        if late is True and has_lsn:
            self._late[place] = min(self._late.get(place, begin.commit_lsn), begin.commit_lsn)
        return early is False or late is True

    def _passed(self, bound: Bound | None, begin: Begin, has_lsn: bool, has_time: bool, file: str) -> bool | None:
        """Whether a transaction is at or after a bound."""
        if bound is None:
            return None
        by_time = isinstance(bound, datetime)
        if not (has_time if by_time else has_lsn):
            lacks, option = ("time", "include-timestamp") if by_time else ("LSN", "include-lsn")
            raise RecordingUnreadableError(
                f"{file} has transactions without {lacks}, so that nobody knows whether they are asked for",
                hint=f"leave out the range; or record with -o format-version=2 -o {option}=1",
            )
        return begin.committed_at >= bound if isinstance(bound, datetime) else begin.commit_lsn >= bound

    def beyond(self, frame: Frame) -> bool | None:
        """Whether all commits of a frame are after the range; None if all are before it."""
        if isinstance(self.since, LSN) and LSN.parse(frame.until) <= self.since:
            return None
        return isinstance(self.until, LSN) and LSN.parse(frame.after) >= self.until

    def positions(self) -> tuple[LSN, LSN]:
        """Of a commit that has none, so that it is after those before it."""
        self._number += 2
        return LSN(self._number - 1), LSN(self._number)

    # What is missing

    @property
    def missing(self) -> list[Missing]:
        """What could not be read, of what was asked for; at the end, all of it."""
        found: list[Missing] = []
        named: defaultdict[_Place, Coverage] = defaultdict(Coverage)
        for loss in self._losses:
            if (stretch := self._lacking(loss)) is not None:
                after, until = stretch
                if after is not None and until is not None:
                    named[loss.place].add(after, until)
                found.append(
                    Missing(
                        file=loss.file,
                        after=None if after is None else str(after),
                        until=None if until is None else str(until),
                        reason=loss.reason,
                    )
                )
        gaps: defaultdict[tuple[_Place, LSN, LSN], list[Table]] = defaultdict(list)
        for (place, table), framed in self._framed.items():
            for after, until in framed.gaps():
                read = named[place].covers(after, until) or self._claimed[place, table].covers(after, until)
                if not read and self._wanted(place, after, until):
                    gaps[place, after, until].append(table)
        found += (self._gap(place, after, until, tables) for (place, after, until), tables in sorted(gaps.items()))
        return found

    def _gap(self, place: _Place, after: LSN, until: LSN, tables: Collection[Table]) -> Missing:
        file = self._begins.get((place, until), "")
        of = "" if len(tables) == len(self.rules) else " of " + ", ".join(sorted(map(".".join, tables)))
        reason = f"no file has what was committed before it{of}"
        return Missing(file=file, after=str(after), until=str(until), reason=reason)

    def _lacking(self, loss: _Loss) -> tuple[LSN | None, LSN | None] | None:
        """What of a loss is nowhere else; None if there is nothing."""
        after, until = loss.after, loss.until
        if after is None:
            return (after, until) if until is None or self._wanted(loss.place, INVALID, until) else None
        tables = [table for table in loss.tables if table in self.rules]
        found = [self._claimed[loss.place, table] for table in tables if (loss.place, table) in self._claimed]
        if len(found) < len(tables):
            found.append(Coverage())
        if loss.last:
            # Whoever goes on begins at the checkpoint, which is never beyond what is whole.
            if self._checkpoint is not None and loss.place == self.place and self._checkpoint <= after:
                return None
            if until is None:
                if all(claimed.reach(after) > after for claimed in found):
                    return None
                until = min(filter(None, (claimed.next(after) for claimed in found)), default=None)
                if until is None and loss.place == self.place:
                    until = self._checkpoint
        if until is not None and all(claimed.covers(after, until) for claimed in found):
            return None
        return (after, until) if self._wanted(loss.place, after, until) else None

    def _wanted(self, place: _Place, after: LSN, until: LSN | None) -> bool:
        """Whether commits with these ends may be in the range."""
        since = self.since if isinstance(self.since, LSN) else self._early.get(place)
        end = self.until if isinstance(self.until, LSN) else self._late.get(place)
        return not (since is not None and until is not None and until <= since) and not (
            end is not None and after >= end
        )


def _order(named: _Named) -> tuple[bool, str, int, str]:
    first = named.first
    if first is None:
        return True, "", 0, named.name
    after = INVALID
    with suppress(ValueError):
        after = LSN.parse(first.after)
    return False, first.system_identifier, after, named.name


def _opened(path: Path | Literal["-"], stack: ExitStack) -> BinaryIO:
    return stack.enter_context(path.open("rb")) if isinstance(path, Path) else sys.stdin.buffer


def _frame(line: bytes) -> Frame | None:
    with suppress(MessageUnreadableError):
        if recording.is_own(line) and isinstance(found := recording.decode(line), Frame):
            return found
    return None


class _Reader:
    """Reads one file. `others` is whether frames of another worker are in there."""

    def __init__(self, source: Source, file: _Named) -> None:
        self.others = self._foreign = False
        self._source = source
        self._file = file
        self._place = source.place
        self._frame: Frame | None = None
        self._verified = False
        self._tables: dict[Table, None] = {}  # those of the frame, or all that were seen
        self._partitions: dict[Table, Table] = {}
        self._masked: Masked = {}
        self._at = _At.OUTSIDE
        self._line = 0
        # What is known: `reached` is up to where this file was read, and from `whole_from` on without a gap.
        self._reached: LSN | None = None
        self._whole_from: LSN | None = None
        self._until: LSN | None = None  # of the last frame
        self._lost: tuple[LSN | None, str] | None = None
        self._ends_at: LSN | None = None  # what is lost last, at least
        if isinstance(file.path, Path) and (named := _NAME.fullmatch(file.path.name)) is not None:
            self._reached = LSN(int(named[1], 16))
        self._begun_in_earnest = False
        # Of the transaction that is open:
        self._assembler = self._new()
        self._begin: Begin | None = None
        self._has_lsn = self._has_time = True
        self._known: dict[Table, bool] = {}  # by table, whether its changes were read already
        self._of_commit: dict[Table, None] = {}
        self._looked: list[Looked] = []
        self._kept = 0
        self._yielded = False
        self._left_out = False
        self._holds: frozenset[Table] = frozenset()

    def _new(self) -> Assembler:
        return Assembler(root_of=self._root, keys=self._source.keys)

    def _root(self, change: Change, commit_lsn: LSN) -> Table | None:
        table = change.schema, change.table
        if table in self._partitions:
            return self._partitions[table]
        if table in self._source.rules or (self._frame is not None and table in self._tables):
            return table
        return None if self._source.roots is None else self._source.roots(change, commit_lsn)

    # Lines

    def take(self, block: Lines) -> Iterator[Recorded]:
        """Read lines that follow each other."""
        frame = _frame(block.lines[0]) if block.verified and block.lines else None
        if block.verified and frame is None:
            self._line = block.number
            self.lose(f"the frame at line {block.number} can't be read: {_why(block.lines[0])}")
            return
        if frame is not None and self._skips(frame, block.lines):
            return
        for number, line in enumerate(block.lines, block.number):
            if not line or line.isspace():
                continue
            self._line = number
            if self._at in _UNREAD and line.startswith(_ACTION) and line[len(_ACTION)] not in _STRUCTURE:
                continue
            try:
                recorded = self._take(line, block)
            except (MessageUnreadableError, BeginToldError) as error:
                if block.ended:
                    self.lose(f"line {number} can't be read: {error}")
                else:
                    self.lose(f"it is cut within line {number}")
                continue
            if recorded is not None:
                yield recorded
        if block.verified and not self._foreign:
            self._close_frame(whole=True)

    def _skips(self, frame: Frame, lines: Sequence[bytes]) -> bool:
        """Whether nothing in a frame is in the range, nor begins in it."""
        if self._at is not _At.OUTSIDE or frame.within or frame.worker != self._source.worker:
            return False
        try:
            beyond = self._source.beyond(frame)
            if beyond is False or (beyond is None and len(lines) > 1 and not lines[-1].startswith(_COMMIT)):
                return False
            self._open_frame(frame, verified=True)
        except (ValueError, MessageUnreadableError):
            return False
        self._close_frame(whole=True)
        return True

    def _take(self, line: bytes, block: Lines) -> Recorded | None:
        if recording.is_own(line):
            own = recording.decode(line)
            match own:
                case Frame():
                    self._open_frame(own, verified=block.verified)
                case _ if self._foreign:
                    pass
                case Partition():
                    self._partitions[own.schema, own.table] = own.root
                case Looked():
                    if self._at is _At.INSIDE:
                        self._looked.append(own)
                case Unread():
                    return self._pass_over(own, line)
            return None
        if self._foreign:
            return None
        if line.startswith(_BEGIN):
            self._start(wal2json.said(line), line)
            return None
        message = wal2json.decode(line)
        match message:
            case Commit():
                return self._commit(message, line)
            case _:
                if self._at is not _At.INSIDE:
                    if isinstance(message, Change) and self._at is _At.OUTSIDE:
                        raise MessageUnreadableError("a change comes outside a transaction")
                    return None
                return self._put(self._assembler.feed(message, line))

    def _pass_over(self, unread: Unread, line: bytes) -> Recorded | None:
        if self._at is _At.OUTSIDE and unread.of == "begin":
            self._at, self._begin = _At.INSIDE, None
            self._reset(has_lsn=True, has_time=True)
        if self._at is not _At.INSIDE:
            return None
        recorded = self._put(self._assembler.pass_over(unread, line))
        if unread.of == "commit":
            self._end(unread.position)
        return recorded

    # Transactions

    def _start(self, said: Said, line: bytes) -> None:
        source = self._source
        commit_lsn, end_lsn = said.commit_lsn, said.end_lsn
        has_lsn, has_time = commit_lsn is not None and end_lsn is not None, said.committed_at is not None
        if commit_lsn is None or end_lsn is None:
            commit_lsn, end_lsn = source.positions()
        begin = Begin(said.xid, commit_lsn, end_lsn, said.committed_at or _UNKNOWN)
        if self._at is _At.INSIDE:
            self.lose(f"at line {self._line} another transaction begins before one has ended")
        if has_lsn:
            self._resume(begin.commit_lsn)
            if self._reached is not None and begin.commit_lsn < self._reached and not self._verified:
                self._claim()  # it was started again, and sends some again
                self._reached = begin.commit_lsn
            if self._whole_from is None and not self._verified:
                self._whole_from = begin.commit_lsn
        elif self._lost is not None:
            self._resume(None)
        self._begin = begin
        self._reset(has_lsn=has_lsn, has_time=has_time)
        if source.outside(self._place, begin, has_lsn=has_lsn, has_time=has_time, file=self._file.name):
            self._at = _At.PASSING
            return
        self._at = _At.INSIDE
        if has_lsn:
            tables = self._tables if self._frame is not None else source.rules
            wanted = [table for table in tables if table in source.rules]
            if all(self._is_known(table) for table in wanted):
                self._at = _At.PASSING
                source.repeated += bool(wanted)
                return
        self._assembler.feed(begin, line)

    def _reset(self, *, has_lsn: bool, has_time: bool) -> None:
        self._has_lsn, self._has_time = has_lsn, has_time
        self._known, self._of_commit, self._looked = {}, {}, []
        self._kept, self._yielded, self._left_out = 0, False, False

    def _is_known(self, table: Table) -> bool:
        if table not in self._known:
            begin = self._begin
            self._known[table] = (
                begin is not None and self._has_lsn and self._source.known(self._place, table, begin.end_lsn)
            )
        return self._known[table]

    def _commit(self, commit: Commit, line: bytes) -> Recorded | None:
        if self._at is _At.OUTSIDE:
            raise MessageUnreadableError("a commit comes outside a transaction")
        if self._at is _At.LOST:
            if (end := wal2json.said(line).end_lsn) is not None:
                self._resume(end)
                self._at = _At.OUTSIDE
            return None
        recorded = None
        if self._at is _At.INSIDE:
            recorded = self._put(self._assembler.feed(commit, line))
            if self._left_out and not self._yielded:
                self._source.repeated += 1
        assert self._begin is not None
        self._end(self._begin.end_lsn if self._has_lsn else None)
        return recorded

    def _end(self, end: LSN | None) -> None:
        """The transaction has been read."""
        if end is not None:
            if not self._verified and self._at is _At.INSIDE:
                self._source.see(self._place, self._of_commit, end)
            self._reach(end)
        self._begin, self._at = None, _At.OUTSIDE

    def _put(self, slice_: Transaction | None) -> Recorded | None:
        """What of a slice is captured, and wasn't read already."""
        if slice_ is None:
            return None
        rules = self._source.rules
        places: list[int] = []
        for place, change in enumerate(slice_.changes):
            table = change.schema, change.table
            if isinstance(change, Unread):
                places.append(place)
            elif table in rules:
                if self._is_known(table):
                    self._left_out = True
                else:
                    places.append(place)
                    if not self._verified:
                        self._of_commit[table] = None
                        if self._frame is None:
                            self._tables[table] = None
        looked, self._looked = (
            [one for one in self._looked if one.number < slice_.index + len(slice_.changes)],
            [one for one in self._looked if one.number >= slice_.index + len(slice_.changes)],
        )
        transaction = self._cut(slice_, places, looked)
        self._kept += len(places)
        if not places and not transaction.messages and not (self._yielded and slice_.last):
            return None
        if not self._yielded:
            self._source.transactions += 1
        self._yielded = True
        numbers = {slice_.index + place: transaction.index + number for number, place in enumerate(places)}
        return Recorded(
            *self._place,
            transaction,
            [msgspec.structs.replace(one, number=numbers[one.number]) for one in looked if one.number in numbers],
            self._has_lsn,
            self._has_time,
            self._file.name,
            frozenset() if self._left_out else self._holds,
        )

    def _cut(self, slice_: Transaction, places: Sequence[int], looked: Sequence[Looked]) -> Transaction:
        """The changes at some places of a slice."""
        numbers = {slice_.index + place: self._kept + number for number, place in enumerate(places)}
        return msgspec.structs.replace(
            slice_,
            changes=[slice_.changes[place] for place in places],
            messages=[(bisect_left(places, place), message) for place, message in slice_.messages],
            payloads=[slice_.payloads[place] for place in places],
            index=self._kept,
            first=not self._yielded,
            answers={(numbers[one.number], one.name): one.row for one in looked if one.number in numbers},
            masked=self._masked,
        )

    # Frames

    def _open_frame(self, frame: Frame, *, verified: bool) -> None:
        source = self._source
        self._foreign = frame.worker != source.worker
        if self._foreign:
            self.others = True
            return
        try:
            after, until = LSN.parse(frame.after), LSN.parse(frame.until)
        except ValueError as error:
            raise MessageUnreadableError(str(error)) from error
        if self._frame is not None and not self._verified:
            self._close_frame(whole=self._at is not _At.LOST)
        place = _Place(frame.system_identifier, frame.database)
        if place != self._place or self._frame is None:
            self._claim()
            if not self._begun_in_earnest:
                self._place = place
                source.before(place, map(qualified, frame.tables), after)
        follows = frame.within and place == self._place and after == self._until and self._frame is not None
        if self._at is _At.INSIDE and not follows:
            self.lose(f"at line {self._line} there is something else than the rest of a transaction")
        elif self._at is _At.PASSING and not follows:
            self._at = _At.OUTSIDE
        self._place, self._begun_in_earnest = place, True
        self._frame, self._verified = frame, verified
        self._until = until
        self._tables = dict.fromkeys(map(qualified, frame.tables))
        self._holds = frozenset(self._tables)
        self._partitions = {}
        self._masked = {qualified(name): frozenset(columns) for name, columns in frame.masked.items()}
        if self._at is _At.LOST and not frame.within:
            self._resume(after)
        elif self._at is _At.OUTSIDE and frame.within:
            self._reached = after
            self.lose(f"at line {self._line} a transaction goes on whose beginning isn't there")
        if self._at is not _At.LOST:
            self._whole_from = after
            self._reach(after)

    def _close_frame(self, *, whole: bool) -> None:
        frame = self._frame
        if frame is None or self._at is _At.LOST:
            return
        assert self._until is not None
        if whole:
            self._reach(self._until)
        self._claim()
        self._whole_from = None if not whole else self._until

    def _claim(self) -> None:
        """Note what has been read without a gap."""
        if self._whole_from is not None and self._reached is not None:
            self._source.cover(
                self._place,
                self._tables,
                self._whole_from,
                self._reached,
                self._file.name,
                framed=self._frame is not None,
                whole=self._verified,
            )
        self._whole_from = None

    # Losses

    def lose(self, reason: str) -> None:
        """Leave out what comes, up to where something whole begins."""
        if self._at is _At.LOST:
            return
        lost_from = self._reached
        if self._begin is not None:
            if self._has_lsn:
                lost_from = self._begin.commit_lsn
                self._ends_at = self._begin.end_lsn
            else:
                lost_from = None
        if lost_from is not None:
            self._reach(lost_from)
        self._claim()
        self._assembler = self._new()
        self._begin, self._at = None, _At.LOST
        self._lost = lost_from, reason

    def _resume(self, at: LSN | None) -> None:
        """What ends after this is there again."""
        if self._lost is None:
            return
        after, reason = self._lost
        self._lost, self._ends_at = None, None
        self._at = _At.OUTSIDE
        if after is None or at is None or after < at:
            self._note(after, at, reason)
        self._whole_from = at
        if at is not None:
            self._reach(at)

    def _reach(self, at: LSN) -> None:
        self._reached = at if self._reached is None else max(self._reached, at)

    def _note(self, after: LSN | None, until: LSN | None, reason: str, *, last: bool = False) -> None:
        tables = [*self._tables] or [*self._source.rules]
        self._source.lose(_Loss(self._file.name, self._place, tables, after, until, reason, last))

    def close(self) -> None:
        """The file has ended."""
        if self._at is _At.INSIDE:
            self.lose(f"it ends within a transaction, at line {self._line}")
        if self._lost is not None:
            after, reason = self._lost
            ends = [
                end for end in (self._ends_at, self._until) if end is not None and after is not None and end > after
            ]
            self._note(after, max(ends, default=None), reason, last=True)
        elif not self._verified:
            self._close_frame(whole=False)
            self._claim()


def _why(line: bytes) -> str:
    try:
        recording.decode(line)
    except MessageUnreadableError as error:
        return str(error)
    return "it doesn't begin as a frame does"
