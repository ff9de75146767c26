"""What happened in the database: messages of a decoder, and the transactions they add up to."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from typing import Final, Literal

import msgspec

from cdc_worker.errors import MessageUnreadableError
from cdc_worker.lsn import INVALID, LSN

Value = None | bool | int | float | Decimal | str
"""A column's value: integers are int, numeric is exact, everything else is text as Postgres prints it."""

Row = dict[str, Value]
"""Column name to value, in the table's order. A column that is absent is *unknown*, which is not NULL."""

Payload = bytes | memoryview
"""A message as the output plugin wrote it."""

Operation = Literal["insert", "update", "delete", "truncate"]


# Structs instead of dataclasses here: one of each is made for every message, and they cost a tenth.
class Begin(msgspec.Struct, frozen=True, gc=False):
    """A transaction starts. All of it is already decided: its commit lies at `commit_lsn` and ends at `end_lsn`."""

    xid: int
    commit_lsn: LSN
    end_lsn: LSN
    committed_at: datetime


class Commit(msgspec.Struct, frozen=True, gc=False):
    """The transaction that began last is complete."""


class Message(msgspec.Struct, frozen=True, gc=False):
    """What the application said with `pg_logical_emit_message(transactional, prefix, content)`."""

    prefix: str
    content: str
    transactional: bool


class Change(msgspec.Struct, frozen=True, gc=False):
    """One row before and after. `old` is None for an insert, `new` for a delete, both for a truncate.

    `changed` names an update's columns whose value is distinct, in the table's order. Unchanged TOASTed columns are
    taken from the old row; where the replica identity doesn't carry the old row they are absent, which means unknown.
    """

    operation: Operation
    schema: str
    table: str
    old: Row | None
    new: Row | None
    changed: tuple[str, ...] = ()

    @property
    def old_row_unknown(self) -> bool:
        """Whether an update came without its whole old row, so that what changed can't be told."""
        return self.old is None or self.new is None or len(self.old) < len(self.new)


def update(schema: str, table: str, old: Row, sent: Row) -> Change:
    """The change of an update: `old` is what is known of the old row, `sent` what was sent of the new one."""
    changed = tuple([name for name, value in sent.items() if name not in old or old[name] != value])
    new = sent if old.keys() <= sent.keys() else {**old, **sent}  # an unchanged TOASTed column isn't sent
    return Change("update", schema, table, old, new, changed)


class Transaction(msgspec.Struct, frozen=True):
    """The changes of one commit, or a slice of them when there are many.

    `index` counts the changes of the same commit that came in earlier slices, of which there is none before `first`.
    `messages` are the logical messages, each with the number of this slice's changes that came before it; `payloads`
    are the changes as they were received.
    """

    xid: int
    commit_lsn: LSN
    end_lsn: LSN
    committed_at: datetime
    changes: list[Change]
    messages: list[tuple[int, Message]]
    payloads: list[Payload]
    index: int
    first: bool
    last: bool


CUTOVER_PREFIX: Final = "cdc_worker.cutover"
"""Prefix of the logical messages that mark where the worker and triggers take over from each other."""


class Assembler:
    """Puts decoded messages together into transactions, in slices of bounded size.

    A transaction that ends at or before `start` has been dealt with and is dropped unread.
    """

    MAX_CHANGES: Final = 1_000
    MAX_BYTES: Final = 1 << 20

    def __init__(self, start: LSN = INVALID) -> None:
        self.received = start  # the end of the last commit that is complete
        self._start = start
        self._begin: Begin | None = None
        self._changes: list[Change] = []
        self._messages: list[tuple[int, Message]] = []
        self._payloads: list[Payload] = []
        self._first = True
        self._index = 0
        self._size = 0

    @property
    def open(self) -> bool:
        """Whether a transaction has begun and not yet ended."""
        return self._begin is not None

    @property
    def _marked(self) -> bool:
        return any(message.prefix == CUTOVER_PREFIX for _, message in self._messages)

    def feed(self, message: Begin | Change | Message | Commit, payload: Payload) -> Transaction | None:
        """Take one message and what it was decoded from; returns a transaction or a slice of one when there is one."""
        begin = self._begin
        if type(message) is Begin:
            if begin is not None:
                raise MessageUnreadableError(f"transaction {message.xid} began inside transaction {begin.xid}")
            self._begin, self._first, self._index = message, True, 0
            return None
        if begin is None:
            if type(message) is Message:
                return None  # not transactional: it arrives at once, also from transactions that roll back
            raise MessageUnreadableError(f"a {type(message).__name__.lower()} came outside a transaction")
        dealt_with = begin.end_lsn <= self._start
        if type(message) is Commit:
            self._begin = None
            self.received = max(self.received, begin.end_lsn)
            if dealt_with or (self._first and not self._changes and not self._marked):  # nothing of ours happened in it
                self._messages = []
                return None
            return self._cut(begin, last=True)
        if dealt_with:
            return None
        if type(message) is Change:
            self._changes.append(message)
            self._payloads.append(payload)
        elif type(message) is Message and message.transactional:
            self._messages.append((len(self._changes), message))
        self._size += len(payload)
        full = self._size >= self.MAX_BYTES or len(self._changes) + len(self._messages) >= self.MAX_CHANGES
        return self._cut(begin, last=False) if full else None

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
        )
        self._index += len(self._changes)
        self._changes, self._messages, self._payloads = [], [], []
        self._size, self._first = 0, False
        return transaction
