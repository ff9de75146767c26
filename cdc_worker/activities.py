"""What changes meant: activities, dead letters, and the batches they are written in."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, ClassVar, Final, Literal, NamedTuple

import msgspec

from cdc_worker.changes import NOT_MASKED, Change, Masked, Operation, Payload, Row, Transaction
from cdc_worker.context import NOTHING, Context
from cdc_worker.lsn import INVALID, LSN


class Position(NamedTuple):
    """How far the stream has been written: all commits that end at or before `lsn`, and of the one after them, which
    commits at `commit_lsn`, the first `changes` changes. Without such a commit both are 0. Positions are ordered.
    """

    lsn: LSN
    commit_lsn: LSN = INVALID
    changes: int = 0

    def __str__(self) -> str:
        inside = f" and {self.changes} changes of the commit at {self.commit_lsn}" if self.commit_lsn else ""
        return f"{self.lsn}{inside}"


class Origin(msgspec.Struct, frozen=True, gc=False):
    """The transaction of a change, and what had been said in it before the change.

    `masked` are columns, of tables that have any, whose values in it are not the true ones.
    """

    xid: int = 0
    commit_lsn: LSN = INVALID
    end_lsn: LSN = INVALID
    context: Context = NOTHING
    masked: Masked = NOT_MASKED


NOWHERE: Final = Origin()

Found = Mapping[str, Row | None]
"""Rows that were found for a change, by the names of its table's lookups; NULL for what isn't there."""

NOTHING_FOUND: Final[Found] = {}


class Activity(msgspec.Struct, frozen=True):
    """What one change meant by one rule: `fields` by name, as the profile's target maps them to columns.

    `index` counts the changes of the same commit before it.
    """

    change_key: str
    fields: dict[str, Any]
    change: Change
    index: int
    origin: Origin = NOWHERE
    found: Found = NOTHING_FOUND


class Line(msgspec.Struct, frozen=True, gc=False):
    """An activity as a line of COPY, ready to be written.

    Its change is kept as it was received where that is known: rows that are no longer touched would crowd out of the
    processor's cache what is.
    """

    change_key: str
    type: str
    text: bytes
    change: Change | Payload
    index: int
    committed_at: datetime
    origin: Origin = NOWHERE
    found: Found = NOTHING_FOUND


DeadLetterKind = Literal["old_values_unknown", "rule_failed", "refused", "unreadable"]


class DeadLetter(msgspec.Struct, frozen=True):
    """A change that could not become an activity, with the reason; `sqlstate` and more if the target refused it.

    With its origin, and what was found for it, it can be tried again. `raw` is a message that couldn't be read.
    """

    change_key: str
    kind: DeadLetterKind
    reason: str
    change: Change
    index: int
    committed_at: datetime
    sqlstate: str | None = None
    constraint: str | None = None
    fields: dict[str, Any] | None = None
    origin: Origin = NOWHERE
    found: Found = NOTHING_FOUND
    raw: bytes | None = None


class Skipped(msgspec.Struct, frozen=True):
    """Rows of a table whose changes were to leave nothing, or were `collapsed` into one activity.

    `subjects` are their keys as text, in the order of the changes; a row with a new key is deleted as the one and
    inserted as the other. A TRUNCATE has none, for it is about all rows of the table. `number` counts the changes of
    the same commit before the first of these. Only what is before `index` is done: who resumes the commit there makes
    the same of the rest, portion by portion.
    """

    table: tuple[str, str]
    operation: Operation
    subjects: tuple[str, ...]
    collapsed: bool
    commit_lsn: LSN
    number: int
    index: int


Prepared = Line | DeadLetter | Skipped
"""What came of a change, as it is written."""

Stretch = tuple[LSN, LSN | None]
"""Commits from one LSN on up to another, which is not in it; None while there is no end."""

Person = tuple[str, str]
"""A field of activities that links to persons, and a key in it as text."""


class OpenEnds(NamedTuple):
    """Tables that setup has not seen, those that are left out until a cut-over, and those that are in no profile.

    `marked` are those of which until a cut-over only what follows a context message is recorded.
    """

    fresh: Set[tuple[str, str]]
    waiting: Set[tuple[str, str]]
    marked: Set[tuple[str, str]]
    others: Set[tuple[str, str]]


class Scope(msgspec.Struct, frozen=True):
    """Of what there are no activities although rules apply, or only blank ones.

    `excluded`: by (schema, table), stretches in which something else recorded its changes, or in which it was not set
    up; `marked`: likewise, but what followed a context message in its transaction was the worker's. `erased`: by
    (field, key), persons to be forgotten, whose activities have that key in that field; each stretch begins where the
    WAL was then, reaches back for ever, and ends within the commit in which the key was given to somebody else, where
    that was done.
    """

    excluded: Mapping[tuple[str, str], Sequence[Stretch]] = {}
    erased: Mapping[Person, Sequence[Stretch]] = {}
    marked: Mapping[tuple[str, str], Sequence[Stretch]] = {}

    def excludes(self, commit_lsn: LSN, *, heard: bool = False) -> frozenset[tuple[str, str]]:
        """The tables whose changes in this commit are not the worker's to record, once a context message is `heard`."""
        return frozenset(
            table
            for found in ((self.excluded,) if heard else (self.excluded, self.marked))
            for table, stretches in found.items()
            if any(begin <= commit_lsn and (end is None or commit_lsn < end) for begin, end in stretches)
        )

    def open_ends(self, captured: Set[tuple[str, str]]) -> OpenEnds:
        """What is still to be done that all captured tables, and no others, are recorded."""
        known = self.excluded.keys() | self.marked.keys()
        waiting, marked = (
            {table for table in captured if any(end is None for _, end in found.get(table, ()))}
            for found in (self.excluded, self.marked)
        )
        others = {
            table
            for found in (self.excluded, self.marked)
            for table in found.keys() - captured
            if any(not begin for begin, _ in found[table])
        }
        return OpenEnds(captured - known, waiting, marked, others)


def key_prefix(worker: str, system_identifier: str, commit_lsn: LSN) -> str:
    """What the change keys of one commit have in common.

    The LSN has all its digits, so that keys sort as commits do and a B-tree takes them at its right edge.
    """
    return f"{worker}/{system_identifier}/{commit_lsn:016X}/"


def change_key(prefix: str, schema: str, table: str, ordinal: int, rule: str) -> str:
    """The identity of what one change meant by one rule: the same from any source and any decoder.

    `ordinal` counts the changes of this table in this transaction, from 0.
    """
    return f"{prefix}{schema}.{table}/{ordinal}/{rule}"


class Place(NamedTuple):
    """Where in a row's history something stands; places are ordered.

    Positions are those of a cluster, which is the `generation`th that the worker has recorded on; 0 is one of which it
    isn't known when that was. Of what came by the stream, `lsn` is that of the commit, and `ordinal` counts the changes
    of the table in there. What was read from rows that were there already (`rank` 1) stands right after the deletion of
    who had the key before; what was found to be missing later (`rank` 2) stands, as number `number`, right after the
    change before which the log was true.
    """

    generation: int = 0
    lsn: LSN = INVALID
    ordinal: int = 0
    rank: int = 0
    number: int = 0


class Clusters(NamedTuple):
    """The cluster on which a worker records, and those on which it did before, the oldest first, as far as is known."""

    current: str
    former: tuple[str, ...] = ()

    @property
    def here(self) -> int:
        """The generation of the current one."""
        return len(self.former) + 1

    def generation(self, system_identifier: str) -> int:
        """Which one that is; 0 if it isn't known."""
        if system_identifier == self.current:
            return self.here
        return self.former.index(system_identifier) + 1 if system_identifier in self.former else 0

    def after(self, lsn: LSN) -> Place:
        """The place after all that was committed up to a position on the current one."""
        return Place(self.here, LSN(lsn + 1), -1)


Kind = Literal["stream", "backfill", "repair"]
"""By which way an activity came: its key is of a kind of its own."""


class Key(msgspec.Struct, frozen=True, gc=False):
    """What a change key says; `table` with its schema. Those of the stream leave out of which row (`subject`) it is."""

    kind: Kind
    table: str
    rule: str
    place: Place
    subject: str = ""


def own_key(worker: str, clusters: Clusters, key: Key) -> str:
    """The change key of what didn't come by the stream: who met the same row at the same place writes the same.

    It begins with the cluster on which it is written. A place on a former one names that; 0 stands for what was before
    all that is known.
    """
    place = key.place
    at = f"{place.lsn:016X}-{place.ordinal}" if place.generation else "0"
    if 0 < place.generation < clusters.here:
        at = f"{clusters.former[place.generation - 1]}:{at}"
    number = f".{place.number}" if place.rank == 2 else ""
    return f"{worker}/{clusters.current}/{key.kind}/{key.table}/{key.subject}/{key.rule}/{at}{number}"


BY_END: Final = "recording/"
"""In a change key, before where the commit ended: in a recording that doesn't say where it was."""

BY_TIME: Final = "recording/T"
"""Likewise, before a number for when that was. It says nothing of what else is in the WAL."""

_KEY: Final = re.compile(
    rf"(\d+)/(?:({BY_TIME}|{BY_END}|)([0-9A-F]{{16}})/(.*)/(\d+)/([^/]*)"
    r"|(backfill|repair)/(.*)/([^/]*)/([^/]*)/(?:0|(?:(\d+):)?([0-9A-F]{16})-(\d+))(?:\.(\d+))?)",
    re.DOTALL,
)


def parsed_key(worker: str, clusters: Clusters, change_key: str) -> Key | None:
    """What a change key of this worker says, be it of another cluster; None for any other."""
    found = _KEY.fullmatch(change_key.removeprefix(f"{worker}/")) if change_key.startswith(f"{worker}/") else None
    if found is None:
        return None
    cluster, by, lsn, table, ordinal, rule, kind, own_table, subject, own_rule, of, after, after_ordinal, number = (
        found.groups()
    )
    generation = 0 if by == BY_TIME else clusters.generation(of or cluster)
    if kind is None:
        return Key("stream", table, rule, Place(generation, LSN(int(lsn, 16)), int(ordinal)))
    place = Place(rank=2, number=int(number or 0)) if kind == "repair" else Place(rank=1)
    if after is not None:
        place = place._replace(generation=generation, lsn=LSN(int(after, 16)), ordinal=int(after_ordinal))
    return Key("repair" if kind == "repair" else "backfill", own_table, own_rule, place, subject)


class _Slice(msgspec.Struct, frozen=True, gc=False):
    """Where the outcomes of a slice of a commit begin in a batch, and what is known of that commit."""

    place: int
    before: LSN
    commit_lsn: LSN


@dataclass(slots=True)
class Batch:
    """What is written in one database transaction: all outcomes up to the position `end`, in order.

    `size` is in bytes of the stream. `given` are the erased persons whose keys were given to somebody else, each with
    the commit that did it.
    """

    MAX_OUTCOMES: ClassVar[int] = 1_000
    MAX_SIZE: ClassVar[int] = 2 << 20

    end: Position
    outcomes: list[Prepared] = field(default_factory=list)
    committed_at: datetime | None = None
    transactions: int = 0
    size: int = 0
    given: list[tuple[Person, LSN]] = field(default_factory=list)
    _slices: list[_Slice] = field(default_factory=list)

    @property
    def full(self) -> bool:
        """Whether it should be written before more is taken."""
        return len(self.outcomes) >= self.MAX_OUTCOMES or self.size >= self.MAX_SIZE

    @property
    def empty(self) -> bool:
        """Whether there is nothing to write but its end."""
        return not (self.outcomes or self.given)

    def add(
        self,
        outcomes: Sequence[Prepared],
        transaction: Transaction,
        *,
        done: int,
        complete: bool,
        given: Sequence[Person] = (),
    ) -> None:
        """Take what came of a slice of a commit: of all of it if `complete`, else of its first `done` changes."""
        before = self.end.lsn
        if given:
            self.given += ((person, transaction.commit_lsn) for person in given)
        if outcomes:
            self._slices.append(_Slice(len(self.outcomes), before, transaction.commit_lsn))
            self.outcomes += outcomes
        self.committed_at = transaction.committed_at
        if complete:
            self.end = Position(transaction.end_lsn)
            self.transactions += 1
        else:
            self.end = Position(before, transaction.commit_lsn, done)

    def position_before(self, place: int) -> Position | None:
        """The position that has been reached when all outcomes before `place` are written.

        None where there is no such position, because the place is between two outcomes of one change, or of a stretch
        of changes that are done together.
        """
        of = self._slices[bisect_right(self._slices, place, key=lambda s: s.place) - 1]
        index = self.outcomes[place].index
        if place > of.place and self.outcomes[place - 1].index == index:
            return None
        return Position(of.before, of.commit_lsn, index)
