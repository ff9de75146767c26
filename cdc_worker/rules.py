"""A profile's rules, compiled once into functions of a change."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from decimal import Decimal
from typing import Any, Final

import msgspec

from cdc_worker import templates
from cdc_worker.changes import Change, Operation, Row
from cdc_worker.context import CHANGED_BY, Context
from cdc_worker.errors import Place, ProfileError, ProfileFault, UnknownValueError
from cdc_worker.profile import Lookup as LookupSpec
from cdc_worker.profile import Profile, backfilled
from cdc_worker.profile import Rule as RuleSpec
from cdc_worker.profile import Table as TableSpec
from cdc_worker.templates import ABSENT, Event, Getter, Names, Test, is_empty, text
from cdc_worker.values import Value

MAX_CANDIDATES: Final = 1_000
"""For so many combinations of changed columns a table remembers which rules may apply."""

HIDDEN: Final = "***"
"""What stands in place of a masked value."""

_NO_COLUMNS: Final[frozenset[str]] = frozenset()


def _unknown(error: KeyError) -> UnknownValueError:
    return UnknownValueError(f'the change does not carry the column "{error.args[0]}"')


@dataclass(frozen=True, slots=True)
class Fact:
    """Where a fact is found: a row of `table` whose columns `theirs` equal our `ours`; of it `columns` are kept.

    It was written, or `deleted`, in the same transaction, and has these values in the columns of `where`.
    """

    name: str
    table: tuple[str, str]
    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    where: tuple[tuple[str, Value], ...]
    columns: tuple[str, ...]
    deleted: bool

    def row(self, change: Change) -> Row | None:
        """The row of a change of `table` that may be one."""
        if self.deleted:
            return change.old if change.operation == "delete" else None
        return change.new

    def key(self, row: Row, columns: tuple[str, ...]) -> tuple[Value, ...]:
        """The values that tie the two rows together."""
        return tuple(row.get(column) for column in columns)


@dataclass(frozen=True, slots=True)
class Lookup:
    """Rows of `table` found by the columns `theirs`, with these values in those of `where`; `columns` are kept.

    Of several it is the first by `key`, the table's; one that is `unique` is the only one.
    """

    table: tuple[str, str]
    theirs: tuple[str, ...]
    where: tuple[tuple[str, Value], ...]
    columns: tuple[str, ...]
    key: tuple[str, ...]

    @property
    def unique(self) -> bool:
        """Whether what is looked for is the table's key."""
        return bool(self.key) and {*self.key} == {*self.theirs}

    def sought(self, row: Row | None) -> tuple[Value, ...] | None:
        """By which values such a row would be looked for; None if that can't be told."""
        if row is None:
            return None
        found = tuple([row[column] for column in self.theirs if column in row])
        return found if len(found) == len(self.theirs) else None

    def kept(self, row: Row) -> Row | None:
        """What is kept of a row, or None if it isn't meant. KeyError if that can't be told."""
        if any(row[column] != value for column, value in self.where):
            return None
        return {column: row[column] for column in self.columns}


@dataclass(frozen=True, slots=True)
class Reference:
    """A lookup as a table's rules know it, and where the values come from that it is made with."""

    name: str
    lookup: Lookup
    _ours: tuple[Getter, ...]

    def sought(self, event: Event) -> tuple[Value, ...] | None:
        """By which values the row is looked for; None where one of them is NULL, which as in SQL matches nothing.

        KeyError if the change, or what was found so far, doesn't tell.
        """
        values = tuple([get(event) for get in self._ours])
        return None if None in values or ABSENT in values else values


def credited(context: Context, column: str = "") -> tuple[str, dict[str, Any]]:
    """Who did it, and how metadata tells it; `column` is whom the row names."""
    if context.said and (said := text(context.said.get(CHANGED_BY))):
        return said, {"changed_by": said, "context_source": "message"}
    if column:
        return column, {"changed_by": column, "context_source": "column"}
    return "system", {"context_source": "default"}


Function = Callable[[Event], Any]
"""What an operator's Python makes of a change: a dict with a `type` and further fields, or None for nothing."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A compiled rule. `facts` and `lookups` name what must be found first, in this order."""

    name: str
    facts: tuple[str, ...]
    lookups: tuple[str, ...]
    _changed: tuple[str, ...]
    _compared: tuple[tuple[str, Getter, Getter], ...]
    _test: Test | None
    _required: tuple[Getter, ...]
    _type: Getter
    _description: Getter
    _metadata: tuple[tuple[str, Getter], ...]
    _fields: tuple[tuple[str, Getter], ...]
    _actor: Getter | None
    _function: Function | None

    def may_apply(self, changed: Sequence[str], claimed: set[str]) -> bool:
        """Whether the rule can be about an update that changed these columns, of which some are claimed for certain."""
        if self._changed == ("*",):
            return True
        if self._changed == ("unclaimed",):
            return not claimed.issuperset(changed)
        return any(column in changed for column in (*self._changed, *(column for column, _, _ in self._compared)))

    def claims(self, changed: Sequence[str]) -> set[str]:
        """Which of the changed columns it claims whatever their values, if it may apply at all."""
        if self._test is not None or self._compared:
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
            return [] if self._test is None or self._test(event) else None
        if self._changed == ("*",):
            columns = list(change.changed)
        elif self._changed == ("unclaimed",):
            columns = [column for column in change.changed if column not in claimed]
        elif self._changed == change.changed and not self._compared:
            columns = [*self._changed]
        else:
            columns = [column for column in self._changed if column in change.changed]
            for column, old, new in self._compared:
                if column not in columns and old(event) != new(event):
                    columns.append(column)
        if not columns:
            return None
        if self._test is not None and not self._test(event):
            return None
        return columns

    def fields(self, event: Event) -> dict[str, Any] | None:
        """The fields of the activity; None where a value that it requires is missing.

        Raises UnknownValueError, ValueError, TypeError or ArithmeticError for data that it can't read.
        """
        try:
            if self._required and any(is_empty(get(event)) for get in self._required):
                return None
            heard = event.heard
            try:
                metadata = {key: value for key, get in self._metadata if (value := get(event)) is not ABSENT}
            except KeyError:
                metadata = self._what_is_there(event)
            created_by, source = credited(heard, text(self._actor(event)) if self._actor is not None else "")
            metadata |= source
            if heard.told:
                metadata = {**heard.told, **metadata}
            fields = {
                "type": text(self._type(event)),
                "description": text(self._description(event)),
                "metadata": metadata,
                "occurred_at": event.committed_at,
                "created_by": created_by,
            }
            for name, get in self._fields:
                fields[name] = value if (value := get(event)) is not ABSENT else None
        except KeyError as error:
            raise _unknown(error) from None
        return fields if self._function is None else self._called(event, fields)

    def _what_is_there(self, event: Event) -> dict[str, Any]:
        """The metadata without keys whose columns the change doesn't carry, since they were dropped or renamed."""
        metadata, missing = {}, []
        for key, get in self._metadata:
            try:
                if (value := get(event)) is not ABSENT:
                    metadata[key] = value
            except KeyError as error:
                missing.append(str(error.args[0]))
        event.missing = missing
        return metadata

    def _called(self, event: Event, fields: dict[str, Any]) -> dict[str, Any] | None:
        """What a function of the operator's makes of a change, on top of what its table's activities have in common."""
        assert self._function is not None
        try:
            made = self._function(event)
        except Exception as error:
            raise UnknownValueError(f'the function of the rule "{self.name}" raised {type(error).__name__}') from error
        if made is None:
            return None
        if not isinstance(made, dict) or not isinstance(made.get("type"), str):
            raise UnknownValueError(f'the function of the rule "{self.name}" returned no dict with a "type"')
        if wrong := [str(name) for name, value in made.items() if not _can_be_written(value)]:
            raise UnknownValueError(f'the function of the rule "{self.name}" returned no value for "{wrong[0]}"')
        told = made.get("metadata") or {}
        if not isinstance(told, dict):
            raise UnknownValueError(f'the function of the rule "{self.name}" returned no dict for "metadata"')
        metadata = {**fields["metadata"], **told}
        return {**fields, **made, "metadata": metadata, "occurred_at": event.committed_at}


def _can_be_written(value: Any, depth: int = 24) -> bool:
    """Whether what a function returned is a value that a column, or metadata, can hold."""
    match value:
        case list() | dict() if not depth:
            return False  # it may even be within itself
        case None | bool() | float() | datetime():
            return True
        case int():
            return value.bit_length() <= 1 << 13
        case Decimal():
            return templates.number(value) is not None
        case str():
            return "\0" not in value and not _SURROGATE.search(value)
        case list():
            return all(_can_be_written(one, depth - 1) for one in value)
        case dict():
            return all(
                isinstance(key, str) and all(_can_be_written(one, depth - 1) for one in (key, of))
                for key, of in value.items()
            )
        case _:
            return False


_SURROGATE: Final = re.compile("[\ud800-\udfff]")


Mask = Callable[[Value], Value]
"""What is seen of a value; of what was masked by it already, the same."""

_HASHED: Final = re.compile(r"hmac:[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Table:
    """A captured table, compiled: rules by operation; to the tables in `tells` its rows are facts.

    `key` are the columns that tell its rows apart. `references` are the lookups of its rules by name, `looked_up` those
    that look for its own rows. `persons` are columns by field: those of its fields that its identity repeats, so that
    each row is the person of this key. `links` are its columns by such fields of any table: whom a row is about; and
    `found` those of looked-up rows of which such fields are made, with the names of the lookups.
    """

    name: tuple[str, str]
    key: tuple[str, ...]
    rules: Mapping[Operation, tuple[Rule, ...]]
    facts: Mapping[str, Fact]
    references: Mapping[str, Reference]
    tells: tuple[tuple[tuple[str, str], Fact], ...]
    looked_up: tuple[Lookup, ...]
    columns: frozenset[str]
    persons: Mapping[str, str]
    links: Mapping[str, str]
    found: Mapping[str, Sequence[tuple[str, str]]]
    ignored: frozenset[str]
    masks: Mapping[str, Mask]
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

    def seen(self, change: Change, already: Set[str] = _NO_COLUMNS) -> Change:
        """A change as rules and dead letters may see it: values masked, and what is to be ignored not changed.

        Columns that are masked `already` stay as they are.
        """
        changed = change.changed
        if self.ignored and not self.ignored.isdisjoint(changed):
            changed = tuple([column for column in changed if column not in self.ignored])
        if not self.masks:
            return change if changed is change.changed else msgspec.structs.replace(change, changed=changed)
        old, new = self.masked(change.old, already), self.masked(change.new, already)
        return msgspec.structs.replace(change, old=old, new=new, changed=changed)

    def masked(self, row: Row | None, already: Set[str] = _NO_COLUMNS) -> Row | None:
        """A row without values that may not be seen. NULL stays NULL."""
        if row is None or not self.masks:
            return row
        masks = self.masks
        return {
            column: masks[column](value) if column in masks and value is not None and column not in already else value
            for column, value in row.items()
        }

    def subject(self, row: Row | None) -> str | None:
        """Which row of the table it is, by its key; None if that can't be told."""
        if row is None or not self.key or any(row.get(column) is None for column in self.key):
            return None
        return subject([text(row[column]) for column in self.key])

    @property
    def plain(self) -> bool:
        """Whether its changes are seen as they are."""
        return not self.ignored and not self.masks

    @property
    def needs_old_rows(self) -> bool:
        """Whether its rules, or those of others, can only work with REPLICA IDENTITY FULL."""
        return bool(self.rules["update"] or self.rules["delete"] or any(fact.deleted for _, fact in self.tells))


Rules = Mapping[tuple[str, str], Table]
"""Compiled tables by (schema, name)."""


def subject(key: Sequence[str]) -> str:
    """The values of a key as one text, which stands between the slashes of a change key."""
    return ",".join([value.replace("%", "%25").replace("/", "%2F").replace(",", "%2C") for value in key])


def qualified(name: str) -> tuple[str, str]:
    """A table's (schema, name) from `lead` or `crm.lead`."""
    schema, dot, table = name.rpartition(".")
    return (schema if dot else "public", table)


def no_functions(name: str) -> Function:
    """The functions that a profile may name if nobody allows any."""
    raise ValueError(f'"{name}": the settings allow functions of no modules (rule_modules)')


def compile_rules(
    profile: Profile, *, function: Callable[[str], Function] = no_functions, mask_key: str | None = None
) -> Rules:
    """Compile a profile. Raises ProfileError with every fault at once.

    `function` finds one by the name that a rule has for it, or raises ValueError; `mask_key` is the key of hashes in
    place of masked values.
    """
    rules = _Compiler(profile, function, mask_key).rules()
    if any(rule.backfill is not None for table in profile.tables.values() for rule in table.rules):
        compile_backfill(profile, mask_key=mask_key)
    return rules


def compile_backfill(profile: Profile, *, mask_key: str | None = None) -> Rules:
    """Compile what of a profile is for rows that are there already: rules on reads. Raises ProfileError likewise."""
    return _Compiler(backfilled(profile), no_functions, mask_key).rules()


class _Compiler:
    def __init__(self, profile: Profile, function: Callable[[str], Function], mask_key: str | None) -> None:
        self._profile = profile
        self._function = function
        self._mask_key = mask_key
        self._specs = {qualified(name): spec for name, spec in profile.tables.items()}
        self._names = {table: Names(spec, profile.text_length) for table, spec in self._specs.items()}
        self._keys = {qualified(name): name for name in profile.tables}
        self._faults: dict[ProfileFault, None] = {}  # in order, each once

    def rules(self) -> Rules:
        for name in self._profile.tables:
            if self._keys[qualified(name)] != name:
                self._wrong(("tables", name), f"tables.{qualified(name)[1]} stands here twice")
        compiled = {table: self._rules_of(table) for table in self._specs}
        masks = {table: self._masks(table) for table in self._specs}
        self._check_lookups()
        if self._faults:
            raise ProfileError.of(self._profile.name, [*self._faults])
        facts = {table: self._facts(table) for table in self._specs}
        lookups = self._lookups()
        links = {table: _links(spec) for table, spec in self._specs.items()}
        persons = {
            table: {name: of for name, of in links[table].items() if spec.fields[name] in spec.identity.values()}
            for table, spec in self._specs.items()
        }
        are_persons = frozenset().union(*persons.values())
        # What is looked up is captured, whether it has a section of its own or not.
        others = {f.table for of in facts.values() for f in of.values()} | {of.table for of in lookups.values()}
        nothing = TableSpec()
        found = {}
        for table in (*self._specs, *sorted(others - self._specs.keys())):
            spec = self._specs.get(table, nothing)
            own = links.get(table, {})
            found[table] = Table(
                name=table,
                key=tuple(spec.key),
                rules=compiled.get(table, _NO_RULES),
                facts=facts.get(table, {}),
                references=self._references(table, lookups),
                tells=tuple((other, f) for other in self._specs for f in facts[other].values() if f.table == table),
                looked_up=tuple(dict.fromkeys(of for of in lookups.values() if of.table == table)),
                columns=frozenset(self._columns(table, facts, lookups)),
                persons=persons.get(table, {}),
                links={name: column for name, column in own.items() if name in are_persons},
                found={name: of for name in sorted(are_persons) if (of := _found(spec or nothing, name))},
                ignored=frozenset(spec.ignored),
                masks=masks.get(table, {}),
            )
        return found

    def _wrong(self, place: Place, message: str) -> None:
        self._faults[ProfileFault(place, message)] = None

    def _rules_of(self, table: tuple[str, str]) -> Mapping[Operation, tuple[Rule, ...]]:
        rules: dict[Operation, list[Rule]] = {on: [] for on in _NO_RULES}
        for number, spec in enumerate(self._specs[table].rules):
            for operation in spec.on:
                rules[operation].append(self._rule(table, number, spec, operation))
        return {operation: tuple(of) for operation, of in rules.items()}

    def _rule(self, name: tuple[str, str], number: int, spec: RuleSpec, operation: Operation) -> Rule:
        """A rule; what of it can't be compiled is noted as a fault."""
        names = self._names[name]
        table = names.table
        section = ("tables", self._keys[name])

        @contextmanager
        def within(*keys: str, common: bool = False) -> Iterator[None]:
            """Note what is wrong under these keys of the rule, or of what is common to the table's."""
            try:
                yield
            except ValueError as error:
                of: Place = () if common else ("rules", number)
                if operation == "read" and not common:
                    of, keys = (*of, "backfill"), (("at",) if keys[-1:] == ("occurred_at",) else keys)
                self._wrong((*section, *of, *keys), f"tables.{name[1]}, rule {number + 1} ({spec.label}): {error}")

        mapped = [column for column in spec.changed if column in table.mapped]
        real = [column for column in spec.changed if column not in table.mapped]
        names.used.update(("row", column) for column in real if column not in ("*", "unclaimed"))
        with within("changed"):
            if len(spec.changed) > 1 and {"*", "unclaimed"} & set(spec.changed):
                raise ValueError('"*" and "unclaimed" stand alone in "changed"')
            if ignored := sorted({_real(table, column) for column in spec.changed} & {*table.ignored}):
                raise ValueError(f"changes of {', '.join(ignored)} are ignored, and no rule is about them")
        with within():
            compared_with = {_real(table, column) for column in (*spec.from_, *spec.to, *spec.delta)}
            if hidden := sorted(compared_with & table.masked.keys()):
                raise ValueError(f"the values of {', '.join(hidden)} are masked, and can't be compared")
        # What this rule uses beside what it shares with others.
        own = replace(names, operation=operation, values={**table.values, **spec.values}, used=set(), named=[])
        bare = replace(own, found=False)
        tests: list[Test] = []
        for of, key, matchers in (("old", "from", spec.from_), ("new", "to", spec.to)):
            for column, matcher in matchers.items():
                with within(key, column):
                    tests.append(templates.matches(f"{of}.{column}", matcher, bare))
        for column, delta in spec.delta.items():
            with within("delta", column):
                tests.append(templates.moves(column, delta, bare))
        with within("when"):
            if spec.when is not None:
                tests.append(templates.condition(spec.when, bare))
        required: list[Getter] = []
        for path in spec.skip_unless:
            with within("skip_unless"):
                required.append(own.getter(path))

        def one(source: Any, *keys: str, common: bool = False) -> Getter:
            with within(*keys, common=common):
                return templates.value(source, own)
            return templates.value("", own)

        def several(ours: Mapping[str, Any], key: str, theirs: Mapping[str, Any], their_key: str) -> _Values:
            """Values of the rule, and of those that its table's have in common what it doesn't override."""
            return tuple(
                (name, one(ours[name], key, name) if name in ours else one(source, their_key, name, common=True))
                for name, source in {**theirs, **ours}.items()
            )

        compared = []
        for column in mapped:
            with within("changed"):
                compared.append((table.mapped[column].column, own.column("old", column), own.column("new", column)))
        identity = {} if operation == "truncate" else table.identity
        fields = several(spec.fields, "fields", table.fields, "fields")
        if table.owner is not None:
            fields = (("owner", own.column("row", table.owner)), *fields)
        function = None
        if spec.rule is not None:
            with within("rule"):
                function = self._function(spec.rule)
        rule = Rule(
            name=spec.label,
            facts=(),
            lookups=(),
            _changed=tuple(real),
            _compared=tuple(compared),
            _test=templates.all_of(tests) if tests else None,
            _required=tuple(required),
            _type=one(spec.type, "type"),
            _description=one(spec.description, "description"),
            _metadata=several(spec.metadata, "metadata", identity, "identity"),
            _fields=fields,
            _actor=one(table.actor, "actor", common=True) if table.actor else None,
            _function=function,
        )
        names.used.update(own.used)
        found: list[str] = []
        with within():
            found = self._with_what_they_need(table, {of for of, _ in own.used} - {"row"}, own)
        names.used.update(own.used)
        return replace(
            rule,
            facts=tuple(name for name in found if table.lookups[name].same_transaction),
            lookups=tuple(name for name in found if not table.lookups[name].same_transaction),
        )

    def _with_what_they_need(self, table: TableSpec, wanted: set[str], own: Names) -> list[str]:
        """Lookups in the order in which they can be made: one may start from what another has found."""
        found: list[str] = []

        def add(name: str, within: tuple[str, ...]) -> None:
            if name in found:
                return
            if name in within:
                raise ValueError(f"lookup.{name} is found by itself")
            if len(within) >= templates.MAX_DEPTH:
                raise ValueError(f"lookup.{name}: too many lookups start from what another has found")
            for ours in table.lookups[name].match.values():
                other = other_lookup(ours)
                if other is not None:
                    own.getter(ours)
                    if table.lookups[name].same_transaction or table.lookups[other[0]].same_transaction:
                        raise ValueError(f"lookup.{name}: what is of the same transaction is found by columns alone")
                    add(other[0], (*within, name))
                else:
                    own.used.add(("row", ours))
            found.append(name)

        for name in sorted(wanted):
            add(name, ())
        return found

    def _masks(self, table: tuple[str, str]) -> Mapping[str, Mask]:
        masked = self._specs[table].masked
        if "hash" in masked.values() and self._mask_key is None:
            place = ("tables", self._keys[table], "masked")
            self._wrong(place, f"tables.{table[1]}.masked: hashes need a key, in the setting mask_key")
            return {}
        key = (self._mask_key or "").encode()

        def hashed(value: Value) -> Value:
            if _HASHED.fullmatch(said := text(value)):
                return said  # a row that was looked up for a recording
            return f"hmac:{hmac.new(key, said.encode(), hashlib.sha256).hexdigest()[:32]}"

        def hidden(value: Value) -> Value:
            return HIDDEN

        return {column: hashed if how == "hash" else hidden for column, how in masked.items()}

    def _check_lookups(self) -> None:
        for table, spec in self._specs.items():
            for name, lookup in spec.lookups.items():
                where = f"tables.{table[1]}.lookups.{name}"
                place = ("tables", self._keys[table], "lookups", name)
                masked = self._specs[of].masked if (of := qualified(lookup.table)) in self._specs else {}
                hidden = masked.keys() & {*lookup.match, *lookup.where}
                for ours in lookup.match.values():
                    other = other_lookup(ours)
                    if other is None:
                        hidden |= {_real(spec, ours)} & spec.masked.keys()
                    elif other[0] not in spec.lookups:
                        self._wrong(place, f'{where}: there is no lookup "{other[0]}" here')
                if hidden:
                    described = ", ".join(sorted(hidden))
                    self._wrong(place, f"{where}: the values of {described} are masked, and nothing is found by them")

    def _facts(self, table: tuple[str, str]) -> dict[str, Fact]:
        return {
            name: Fact(
                name,
                qualified(spec.table),
                tuple(spec.match),
                tuple(spec.match.values()),
                tuple(spec.where.items()),
                self._kept(table, name),
                spec.same_transaction == "deleted",
            )
            for name, spec in self._specs[table].lookups.items()
            if spec.same_transaction
        }

    def _kept(self, table: tuple[str, str], name: str) -> tuple[str, ...]:
        return tuple(sorted(column for of, column in self._names[table].used if of == name and column))

    def _lookups(self) -> dict[tuple[tuple[str, str], str], Lookup]:
        """The lookups of all tables; those that look for the same rows are one."""
        columns: dict[tuple[Any, ...], set[str]] = {}
        all_ = [(table, name, spec) for table, of in self._specs.items() for name, spec in of.lookups.items()]
        wanted = [(table, name, spec) for table, name, spec in all_ if not spec.same_transaction]
        for table, name, spec in wanted:
            columns.setdefault(_sought(spec), set()).update(self._kept(table, name))
        return {
            (table, name): Lookup(
                *_sought(spec),
                columns=tuple(sorted(columns[_sought(spec)])),
                key=tuple(self._specs[of].key) if (of := qualified(spec.table)) in self._specs else (),
            )
            for table, name, spec in wanted
        }

    def _references(
        self, table: tuple[str, str], lookups: Mapping[tuple[tuple[str, str], str], Lookup]
    ) -> dict[str, Reference]:
        if table not in self._specs:
            return {}
        names = replace(self._names[table], used=set())
        return {
            name: Reference(name, lookups[table, name], tuple(_ours(ours, names) for ours in spec.match.values()))
            for name, spec in self._specs[table].lookups.items()
            if not spec.same_transaction
        }

    def _columns(
        self,
        table: tuple[str, str],
        facts: Mapping[tuple[str, str], Mapping[str, Fact]],
        lookups: Mapping[tuple[tuple[str, str], str], Lookup],
    ) -> Iterable[str]:
        """The columns of a table that rules name, its own or those of tables that look for its rows."""
        if table in self._specs:
            spec = self._specs[table]
            yield from (column for of, column in self._names[table].used if of == "row")
            yield from (*spec.key, *spec.ignored, *spec.masked)
            for fact in facts[table].values():
                yield from fact.ours
        for others in facts.values():
            for fact in others.values():
                if fact.table == table:
                    yield from (*fact.theirs, *fact.columns, *(column for column, _ in fact.where))
        for lookup in lookups.values():
            if lookup.table == table:
                yield from (*lookup.theirs, *lookup.columns, *(column for column, _ in lookup.where))


_Values = tuple[tuple[str, Getter], ...]

_NO_RULES: Final[Mapping[Operation, tuple[Rule, ...]]] = {
    "insert": (),
    "update": (),
    "delete": (),
    "truncate": (),
    "read": (),
}


def _sought(spec: LookupSpec) -> tuple[tuple[str, str], tuple[str, ...], tuple[tuple[str, Value], ...]]:
    return qualified(spec.table), tuple(spec.match), tuple(spec.where.items())


def _real(table: TableSpec, column: str) -> str:
    """The real column behind one that may be mapped."""
    return table.mapped[column].column if column in table.mapped else column


def other_lookup(ours: str) -> tuple[str, str] | None:
    """The lookup that a value for another one comes from, and its column there."""
    found = re.fullmatch(r"lookup\.([^.]+)\.(.+)", ours)
    return None if found is None else (found[1], found[2])


def _ours(ours: str, names: Names) -> Getter:
    return names.getter(ours) if other_lookup(ours) is not None else names.column("row", ours)


def _links(table: TableSpec) -> dict[str, str]:
    """The columns, by field, of fields that are nothing but a column."""
    found = {}
    for name, source in table.fields.items():
        column = re.fullmatch(r"\{row\.([^{}:!]+)\}", source) if isinstance(source, str) else None
        if column is not None and column[1] not in table.mapped:
            found[name] = column[1]
    return found


def _found(table: TableSpec, name: str) -> list[tuple[str, str]]:
    """The columns of looked-up rows, with the names of the lookups, that a field is made of by the table or a rule."""
    sources = [table.fields.get(name), *(rule.fields.get(name) for rule in table.rules)]
    found = (re.findall(r"\blookup\.(\w+)\.(\w+)", source) for source in sources if isinstance(source, str))
    return sorted({one for of in found for one in of})
