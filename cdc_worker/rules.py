"""A profile's rules, compiled once into functions of a change."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from decimal import Decimal
from typing import Any, Final

import msgspec

from cdc_worker.changes import Change, Operation, Row, Value
from cdc_worker.errors import ProfileError, UnknownValueError
from cdc_worker.profile import Profile
from cdc_worker.profile import Rule as RuleSpec
from cdc_worker.profile import Table as TableSpec


class Absent:
    """A column of a fact that the transaction doesn't have: nothing in text, NULL in a field, no key in metadata."""


ABSENT = Absent()

MAX_CANDIDATES: Final = 1_000
"""For so many combinations of changed columns a table remembers which rules may apply."""


class _NoRow(dict[str, Value]):
    """The `row` of a truncate: all its columns are NULL."""

    def __missing__(self, column: str) -> None:
        return None


_NO_ROW: Final = _NoRow()


class Event(msgspec.Struct, gc=False):
    """A change as rules see it. `columns` are the changed columns that the rule at hand is about."""

    change: Change
    committed_at: datetime
    context: Mapping[str, Any]
    old: Row
    new: Row
    row: Row
    facts: dict[str, Row | None]
    columns: list[str] = []


def event_of(change: Change, committed_at: datetime, context: Mapping[str, Any]) -> Event:
    """What there is to see of a change."""
    old, new = change.old, change.new
    row = new if new is not None else old if old is not None else _NO_ROW
    return Event(change, committed_at, context, old or {}, new or {}, row, {})


Getter = Callable[[Event], Any]

_WITHOUT: Final[Mapping[str, tuple[Operation, ...]]] = {"old": ("insert", "truncate"), "new": ("delete", "truncate")}
"""The operations at which there is no such row."""

_NAMES: Final = frozenset({"old", "new", "row", "context"})
"""What templates can name beside facts."""


def text(value: Any) -> str:
    """A value as it stands in a description: as Postgres prints it, NULL as nothing."""
    if value is None or value is ABSENT:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Decimal):
        return f"{value:f}"
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    return str(value)


@dataclass(frozen=True, slots=True)
class _Scope:
    """The names that a table's templates may use in rules on an operation; remembers which they used."""

    table: TableSpec
    text_length: int
    operation: Operation | None = None
    used: set[tuple[str, str]] = field(default_factory=set)

    def getter(self, name: str) -> Getter:
        """A function that reads `old.status`, `columns` and the like. ValueError for a name that isn't there."""
        if name == "columns":
            return lambda event: ", ".join(event.columns)
        if name == "changes":
            return self._changes
        of, dot, column = name.partition(".")
        if not dot or not column:
            raise ValueError(f"{{{name}}} names nothing that a template can use")
        if of in ("old", "new", "row"):
            return self.column(of, column)
        if of == "context":
            return lambda event: event.context.get(column)
        if of in self.table.facts:
            self.used.add((of, column))
            return lambda event: ABSENT if (row := event.facts[of]) is None else row.get(column)
        raise ValueError(f'{{{name}}}: there is no "{of}" here')

    def column(self, of: str, column: str) -> Getter:
        """A function that reads a column, or a mapped one, of the `old`, `new` or whichever `row` there is."""
        mapped = self.table.mapped.get(column)
        if mapped is not None:
            source, values, default = self._real_column(of, mapped.column), mapped.map, mapped.default
            return lambda event: values.get(text(source(event)), default)
        return self._real_column(of, column)

    def _real_column(self, of: str, column: str) -> Getter:
        self.used.add(("row", column))
        if self.operation in _WITHOUT.get(of, ()):
            raise ValueError(f"{{{of}.{column}}}: there is no {of} row at {self.operation}")
        # A column that the change doesn't carry is a KeyError, which `applies` and `fields` explain.
        if of == "old":
            return lambda event: event.old[column]
        if of == "new":
            return lambda event: event.new[column]
        return lambda event: event.row[column]

    def _changes(self, event: Event) -> dict[str, dict[str, Value]]:
        short, old, new = self._short, event.old, event.new
        return {name: {"old": short(old.get(name)), "new": short(new.get(name))} for name in event.columns}

    def _short(self, value: Value) -> Value:
        if isinstance(value, str) and len(value) > self.text_length:
            return value[: self.text_length] + "…"
        return value


def _template(source: str | bool | int, scope: _Scope) -> Getter:
    """Compile a template. It is parsed once and never again, so braces in a value stay text."""
    if not isinstance(source, str):
        return _constant(source)
    match list(string.Formatter().parse(source)):
        case [("", str(name), "", None)]:
            return scope.getter(name)  # a bare name keeps the value's type
        case [(str(literal), None, None, None)]:
            return _constant(literal)
        case parsed:
            pattern, values = "", list[Getter]()
            for literal, field_name, spec, conversion in parsed:
                pattern += literal.replace("%", "%%")
                if field_name is None:
                    continue
                if conversion or "{" in (spec or ""):
                    raise ValueError(f"{source!r}: conversions and nested braces have no meaning here")
                if field_name == "changes":
                    raise ValueError(f"{source!r}: {{changes}} is no text, it stands alone")
                pattern += "%s"
                values.append(_formatted(scope.getter(field_name), spec or ""))
            return lambda event: pattern % tuple([value(event) for value in values])


def _constant(value: Any) -> Getter:
    return lambda event: value


def _formatted(getter: Getter, spec: str) -> Getter:
    if not spec:
        return lambda event: value if type(value := getter(event)) is str else text(value)
    # Without a presentation type, Decimal would take to exponents.
    decimal_spec = spec if spec[-1:] in "eEfFgGn%" else spec + "f"

    def part(event: Event) -> str:
        value = getter(event)
        if value is None or value is ABSENT:
            return ""
        if isinstance(value, bool):
            return format(text(value), spec)
        return format(value, decimal_spec if isinstance(value, Decimal) else spec)

    return part


def _unknown(error: KeyError) -> UnknownValueError:
    return UnknownValueError(f'the change does not carry the column "{error.args[0]}"')


@dataclass(frozen=True, slots=True)
class Fact:
    """Where a fact is found: a row of `table` whose columns `theirs` equal our `ours`; of it `columns` are kept."""

    name: str
    table: tuple[str, str]
    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    columns: tuple[str, ...]

    def key(self, row: Row, columns: tuple[str, ...]) -> tuple[Value, ...]:
        """The values that tie the two rows together."""
        return tuple(row.get(column) for column in columns)


@dataclass(frozen=True, slots=True)
class Rule:
    """A compiled rule."""

    name: str
    facts: tuple[str, ...]
    _changed: tuple[str, ...]
    _compared: tuple[tuple[str, Getter, Getter], ...]
    _to: tuple[tuple[Getter, Value], ...]
    _type: str
    _description: Getter
    _metadata: tuple[tuple[str, Getter], ...]
    _fields: tuple[tuple[str, Getter], ...]
    _actor: Getter | None

    def may_apply(self, changed: Sequence[str], claimed: set[str]) -> bool:
        """Whether the rule can be about an update that changed these columns, of which some are claimed for certain."""
        if self._changed == ("*",):
            return True
        if self._changed == ("unclaimed",):
            return not claimed.issuperset(changed)
        return any(column in changed for column in (*self._changed, *(column for column, _, _ in self._compared)))

    def claims(self, changed: Sequence[str]) -> set[str]:
        """Which of the changed columns it claims whatever their values, if it may apply at all."""
        if self._to or self._compared:
            return set()
        return set(changed) if self._changed in (("*",), ("unclaimed",)) else set(changed).intersection(self._changed)

    def columns(self, event: Event, claimed: set[str]) -> list[str] | None:
        """The changed columns that this rule is about, or None when it doesn't apply to the change.

        Raises UnknownValueError when that can't be told.
        """
        try:
            return self._columns(event, claimed)
        except KeyError as error:
            raise _unknown(error) from None

    def _columns(self, event: Event, claimed: set[str]) -> list[str] | None:
        change = event.change
        if change.operation != "update":
            return []
        if self._changed == ("*",):
            columns = list(change.changed)
        elif self._changed == ("unclaimed",):
            columns = [column for column in change.changed if column not in claimed]
        else:
            columns = [column for column in self._changed if column in change.changed]
            for column, old, new in self._compared:
                if column not in columns and old(event) != new(event):
                    columns.append(column)
        if not columns:
            return None
        if any(get(event) != value for get, value in self._to):
            return None
        return columns

    def fields(self, event: Event) -> dict[str, Any]:
        """The fields of the activity. Raises UnknownValueError, ValueError or TypeError for data it can't read."""
        try:
            return self._build(event)
        except KeyError as error:
            raise _unknown(error) from None

    def _build(self, event: Event) -> dict[str, Any]:
        said = event.context.get("changed_by") if event.context else None
        actor = text(said) or (text(self._actor(event)) if self._actor is not None else "")
        metadata = {key: value for key, get in self._metadata if (value := get(event)) is not ABSENT}
        if actor:
            metadata["changed_by"] = actor
        fields = {
            "type": self._type,
            "description": text(self._description(event)),
            "metadata": metadata,
            "occurred_at": event.committed_at,
            "created_by": actor or "system",
        }
        for name, get in self._fields:
            value = get(event)
            fields[name] = None if value is ABSENT else value
        return fields


@dataclass(frozen=True, slots=True)
class Table:
    """A captured table, compiled: rules by operation, facts by name; to the tables in `tells` its rows are facts.

    `persons` are columns by field: those of its fields that its identity repeats, so that each row is the person of
    this key. `links` are its columns by such fields of any table: whom a row is about.
    """

    name: tuple[str, str]
    rules: Mapping[Operation, tuple[Rule, ...]]
    facts: Mapping[str, Fact]
    tells: tuple[tuple[tuple[str, str], Fact], ...]
    columns: frozenset[str]
    persons: Mapping[str, str]
    links: Mapping[str, str]
    _candidates: dict[tuple[str, ...], tuple[Rule, ...]] = field(default_factory=dict)

    def candidates(self, change: Change) -> tuple[Rule, ...]:
        """The rules that may apply to a change. For updates, what the names of their columns tell is remembered."""
        if change.operation != "update":
            return self.rules[change.operation]
        found = self._candidates.get(change.changed)
        if found is None:
            if len(self._candidates) >= MAX_CANDIDATES:
                self._candidates.clear()
            found = self._candidates[change.changed] = self._narrowed(change.changed)
        return found

    def _narrowed(self, changed: tuple[str, ...]) -> tuple[Rule, ...]:
        claimed: set[str] = set()
        rules = []
        for rule in self.rules["update"]:
            if rule.may_apply(changed, claimed):
                rules.append(rule)
                claimed |= rule.claims(changed)
        return tuple(rules)

    @property
    def needs_old_rows(self) -> bool:
        """Whether its rules can only work with REPLICA IDENTITY FULL."""
        return bool(self.rules["update"] or self.rules["delete"])


Rules = Mapping[tuple[str, str], Table]
"""Compiled tables by (schema, name)."""


def qualified(name: str) -> tuple[str, str]:
    """A table's (schema, name) from `lead` or `crm.lead`."""
    schema, dot, table = name.rpartition(".")
    return (schema if dot else "public", table)


def compile_rules(profile: Profile) -> Rules:
    """Compile a profile. Raises ProfileError with every fault at once."""
    tables = [qualified(name) for name in profile.tables]
    faults = [f"tables.{table[1]} stands here twice" for table in sorted(set(tables)) if tables.count(table) > 1]
    scopes = {qualified(name): _Scope(spec, profile.text_length) for name, spec in profile.tables.items()}
    compiled: dict[tuple[str, str], dict[Operation, tuple[Rule, ...]]] = {}
    for table, scope in scopes.items():
        rules: dict[Operation, list[Rule]] = {"insert": [], "update": [], "delete": [], "truncate": []}
        for number, spec in enumerate(scope.table.rules, 1):
            for operation in spec.on:
                try:
                    rules[operation].append(_rule(spec, operation, scope))
                except ValueError as error:
                    faults.append(f"tables.{table[1]}, rule {number} ({spec.name or spec.type}): {error}")
        compiled[table] = {operation: tuple(of) for operation, of in rules.items()}
    facts = {table: _facts(scope) for table, scope in scopes.items()}
    for table in scopes:
        for fact in facts[table].values():
            if fact.table not in scopes:
                name = ".".join(fact.table)
                faults.append(f"tables.{table[1]}.facts.{fact.name}: {name} is not a table of this profile")
            if fact.name in _NAMES:
                faults.append(f"tables.{table[1]}.facts.{fact.name}: the name means something else in templates")
    if faults:
        lines = "\n".join(f"  {fault}" for fault in faults)
        raise ProfileError(f'profile "{profile.name}" is wrong:\n{lines}', hint="mend each place named")
    links = {table: _links(scope.table) for table, scope in scopes.items()}
    persons = {
        table: {name: column for name, column in links[table].items() if spec.fields[name] in spec.identity.values()}
        for table, spec in ((table, scope.table) for table, scope in scopes.items())
    }
    are_persons = frozenset().union(*persons.values())
    return {
        table: Table(
            name=table,
            rules=compiled[table],
            facts=facts[table],
            tells=tuple((other, f) for other in scopes for f in facts[other].values() if f.table == table),
            columns=frozenset(_columns(table, scopes, facts)),
            persons=persons[table],
            links={name: column for name, column in links[table].items() if name in are_persons},
        )
        for table in scopes
    }


def _links(table: TableSpec) -> dict[str, str]:
    """The columns, by field, of fields that are nothing but a column."""
    found = {}
    for name, source in table.fields.items():
        column = re.fullmatch(r"\{row\.([^{}:!]+)\}", source) if isinstance(source, str) else None
        if column is not None and column[1] not in table.mapped:
            found[name] = column[1]
    return found


def _facts(scope: _Scope) -> dict[str, Fact]:
    return {
        name: Fact(
            name,
            qualified(spec.table),
            tuple(spec.match),
            tuple(spec.match.values()),
            tuple(sorted(column for of, column in scope.used if of == name)),
        )
        for name, spec in scope.table.facts.items()
    }


def _columns(
    table: tuple[str, str],
    scopes: Mapping[tuple[str, str], _Scope],
    facts: Mapping[tuple[str, str], Mapping[str, Fact]],
) -> Iterable[str]:
    """The columns of a table that rules name, its own or those of tables to which it tells something."""
    yield from (column for of, column in scopes[table].used if of == "row")
    for fact in facts[table].values():
        yield from fact.ours
    for others in facts.values():
        for fact in others.values():
            if fact.table == table:
                yield from (*fact.theirs, *fact.columns)


def _rule(spec: RuleSpec, operation: Operation, scope: _Scope) -> Rule:
    table = scope.table
    mapped = [column for column in spec.changed if column in table.mapped]
    real = [column for column in spec.changed if column not in table.mapped]
    scope.used.update(("row", column) for column in real if column not in ("*", "unclaimed"))
    if len(spec.changed) > 1 and {"*", "unclaimed"} & set(spec.changed):
        raise ValueError('"*" and "unclaimed" stand alone in "changed"')
    own = _Scope(table, scope.text_length, operation)  # what this rule uses beside what it shares with others
    identity = {} if operation == "truncate" else table.identity
    rule = Rule(
        name=spec.name or spec.type,
        facts=(),
        _changed=tuple(real),
        _compared=tuple((table.mapped[c].column, own.column("old", c), own.column("new", c)) for c in mapped),
        _to=tuple((own.column("new", column), value) for column, value in spec.to.items()),
        _type=spec.type,
        _description=_template(spec.description, own),
        _metadata=tuple((key, _template(source, own)) for key, source in {**identity, **spec.metadata}.items()),
        _fields=tuple((name, _template(source, own)) for name, source in {**table.fields, **spec.fields}.items()),
        _actor=_template(table.actor, own) if table.actor else None,
    )
    scope.used.update(own.used)
    return replace(rule, facts=tuple(sorted({of for of, _ in own.used} - {"row"})))
