"""What a profile's rules write to each column of the target, as far as the profile alone tells."""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from cdc_worker.activities import change_key, key_prefix
from cdc_worker.changes import Operation
from cdc_worker.lsn import INVALID
from cdc_worker.profile import Profile, Table
from cdc_worker.rules import qualified, text


@dataclass(frozen=True, slots=True)
class Source:
    """Where a value comes from: the `samples` that there can be, or the `column` of a captured table, or any text.

    It is the only sample, None for NULL, if that is `certain`. Otherwise it may also be NULL if it is `optional`, or
    if its column is.
    """

    samples: tuple[str | None, ...] = ()
    certain: bool = False
    column: tuple[tuple[str, str], str] | None = None
    optional: bool = False


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
                fields = {**_COMMON, "type": Source((rule.type,), certain=True)}
                templates = {**table.fields, **rule.fields}
                fields |= {field: _source(given, table, name, operation) for field, given in templates.items()}
                description = _source(rule.description, table, name, operation)
                fields["description"] = description if description.certain else _TEXT  # always a text, never NULL
                values = {column: fields.get(field, _NULL) for column, field in profile.target.columns.items()}
                yield Written(qualified(name), rule.name or rule.type, operation, {**values, **constants})


def longest_key(profile: Profile, worker: str) -> int:
    """Characters in the longest change key that this worker can make."""
    prefix = key_prefix(worker, str(2**64 - 1), INVALID)
    return max(
        (len(change_key(prefix, *of.table, LONGEST_ORDINAL, of.rule)) for of in written(profile)), default=len(prefix)
    )


_COLUMN: Final = re.compile(r"\{([^{}.:!]+)\.([^{}:!]+)\}")


def _source(template: str | bool | int, table: Table, name: str, operation: Operation) -> Source:
    if not isinstance(template, str):
        return Source((text(template),), certain=True)
    if template == "{changes}":
        return Source(("{}",))
    parsed = list(string.Formatter().parse(template))
    if all(field is None for _, field, _, _ in parsed):
        return Source(("".join(literal for literal, _, _, _ in parsed),), certain=True)
    found = _COLUMN.fullmatch(template)
    if found is None:
        return _TEXT
    of, column = found.groups()
    if of == "context":
        return Source(optional=True)
    if of in table.facts:
        return Source(column=(qualified(table.facts[of].table), column), optional=True)
    if operation == "truncate":
        return _NULL
    if column in table.mapped:
        mapped = table.mapped[column]
        samples = (*mapped.map.values(), *([] if mapped.default is None else [mapped.default]))
        return Source(samples, optional=mapped.default is None)
    return Source(column=(qualified(name), column))
