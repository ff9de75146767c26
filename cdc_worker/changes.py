"""What happened in the database: messages of a decoder, and the transactions they add up to."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Final, Literal, NamedTuple

import msgspec

from cdc_worker.errors import MessageUnreadableError
from cdc_worker.lsn import INVALID, LSN
from cdc_worker.values import Value

Row = Mapping[str, Value]
"""Column name to value, in the table's order. A column that is absent is *unknown*, which is not NULL."""

Payload = bytes | memoryview
"""A message as the output plugin wrote it."""

Happening = Literal["insert", "update", "delete", "truncate"]
"""What can happen to a row, or to all rows of a table."""

Operation = Happening | Literal["read", "unreadable"]
"""What a change is. Of a row that was `read` nothing is known to have happened: it is there.

What is `unreadable` has no row.
"""


# Structs instead of dataclasses here: one of each is made for every message, and they cost a tenth.
class Begin(msgspec.Struct, frozen=True, gc=False):
    """A transaction starts. All of it is already decided: its commit lies at `commit_lsn` and ends at `end_lsn`.

    A plugin that doesn't say yet where it ends has the next position for it: no record begins or ends in between, so
    compared with any other position it is the same.
    """

    xid: int
    commit_lsn: LSN
    end_lsn: LSN
    committed_at: datetime


class Commit(msgspec.Struct, frozen=True, gc=False):
    """The transaction that began last is complete. It ends at `end_lsn`, if its begin didn't say so."""

    end_lsn: LSN | None = None


class Message(msgspec.Struct, frozen=True, gc=False):
    """What the application said with `pg_logical_emit_message(transactional, prefix, content)`."""

    prefix: str
    content: str
    transactional: bool


class Change(msgspec.Struct, frozen=True, gc=False):
    """One row before and after. `old` is None for an insert and a read, `new` for a delete, both for a truncate.

    `changed` names an update's columns whose value is distinct, in the table's order; of an insert, those of a masked
    row that has moved. Unchanged TOASTed columns are taken from the old row; where the replica identity doesn't carry
    the old row they are absent, which means unknown.

    A change of a partition is one of its root, and `partition` says where: for a row that moved, where its old row was.
    """

    operation: Operation
    schema: str
    table: str
    old: Row | None
    new: Row | None
    changed: tuple[str, ...] = ()
    partition: tuple[str, str] | None = None

    @property
    def old_row_unknown(self) -> bool:
        """Whether an update came without its whole old row, so that what changed can't be told."""
        return self.old is None or self.new is None or len(self.old) < len(self.new)


STREAM: Final = ("cdc_worker", "stream")
"""In place of the table of messages of which it isn't known whether they are changes of one."""


Part = Literal["begin", "change", "commit"]
"""What of a transaction a message is; what may be a change counts as one."""


class Unread(Change, frozen=True, gc=False, kw_only=True):
    """A message that couldn't be read, and was to be passed over, in the place of the change that it may have been.

    If it is that of a captured table it counts as one of its changes, so that those after it are counted alike by who
    can read it. `raw` is None where it may not be kept; `met_at` is when it was met.
    """

    of: Part = "change"
    position: LSN
    reason: str
    met_at: datetime
    raw: bytes | None = None


Decoded = Begin | Change | Message | Commit | tuple[Change, ...]
"""What a message of an output plugin says: of several tables that were truncated at once, each."""


class BeginToldError(Exception):
    """The commit of a transaction whose begin couldn't be read says all that the begin did: it can be read again."""

    def __init__(self, position: LSN, commit: Payload) -> None:
        """`position` is that of the begin."""
        super().__init__(f"the begin at {position} is known from its commit")
        self.position = position
        self.commit = bytes(commit)


def update(
    schema: str,
    table: str,
    old: Row,
    sent: Row,
    partition: tuple[str, str] | None = None,
    *,
    also: Collection[str] = (),
) -> Change:
    """The change of an update: `old` is what is known of the old row, `sent` what was sent of the new one.

    Columns that have changed `also` are those of which that isn't seen, because they are masked.
    """
    if not also and len(old) == len(sent):
        try:
            changed = tuple([name for name, value in sent.items() if old[name] != value])
            return Change("update", schema, table, old, sent, changed, partition)
        except KeyError:
            pass  # they have other columns
    changed = tuple([name for name, value in sent.items() if name not in old or old[name] != value or name in also])
    new = sent if old.keys() <= sent.keys() else {**old, **sent}  # an unchanged TOASTed column isn't sent
    return Change("update", schema, table, old, new, changed, partition)


def _moved(deleted: Change, change: Change, key: tuple[str, ...]) -> Change | None:
    """The update that a delete and the change after it are together, if a row has moved between partitions."""
    old, new, apart = deleted.old, change.new, change.partition not in (None, deleted.partition)
    if change.operation != "insert" or change.table != deleted.table or change.schema != deleted.schema or not apart:
        return None
    if old is None or new is None or not key or not (old.keys() & new.keys()).issuperset(key):
        return None
    if any(old[column] != new[column] for column in key):
        return None
    return update(change.schema, change.table, old, new, deleted.partition, also=change.changed)


class Received(NamedTuple):
    """A message that was consumed, as it was received; if it was a change, the captured table that it is of.

    `partition` is the name under which it came, if that was another. With an insert that is the end of a row's move
    goes what has `changed` in it.
    """

    payload: Payload
    table: tuple[str, str] | None = None
    partition: tuple[str, str] | None = None
    changed: tuple[str, ...] = ()


Answers = Mapping[tuple[int, str], Row | None]
"""What was found by the lookups of changes: by the number of the change in its commit, and the lookup's name."""

_NO_ANSWERS: Final[Answers] = {}

Masked = Mapping[tuple[str, str], frozenset[str]]
"""Columns by table whose values came masked."""

NOT_MASKED: Final[Masked] = {}


class Transaction(msgspec.Struct, frozen=True):
    """The changes of one commit, or a slice of them when there are many.

    `index` counts the changes of the same commit that came in earlier slices, of which there is none before `first`.
    `messages` are the logical messages, each with the number of this slice's changes that came before it; `payloads`
    are the changes as they were received, or the changes themselves where they came under other names.

    Who asks for them has all consumed messages in `received`, as wal2json writes them. `answers` are what was
    found by lookups when the slice was first read, if that is known: they count for this slice. `masked` is what is not
    to be masked again.
    """

    xid: int
    commit_lsn: LSN
    end_lsn: LSN
    committed_at: datetime
    changes: list[Change]
    messages: list[tuple[int, Message]]
    payloads: list[Payload | Change]
    index: int
    first: bool
    last: bool
    received: Sequence[Received] = ()
    answers: Answers = _NO_ANSWERS
    masked: Masked = NOT_MASKED


MARKER_PREFIX: Final = "cdc_worker.marker"
"""Prefix of the logical messages that mark a position: who reads one writes how far it is, if only for that."""


_NO_KEYS: Final[Mapping[tuple[str, str], tuple[str, ...]]] = {}

RootOf = Callable[[Change, LSN], tuple[str, str] | None]
"""The captured table that a change in the commit at an LSN is of, or None if it is nobody's."""

StoredIn = Callable[[tuple[str, str], int], Collection[tuple[str, str]]]
"""The partitions that hold a table's rows, but for those that came with a transaction of this number or later."""


class _Lost(msgspec.Struct, eq=False):
    """A transaction whose begin couldn't be read: how much came since, and what of it was as unreadable."""

    begin: tuple[Unread, Payload]
    count: int = 0
    last: tuple[Unread, Payload] | None = None


class Assembler:
    """Puts decoded messages together into transactions, in slices of bounded size.

    A transaction that ends at or before `start` has been dealt with and is dropped unread.

    Where changes come under the names of partitions, `root_of` tells whose they are. A delete in one partition and, as
    the next change, an insert in another with the same `keys` is an update: a row has moved. What is emptied with its
    partitions is emptied once; where a plugin names only these, it is emptied with all that it was `stored_in`.

    With `keep` transactions have their messages as they were received, or as `line` writes them. What can't be
    decoded again `by_itself` is kept as the change that it is.
    """

    MAX_CHANGES: Final = 1_000
    MAX_BYTES: Final = 1 << 20

    def __init__(
        self,
        start: LSN = INVALID,
        *,
        root_of: RootOf | None = None,
        stored_in: StoredIn | None = None,
        keys: Mapping[tuple[str, str], tuple[str, ...]] = _NO_KEYS,
        keep: bool = False,
        line: Callable[[Decoded, Payload], Payload] = lambda message, payload: payload,
        by_itself: bool = True,
    ) -> None:
        self.received = start  # the end of the last commit that is complete
        self._start = start
        self._begin: Begin | None = None
        self._lost: _Lost | None = None
        self._changes: list[Change] = []
        self._messages: list[tuple[int, Message]] = []
        self._payloads: list[Payload | Change] = []
        self._root_of = root_of
        self._stored_in = stored_in
        self._keys = keys
        self._received: list[Received] | None = [] if keep else None
        self._line = line
        self._by_itself = by_itself
        self._held: tuple[Change, int] | None = None  # a delete that may turn out to be half an update, and its size
        self._emptied: tuple[str, str] | None = None  # the table of which the last change emptied all or a part
        self._wholly: set[tuple[str, str]] = set()  # those that were emptied since there was a change of any rows
        self._first = True
        self._index = 0
        self._size = 0

    @property
    def open(self) -> bool:
        """Whether a transaction has begun and not yet ended."""
        return self._begin is not None or self._lost is not None

    @property
    def begun(self) -> Begin | None:
        """How that transaction began; None also if that couldn't be read."""
        return self._begin

    @property
    def count(self) -> int:
        """How many changes of it have come so far."""
        if self._lost is not None:
            return self._lost.count
        return self._index + len(self._changes) + (self._held is not None)

    @property
    def dealt_with(self) -> bool:
        """Whether it was before the start."""
        return self._begin is not None and self._begin.end_lsn <= self._start

    @property
    def _marked(self) -> bool:
        return any(message.prefix == MARKER_PREFIX for _, message in self._messages)

    def feed(self, message: Decoded, payload: Payload) -> Transaction | None:
        """Take one message and what it was decoded from; returns a transaction or a slice of one when there is one."""
        begin = self._begin
        if type(message) is Begin:
            if begin is not None:
                raise MessageUnreadableError(f"transaction {message.xid} began inside transaction {begin.xid}")
            left_out = None if self._lost is None else self._over(self._lost)
            self._begin, self._first, self._index, self._emptied = message, True, 0, None
            self._wholly.clear()
            if self._received is not None:
                self._received = [Received(self._line(message, payload))]
            return left_out
        if begin is None:
            if type(message) is Message:
                return None  # not transactional: it arrives at once, also from transactions that roll back
            if (lost := self._lost) is not None:
                if type(message) is Commit:
                    self._lost = None
                    raise BeginToldError(lost.begin[0].position, payload)
                lost.count += 1
                return None
            raise MessageUnreadableError(f"a {type(message).__name__.lower()} came outside a transaction")
        if type(message) is Commit:
            line = payload if self._received is None else self._line(message, payload)
            return self._complete(begin, message.end_lsn, line)
        if begin.end_lsn <= self._start:
            return None
        if type(message) is Change:
            if self._root_of is None:
                self._changes.append(message)
                self._payloads.append(payload if self._by_itself else message)
                self._size += len(payload)
                if self._received is not None:
                    line = self._line(message, payload)
                    self._received.append(Received(line, (message.schema, message.table)))
            else:
                self._resolve(message, payload, self._root_of(message, begin.commit_lsn))
        elif type(message) is tuple:
            for one, root in self._truncates(message, begin):
                self._resolve(one, payload, root)
        elif type(message) is Message and message.transactional:
            if self._held is not None:
                self._let_go()
            self._messages.append((len(self._changes), message))
            self._size += len(payload)
            if self._received is not None:
                self._received.append(Received(self._line(message, payload)))
        full = self._size >= self.MAX_BYTES or len(self._changes) + len(self._messages) >= self.MAX_CHANGES
        return self._cut(begin, last=False) if full else None

    def _complete(self, begin: Begin, end_lsn: LSN | None, line: Payload) -> Transaction | None:
        """The transaction has ended, with this line in a recording."""
        dealt_with = begin.end_lsn <= self._start
        self._begin = None
        if self._held is not None:
            self._let_go()
        if end_lsn is not None and end_lsn != begin.end_lsn:
            begin = msgspec.structs.replace(begin, end_lsn=end_lsn)
            if self._first and self._received:
                self._received[0] = Received(self._line(begin, self._received[0].payload))
        self.received = max(self.received, begin.end_lsn)
        if dealt_with or (self._first and not self._changes and not self._marked):  # nothing of ours happened in it
            self._messages = []
            return None
        if self._received is not None:
            self._received.append(Received(line))
        return self._cut(begin, last=True)

    def pass_over(self, unread: Unread, line: Payload, *, instead: Change | None = None) -> Transaction | None:
        """Take a message that can't be read, and the line that stands for it in a recording, be it as the commit.

        Where a begin can't be read, what follows is left out up to the commit, which raises BeginToldError if it can be
        read itself. `instead` is the change that it was, if that is known by now: it stands in the same place, and is
        no half of a row that moved, for it was none when those after it were counted.
        """
        begin, lost = self._begin, self._lost
        if begin is None:
            if lost is None:
                self._lost = _Lost((unread, line))
                return None
            lost.last = unread, line
            if unread.of == "commit":
                return self._over(lost)
            lost.count += 1
            return None
        if not self.dealt_with:
            if self._held is not None:
                self._let_go()
            self._emptied = None
            self._wholly.clear()
            change = unread if instead is None else instead
            self._append(change, line if instead is None else change, len(line))
            if self._received is not None and unread.of != "commit":
                self._received.append(Received(line))
        return self._complete(begin, unread.position, line) if unread.of == "commit" else None

    def _over(self, lost: _Lost) -> Transaction | None:
        """A transaction has ended of which neither begin nor commit can be read: all of it is left out.

        Nobody knows where it was committed: where it ended stands for that.
        """
        self._lost = None
        if lost.last is None:
            if lost.count:
                raise MessageUnreadableError("a transaction began inside one whose begin can't be read")
            return None  # it was no begin, but a message outside of transactions
        (first, first_line), (last, last_line) = lost.begin, lost.last
        end = last.position
        self.received = max(self.received, end)
        if end <= self._start:
            return None
        reason = f"{first.reason}; nor can its end: {lost.count} messages of the transaction are left out"
        letters: list[Change] = [
            msgspec.structs.replace(first, of="change", reason=reason),
            msgspec.structs.replace(last, of="change"),
        ]
        lines: list[Payload | Change] = [first_line, last_line]
        received = [Received(first_line), Received(last_line)] if self._received is not None else []
        return Transaction(0, end, end, last.met_at, letters, [], lines, 0, True, True, received)

    def _truncates(self, message: tuple[Change, ...], begin: Begin) -> Iterator[tuple[Change, tuple[str, str] | None]]:
        """What one statement has emptied, and whose it is."""
        told = {(change.schema, change.table) for change in message}
        emptied: set[tuple[str, str] | None] = set()
        for part in message:
            own = part.schema, part.table
            root = own if self._root_of is None else self._root_of(part, begin.commit_lsn)
            if root in emptied:
                continue
            if root is None or root in told or not self._holds_all(told, root, begin):
                yield part, root
            else:
                emptied.add(root)
                yield Change("truncate", *root, None, None), root

    def _holds_all(self, told: set[tuple[str, str]], root: tuple[str, str], begin: Begin) -> bool:
        return self._stored_in is not None and told.issuperset(self._stored_in(root, begin.xid))

    def _append(self, change: Change, payload: Payload | Change, size: int) -> None:
        self._changes.append(change)
        self._payloads.append(payload)
        self._size += size

    def _let_go(self) -> None:
        """What was held is what it seemed to be."""
        assert self._held is not None
        change, size = self._held
        self._held = None
        self._append(change, change, size)

    def _resolve(self, change: Change, payload: Payload, root: tuple[str, str] | None) -> None:
        """Take a change under the name of its root."""
        if root is None:
            return
        size, partition = len(payload), (change.schema, change.table)
        if self._received is not None:
            line = self._line(change, payload)
            self._received.append(Received(line, root, None if partition == root else partition))
        kept: Payload | Change = payload if self._by_itself else change
        if root != partition:
            kept = change = Change(change.operation, *root, change.old, change.new, change.changed, partition)
            if change.operation == "truncate" and (self._emptied == root or root in self._wholly):
                return
        if self._held is not None:
            deleted, before = self._held
            moved = _moved(deleted, change, self._keys.get(root, ()))
            if moved is not None:
                self._held = None
                if self._received is not None:
                    self._received[-1] = self._received[-1]._replace(changed=moved.changed)
                self._append(moved, moved, before + size)
                return
            self._let_go()
        self._emptied = root if change.operation == "truncate" else None
        if change.operation != "truncate":
            self._wholly.clear()
        elif root == partition:
            self._wholly.add(root)
        if change.operation == "delete" and change.partition is not None:
            self._held = change, size
        else:
            self._append(change, kept, size)

    def _cut(self, begin: Begin, *, last: bool) -> Transaction:
        transaction = Transaction(
            begin.xid,
            begin.commit_lsn,
            begin.end_lsn,
            begin.committed_at,
            self._changes,
            self._messages,
            self._payloads,
            self._index,
            self._first,
            last,
            self._received if self._received is not None else (),
        )
        if self._received is not None:
            self._received = []
        self._index += len(self._changes)
        self._changes, self._messages, self._payloads = [], [], []
        self._size, self._first = 0, False
        return transaction
