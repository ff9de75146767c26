"""Transactions to activities: a profile's rules applied to changes, without a database, a clock or a log."""

from __future__ import annotations

import pickle
import zlib
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple

import msgspec

from cdc_worker.activities import (
    NOTHING_FOUND,
    NOWHERE,
    Activity,
    DeadLetter,
    DeadLetterKind,
    Origin,
    Person,
    Position,
    Scope,
    Skipped,
    Stretch,
    change_key,
    key_prefix,
)
from cdc_worker.changes import (
    MARKER_PREFIX,
    Answers,
    Change,
    Masked,
    Message,
    Operation,
    Row,
    Transaction,
    Unread,
)
from cdc_worker.context import NOTHING, Collapse, Context, Policy, hear
from cdc_worker.context import PREFIX as CONTEXT_PREFIX
from cdc_worker.errors import UnknownValueError
from cdc_worker.lsn import INVALID, LSN
from cdc_worker.rules import Lookup, Rule, Rules, Table, credited
from cdc_worker.templates import Event, event_of, text
from cdc_worker.values import Value

PREFIXES: Final = (CONTEXT_PREFIX, MARKER_PREFIX)
"""Of all logical messages that are for the worker."""

FACT_DISTANCE: Final = 10_000
"""How many changes of the same transaction may lie between a change and the fact that completes it."""

FACT_TEXT: Final = 16 << 20
"""How many characters of row values may lie between them: large rows must not fill the memory."""

MAX_OUTCOMES: Final = 500
"""So many outcomes that have waited come out at once."""

MAX_ROWS: Final = 10_000
"""So many looked-up rows are remembered of each lookup."""

MAX_UNSEEN: Final = 1_000
"""So many transactions later one that wrote a looked-up table is surely to be seen in it."""

MAX_SKIPPED: Final = 1_000
"""So many changes that leave nothing are noted at once."""

MAX_SUBJECT: Final = 600
"""A row whose key is longer is not noted: the index of such keys takes 2,700 bytes."""

ERASED: Final = "the person was erased"
"""The reason of a dead letter of which nothing else may be told."""

Told = Activity | DeadLetter
"""What became of a change that something is told of."""

Outcome = Told | Skipped

_FactKey = tuple[tuple[str, str], str, tuple[Value, ...]]

Wanted = tuple[Lookup, tuple[Value, ...]]
"""A row that is looked for, by these values."""


class Answer(NamedTuple):
    """A row that was found for the change `number` of its commit, by the lookup of this name, or that is not there."""

    number: int
    name: str
    wanted: Wanted
    row: Row | None


class _Held(msgspec.Struct, eq=False):
    """An outcome that waits for its turn; or, with a `rule`, the event of one that is not complete yet.

    It is kept packed: thousands may wait at once, and a change's two rows are nearly the same text. Only one for which
    rows are looked up, which is soon done, is kept as it is in `event`.
    """

    index: int
    packed: bytes = b""
    rule: Rule | None = None
    key: str = ""
    text: int = 0  # the Transformer's count when it began to wait
    missing: tuple[_FactKey, ...] = ()
    facts: dict[str, Row] | None = None  # those that came later than the change
    event: Event | None = None


def _packed(value: Outcome | Event) -> bytes:
    return zlib.compress(pickle.dumps(value, pickle.HIGHEST_PROTOCOL), 1)


def _size(change: Change) -> int:
    """Characters in the values of a change, the same from any decoder."""
    return sum(len(value) for row in (change.old, change.new) if row for value in row.values() if type(value) is str)


def blank(change: Change, links: Mapping[str, str]) -> Change:
    """A change of which no more is told than which persons it was of: `links` are its table's."""

    def kept(row: Row | None) -> Row | None:
        return row and {column: row[column] for column in links.values() if column in row}

    return msgspec.structs.replace(change, old=kept(change.old), new=kept(change.new))


def _blank(outcome: Told, links: Mapping[str, str], key: Sequence[str]) -> Told:
    """An outcome that tells of nobody any more: no more than of which key, and by which other one it is followed."""
    change = blank(outcome.change, links)
    if isinstance(outcome, DeadLetter):
        origin = msgspec.structs.replace(outcome.origin, context=NOTHING)
        return msgspec.structs.replace(outcome, reason=ERASED, change=change, origin=origin, found={}, fields=None)
    fields = {**outcome.fields, "description": "", "metadata": {"erased": True, **_moved(outcome.fields, key)}}
    origin = msgspec.structs.replace(outcome.origin, context=NOTHING)
    return msgspec.structs.replace(outcome, fields=fields, change=change, origin=origin, found={})


def _moved(fields: Mapping[str, Any], key: Sequence[str]) -> dict[str, Any]:
    """What metadata tells of a changed key, without which nobody knows what became of the row."""
    found = {}
    for name, told in fields["metadata"].items():
        kept = {column: told[column] for column in key if column in told} if isinstance(told, dict) else {}
        if kept and all(isinstance(of, dict) and of.keys() == {"old", "new"} for of in kept.values()):
            found[name] = kept
    return found


class _Summary(msgspec.Struct, eq=False):
    """Changes that are told as one, because of what was said in the message `number` of their commit.

    While it is being made none of them is done: whoever resumes the commit counts them all again.
    """

    context: Context
    number: int
    first: Change
    index: int
    committed_at: datetime
    counts: dict[str, dict[str, int]] = {}

    def count(self, change: Change) -> None:
        name = change.table if change.schema == "public" else f"{change.schema}.{change.table}"
        of = self.counts.setdefault(name, {})
        of[change.operation] = of.get(change.operation, 0) + 1

    def activity(self, prefix: str, origin: Origin) -> Activity:
        wish = self.context.collapse or Collapse()
        created_by, source = credited(self.context)
        counted = [f"{name} {operation} {n}" for name, of in self.counts.items() for operation, n in of.items()]
        fields = {
            "type": wish.type or "changes_collapsed",
            "description": wish.description or f"Changes: {', '.join(counted)}",
            "metadata": {**self.context.told, **source, "changes": self.counts},
            "occurred_at": self.committed_at,
            "created_by": created_by,
        }
        # Of the first change no more than its table: one activity of many persons is nobody's.
        change = Change(self.first.operation, self.first.schema, self.first.table, None, None)
        key = change_key(prefix, "cdc_worker", "context", self.number, "collapse")
        return Activity(key, fields, change, self.index, origin)


class _Passed(msgspec.Struct, eq=False):
    """Changes of which only the rows are noted, some at a time: until these are out, none of them is done.

    How many they are depends on nothing but the commit, so that who resumes it makes the same portions. In a stretch
    that is collapsed its `index` is that of the summary, with which alone they are done.
    """

    index: int
    collapsed: bool
    count: int = 0
    found: dict[tuple[tuple[str, str], Operation], tuple[int, dict[str, None]]] = {}

    def add(self, operation: Operation, table: Table, subjects: Collection[str], index: int) -> None:
        self.found.setdefault((table.name, operation), (index, {}))[1].update(dict.fromkeys(subjects))

    def after(self, operation: Operation, table: Table, subjects: Collection[str]) -> bool:
        """Whether rows that come or go had gone or come in here: which of it was last would not be noted."""
        return operation != "update" and any(
            name == table.name
            and of not in (operation, "update")
            and ("truncate" in (of, operation) or not noted.keys().isdisjoint(subjects))
            for (name, of), (_, noted) in self.found.items()
        )

    def skipped(self, commit_lsn: LSN) -> Iterator[Skipped]:
        for (table, operation), (number, subjects) in self.found.items():
            yield Skipped(table, operation, tuple(subjects), self.collapsed, commit_lsn, number, self.index)


_NO_COLUMNS: Final[frozenset[str]] = frozenset()
_EVERYTHING: Final = Scope()
_BELIEVING: Final = Policy()
_NOWHERE: Final = Position(INVALID)


class Transformer:
    """Turns transactions, fed in order and possibly in slices, into outcomes in the order of the changes.

    What comes out depends on the transactions and on what is looked up, never on where they were sliced. After each
    `feed`, the rows that are `wanted` are to be told with `tell`, and `rest` has more as long as `ready`: until all of
    that is done the commit isn't. `given` are the erased persons whose keys were given to somebody else meanwhile.
    `missing` are columns, by table, that changes didn't carry, so that the metadata had to do without; `refused` is
    what messages asked for that the `policy` doesn't allow, and `untrusted` whether any so far was a mere claim.
    With `keep`, `answered` is what else than the commit itself has completed the changes of the last slice: who gives
    it to another transformer, in the slice, gets the same. `worker` and `system_identifier` are part of every change
    key. Of a commit that is `resumed` the first changes were written before, perhaps by another policy: no summary
    tells them again, and none of them is noted.
    """

    def __init__(
        self,
        rules: Rules,
        *,
        worker: str,
        system_identifier: str,
        scope: Scope = _EVERYTHING,
        policy: Policy = _BELIEVING,
        resumed: Position = _NOWHERE,
        keep: bool = False,
    ) -> None:
        self._rules = rules
        self._keep = keep
        self.answered: list[Answer] = []
        self._answers: Answers = {}
        self._masked: Masked = {}
        self._hidden = {name: frozenset(table.masks) for name, table in rules.items() if table.masks}
        self._origin = NOWHERE
        self._committed_at = datetime.min
        self._resumed = resumed
        self._scope = scope
        self._policy = policy
        self._excluded: frozenset[tuple[str, str]] = frozenset()
        ends = [end for of in (scope.excluded, scope.marked) for found in of.values() for _, end in found]
        self._excluded_until = LSN(2**64) if None in ends else max(filter(None, ends), default=INVALID)
        self.given: list[Person] = []
        self.refused: frozenset[str] = frozenset()
        self.untrusted = False
        self.missing: set[tuple[str, str, str]] = set()
        self._erased: dict[Person, list[Stretch]] = {person: [*found] for person, found in scope.erased.items()}
        self._erased_fields = {name: name for name, _ in scope.erased}
        self._given_at: dict[Person, int] = {}  # by which change of the current commit
        self._commit_lsn = INVALID
        self._worker = worker
        self._system_identifier = system_identifier
        self._prefix = ""
        self._context = NOTHING
        self._context_number = self._messages = 0
        self._summary: _Summary | None = None
        self._passed: _Passed | None = None
        self._ordinals: defaultdict[tuple[str, str], int] = defaultdict(int)
        self._facts: dict[_FactKey, tuple[int, Row]] = {}
        self._waiting: dict[_FactKey, list[_Held]] = {}
        self._held: deque[_Held] = deque()
        self._open: deque[_Held] = deque()  # those of the held that wait for facts
        self._text = 0
        self._rows: defaultdict[Lookup, OrderedDict[tuple[Value, ...], Row | None]] = defaultdict(OrderedDict)
        self._asking: deque[_Held] = deque()  # those of the held for which rows are looked up
        self._wanted: dict[Wanted, None] = {}
        self._unseen: OrderedDict[int, None] = OrderedDict()
        self._xid = 0
        self._out: list[Outcome] = []
        self._index = 0

    @property
    def done(self) -> int:
        """How many changes of the current commit have all their outcomes out."""
        if self._held:
            return self._held[0].index
        stretch = self._summary or self._passed
        return self._index if stretch is None else stretch.index

    def feed(self, transaction: Transaction) -> list[Outcome]:
        """Outcomes that are certain now. With the last slice of a commit, all of them are."""
        if transaction.first:
            self._start(transaction)
        self._out, self.given, self.refused, self.answered = [], [], frozenset(), []
        self._masked = transaction.masked
        self._answers = self._numbered(transaction) if transaction.answers else transaction.answers
        if transaction.masked:
            self._origin = msgspec.structs.replace(self._origin, masked=self._hidden_in(transaction.masked))
        messages = iter(transaction.messages)
        until, message = next(messages, (-1, None))
        for number, change in enumerate(transaction.changes):
            while until == number and message is not None:
                self._hear(message, transaction.xid)
                until, message = next(messages, (-1, None))
            table = self._rules.get((change.schema, change.table))
            if type(change) is Unread:
                self._pass_by(change, table)
            elif table is not None:
                self._take(change, table, transaction.committed_at)
        while message is not None:
            self._hear(message, transaction.xid)
            until, message = next(messages, (-1, None))
        if transaction.last:
            self._sum_up()
            self._expire(self._index + FACT_DISTANCE + 1)
        if self._held:
            self._release()
        return self._told() if self._erased else self._out

    def take_up(
        self, transaction: Transaction, *, heard: Context, ordinals: Mapping[tuple[str, str], int]
    ) -> list[Outcome]:
        """Feed the last slice of a commit of whose earlier ones no more is known.

        That is what was `heard` in it, and of how many changes of each table.
        """
        self._start(transaction)
        self._context = heard
        self._origin = msgspec.structs.replace(self._origin, context=heard)
        if heard != NOTHING:
            self._excluded = self._scope.excludes(transaction.commit_lsn, heard=True)
        self._ordinals.update(ordinals)
        return self.feed(msgspec.structs.replace(transaction, first=False))

    def _numbered(self, transaction: Transaction) -> Answers:
        """What is known of the changes of a slice, numbered as here: it may have some of tables without rules."""
        counted = (
            number
            for number, change in enumerate(transaction.changes, transaction.index)
            if type(change) is Unread or (change.schema, change.table) in self._rules
        )
        numbers = {number: index for index, number in enumerate(counted, self._index)}
        return {
            (numbers[number], name): row for (number, name), row in transaction.answers.items() if number in numbers
        }

    def _hidden_in(self, masked: Masked) -> Masked:
        """The columns that are masked where these came masked already."""
        tables = self._hidden.keys() | masked.keys()
        return {name: self._hidden.get(name, _NO_COLUMNS) | masked.get(name, _NO_COLUMNS) for name in tables}

    @property
    def ready(self) -> bool:
        """Whether more outcomes are certain than the last call has returned."""
        if not self._held:
            return False
        index = self._held[0].index
        return not (self._open and self._open[0].index <= index) and not (
            self._asking and self._asking[0].index <= index
        )

    @property
    def wanted(self) -> Collection[Wanted]:
        """Rows to look for, without which nothing more is certain."""
        return self._wanted.keys()

    @property
    def unseen(self) -> Collection[int]:
        """The transactions, by their numbers, that must be to be seen in the database where rows are looked for."""
        return self._unseen.keys() | {self._xid} if self._xid else ()

    def tell(self, found: Mapping[Wanted, Row | None], *, failed: Collection[Lookup] = ()) -> None:
        """Take rows that were looked for, as they are now; None for those that aren't there.

        What is found by lookups that `failed` is not remembered: they may succeed again.
        """
        self._wanted = {}
        self._unseen.clear()
        for (lookup, values), row in found.items():
            known = self._rows[lookup]
            if row is not None or known.get(values) is None:  # what is gone by now was there then
                self._remember(lookup, values, self._seen(lookup, row))
        asking, self._asking = self._asking, deque()
        for held in asking:
            self._seek(held)
        for lookup, values in found:
            if lookup in failed:
                self._rows[lookup].pop(values, None)

    def _seen(self, lookup: Lookup, row: Row | None) -> Row | None:
        return self._rules[lookup.table].masked(row)

    def rest(self) -> list[Outcome]:
        """More of them."""
        self._out, self.given, self.refused = [], [], frozenset()
        self._release()
        return self._told() if self._erased else self._out

    def _start(self, transaction: Transaction) -> None:
        self._prefix = key_prefix(self._worker, self._system_identifier, transaction.commit_lsn)
        self._context, self._messages, self._summary, self._passed = NOTHING, 0, None, None
        self._ordinals.clear()
        self._index = 0
        self._commit_lsn = transaction.commit_lsn
        self._xid = transaction.xid
        self._committed_at = transaction.committed_at
        self._origin = Origin(transaction.xid, transaction.commit_lsn, transaction.end_lsn, masked=self._hidden)
        self._given_at.clear()
        if transaction.commit_lsn < self._excluded_until:
            self._excluded = self._scope.excludes(transaction.commit_lsn)
        else:
            self._excluded = frozenset()
        if self._facts or self._held:
            self._facts.clear()
            self._waiting.clear()
            self._held.clear()
            self._open.clear()
            self._asking.clear()
            self._text = 0

    def _hear(self, message: Message, xid: int) -> None:
        if message.prefix != CONTEXT_PREFIX:
            return
        if self._excluded:
            self._excluded = self._scope.excludes(self._commit_lsn, heard=True)
        context = hear(self._context, message.content, xid=xid, policy=self._policy)
        if context != self._context:
            self._sum_up()
            self.refused |= context.refused - self._context.refused
            self.untrusted |= len(context.claimed) > 0
            self._context, self._context_number = context, self._messages
            self._origin = msgspec.structs.replace(self._origin, context=context)
        self._messages += 1

    def _sum_up(self) -> None:
        """Note the changes that were passed over up to here, and tell those that were collapsed."""
        self._note()
        if self._summary is not None:
            self._put(self._summary.activity(self._prefix, self._origin))
            self._summary = None

    def _note(self) -> None:
        passed, self._passed = self._passed, None
        for skipped in passed.skipped(self._commit_lsn) if passed is not None else ():
            self._put(skipped)

    def _pass_over(self, change: Change, table: Table, index: int) -> None:
        """Note which row it is that is not told of, or not by itself, if that is known.

        With a new key it is another one, as for who asks what became of the row with that key.
        """
        operation = change.operation
        found = {operation: [table.subject(change.old), table.subject(change.new)]}
        if operation == "update" and None not in found[operation] and len({*found[operation]}) > 1:
            (old, new) = found.pop(operation)
            found |= {"delete": [old], "insert": [new]}
        noted = [
            (of, [subject for subject in subjects if subject is not None and len(subject) <= MAX_SUBJECT])
            for of, subjects in found.items()
        ]
        if not any(subjects for _, subjects in noted) and not (operation == "truncate" and table.key):
            return
        if self._passed is not None and any(self._passed.after(of, table, subjects) for of, subjects in noted):
            self._note()
        if self._passed is None:
            summary = self._summary
            self._passed = _Passed(index if summary is None else summary.index, summary is not None)
        self._passed.count += 1
        for of, subjects in noted:
            if subjects or of == "truncate":
                self._passed.add(of, table, subjects, index)
        if self._passed.count >= MAX_SKIPPED:
            self._note()

    def _take(self, change: Change, table: Table, committed_at: datetime) -> None:
        index = self._index
        ordinal = self._ordinals[table.name]
        self._ordinals[table.name] = ordinal + 1
        if not table.plain:
            change = table.seen(change, self._masked.get(table.name, _NO_COLUMNS))
        if table.looked_up:
            self._observe(change, table)
        if self._open:
            self._text += _size(change)
            self._expire(index)
        if table.tells:
            self._learn(change, table, index)
        if self._erased and change.operation == "insert":
            self._give(change.new, table, index)
        self._index = index + 1
        if self._excluded and table.name in self._excluded:
            return
        operation = change.operation
        if not table.rules[operation] or (operation == "update" and not change.changed):
            return
        if self._context is not NOTHING and (self._context.skip or self._context.collapse is not None):
            if self._commit_lsn == self._resumed.commit_lsn and index < self._resumed.changes:
                return
            if not self._context.skip:
                if self._summary is None:
                    self._summary = _Summary(self._context, self._context_number, change, index, committed_at)
                self._summary.count(change)
            self._pass_over(change, table, index)
            return
        if operation == "update" and change.old_row_unknown:
            key = change_key(self._prefix, *table.name, ordinal, "*")
            reason = "the change carries no old row: the table needs REPLICA IDENTITY FULL"
            self._put(self._letter(key, "old_values_unknown", reason, change))
            return
        if operation == "truncate" and change.partition is not None:
            key = change_key(self._prefix, *table.name, ordinal, "*")
            reason = f"the partition {'.'.join(change.partition)} was emptied: which rows it had isn't told"
            self._put(self._letter(key, "old_values_unknown", reason, change))
            return
        claimed: set[str] = set()
        for rule in table.candidates(change):
            event = event_of(change, committed_at, self._context)
            key = change_key(self._prefix, *table.name, ordinal, rule.name)
            try:
                columns = rule.columns(event, claimed)
            except UnknownValueError as error:
                event.failure = str(error)  # which is told with all that it takes to try again
            else:
                if columns is None:
                    continue
                claimed.update(columns)
                event.columns = columns
            missing = self._find(event, rule, table, index) if rule.facts else ()
            if missing or rule.lookups:
                self._hold(event, rule, key, index, missing)
            elif (outcome := self._built(event, rule, key, index)) is not None:
                self._put(outcome)

    def _pass_by(self, change: Unread, table: Table | None) -> None:
        """Take a change that couldn't be read, of this table or perhaps of any."""
        name, index = (change.schema, change.table), self._index
        ordinal = self._ordinals[name]
        self._ordinals[name] = ordinal + 1
        for lookup, known in self._rows.items():
            if table is None or lookup.table == name:
                known.clear()
        if table is None or table.looked_up:
            self._note_unseen()
        self._expire(index)
        self._index = index + 1
        if name in self._excluded:
            return
        # Within changes that are done together, it is done with them.
        stretch = self._summary or self._passed
        masked = any(of.masks for of in ([table] if table is not None else self._rules.values()))
        self._put(
            DeadLetter(
                change_key(self._prefix, *name, ordinal, "*" if change.of == "change" else change.of),
                "unreadable",
                change.reason,
                Change("unreadable", *name, None, None, (), change.partition),
                index if stretch is None else stretch.index,
                self._committed_at,
                origin=self._origin,
                raw=None if masked else change.raw,
            )
        )

    def _built(self, event: Event, rule: Rule, key: str, index: int) -> Outcome | None:
        change = event.change
        try:
            if event.failure:
                raise UnknownValueError(event.failure)
            fields = rule.fields(event)
        except (UnknownValueError, ValueError, TypeError, ArithmeticError) as error:
            return DeadLetter(
                key,
                "rule_failed",
                str(error),
                change,
                index,
                event.committed_at,
                origin=self._origin_of(event),
                found=event.found,
            )
        if event.missing:
            self.missing.update((change.schema, change.table, column) for column in event.missing)
        if fields is None:
            return None
        return Activity(key, fields, change, index, self._origin_of(event), event.found or NOTHING_FOUND)

    def _origin_of(self, event: Event) -> Origin:
        origin = self._origin
        if event.heard is origin.context or event.heard == origin.context:
            return origin
        return msgspec.structs.replace(origin, context=event.heard)  # of one that has waited

    def _letter(self, key: str, kind: DeadLetterKind, reason: str, change: Change) -> DeadLetter:
        """One of the change that is being taken."""
        return DeadLetter(key, kind, reason, change, self._index - 1, self._committed_at, origin=self._origin)

    def _put(self, outcome: Outcome) -> None:
        if self._held:
            # Behind one that waits, all wait: the order of the changes is the order of what comes out.
            self._held.append(_Held(outcome.index, _packed(outcome)))
        else:
            self._out.append(outcome)

    def _release(self) -> None:
        """Let go of what has waited and is certain, in whole changes."""
        held, out = self._held, self._out
        while self.ready and (len(out) < MAX_OUTCOMES or out[-1].index == held[0].index):
            if (outcome := self._outcome(held.popleft())) is not None:
                out.append(outcome)

    def _outcome(self, held: _Held) -> Outcome | None:
        """What has waited, with what has been found."""
        value = pickle.loads(zlib.decompress(held.packed))  # noqa: S301  # nobody but us has packed it
        if held.rule is None:
            outcome: Outcome = value
            return outcome
        event: Event = value
        event.found |= held.facts or {}
        return self._built(event, held.rule, held.key, held.index)

    # Erased persons: whoever is inserted under the key of one is somebody else.

    def _give(self, row: Row | None, table: Table, index: int) -> None:
        commit = self._commit_lsn
        for person in _persons(row, table.persons):
            stretches = self._erased.get(person)
            if stretches is None:
                continue
            self._given_at.setdefault(person, index)
            ended = [(begin, commit if end is None and begin < commit else end) for begin, end in stretches]
            if ended != stretches:
                self._erased[person] = ended
                self.given.append(person)

    def _told(self) -> list[Outcome]:
        """What came out, without what may no longer be told."""
        return [self._silenced(outcome) for outcome in self._out]

    def _silenced(self, outcome: Outcome) -> Outcome:
        if isinstance(outcome, Skipped) or outcome.change.operation == "unreadable":
            return outcome
        change = outcome.change
        table = self._rules[change.schema, change.table]
        links = table.links
        persons = [*_persons(change.old, links), *_persons(change.new, links)]
        if isinstance(outcome, Activity):
            persons += _persons(outcome.fields, self._erased_fields)
        else:  # what it would have told is not known, but of whom
            for name, sources in table.found.items():
                for lookup, column in sources:
                    persons += _persons(outcome.found.get(lookup), {name: column})
        erased = any(person in self._erased and self._is_erased(person, outcome.index) for person in persons)
        return _blank(outcome, links, table.key) if erased else outcome

    def _is_erased(self, person: Person, index: int) -> bool:
        """Whether nothing may be told of who has this key at a change of the current commit."""
        commit = self._commit_lsn
        if index >= self._given_at.get(person, index + 1):  # who has it now may have been erased since
            return any(begin >= commit for begin, _ in self._erased[person])
        return any(end is None or commit <= end for _, end in self._erased[person])

    # Facts: rows of the same transaction that complete an activity, before it or after it.

    def _learn(self, change: Change, table: Table, index: int) -> None:
        facts = self._facts
        for other, fact in table.tells:
            row = fact.row(change)
            if row is None or any(row.get(column) != value for column, value in fact.where):
                continue
            key = (other, fact.name, fact.key(row, fact.theirs))
            if None in key[2]:
                continue  # as in SQL, NULL matches nothing
            facts.pop(key, None)
            facts[key] = (index, {column: row[column] for column in fact.columns if column in row})
            for held in self._waiting.pop(key, ()):
                held.facts = {**(held.facts or {}), fact.name: facts[key][1]}
                held.missing = tuple(other for other in held.missing if other != key)
            self._expire(index)
        while facts and next(iter(facts.values()))[0] + FACT_DISTANCE < index:
            del facts[next(iter(facts))]

    def _find(self, event: Event, rule: Rule, table: Table, index: int) -> tuple[_FactKey, ...]:
        """Note in the event which facts are known; returns those that may still come."""
        missing = []
        for name in rule.facts:
            fact = table.facts[name]
            key = (table.name, name, fact.key(event.row, fact.ours))
            at, row = self._facts.get(key, (0, None))
            found = row if at + FACT_DISTANCE >= index else None
            event.found[name] = self._answer(index, name, fact.table) if found is None else found
            if event.found[name] is None and None not in key[2]:
                missing.append(key)
        return tuple(missing)

    def _hold(self, event: Event, rule: Rule, key: str, index: int, missing: tuple[_FactKey, ...]) -> None:
        held = _Held(index, rule=rule, key=key, text=self._text, missing=missing, event=event)
        if rule.lookups and self._sought(event, rule, index):
            self._asking.append(held)
        elif missing:
            self._pack(held)
        else:
            if (outcome := self._built(event, rule, key, index)) is not None:
                self._put(outcome)
            return
        if not self._held:
            # `done` counts whole changes, so the outcomes of this one stay together.
            while self._out and self._out[-1].index == index:
                self._held.appendleft(_Held(index, _packed(self._out.pop())))
        self._held.append(held)
        if missing:
            self._open.append(held)
            for fact_key in missing:
                self._waiting.setdefault(fact_key, []).append(held)

    def _pack(self, held: _Held) -> None:
        assert held.event is not None
        held.packed, held.event = _packed(held.event), None

    # Lookups: rows of other tables. What the stream says of them is remembered, the rest is asked for.

    def _sought(self, event: Event, rule: Rule, index: int) -> bool:
        """Note in the event which looked-up rows are known; returns whether others are to be asked for."""
        asked = False
        references = self._rules[event.change.schema, event.change.table].references
        for name in rule.lookups:
            if name in event.found:
                continue
            reference = references[name]
            if (index, name) in self._answers:
                event.found[name] = self._answer(index, name, reference.lookup.table)
                continue
            try:
                values = reference.sought(event)
            except KeyError:  # of a row that is asked for itself, or of a column that isn't carried: that is no miss
                continue
            known = self._rows[reference.lookup]
            if values is None:
                event.found[name] = None
            elif values in known:
                known.move_to_end(values)
                event.found[name] = known[values]
                if self._keep:
                    self.answered.append(Answer(index, name, (reference.lookup, values), known[values]))
            else:
                self._wanted[reference.lookup, values] = None
                asked = True
        return asked

    def _answer(self, index: int, name: str, table: tuple[str, str]) -> Row | None:
        """What was found by a lookup in this table when the slice was first read, as it may be seen by now."""
        return self._rules[table].masked(self._answers.get((index, name)), self._masked.get(table, _NO_COLUMNS))

    def _seek(self, held: _Held) -> None:
        assert held.event is not None
        assert held.rule is not None
        if self._sought(held.event, held.rule, held.index):
            self._asking.append(held)
        else:
            self._pack(held)

    def _observe(self, change: Change, table: Table) -> None:
        """Keep what is remembered of a table true, as far as a change tells; forget the rest."""
        self._note_unseen()
        for lookup in table.looked_up:
            known = self._rows[lookup]
            before, after = lookup.sought(change.old), lookup.sought(change.new)
            # Without its old values an updated row has kept its key; of what else it was looked for by, nobody knows.
            kept = change.operation == "update" and lookup.unique
            if before is None and not kept and change.operation != "insert":
                known.clear()
            elif not lookup.unique:
                for values in (before, after):
                    if values is not None:
                        known.pop(values, None)
            else:
                if before is not None and before != after:
                    self._remember(lookup, before, None)
                if after is not None and change.new is not None:
                    try:
                        self._remember(lookup, after, lookup.kept(change.new))
                    except KeyError:
                        known.pop(after, None)

    def _note_unseen(self) -> None:
        """Note that rows that are looked for may be of the current transaction."""
        if self._xid:
            self._unseen[self._xid] = None
            if len(self._unseen) > MAX_UNSEEN:
                self._unseen.popitem(last=False)

    def _remember(self, lookup: Lookup, values: tuple[Value, ...], row: Row | None) -> None:
        known = self._rows[lookup]
        known[values] = row
        known.move_to_end(values)
        if len(known) > MAX_ROWS:
            known.popitem(last=False)

    def _expire(self, index: int) -> None:
        """Let nothing wait any longer, at the change `index`, for facts that are found or too far away."""
        while self._open:
            head = self._open[0]
            if head.missing:
                if head.index + FACT_DISTANCE >= index and self._text - head.text <= FACT_TEXT:
                    return
                for key in head.missing:
                    self._forget(key, head)
                head.missing = ()
            self._open.popleft()

    def _forget(self, key: _FactKey, held: _Held) -> None:
        others = [other for other in self._waiting.pop(key) if other is not held]
        if others:
            self._waiting[key] = others


def _persons(values: Mapping[str, Any] | None, columns: Mapping[str, str]) -> list[Person]:
    if values is None:
        return []
    return [(name, text(key)) for name, column in columns.items() if (key := values.get(column)) is not None]


Fetch = Callable[[Collection[Wanted]], Mapping[Wanted, Row | None]]
"""Looks for rows; those that it doesn't return are asked for again."""


def _nothing(wanted: Collection[Wanted]) -> Mapping[Wanted, Row | None]:
    return dict.fromkeys(wanted)


def told(outcomes: Iterable[Outcome]) -> Iterator[Told]:
    """Those of which something is told."""
    return (outcome for outcome in outcomes if not isinstance(outcome, Skipped))


def settled(transformer: Transformer, transaction: Transaction, fetch: Fetch) -> Iterator[Told]:
    """What a transformer tells of a transaction, or of a slice, with all that it wants looked for at once."""
    yield from completed(transformer, transformer.feed(transaction), fetch)


def completed(transformer: Transformer, outcomes: Iterable[Outcome], fetch: Fetch) -> Iterator[Told]:
    """What it tells after these outcomes as well."""
    yield from told(outcomes)
    while transformer.wanted or transformer.ready:
        if transformer.wanted:
            transformer.tell(fetch(transformer.wanted))
        yield from told(transformer.rest())


def transform(
    rules: Rules,
    transactions: list[Transaction],
    *,
    worker: str,
    system_identifier: str,
    scope: Scope = _EVERYTHING,
    policy: Policy = _BELIEVING,
    fetch: Fetch = _nothing,
) -> list[Told]:
    """All that is told of some whole transactions."""
    transformer = Transformer(rules, worker=worker, system_identifier=system_identifier, scope=scope, policy=policy)
    return [outcome for transaction in transactions for outcome in settled(transformer, transaction, fetch)]
