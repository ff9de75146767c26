"""Transactions to activities: a profile's rules applied to changes, without a database, a clock or a log."""

from __future__ import annotations

import pickle
import zlib
from collections import defaultdict, deque
from datetime import datetime
from typing import Any, Final

import msgspec

from cdc_worker.activities import Activity, DeadLetter, change_key, key_prefix
from cdc_worker.changes import Change, Message, Row, Transaction, Value
from cdc_worker.errors import UnknownValueError
from cdc_worker.rules import Event, Rule, Rules, Table, event_of

CONTEXT_PREFIX: Final = "cdc_worker.context"
"""Prefix of the logical messages in which an application says who changes what follows."""

FACT_DISTANCE: Final = 10_000
"""How many changes of the same transaction may lie between a change and the fact that completes it."""

HELD_TEXT: Final = 16 << 20
"""So many characters of row values wait for facts at most; then the oldest goes without."""

Outcome = Activity | DeadLetter

_FactKey = tuple[tuple[str, str], str, tuple[Value, ...]]


class _Held(msgspec.Struct, eq=False):
    """An outcome that waits for its turn; or, with a `rule`, the event of one that facts may still complete.

    It is kept packed: thousands may wait at once, and a change's two rows are nearly the same text.
    """

    index: int
    size: int
    packed: bytes
    rule: Rule | None = None
    key: str = ""
    missing: set[_FactKey] = set()
    facts: dict[str, Row | None] = {}

    def outcome(self) -> Outcome:
        """What it comes to, with the facts that have been found."""
        value = pickle.loads(zlib.decompress(self.packed))  # noqa: S301  # nobody but us has packed it
        if self.rule is None:
            outcome: Outcome = value
            return outcome
        event: Event = value
        event.facts = self.facts
        return _build(event, self.rule, self.key, self.index)


def _packed(value: Outcome | Event) -> bytes:
    return zlib.compress(pickle.dumps(value, pickle.HIGHEST_PROTOCOL), 1)


def _size(change: Change) -> int:
    """Characters in the values of a change, the same from any decoder."""
    return sum(len(value) for row in (change.old, change.new) if row for value in row.values() if type(value) is str)


def _build(event: Event, rule: Rule, key: str, index: int) -> Outcome:
    try:
        return Activity(key, rule.fields(event), event.change, index)
    except (UnknownValueError, ValueError, TypeError, ArithmeticError) as error:
        return DeadLetter(key, "rule_failed", str(error), event.change, index, event.committed_at)


class Transformer:
    """Turns transactions, fed in order and possibly in slices, into outcomes in the order of the changes.

    What comes out depends on the transactions alone, never on where they were sliced. `worker` and
    `system_identifier` are part of every change key.
    """

    def __init__(self, rules: Rules, *, worker: str, system_identifier: str) -> None:
        self._rules = rules
        self._worker = worker
        self._system_identifier = system_identifier
        self._prefix = ""
        self._context: dict[str, Any] = {}
        self._ordinals: defaultdict[tuple[str, str], int] = defaultdict(int)
        self._facts: dict[_FactKey, tuple[int, Row]] = {}
        self._waiting: defaultdict[_FactKey, list[tuple[str, _Held]]] = defaultdict(list)
        self._held: deque[_Held] = deque()
        self._held_size = 0
        self._out: list[Outcome] = []
        self._index = 0

    @property
    def done(self) -> int:
        """How many changes of the current commit have all their outcomes out."""
        return self._held[0].index if self._held else self._index

    def feed(self, transaction: Transaction) -> list[Outcome]:
        """The outcomes that are certain now. After the last slice of a commit, that is all of them."""
        if transaction.first:
            self._start(transaction)
        out = self._out = []
        messages = iter(transaction.messages)
        until, message = next(messages, (-1, None))
        for number, change in enumerate(transaction.changes):
            while until == number and message is not None:
                self._hear(message)
                until, message = next(messages, (-1, None))
            table = self._rules.get((change.schema, change.table))
            if table is not None:
                self._take(change, table, transaction.committed_at)
        while message is not None:
            self._hear(message)
            until, message = next(messages, (-1, None))
        if transaction.last:
            self._release(self._index + FACT_DISTANCE + 1)
        return out

    def _start(self, transaction: Transaction) -> None:
        self._prefix = key_prefix(self._worker, self._system_identifier, transaction.commit_lsn)
        self._context = {}
        self._ordinals.clear()
        self._facts.clear()
        self._waiting.clear()
        self._held.clear()
        self._held_size = 0
        self._index = 0

    def _hear(self, message: Message) -> None:
        if message.prefix != CONTEXT_PREFIX:
            return
        try:
            said = msgspec.json.decode(message.content, type=dict[str, Any])
        except (msgspec.DecodeError, RecursionError):
            return  # the application's words are not ours to mend, and its changes are recorded all the same
        # Only what a text column can hold: whatever anyone says here, it must not get in the way of the changes.
        self._context = {**self._context, **{name: value for name, value in said.items() if _plain(value)}}

    def _take(self, change: Change, table: Table, committed_at: datetime) -> None:
        index = self._index
        ordinal = self._ordinals[table.name]
        self._ordinals[table.name] = ordinal + 1
        if self._held:
            self._release(index)
        if table.tells and change.new is not None:
            self._learn(change.new, table, index)
            self._release(index)
        self._index = index + 1
        if change.operation == "update":
            if not change.changed or not table.rules["update"]:
                return
            if change.old_row_unknown:
                key = change_key(self._prefix, *table.name, ordinal, "*")
                reason = "the change carries no old row: the table needs REPLICA IDENTITY FULL"
                self._put(DeadLetter(key, "old_values_unknown", reason, change, index, committed_at))
                return
        claimed: set[str] = set()
        for rule in table.candidates(change):
            event = event_of(change, committed_at, self._context)
            key = change_key(self._prefix, *table.name, ordinal, rule.name)
            try:
                columns = rule.columns(event, claimed)
            except UnknownValueError as error:
                self._put(DeadLetter(key, "rule_failed", str(error), change, index, committed_at))
                continue
            if columns is None:
                continue
            claimed.update(columns)
            event.columns = columns
            if rule.facts and (missing := self._find(event, rule, table, index)):
                self._hold(event, rule, key, index, missing)
            else:
                self._put(_build(event, rule, key, index))

    def _put(self, outcome: Outcome) -> None:
        if self._held:
            # Behind one that waits, all wait: the order of the changes is the order of what comes out.
            self._held.append(self._kept(outcome))
        else:
            self._out.append(outcome)

    def _kept(self, outcome: Outcome) -> _Held:
        size = _size(outcome.change)
        self._held_size += size
        return _Held(outcome.index, size, _packed(outcome))

    # Facts: rows of the same transaction that complete an activity, before it or after it.

    def _learn(self, row: Row, table: Table, index: int) -> None:
        facts = self._facts
        for other, fact in table.tells:
            key = (other, fact.name, fact.key(row, fact.theirs))
            if None in key[2]:
                continue  # as in SQL, NULL matches nothing
            facts.pop(key, None)
            facts[key] = (index, {column: row[column] for column in fact.columns if column in row})
            for name, held in self._waiting.pop(key, ()):
                held.facts[name] = facts[key][1]
                held.missing.discard(key)
        while facts and next(iter(facts.values()))[0] + FACT_DISTANCE < index:
            del facts[next(iter(facts))]

    def _find(self, event: Event, rule: Rule, table: Table, index: int) -> dict[_FactKey, str]:
        """Note in the event which facts are known; returns those that may still come."""
        missing = {}
        for name in rule.facts:
            fact = table.facts[name]
            key = (table.name, name, fact.key(event.row, fact.ours))
            at, row = self._facts.get(key, (0, None))
            event.facts[name] = row if at + FACT_DISTANCE >= index else None
            if event.facts[name] is None and None not in key[2]:
                missing[key] = name
        return missing

    def _hold(self, event: Event, rule: Rule, key: str, index: int, missing: dict[_FactKey, str]) -> None:
        if not self._held:
            self._take_back(index)
        size = _size(event.change)
        self._held_size += size
        held = _Held(index, size, _packed(event), rule, key, set(missing), event.facts)
        self._held.append(held)
        for fact_key, name in missing.items():
            self._waiting[fact_key].append((name, held))

    def _take_back(self, index: int) -> None:
        """Keep the outcomes of a change together: `done` counts whole changes."""
        while self._out and self._out[-1].index == index:
            self._held.appendleft(self._kept(self._out.pop()))

    def _release(self, index: int) -> None:
        """Let go of what need not wait any longer at the change `index`."""
        while self._held:
            head = self._held[0]
            if head.missing:
                if head.index + FACT_DISTANCE >= index and self._held_size <= HELD_TEXT:
                    self._take_back(head.index)
                    return
                for key in head.missing:
                    self._forget(key, head)
            self._out.append(head.outcome())
            self._held.popleft()
            self._held_size -= head.size

    def _forget(self, key: _FactKey, held: _Held) -> None:
        others = [waiting for waiting in self._waiting.pop(key) if waiting[1] is not held]
        if others:
            self._waiting[key] = others


def _plain(value: Any) -> bool:
    return "\0" not in value if isinstance(value, str) else not isinstance(value, (dict, list))


def transform(rules: Rules, transactions: list[Transaction], *, worker: str, system_identifier: str) -> list[Outcome]:
    """All outcomes of some whole transactions."""
    transformer = Transformer(rules, worker=worker, system_identifier=system_identifier)
    return [outcome for transaction in transactions for outcome in transformer.feed(transaction)]
