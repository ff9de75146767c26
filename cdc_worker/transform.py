"""Transactions to activities: a profile's rules applied to changes, without a database, a clock or a log."""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

import msgspec

from cdc_worker.activities import Activity, DeadLetter, change_key, key_prefix
from cdc_worker.changes import Change, Message, Row, Transaction, Value
from cdc_worker.errors import UnknownValueError
from cdc_worker.rules import Event, Rule, Rules, Table

CONTEXT_PREFIX: Final = "cdc_worker.context"
"""Prefix of the logical messages in which an application says who changes what follows."""

FACT_DISTANCE: Final = 10_000
"""How many changes of the same transaction may lie between a change and the fact that completes it."""

Outcome = Activity | DeadLetter


def _plain(value: Any) -> bool:
    return "\0" not in value if isinstance(value, str) else not isinstance(value, (dict, list))


_FactKey = tuple[tuple[str, str], str, tuple[Value, ...]]


@dataclass(slots=True, eq=False)
class _Waiting:
    """An activity that the facts which are `missing` may still complete."""

    event: Event
    rule: Rule
    table: Table
    key: str
    index: int
    missing: list[_FactKey] = field(default_factory=list)
    outcome: Outcome | None = None


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
        self._waiting: defaultdict[_FactKey, list[_Waiting]] = defaultdict(list)
        self._held: deque[Outcome | _Waiting] = deque()
        self._out: list[Outcome] = []
        self._index = 0

    @property
    def done(self) -> int:
        """How many changes of the current commit have all their outcomes out."""
        return self._held[0].index if self._held else self._index

    def feed(self, transaction: Transaction) -> list[Outcome]:
        """The outcomes that are certain now. After the last slice of a commit, that is all of them."""
        if transaction.index == 0:
            self._start(transaction)
        out = self._out = []
        rules = self._rules
        messages = iter(transaction.messages)
        until, message = next(messages, (-1, None))
        for number, change in enumerate(transaction.changes):
            while until == number and message is not None:
                self._hear(message)
                until, message = next(messages, (-1, None))
            table = rules.get((change.schema, change.table))
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
        if change.operation == "update" and (not change.changed or not table.rules["update"]):
            return
        prefix = self._prefix
        if change.operation == "update" and change.old_row_unknown:
            key = change_key(prefix, *table.name, ordinal, "*")
            reason = "the change carries no old row: the table needs REPLICA IDENTITY FULL"
            self._put(DeadLetter(key, "old_values_unknown", reason, change, index, committed_at))
            return
        claimed: set[str] = set()
        for rule in table.rules[change.operation]:
            event = Event(change, committed_at, self._context, {})
            key = change_key(prefix, *table.name, ordinal, rule.name)
            try:
                columns = rule.columns(event, claimed)
            except UnknownValueError as error:
                self._put(DeadLetter(key, "rule_failed", str(error), change, index, committed_at))
                continue
            if columns is None:
                continue
            claimed.update(columns)
            event.columns = columns
            waiting = _Waiting(event, rule, table, key, index)
            if rule.facts and not self._find(waiting):
                self._hold(waiting)
            else:
                self._put(self._build(waiting))

    def _put(self, outcome: Outcome) -> None:
        # Behind one that waits, all wait: the order of the changes is the order of what comes out.
        (self._held if self._held else self._out).append(outcome)

    def _build(self, of: _Waiting) -> Outcome:
        change = of.event.change
        try:
            return Activity(of.key, of.rule.fields(of.event), change, of.index)
        except (UnknownValueError, ValueError, TypeError, ArithmeticError) as error:
            return DeadLetter(of.key, "rule_failed", str(error), change, of.index, of.event.committed_at)

    # Facts: rows of the same transaction that complete an activity, before it or after it.

    def _learn(self, row: Row, table: Table, index: int) -> None:
        facts = self._facts
        for other, fact in table.tells:
            key = (other, fact.name, fact.key(row, fact.theirs))
            if None in key[2]:
                continue
            facts.pop(key, None)
            facts[key] = (index, {column: row[column] for column in fact.columns if column in row})
            for waiting in self._waiting.pop(key, ()):
                waiting.event.facts[fact.name] = facts[key][1]
                waiting.missing.remove(key)
                if not waiting.missing:
                    waiting.outcome = self._build(waiting)
        while facts and next(iter(facts.values()))[0] + FACT_DISTANCE < index:
            del facts[next(iter(facts))]

    def _find(self, waiting: _Waiting) -> bool:
        """Whether no fact that the rule needs may still come; notes what is known and what is missing."""
        for name in waiting.rule.facts:
            fact = waiting.table.facts[name]
            key = (waiting.table.name, name, fact.key(waiting.event.row or {}, fact.ours))
            index, row = self._facts.get(key, (0, None))
            if row is not None and index + FACT_DISTANCE < waiting.index:
                row = None
            waiting.event.facts[name] = row
            if row is None and None not in key[2]:  # as in SQL, NULL matches nothing
                waiting.missing.append(key)
        return not waiting.missing

    def _hold(self, waiting: _Waiting) -> None:
        if not self._held:
            self._take_back(waiting.index)
        self._held.append(waiting)
        for key in waiting.missing:
            self._waiting[key].append(waiting)

    def _take_back(self, index: int) -> None:
        """Keep the outcomes of a change together: `done` counts whole changes."""
        while self._out and self._out[-1].index == index:
            self._held.appendleft(self._out.pop())

    def _release(self, index: int) -> None:
        """Let go of what need not wait any longer at the change `index`."""
        held = self._held
        while held:
            head = held[0]
            if isinstance(head, _Waiting):
                if head.outcome is None:
                    if head.index + FACT_DISTANCE >= index:
                        self._take_back(head.index)
                        return
                    for key in head.missing:
                        self._forget(key, head)
                    head.outcome = self._build(head)
                self._out.append(head.outcome)
            else:
                self._out.append(head)
            held.popleft()

    def _forget(self, key: _FactKey, waiting: _Waiting) -> None:
        others = self._waiting[key]
        others.remove(waiting)
        if not others:
            del self._waiting[key]


def transform(rules: Rules, transactions: list[Transaction], *, worker: str, system_identifier: str) -> list[Outcome]:
    """All outcomes of some whole transactions."""
    transformer = Transformer(rules, worker=worker, system_identifier=system_identifier)
    return [outcome for transaction in transactions for outcome in transformer.feed(transaction)]
