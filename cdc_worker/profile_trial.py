"""What a profile would write of changes that somebody tells, or has recorded. Nothing is written anywhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any, Final, Literal

import msgspec
from pydantic import AfterValidator, BaseModel, Field, ValidationError

from cdc_worker import catalog, context, lookups, partitions, postgres, wal2json
from cdc_worker.activities import Activity
from cdc_worker.changes import Assembler, Change, Happening, Message, Operation, Row, Transaction, update
from cdc_worker.config import Settings
from cdc_worker.errors import MessageUnreadableError
from cdc_worker.lsn import LSN
from cdc_worker.profile import Profile
from cdc_worker.profile_checks import PROFILE, READ_ONLY
from cdc_worker.replay import Columns
from cdc_worker.rules import Lookup, Rules, Table, qualified
from cdc_worker.transform import Told, Transformer, Wanted, settled
from cdc_worker.values import MAX_DIGITS

_XID: Final = 1

_json = msgspec.json.Encoder(decimal_format="number")


class ChangeError(ValueError):
    """What is told of a change makes none."""


def _value(value: object) -> object:
    """What a column may hold."""
    if isinstance(value, (dict, list)) or (isinstance(value, str) and "\0" in value):
        raise ValueError("a value is null, true, false, a number, or a text as PostgreSQL prints it")
    return value


Column = Annotated[Any, AfterValidator(_value)]


class ToldChange(BaseModel, extra="forbid"):
    """A change as one writes it by hand: `{"table": "lead", "old": {"status": "a"}, "new": {"status": "b"}}`."""

    table: str = Field(description="captured table, with its schema if that isn't public")
    operation: Happening | None = Field(default=None, description="what `old` and `new` tell, if not given")
    old: dict[str, Column] | None = Field(default=None, description="columns of the old row; others are NULL")
    new: dict[str, Column] | None = Field(
        default=None, description="columns of the new row; others are as in the old one"
    )
    context: dict[str, Any] = Field(default={}, description="what a context message before it says; taken as signed")
    lookups: dict[str, dict[str, Column] | None] = Field(
        default={}, description="by name, rows that are looked up, or null"
    )


class Tried(BaseModel):
    """What would be written of a change. These are the fields of `profile try --json`, an object a line."""

    outcome: Literal["activity", "dead_letter"] = Field(description="what the change would become")
    table: str = Field(description="captured table")
    operation: Operation = Field(description="what happened to its row")
    type: str | None = Field(default=None, description="type of the activity")
    description: str | None = Field(default=None, description="its text")
    metadata: dict[str, Any] | None = Field(default=None, description="its metadata")
    columns: dict[str, str | None] | None = Field(
        default=None, description="columns of the target, as they would be sent"
    )
    reason: str | None = Field(default=None, description="why it would become a dead letter")

    def json_line(self) -> str:
        """An object, with every digit of its numbers."""
        return _json.encode(self.model_dump()).decode()


@dataclass(slots=True)
class Counts:
    """How much was tried. `not_looked_up` are tables that only a database knows."""

    changes: int = 0
    activities: int = 0
    dead_letters: int = 0
    not_looked_up: set[str] = field(default_factory=set)


def told_change(text: str) -> ToldChange:
    """Read one from JSON. Raises ChangeError."""
    try:
        return ToldChange.model_validate(json.loads(text, parse_float=_number, parse_constant=_number))
    except ValidationError as error:
        faults = (
            f"{'.'.join(map(str, fault['loc']))}: {fault['msg'].removeprefix('Value error, ')}"
            for fault in error.errors()
        )
        raise ChangeError("; ".join(fault.removeprefix(": ") for fault in faults)) from None
    except (ValueError, RecursionError) as error:
        raise ChangeError(f"it can't be read as JSON: {error}") from None


def _number(digits: str) -> Decimal:
    try:
        number = Decimal(digits)
        if number.is_finite() and abs(number.adjusted()) <= MAX_DIGITS:
            return number
    except ArithmeticError:
        pass
    raise ValueError(f"{digits} is no number that a column has")


def try_changes(settings: Settings, profile: Profile, changes: Sequence[ToldChange], counts: Counts) -> Iterator[Tried]:
    """What would be written of changes in one transaction. Raises ChangeError for one that can't be."""
    with ExitStack() as stack:
        trial = _Trial(settings, profile, counts, stack)
        yield from trial.of([trial.transaction(changes)])


def try_recording(settings: Settings, profile: Profile, payloads: Iterable[bytes], counts: Counts) -> Iterator[Tried]:
    """What would be written of what wal2json has sent, line by line."""
    with ExitStack() as stack:
        trial = _Trial(settings, profile, counts, stack)
        yield from trial.of(_transactions(payloads, trial.assembler()))


def _transactions(payloads: Iterable[bytes], assembler: Assembler) -> Iterator[Transaction]:
    for number, payload in enumerate(payloads, 1):
        if not payload.strip():
            continue
        try:
            transaction = assembler.feed(wal2json.decode(payload), payload)
        except MessageUnreadableError as error:
            raise MessageUnreadableError(f"line {number}: {error}", hint=error.hint) from error
        if transaction is not None:
            yield transaction
    if assembler.open:
        raise MessageUnreadableError(
            "the recording ends within a transaction, of which what came last isn't told",
            hint="record until after its commit",
        )


class _Trial:
    """A transformer whose outcomes are shown."""

    def __init__(self, settings: Settings, profile: Profile, counts: Counts, stack: ExitStack) -> None:
        self._rules: Rules = settings.rules(profile)
        self._counts = counts
        self._key = settings.policy(profile).key
        self._given: dict[Lookup, Row | None] = {}
        self._columns: catalog.Columns = {}
        self._partitions: Mapping[tuple[str, str], tuple[str, str]] = {}
        self._ask: Callable[[Collection[Wanted]], Mapping[Wanted, Row | None]] | None = None
        connection = None
        if dsn := settings.dsn.get_secret_value():
            connection = stack.enter_context(postgres.connect(dsn, settings.worker, name=PROFILE))
            connection.execute(READ_ONLY)
            self._columns = catalog.columns(connection, *self._rules)
            self._partitions = partitions.roots(connection, self._rules)
            self._ask = lambda wanted: lookups.fetch(connection, self._rules, wanted)
        self._sent = Columns(settings, profile, connection)
        self._transformer = Transformer(
            self._rules, worker=settings.worker, system_identifier="0", policy=settings.policy(profile)
        )

    def assembler(self) -> Assembler:
        """One that knows which partitions there are now."""
        tables = {**self._partitions, **{name: name for name in self._rules}}
        keys = {name: table.key for name, table in self._rules.items()}
        return Assembler(root_of=lambda change, _: tables.get((change.schema, change.table)), keys=keys)

    def of(self, transactions: Iterable[Transaction]) -> Iterator[Tried]:
        """What would be written of transactions, or of their slices."""
        for transaction in transactions:
            self._counts.changes += len(transaction.changes)
            yield from map(self._tried, settled(self._transformer, transaction, self._fetch))

    def _tried(self, outcome: Told) -> Tried:
        change = outcome.change
        table = ".".join((change.schema, change.table))
        if not isinstance(outcome, Activity):
            self._counts.dead_letters += 1
            reason = f"{outcome.kind}: {outcome.reason}"
            return Tried(outcome="dead_letter", table=table, operation=change.operation, reason=reason)
        self._counts.activities += 1
        fields = outcome.fields
        return Tried(
            outcome="activity",
            table=table,
            operation=change.operation,
            type=fields["type"],
            description=fields["description"],
            metadata=fields["metadata"],
            columns=self._sent.of(outcome),
        )

    def _fetch(self, wanted: Collection[Wanted]) -> Mapping[Wanted, Row | None]:
        found = {key: self._given[key[0]] for key in wanted if key[0] in self._given}
        rest = [key for key in wanted if key not in found]
        if self._ask is None:
            self._counts.not_looked_up.update(".".join(lookup.table) for lookup, _ in rest)
        return {**dict.fromkeys(rest), **(self._ask(rest) if self._ask and rest else {}), **found}

    # Changes that are told

    def transaction(self, told: Sequence[ToldChange]) -> Transaction:
        """A transaction of them. Raises ChangeError."""
        messages = [(number, self._message(one.context)) for number, one in enumerate(told) if one.context]
        changes = [self._change(one) for one in told]
        at = datetime.now(UTC)
        return Transaction(_XID, LSN(1), LSN(2), at, changes, messages, [*changes], index=0, first=True, last=True)

    def _message(self, said: Mapping[str, Any]) -> Message:
        payload = _json.encode(said).decode()
        if self._key is not None:
            signature = context.signature(self._key, _XID, payload)
            payload = _json.encode({"signed": payload, "signature": signature}).decode()
        return Message(context.PREFIX, payload, transactional=True)

    def _change(self, told: ToldChange) -> Change:
        name = qualified(told.table)
        table = self._rules.get(name)
        if table is None:
            tables = ", ".join(sorted(".".join(of) for of in self._rules))
            raise ChangeError(f'table "{told.table}" isn\'t captured; these are: {tables}')
        for lookup, row in told.lookups.items():
            self._give(table, lookup, row)
        operation = told.operation or _OPERATIONS[told.old is not None, told.new is not None]
        if operation is None:
            raise ChangeError('it has neither "old" nor "new"; if all rows went: "operation": "truncate"')
        old = None if operation in ("insert", "truncate") else self._row(table, told.old or {})
        new = None if operation in ("delete", "truncate") else self._row(table, {**(old or {}), **(told.new or {})})
        if operation == "update" and old is not None and new is not None:
            return update(*name, old, new)
        return Change(operation, *name, old, new)

    def _row(self, table: Table, given: Row) -> Row:
        """A whole row: of the columns that the table has, or of those that are given, or that rules name."""
        known = self._columns.get(table.name, {})
        if known and (unknown := sorted(given.keys() - known.keys())):
            raise ChangeError(f"table {'.'.join(table.name)} has no column {', '.join(unknown)}")
        return {**dict.fromkeys(known or sorted(table.columns)), **given}

    def _give(self, table: Table, name: str, row: Row | None) -> None:
        if name in table.facts:
            raise ChangeError(f'lookup "{name}" is about the same transaction: tell its row as a change of its own')
        if name not in table.references:
            raise ChangeError(f'table {".".join(table.name)} has no lookup "{name}"')
        lookup = table.references[name].lookup
        self._given[lookup] = None if row is None else {**dict.fromkeys(lookup.columns), **row}


_OPERATIONS: Final[Mapping[tuple[bool, bool], Happening | None]] = {
    (True, True): "update",
    (False, True): "insert",
    (True, False): "delete",
    (False, False): None,
}


def lines(tried: Tried) -> Iterator[str]:
    """It as a person reads it."""
    if tried.columns is None:
        yield f"{tried.table}, {tried.operation}: dead letter, {tried.reason}"
        return
    yield f"{tried.table}, {tried.operation}: {tried.type}"
    width = max(map(len, tried.columns))
    for column, value in tried.columns.items():
        yield f"  {column:{width}}  {'NULL' if value is None else value}"


def summary(counts: Counts) -> Iterator[str]:
    """What it came to."""
    if counts.not_looked_up:
        yield f"not looked up, for want of a DSN: rows of {', '.join(sorted(counts.not_looked_up))}"
    yield (
        f"{counts.changes} changes: {counts.activities} activities, {counts.dead_letters} dead letters;"
        " nothing was written"
    )
