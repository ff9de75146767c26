"""What of recordings has been read, what was asked for, and what of that is missing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from datetime import datetime
from typing import NamedTuple

from pydantic import BaseModel, Field

from cdc_worker.changes import Begin
from cdc_worker.coverage import Coverage, Seen
from cdc_worker.errors import RecordingUnreadableError
from cdc_worker.lsn import INVALID, LSN

Table = tuple[str, str]

Bound = LSN | datetime
"""Of a range of commits: by where they are, or by when they were."""


class Place(NamedTuple):
    """Whose commits these are."""

    system_identifier: str
    database: str | None


class Missing(BaseModel, frozen=True):
    """What a recording lacks: commits that end after `after` and at or before `until`, as far as that is known."""

    file: str = Field(description="the file that is damaged, or before which others are missing")
    after: str | None = Field(default=None, description="LSN: commits that end after it are missing")
    until: str | None = Field(default=None, description="LSN: those that end after it are not, as far as there are any")
    reason: str = Field(description="what is wrong")

    def __str__(self) -> str:
        ends = [f"from {self.after}"] * (self.after is not None) + [f"to {self.until}"] * (self.until is not None)
        return f"{self.file}{', ' if ends else ''}{' '.join(ends)}: {self.reason}"


class Loss(NamedTuple):
    """What a file lacks of these tables. After what is `last` it has nothing that is whole, or, if `cut`, nothing."""

    file: str
    place: Place
    tables: Collection[Table]
    after: LSN | None
    until: LSN | None
    reason: str
    last: bool = False
    cut: bool = False


class Range:
    """The commits that are asked for: from `since` on, and before `until`."""

    def __init__(self, since: Bound | None, until: Bound | None) -> None:
        self._since = since
        self._until = until
        self._early: dict[Place, LSN] = {}  # up to where they were seen to be too early
        self._late: dict[Place, LSN] = {}  # from where on they were seen to be too late

    def holds(self, place: Place, begin: Begin, *, has_lsn: bool, has_time: bool, file: str) -> bool:
        """Whether a transaction is in it. Raises RecordingUnreadableError if that can't be told."""
        early = self._since is not None and not _passed(self._since, begin, has_lsn, has_time, file)
        late = self._until is not None and _passed(self._until, begin, has_lsn, has_time, file)
        if early and has_lsn:
            self._early[place] = max(self._early.get(place, INVALID), begin.end_lsn)
        if late and has_lsn:
            self._late[place] = min(self._late.get(place, begin.commit_lsn), begin.commit_lsn)
        return not (early or late)

    def precedes(self, after: LSN) -> bool:
        """Whether all commits that end after this are too late."""
        return isinstance(self._until, LSN) and after >= self._until

    def follows(self, until: LSN) -> bool:
        """Whether all commits that end at or before this are too early."""
        return isinstance(self._since, LSN) and until <= self._since

    def touches(self, place: Place, after: LSN, until: LSN | None) -> bool:
        """Whether commits with these ends may be in it."""
        since = self._since if isinstance(self._since, LSN) else self._early.get(place)
        end = self._until if isinstance(self._until, LSN) else self._late.get(place)
        too_early = since is not None and until is not None and until <= since
        return not too_early and not (end is not None and after >= end)


def _passed(bound: Bound, begin: Begin, has_lsn: bool, has_time: bool, file: str) -> bool:
    """Whether a transaction is at or after a bound."""
    if not (has_time if isinstance(bound, datetime) else has_lsn):
        lacks, option = ("time", "include-timestamp") if isinstance(bound, datetime) else ("LSN", "include-lsn")
        raise RecordingUnreadableError(
            f"{file} has transactions without {lacks}, so that nobody knows whether they are asked for",
            hint=f"leave out the range; or record with -o format-version=2 -o {option}=1",
        )
    return begin.committed_at >= bound if isinstance(bound, datetime) else begin.commit_lsn >= bound


class Ledger:
    """Keeps what has been read of tables.

    Frames of ours say what they hold all of, and some are known to be `whole`. Of what has no frames only single
    commits are known to have been read; that it goes on without a gap is a claim, which can fill one between frames.
    Of what the checkpoint hasn't passed nothing is missing. With `strict` what is missing is an error at once.
    `transactions` counts what was read, wholly or in part, and `repeated` what was left out for having been read.
    """

    def __init__(
        self, tables: Collection[Table], range_: Range, ours: Place, *, checkpoint: LSN | None, strict: bool
    ) -> None:
        self._tables = tables
        self._range = range_
        self._ours = ours
        self._checkpoint = checkpoint
        self._strict = strict
        self.transactions = self.repeated = 0
        self._losses: list[Loss] = []
        self._whole: defaultdict[tuple[Place, Table], Coverage] = defaultdict(Coverage)
        self._framed: defaultdict[tuple[Place, Table], Coverage] = defaultdict(Coverage)
        self._claimed: defaultdict[tuple[Place, Table], Coverage] = defaultdict(Coverage)
        self._seen: defaultdict[tuple[Place, Table], Seen] = defaultdict(Seen)
        self._goes_on: dict[tuple[Place, LSN], str] = {}  # which file does after a gap

    def known(self, place: Place, table: Table, end: LSN) -> bool:
        """Whether the changes of a table in the commit with this end were read already."""
        key = place, table
        whole = self._whole.get(key)
        return (whole is not None and whole.covers(LSN(end - 1), end)) or (key in self._seen and end in self._seen[key])

    def see(self, place: Place, tables: Iterable[Table], end: LSN) -> None:
        """Note that a commit was read."""
        for table in tables:
            self._seen[place, table].add(end)

    def cover(
        self, place: Place, tables: Iterable[Table], after: LSN, until: LSN, *, file: str, framed: bool, whole: bool
    ) -> None:
        """Note that all commits with these ends were read."""
        for key in [(place, table) for table in tables if table in self._tables]:
            self._claimed[key].add(after, until)
            if framed:
                end = self._framed[key].until
                if end is not None and end < after:
                    self._goes_on[place, after] = file
                self._framed[key].add(after, until)
            if whole:
                self._whole[key].add(after, until)

    def lose(self, loss: Loss) -> None:
        """Note what can't be read."""
        self._losses.append(loss)
        if self._strict and not loss.last:
            self._stop_at(self.missing)

    def begin(self, place: Place, tables: Iterable[Table], after: LSN, file: str) -> None:
        """Note that no file that is still to be read begins before this."""
        if not self._strict:
            return
        self._stop_at(one for one in self.missing if one.after is None or LSN.parse(one.after) < after)
        gaps: defaultdict[LSN, list[Table]] = defaultdict(list)
        for table in tables:
            end = self._framed[place, table].until if (place, table) in self._framed else None
            if end is not None and end < after and self._range.touches(place, end, after):
                self._goes_on[place, after] = file
                gaps[end].append(table)
        self._stop_at(self._gap(place, end, after, of) for end, of in gaps.items())

    def end(self) -> None:
        """Note that nothing else is to be read."""
        if self._strict:
            self._stop_at(self.missing)

    def _stop_at(self, missing: Iterable[Missing]) -> None:
        for one in missing:
            raise RecordingUnreadableError(
                f"the recording isn't whole: {one}", hint="leave out --strict, and what is whole is read"
            )

    @property
    def missing(self) -> list[Missing]:
        """What of what is asked for could not be read, and gaps between what could."""
        found: list[Missing] = []
        named: defaultdict[Place, Coverage] = defaultdict(Coverage)
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
        return [*found, *self._gaps(named)]

    def _gaps(self, named: defaultdict[Place, Coverage]) -> Iterator[Missing]:
        """Between frames, but those that are `named` already."""
        gaps: defaultdict[tuple[Place, LSN, LSN], list[Table]] = defaultdict(list)
        for (place, table), framed in self._framed.items():
            for after, until in framed.gaps():
                read = named[place].covers(after, until) or self._claimed[place, table].covers(after, until)
                if not read and self._range.touches(place, after, until):
                    gaps[place, after, until].append(table)
        return (self._gap(*gap, tables) for gap, tables in gaps.items())

    def _gap(self, place: Place, after: LSN, until: LSN, tables: Collection[Table]) -> Missing:
        of = "" if len(tables) == len(self._tables) else f", of {', '.join(sorted(map('.'.join, tables)))}"
        reason = f"no file has what was committed before this one goes on{of}"
        return Missing(file=self._goes_on.get((place, until), ""), after=str(after), until=str(until), reason=reason)

    def _lacking(self, loss: Loss) -> tuple[LSN | None, LSN | None] | None:
        """What of a loss isn't to be had elsewhere, and was asked for; None if that is nothing."""
        nothing = Coverage()
        read = [self._claimed.get((loss.place, table), nothing) for table in loss.tables if table in self._tables]
        after, until = loss.after, loss.until
        if not read:
            return None  # nobody wants these tables
        if after is not None:
            after = min(of.reach(after) for of in read)
            if loss.last:
                checkpoint = self._checkpoint if loss.place == self._ours else None
                # Whoever goes on begins at the checkpoint, which is never beyond what is whole.
                if checkpoint is not None and checkpoint <= after:
                    return None
                if checkpoint is None and until is None and loss.cut and after != loss.after:
                    return None
                if until is None:
                    until = min(filter(None, (of.next(after) for of in read)), default=checkpoint)
            if until is not None and until <= after:
                return None
        return (after, until) if self._range.touches(loss.place, after or INVALID, until) else None
