"""Reads one file of a recording: its transactions, as far as they are whole."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from datetime import UTC, datetime
from enum import Enum, auto
from typing import Final, NamedTuple

import msgspec

from cdc_worker import decoders, recording, wal2json
from cdc_worker.blocks import FRAME, LONGEST, Lines
from cdc_worker.changes import (
    Assembler,
    Begin,
    BeginToldError,
    Change,
    Commit,
    Masked,
    Message,
    RootOf,
    Transaction,
    Unread,
)
from cdc_worker.documents import Documents
from cdc_worker.errors import MessageUnreadableError
from cdc_worker.ledger import Ledger, Loss, Place, Range, Table
from cdc_worker.lsn import INVALID, LSN
from cdc_worker.recording import Frame, Looked, Partition
from cdc_worker.rules import Rules, qualified
from cdc_worker.wal2json import Said

_LINE: Final = b'{"action"'
_ACTION: Final = b'{"action":"'
_STRUCTURE: Final = b"BCRP"
"""The lines that are read also of what nobody wants."""

_BEGIN: Final = b'{"action":"B"'
_COMMIT: Final = b'{"action":"C"'

_ELEMENT: Final = b'{"kind"', b',{"kind"'
"""How lines begin that are a part of a document, where each change is a line."""

_UNKNOWN: Final = datetime.fromtimestamp(0, UTC)
"""In place of the time of a commit that doesn't tell it."""


class Recorded(NamedTuple):
    """A transaction of a recording, or a slice of one. A commit that breaks off has no last slice.

    `looked` is what was found by lookups for the changes of this slice, counted as they are now. Without LSN the
    positions of a transaction only say what came first; without time, that of its commit is not true. It may be known
    nevertheless where the commit `ended`. Of the tables that it `holds` all changes of the commit come; of others that
    isn't known.
    """

    system_identifier: str
    database: str | None
    transaction: Transaction
    looked: Sequence[Looked] = ()
    has_lsn: bool = True
    has_time: bool = True
    file: str = ""
    holds: Set[Table] = frozenset()
    ended: LSN | None = None

    @property
    def exact(self) -> bool:
        """Whether it is known where and when the commit was."""
        return self.has_lsn and self.has_time


class Wanted(NamedTuple):
    """What is to be read, and what files that don't tell are taken to be of."""

    worker: str
    place: Place
    rules: Rules
    roots: RootOf | None
    keys: Mapping[Table, tuple[str, ...]]
    range_: Range


class _At(Enum):
    """Where in a file its reader is."""

    OUTSIDE = auto()
    INSIDE = auto()  # a transaction
    PASSING = auto()  # one that nobody wants
    LOST = auto()  # until something whole begins


_UNREAD: Final = frozenset((_At.PASSING, _At.LOST))


class _Open:
    """The transaction that is being read. `end` is where it ends, if that is known by now."""

    def __init__(self, begin: Begin | None, *, has_lsn: bool, has_time: bool, end: LSN | None) -> None:
        self.begin = begin
        self.has_lsn = has_lsn
        self.has_time = has_time
        self.end = end
        self.document = False
        self.known: dict[Table, bool] = {}  # whether the changes of a table were read already
        self.tables: dict[Table, None] = {}  # of which there were others
        self.looked: list[Looked] = []
        self.kept = 0
        self.begun = self.left_out = self.elsewhere = False

    @property
    def known_by(self) -> LSN | None:
        """What it is known by when it comes again: the first position at which it may end.

        Of a large commit that came by pgoutput the begin says no more. Where it isn't known where it was committed, it
        is its end.
        """
        return self.end if self.begin is None or not self.has_lsn else LSN(self.begin.commit_lsn + 1)


class FileReader:
    """Reads lines in order, whatever came between them. `others` is whether some are of another worker."""

    def __init__(
        self,
        name: str,
        wanted: Wanted,
        ledger: Ledger,
        *,
        after: LSN | None,
        positions: Callable[[], tuple[LSN, LSN]],
        later: Callable[[Place, Collection[Table], LSN], bool],
    ) -> None:
        """It begins `after`, if its name says so. `positions` are of commits that have none.

        `later` tells of the commit with an end whether it is to be read from another file.
        """
        self.others = False
        self._name = name
        self._wanted = wanted
        self._ledger = ledger
        self._positions = positions
        self._later = later
        self._place = wanted.place
        self._frame: Frame | None = None
        self._verified = self._foreign = False
        self._until: LSN | None = None  # of the frame
        self._tables: dict[Table, None] = {}  # those of the frame; without one, those that were seen
        self._holds: frozenset[Table] = frozenset()
        self._partitions: dict[Table, Table] = {}
        self._masked: Masked = {}
        self._at = _At.OUTSIDE
        self._line = 0
        self._reached = after  # so far it has been read
        self._whole_from: LSN | None = None  # and from here on without a gap
        self._lost: tuple[LSN | None, str] | None = None  # from where on, and why
        self._lost_end: LSN | None = None  # where what was open then ends
        self._cut = False
        self._more = False  # nobody knows what else was there
        self._open: _Open | None = None
        self._assembler = self._new()
        self._documents = Documents()
        self._document: list[bytes] = []
        self._size = 0  # of the document

    def _new(self) -> Assembler:
        return Assembler(root_of=self._root, keys=self._wanted.keys)

    def _root(self, change: Change, commit_lsn: LSN) -> Table | None:
        table = change.schema, change.table
        if table in self._partitions:
            return self._partitions[table]
        if table in self._wanted.rules or (self._frame is not None and table in self._tables):
            return table
        return None if self._wanted.roots is None else self._wanted.roots(change, commit_lsn)

    # Lines

    def take(self, block: Lines) -> Iterator[Recorded]:
        """Read lines that follow each other. Raises RecordingUnreadableError."""
        if block.verified and self._skips(block):
            return
        for number, line in enumerate(block.lines, block.number):
            self._line = number
            if not line or line.isspace():
                continue
            if self._at in _UNREAD and line.startswith(_ACTION) and line[len(_ACTION) :][:1] not in _STRUCTURE:
                continue
            try:
                if line.startswith(_LINE):
                    recorded = self._take(line, verified=block.verified)
                    if recorded is not None:
                        yield recorded
                elif not self._foreign:
                    yield from self._part(line)
            except (MessageUnreadableError, BeginToldError) as error:
                if block.ended:
                    self.lose(f"line {number} can't be read: {error}", more=not block.verified)
                else:
                    self.lose(f"it is cut within line {number}", cut=True)
        if block.verified:
            self._close_frame(whole=True)

    def _skips(self, block: Lines) -> bool:
        """Whether nothing in a frame is wanted, nor begins in it."""
        try:
            frame = recording.decode(block.lines[0])
        except MessageUnreadableError as error:
            self.lose(f"the frame at line {block.number} can't be read: {error}", more=True)
            return True
        assert isinstance(frame, Frame)
        if frame.worker != self._wanted.worker:
            self.others = True
            return True
        if self._at is not _At.OUTSIDE or frame.within:
            return False
        range_, ends_open = self._wanted.range_, len(block.lines) > 1 and not block.lines[-1].startswith(_COMMIT)
        with suppress(MessageUnreadableError, ValueError):
            if range_.precedes(LSN.parse(frame.after)) or (range_.follows(LSN.parse(frame.until)) and not ends_open):
                self._line = block.number
                self._open_frame(frame, verified=True)
                self._close_frame(whole=True)
                return True
        return False

    def _take(self, line: bytes, *, verified: bool) -> Recorded | None:
        if recording.is_own(line):
            return self._own(line, verified=verified)
        if self._foreign:
            return None
        if line.startswith(_BEGIN):
            self._start(wal2json.said(line), line)
            return None
        if line.startswith(_COMMIT):
            return self._commit(wal2json.said(line), line)
        message = wal2json.decode(line)
        if self._at is _At.INSIDE:
            return self._put(self._assembler.feed(message, line))
        if self._at is _At.OUTSIDE and isinstance(message, Change):
            raise MessageUnreadableError("a change comes outside a transaction")
        return None

    def _own(self, line: bytes, *, verified: bool) -> Recorded | None:
        try:
            own = recording.decode(line)
        except MessageUnreadableError:
            self._foreign = self._foreign or line.startswith(FRAME)
            raise
        if isinstance(own, Frame):
            self._open_frame(own, verified=verified)
        elif self._foreign:
            pass
        elif isinstance(own, Partition):
            self._partitions[own.schema, own.table] = own.root
        elif isinstance(own, Looked):
            if self._at is _At.INSIDE and self._open is not None:
                self._open.looked.append(own)
        else:
            return self._pass_over(own, line)
        return None

    def _pass_over(self, unread: Unread, line: bytes) -> Recorded | None:
        if self._at is _At.OUTSIDE and unread.of == "begin":
            self._at, self._open = _At.INSIDE, _Open(None, has_lsn=True, has_time=True, end=None)
        if self._at is not _At.INSIDE:
            return None
        again = decoders.read_again(unread, unread.raw) if unread.of == "change" and unread.raw else None
        recorded = self._put(self._assembler.pass_over(unread, line, instead=again))
        if unread.of == "commit":
            known = None if self._open is None else self._open.end
            self._end(unread.position if known is None else known)
        return recorded

    # Documents of format 1

    def _part(self, line: bytes) -> Iterator[Recorded]:
        """A line of a document, or one that is all of it."""
        line = line.rstrip()
        if line.startswith(b"{") and not line.startswith(_ELEMENT):
            if self._document:
                self._document = []
                self.lose(f"a document ends before line {self._line} without being whole")
            self._document, self._size = [line], 0
            whole = line.endswith(b"]}")
        elif not self._document:
            raise MessageUnreadableError("it isn't what wal2json writes")
        else:
            self._document.append(line)
            whole = line in (b"}", b"]}")
        self._size += len(line)
        if whole:
            lines, self._document = self._document, []
            yield from self._whole_document(b"\n".join(lines))
        elif self._size > LONGEST:
            raise MessageUnreadableError("a document of more than a gigabyte")

    def _whole_document(self, document: bytes) -> Iterator[Recorded]:
        said, changes = self._documents.read(document)
        self._start(said._replace(commit_lsn=None), document, document=True)
        for raw in changes:
            message: Change | Message = self._documents.message(raw)
            if self._at is _At.INSIDE:
                recorded = self._put(self._assembler.feed(message, raw))
                if recorded is not None:
                    yield recorded
        recorded = self._commit(said, document)
        if recorded is not None:
            yield recorded

    # Transactions

    def _start(self, said: Said, line: bytes, *, document: bool = False) -> None:
        commit_lsn, end_lsn = said.commit_lsn, said.end_lsn
        has_lsn, has_time = commit_lsn is not None and end_lsn is not None, said.committed_at is not None
        if self._at is _At.INSIDE:
            self.lose(f"a transaction ends before line {self._line} without being whole")
        if commit_lsn is None or end_lsn is None:
            self._resume(None)
            commit_lsn, end_lsn = self._positions()
        else:
            self._resume(commit_lsn)
            if not self._verified:
                if self._reached is not None and commit_lsn < self._reached:
                    self._claim()  # it was started again, and sends some again
                    self._reached = commit_lsn
                if self._whole_from is None:
                    self._whole_from = commit_lsn
        begin = Begin(said.xid, commit_lsn, end_lsn, said.committed_at or _UNKNOWN)
        known = None if end_lsn == commit_lsn + 1 and has_lsn else said.end_lsn
        self._open = _Open(begin, has_lsn=has_lsn, has_time=has_time, end=known)
        self._open.document = document
        self._at = _At.PASSING
        wanted = self._wanted
        if not wanted.range_.holds(self._place, begin, has_lsn=has_lsn, has_time=has_time, file=self._name):
            return
        tables = [table for table in (wanted.rules if self._frame is None else self._tables) if table in wanted.rules]
        if all(self._is_known(table) for table in tables):
            self._ledger.repeated += bool(tables)
            return
        if self._frame is not None and tables and self._later(self._place, tables, end_lsn):
            self._open.elsewhere = True
            self._ledger.repeated += 1
            self._reach(commit_lsn)
            self._claim()
            return
        self._at = _At.INSIDE
        self._assembler.feed(begin, line)

    def _is_known(self, table: Table) -> bool:
        of = self._open
        if of is None or of.known_by is None:
            return False
        if table not in of.known:
            of.known[table] = self._ledger.known(self._place, table, of.known_by)
        return of.known[table]

    def _commit(self, said: Said, line: bytes) -> Recorded | None:
        if self._at is _At.OUTSIDE:
            raise MessageUnreadableError("a commit comes outside a transaction")
        if self._at is _At.LOST:
            if said.end_lsn is not None:
                self._resume(said.end_lsn)
            return None
        of, recorded = self._open, None
        assert of is not None
        if self._at is _At.INSIDE:
            recorded = self._put(self._assembler.feed(Commit(said.end_lsn), line))
            self._ledger.repeated += of.left_out and not of.begun
        self._end(of.end if of.begin is None or said.end_lsn is None else said.end_lsn)
        return recorded

    def _end(self, end: LSN | None) -> None:
        """The transaction has been read."""
        if end is not None:
            if not self._verified and self._open is not None:
                for known_by in filter(None, (self._open.known_by, end)):
                    self._ledger.see(self._place, self._open.tables, known_by)
            self._reach(end)
            if self._open is not None and self._open.elsewhere:
                self._whole_from = end
        self._open, self._at = None, _At.OUTSIDE

    def _put(self, slice_: Transaction | None) -> Recorded | None:
        """What of a slice is captured, and wasn't read already."""
        of = self._open
        if slice_ is None or of is None:
            return None
        places = [place for place, change in enumerate(slice_.changes) if self._takes(change, of)]
        end = slice_.index + len(slice_.changes)
        looked = [one for one in of.looked if one.number < end]
        of.looked = [one for one in of.looked if one.number >= end]
        if not places and not slice_.messages and not (of.begun and slice_.last):
            return None
        numbers = {slice_.index + place: of.kept + number for number, place in enumerate(places)}
        found = [msgspec.structs.replace(one, number=numbers[one.number]) for one in looked if one.number in numbers]
        changes = [slice_.changes[place] for place in places]
        transaction = msgspec.structs.replace(
            slice_,
            changes=changes,
            messages=[(bisect_left(places, place), message) for place, message in slice_.messages],
            # What comes in a document is nothing that `wal2json` could read again.
            payloads=[*changes] if of.document else [slice_.payloads[place] for place in places],
            index=of.kept,
            first=not of.begun,
            answers={(one.number, one.name): one.row for one in found},
            masked=self._masked,
        )
        self._ledger.transactions += not of.begun
        of.begun = True
        of.kept += len(places)
        holds = frozenset() if of.left_out else self._holds
        return Recorded(*self._place, transaction, found, of.has_lsn, of.has_time, self._name, holds, of.end)

    def _takes(self, change: Change, of: _Open) -> bool:
        table = change.schema, change.table
        if isinstance(change, Unread):
            return True
        if table not in self._wanted.rules:
            return False
        if self._is_known(table):
            of.left_out = True
            return False
        of.tables[table] = None
        if self._frame is None:
            self._tables[table] = None
        return True

    # Frames of ours

    def _open_frame(self, frame: Frame, *, verified: bool) -> None:
        self._foreign = frame.worker != self._wanted.worker
        if self._foreign:
            self.others = True
            return
        try:
            after, until = LSN.parse(frame.after), LSN.parse(frame.until)
        except ValueError as error:
            raise MessageUnreadableError(str(error)) from error
        place = Place(frame.system_identifier, frame.database)
        tables = dict.fromkeys(map(qualified, frame.tables))
        if self._frame is None:
            self._claim()
            self._place = place
            self._ledger.begin(place, tables, after, self._name)
        elif not self._verified:
            self._close_frame(whole=True)
        before, follows = self._frame, False
        if before is not None:
            follows = frame.within and place == self._place and frame.number == before.number + 1
        if self._at is _At.INSIDE and not follows:
            self.lose(f"what comes at line {self._line} is not the rest of the transaction before")
        elif self._at is _At.PASSING and not follows:
            self._open, self._at = None, _At.OUTSIDE
        elif self._at is _At.OUTSIDE and frame.within:
            self._reach(after)
            self.lose(f"the transaction that goes on at line {self._line} has no beginning")
        if not frame.within:
            self._resume(after)
        self._frame, self._place, self._verified = frame, place, verified
        self._until, self._tables, self._partitions = until, tables, {}
        self._holds = frozenset(tables)
        self._masked = {qualified(name): frozenset(columns) for name, columns in frame.masked.items()}
        if self._at is not _At.LOST:
            self._whole_from = after
            self._reach(after)

    def _close_frame(self, *, whole: bool) -> None:
        if self._frame is None or self._foreign or self._at is _At.LOST:
            return
        if whole and self._until is not None:
            self._reach(self._until)
        self._claim()

    def _claim(self) -> None:
        """Note what has been read without a gap."""
        if self._whole_from is not None and self._reached is not None:
            self._ledger.cover(
                self._place,
                self._tables,
                self._whole_from,
                self._reached,
                file=self._name,
                framed=self._frame is not None,
                whole=self._verified,
            )
        self._whole_from = None

    def _reach(self, at: LSN) -> None:
        self._reached = at if self._reached is None else max(self._reached, at)

    # Losses

    def lose(self, reason: str, *, more: bool = False, cut: bool = False) -> None:
        """Leave out what comes, up to where something whole begins: perhaps `more` than what is open and its frame.

        What is `cut` has nothing after it.
        """
        self._document = []
        self._more = more or (self._more and self._at is _At.LOST)
        if self._at is _At.LOST:
            return
        self._cut = cut
        of = self._open
        if of is not None and of.has_lsn and of.begin is not None:
            if self._whole_from is None:  # nothing has ended since the frame in which it began
                self._whole_from = self._until
            self._reach(of.begin.commit_lsn)
        self._lost_end = None if of is None else of.end
        self._lost = self._reached, reason
        self._claim()
        self._assembler = self._new()
        self._open, self._at = None, _At.LOST

    def _resume(self, at: LSN | None) -> None:
        """What ends after this is there again."""
        if self._at is not _At.LOST or self._lost is None:
            return
        after, reason = self._lost
        self._lost, self._at = None, _At.OUTSIDE
        if after is None or at is None or after < at:
            self._note(after, at, reason)
        self._whole_from = at
        if at is not None:
            self._reach(at)

    def _note(self, after: LSN | None, until: LSN | None, reason: str, *, last: bool = False) -> None:
        tables = [*self._tables] or [*self._wanted.rules]
        self._ledger.lose(Loss(self._name, self._place, tables, after, until, reason, last, self._cut))

    def close(self) -> None:
        """The file has ended."""
        if self._document:
            self.lose(f"it ends within a document, at line {self._line}", cut=True)
        if self._at in (_At.INSIDE, _At.PASSING):  # after what nobody wants there may have been more
            self.lose(f"it ends within a transaction, at line {self._line}", cut=True)
        if self._lost is not None:
            after, reason = self._lost
            ends = () if self._more else (self._lost_end, self._until)
            until = max((end for end in ends if end is not None and end > (after or INVALID)), default=None)
            self._note(after, until, reason, last=True)
        elif not self._verified:
            self._claim()


def first_frame(lines: Iterable[bytes]) -> Frame | None:
    """The frame that begins with the first of some lines."""
    with suppress(MessageUnreadableError):
        for line in lines:
            if recording.is_own(line) and isinstance(found := recording.decode(line), Frame):
                return found
            break
    return None
