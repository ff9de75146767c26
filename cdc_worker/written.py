"""What a profile's rules write to each column of the target, as far as the profile alone tells."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from cdc_worker.activities import change_key, key_prefix
from cdc_worker.changes import Operation
from cdc_worker.lsn import INVALID
from cdc_worker.profile import Map, Profile, Rule, Table, Value
from cdc_worker.rules import qualified
from cdc_worker.templates import Expression, parse, text


@dataclass(frozen=True, slots=True)
class Source:
    """Where a value comes from: the `samples` that there can be, or the `column` of a captured table, or any text.

    It is the only sample, None for NULL, if that is `certain`. Otherwise it may also be NULL if it is `optional`, or
    if its column is, unless it is `required`.
    """

    samples: tuple[str | None, ...] = ()
    certain: bool = False
    column: tuple[tuple[str, str], str] | None = None
    optional: bool = False
    required: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Written:
    """What a rule writes at an operation, by column of the target."""

    table: tuple[str, str]
    rule: str
    operation: Operation
    values: Mapping[str, Source]

    @property
    def described(self) -> str:
        """The rule as messages name it."""
        return f"{self.rule} of {'.'.join(self.table)}"


def names(rules: Iterable[Written]) -> str:
    """The rules as messages name them, each once whatever its operations."""
    return ", ".join(dict.fromkeys(rule.described for rule in rules))


LONGEST_ORDINAL: Final = 10**10 - 1
"""No transaction has more changes of one table."""

_TEXT: Final = Source()
_NULL: Final = Source((None,), certain=True)

_COMMON: Final = {
    "metadata": Source(('{"id": 1}',)),
    "occurred_at": Source(("2001-02-03 04:05:06.789",)),
    "created_by": _TEXT,
    "change_key": Source((change_key(key_prefix("worker", "1", INVALID), "public", "table", 0, "rule"),)),
}


def written(profile: Profile) -> Iterator[Written]:
    """What each rule writes at each of its operations."""
    constants = {column: Source((text(value),), certain=True) for column, value in profile.target.constants.items()}
    for name, table in profile.tables.items():
        for rule in table.rules:
            for operation in rule.on:
                found = _Values(name, table, rule, operation)
                fields = {**_COMMON, "type": found.source(rule.type)}
                if table.owner is not None:
                    fields["owner"] = found.column(table.owner)
                fields |= {field: found.source(given) for field, given in {**table.fields, **rule.fields}.items()}
                description = found.source(rule.description)
                fields["description"] = description if description.certain else _TEXT  # always a text, never NULL
                otherwise = _NULL
                if rule.rule is not None:  # what a function returns, nobody knows
                    otherwise = Source(optional=True)
                    fields |= {"type": _TEXT, "description": _TEXT}
                values = {column: fields.get(field, otherwise) for column, field in profile.target.columns.items()}
                yield Written(qualified(name), rule.label, operation, {**values, **constants})


def types(table: Table) -> set[str]:
    """The types of a table's activities, as far as they are certain."""
    found = (_Values("", table, rule, on).source(rule.type) for rule in table.rules for on in rule.on)
    return {sample for source in found for sample in source.samples if sample}


def longest_key(profile: Profile, worker: str) -> int:
    """Characters in the longest change key that this worker can make."""
    prefix = key_prefix(worker, str(2**64 - 1), INVALID)
    return max(
        (len(change_key(prefix, *of.table, LONGEST_ORDINAL, of.rule)) for of in written(profile)), default=len(prefix)
    )


@dataclass(frozen=True, slots=True)
class _Values:
    """Where a rule's values come from at an operation."""

    name: str
    table: Table
    rule: Rule
    operation: Operation

    def source(self, value: Value) -> Source:
        """Where a value of the profile comes from."""
        match value:
            case str():
                return self._template(value)
            case Map():
                branches = [self.source(one) for one in value.map.values()]
                branches.append(_NULL if value.default is None else self.source(value.default))
                return _either(branches)
            case list():
                return _TEXT
            case _:
                return Source((text(value),), certain=True)

    def column(self, column: str) -> Source:
        """Where a column of the row comes from."""
        if self.operation == "truncate":
            return _NULL
        if column in self.table.mapped:
            mapped = self.table.mapped[column]
            samples = (*mapped.map.values(), *([] if mapped.default is None else [mapped.default]))
            return Source(samples, optional=mapped.default is None)
        return Source(column=(qualified(self.name), column))

    def _template(self, template: str) -> Source:
        try:
            pieces = parse(template)
        except ValueError:
            return _TEXT
        match pieces:
            case []:
                return Source(("",), certain=True)
            case [str(literal)]:
                return Source((literal,), certain=True)
            case [Expression(paths=("changes",))]:
                return Source(("{}",))
            case [Expression(default=None, spec="", paths=paths)]:
                found = [self._path(path) for path in paths]
                # Of several the first says of which type they are; it is NULL only if all are.
                return replace(
                    next((source for source in found if source.column is not None), found[0]),
                    optional=all(source.optional for source in found),
                    required=any(source.required for source in found),
                )
            case _:
                return _TEXT

    def _path(self, path: str) -> Source:
        of, _, name = path.partition(".")
        found = _TEXT
        if of == "context":
            found = Source(optional=True)
        elif of == "lookup":
            lookup, _, column = name.partition(".")
            if lookup in self.table.lookups and column:
                found = Source(column=(qualified(self.table.lookups[lookup].table), column), optional=True)
        elif of == "values":
            values = {**self.table.values, **self.rule.values}
            found = self.source(values[name]) if name in values else _TEXT
        elif of in ("old", "new", "row"):
            found = self.column(name)
        required = self._plain(path) in map(self._plain, self.rule.skip_unless)
        return replace(found, required=True) if required else found

    def _plain(self, path: str) -> str:
        """The row's columns by one name."""
        same = "old." if self.operation == "delete" else "new."
        return path.replace(same, "row.", 1) if path.startswith(same) else path


def _either(branches: Sequence[Source]) -> Source:
    """One of several."""
    for source in branches:
        if not source.certain and not source.samples:
            return replace(source, optional=source.optional or _NULL in branches)
    samples = tuple(dict.fromkeys(s for source in branches for s in source.samples if s is not None))
    return Source(samples, optional=any(source.optional or source == _NULL for source in branches))
