"""What a profile says of a change, compiled once into functions of it: values, templates and conditions.

A template is parsed when the profile is read, by Python's own parser of format strings, and never again: braces in a
value stay text, and nothing is reached but the names that `Names` knows.
"""

from __future__ import annotations

import decimal
import re
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from decimal import MAX_EMAX, MIN_EMIN, Decimal
from typing import Any, Final

import msgspec

from cdc_worker import profile
from cdc_worker.changes import Change, Operation, Row
from cdc_worker.context import Context
from cdc_worker.profile import Condition, Constant, Delta, Map, Match, Matcher, Part
from cdc_worker.values import MAX_DIGITS, Value


class Absent:
    """A column of a looked-up row that isn't there: nothing in text, NULL in a field, no key in metadata."""

    def __reduce__(self) -> str:
        return "ABSENT"


ABSENT = Absent()


class _NoRow(dict[str, Value]):
    """The `row` of a truncate: all its columns are NULL."""

    def __missing__(self, column: str) -> None:
        return None


_NO_ROW: Final = _NoRow()


class Event(msgspec.Struct, gc=False):
    """A change as rules see it. `columns` are the changed columns that the rule at hand is about.

    `found` are rows that were looked up, by name; `missing` the columns of which the metadata had to do without.
    `failure` is why the rule can't be applied, where that is known before all rows are found.
    """

    change: Change
    committed_at: datetime
    heard: Context
    old: Row
    new: Row
    row: Row
    found: dict[str, Row | None]
    columns: list[str] = []
    missing: list[str] = []
    failure: str = ""

    @property
    def context(self) -> Mapping[str, Any]:
        """What was said in context messages, as far as it is to be trusted."""
        return self.heard.said


def event_of(change: Change, committed_at: datetime, heard: Context) -> Event:
    """What there is to see of a change."""
    old, new = change.old, change.new
    row = new if new is not None else old if old is not None else _NO_ROW
    return Event(change, committed_at, heard, old or {}, new or {}, row, {})


Getter = Callable[[Event], Any]
Test = Callable[[Event], bool]

_WITHOUT: Final[Mapping[str, tuple[Operation, ...]]] = {
    "old": ("insert", "truncate", "read"),
    "new": ("delete", "truncate"),
}
"""The operations at which there is no such row."""


def text(value: Any) -> str:
    """A value as it stands in a description: as Postgres prints it, NULL as nothing."""
    if type(value) is str:  # as nearly all are
        return value
    if value is None or value is ABSENT:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Decimal):
        return f"{value:f}"
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    return str(value)


def is_empty(value: Any) -> bool:
    """Whether there is nothing: NULL, a text without characters, a row that isn't there."""
    return value is None or value is ABSENT or value == ""


@dataclass(frozen=True, slots=True)
class Expression:
    """What a template has in a pair of braces: paths, of which the first that isn't empty counts, or else a text."""

    paths: tuple[str, ...]
    default: str | None = None
    spec: str = ""


Piece = str | Expression

_OR: Final = re.compile(r"(?<!\s)\s+or\s+")


def parse(template: str) -> list[Piece]:
    """The literals and expressions of a template. Raises ValueError for what is none."""
    pieces: list[Piece] = []
    for literal, name, spec, conversion in string.Formatter().parse(template):
        if literal:
            pieces.append(literal)
        if name is None:
            continue
        if conversion or "{" in (spec or ""):
            raise ValueError(f"{template!r}: conversions and nested braces have no meaning here")
        *paths, last = _OR.split(name.strip())
        if any("'" in path for path in paths) or last.count("'") % 2:
            raise ValueError(f"{template!r}: a text in quotes stands last, and without ' : or ! in it")
        quoted = re.fullmatch(r"'([^']*)'", last)
        if quoted is None:
            pieces.append(Expression((*paths, last), spec=spec or ""))
        elif paths:
            pieces.append(Expression((*paths,), quoted[1], spec or ""))
        else:
            raise ValueError(f"{template!r}: a text in quotes stands after an or")
    return pieces


MAX_DEPTH: Final = 8
"""So many values may be made of each other in turn, and so many lookups start from what another has found."""

MAX_NAMED: Final = 1_000
"""So often a rule may use values that have a name, those that they are made of included."""


@dataclass(frozen=True, slots=True)
class Names:
    """The names that a table's templates may use in rules on an operation; remembers which they `used`.

    `lookups` are those of the table. Without `found` looked-up rows and named values are out of reach. `named` are the
    values that were used, as often as they were.
    """

    table: profile.Table
    text_length: int
    operation: Operation | None = None
    values: Mapping[str, profile.Value] = field(default_factory=dict)
    found: bool = True
    used: set[tuple[str, str]] = field(default_factory=set)
    within: tuple[str, ...] = ()
    named: list[str] = field(default_factory=list)

    def getter(self, path: str) -> Getter:
        """A function that reads `old.status`, `columns` and the like. ValueError for a name that isn't there."""
        if path == "columns":
            return lambda event: ", ".join(event.columns)
        if path == "changes":
            return self._changes
        of, dot, column = path.partition(".")
        if not dot or not column:
            raise ValueError(f"{{{path}}} names nothing that a template can use")
        if of in ("old", "new", "row"):
            return self.column(of, column)
        if of == "context":
            return lambda event: event.heard.said.get(column)
        if of in ("lookup", "values") and not self.found:
            raise ValueError(f"{path}: what is looked up or has a name is not known yet where a rule may apply")
        if of == "values":
            return self._value(column)
        if of == "lookup":
            return self._looked_up(column)
        raise ValueError(f'{{{path}}}: there is no "{of}" here')

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
        # A column that the change doesn't carry is a KeyError, which whoever calls explains.
        if of == "old":
            return lambda event: event.old[column]
        if of == "new":
            return lambda event: event.new[column]
        return lambda event: event.row[column]

    def _looked_up(self, rest: str) -> Getter:
        name, dot, column = rest.partition(".")
        if name not in self.table.lookups:
            raise ValueError(f'{{lookup.{rest}}}: there is no lookup "{name}" here')
        if not dot:
            self.used.add((name, ""))
            return lambda event: ABSENT if event.found[name] is None else True
        self.used.add((name, column))
        return lambda event: ABSENT if (row := event.found[name]) is None else row.get(column)

    def _value(self, name: str) -> Getter:
        if name in self.within:
            raise ValueError(f"{{values.{name}}}: it is made of itself")
        if name not in self.values:
            raise ValueError(f'{{values.{name}}}: there is no value "{name}" here')
        self.named.append(name)
        if len(self.within) >= MAX_DEPTH or len(self.named) > MAX_NAMED:
            raise ValueError(f"{{values.{name}}}: values are made of each other in too many ways")
        return value(self.values[name], replace(self, within=(*self.within, name)))

    def _changes(self, event: Event) -> dict[str, dict[str, Value]]:
        short, old, new = self._short, event.old, event.new
        return {name: {"old": short(old.get(name)), "new": short(new.get(name))} for name in event.columns}

    def _short(self, value: Value) -> Value:
        if isinstance(value, str) and len(value) > self.text_length:
            return value[: self.text_length] + "…"
        return value


# Values.


def value(source: profile.Value, names: Names) -> Getter:
    """Compile a value of a profile: a constant, a template, a map or a list of parts."""
    match source:
        case str():
            return _template(source, names)
        case Map():
            return _map(source, names)
        case list():
            parts = [_part(part, names) for part in source]
            return lambda event: "".join([text(part(event)) for part in parts])
        case _:
            return _constant(source)


def _template(source: str, names: Names) -> Getter:
    match parse(source):
        case []:
            return _constant("")
        case [str(literal)]:
            return _constant(literal)
        case [Expression(spec="") as alone]:
            return _expression(alone, names)  # which keeps the value's type
        case pieces:
            pattern, values = "", list[Getter]()
            for piece in pieces:
                if isinstance(piece, str):
                    pattern += piece.replace("%", "%%")
                    continue
                if "changes" in piece.paths:
                    raise ValueError(f"{source!r}: {{changes}} is no text, it stands alone")
                pattern += "%s"
                values.append(_formatted(_expression(piece, names), piece.spec))
            return lambda event: pattern % tuple([v if type(v := get(event)) is str else text(v) for get in values])


def _constant(constant: Any) -> Getter:
    return lambda event: constant


def _expression(expression: Expression, names: Names) -> Getter:
    getters = [names.getter(path) for path in expression.paths]
    default = expression.default
    if len(getters) == 1 and default is None:
        return getters[0]

    def first(event: Event) -> Any:
        found: Any = None
        for get in getters:
            found = get(event)
            if not is_empty(found):
                return found
        return found if default is None else default

    return first


_CUT: Final = re.compile(r"cut (\d+)(?: (.*))?", re.DOTALL)

# Python's, but for the type c, which makes any character of a number; and no width or precision fills the memory.
_SPEC: Final = re.compile(r"(?:.?[<>=^])?[-+ ]?z?#?0?\d{0,3}[,_]?(?:\.\d{1,3})?[bdeEfFgGnosxX%]?", re.DOTALL)

_NUMERIC: Final = frozenset("deEfFgGn%")

_FRACTIONAL: Final = _NUMERIC - {"d", "n"}


def _formatted(getter: Getter, spec: str) -> Getter:
    """A function that reads a value as the spec has it; without one, as it is."""
    if not spec:
        return getter
    if (cut := _CUT.fullmatch(spec)) is not None:
        return _cut(getter, int(cut[1]), cut[2] or "…")
    if _SPEC.fullmatch(spec) is None:
        raise ValueError(f"{spec!r} is no format for values, or one with more than 999 characters or digits")
    # Without a presentation type, Decimal would take to exponents.
    decimal_spec = spec if spec[-1:] in _NUMERIC else spec + "f"

    def part(event: Event) -> str:
        found = getter(event)
        if found is None or found is ABSENT:
            return ""
        if isinstance(found, bool):
            return format(text(found), spec)
        if isinstance(found, str) and spec[-1:] in _NUMERIC and (number_ := number(found)) is not None:
            found = number_  # a domain over numeric comes as text
        elif isinstance(found, int) and spec[-1:] in _FRACTIONAL:
            found = Decimal(found)  # Python would make a float of it
        return format(found, decimal_spec if isinstance(found, Decimal) else spec)

    return part


def _cut(getter: Getter, length: int, ellipsis: str) -> Getter:
    def part(event: Event) -> str:
        whole = text(getter(event))
        return whole if len(whole) <= length else whole[:length] + ellipsis

    return part


def _map(source: Map, names: Names) -> Getter:
    by = names.getter(source.by)
    by_value = {key: value(of, names) for key, of in source.map.items()}
    default = _constant(None) if source.default is None else value(source.default, names)

    def mapped(event: Event) -> Any:
        found = by(event)
        missing = found is None or found is ABSENT
        return (default if missing else by_value.get(text(found), default))(event)

    return mapped


def _part(source: str | Part, names: Names) -> Getter:
    if isinstance(source, str):
        return value(source, names)
    there, otherwise, holds = value(source.text, names), value(source.otherwise, names), condition(source.when, names)
    return lambda event: there(event) if holds(event) else otherwise(event)


# Conditions. Whatever a value is, they say yes or no.


def number(value: Any) -> Decimal | None:
    """A number exactly; None for what is none, isn't finite, or is none that Postgres could hold."""
    if value is None or isinstance(value, bool):
        return None
    try:
        found = Decimal(repr(value) if isinstance(value, float) else value)
    except (ArithmeticError, ValueError, TypeError):
        return None
    return found if found.is_finite() and abs(found.adjusted()) <= MAX_DIGITS else None


def condition(source: Condition, names: Names) -> Test:
    """Compile a condition: whether all that it says holds."""
    tests = [matches(f"{of}.{column}", matcher, names) for of, column, matcher in _compared(source)]
    tests += [moves(column, delta, names) for column, delta in source.delta.items()]
    tests += [condition(one, names) for one in source.all]
    if source.any is not None:
        tests.append(_any([condition(one, names) for one in source.any]))
    if source.not_ is not None:
        tests.append(_not(condition(source.not_, names)))
    return all_of(tests)


def _compared(source: Condition) -> list[tuple[str, str, Matcher]]:
    plain = {"old": source.old, "new": source.new, "row": source.row, "context": source.context}
    plain |= {"values": source.values}
    compared = [(of, column, matcher) for of, columns in plain.items() for column, matcher in columns.items()]
    return compared + [
        ("lookup", f"{name}.{column}", matcher)
        for name, columns in source.lookup.items()
        for column, matcher in columns.items()
    ]


def matches(path: str, matcher: Matcher, names: Names) -> Test:
    """Whether what is found at a path is meant by a matcher."""
    get, means = names.getter(path), _matcher(matcher)
    return lambda event: means(get(event))


# As many digits as a numeric may have: the usual 28 would round.
_EXACT: Final = decimal.Context(prec=300_000, Emax=MAX_EMAX, Emin=MIN_EMIN)


def moves(column: str, delta: Delta, names: Names) -> Test:
    """Whether a column's number changes by as much as a delta says."""
    get_old, get_new = names.column("old", column), names.column("new", column)

    def test(event: Event) -> bool:
        old, new = number(get_old(event)), number(get_new(event))
        if old is None or new is None:
            return False
        by, whole = _EXACT.subtract(new, old).copy_abs(), old.copy_abs()
        return (
            (delta.grows is None or (new > old if delta.grows else new < old))
            and (delta.over is None or by > delta.over)
            and (delta.at_least is None or by >= delta.at_least)
            and (delta.over_ratio is None or (whole > 0 and by > _EXACT.multiply(delta.over_ratio, whole)))
            and (delta.at_least_ratio is None or (whole > 0 and by >= _EXACT.multiply(delta.at_least_ratio, whole)))
        )

    return test


def all_of(tests: list[Test]) -> Test:
    """Whether all hold."""
    if len(tests) == 1:
        return tests[0]
    return lambda event: all(test(event) for test in tests)


def _any(tests: list[Test]) -> Test:
    return lambda event: any(test(event) for test in tests)


def _not(test: Test) -> Test:
    return lambda event: not test(event)


def _matcher(source: Matcher) -> Callable[[Any], bool]:
    match source:
        case list():
            some = [_matcher(one) for one in source]
            return lambda value: any(means(value) for means in some)
        case Match():
            every = list(_matched(source))
            return lambda value: all(means(value) for means in every)
        case _:
            return _equals(source)


def _equals(constant: Constant) -> Callable[[Any], bool]:
    # To Python, true is 1 and 0.1 is a float that is more than that.
    if isinstance(constant, bool):
        return lambda value: value is constant
    if isinstance(constant, str):
        return lambda value: bool(value == constant)
    inexact = float(constant)
    return lambda value: (
        value is not True and value is not False and bool(value == (inexact if type(value) is float else constant))
    )


def _matched(source: Match) -> list[Callable[[Any], bool]]:
    tests: list[Callable[[Any], bool]] = []
    if (null := source.null) is not None:
        tests.append(lambda value: (value is None or value is ABSENT) is null)
    if (empty := source.empty) is not None:
        tests.append(lambda value: is_empty(value) is empty)
    if source.not_ is not None:
        means = _matcher(source.not_)
        tests.append(lambda value: not means(value))
    if (over := source.over) is not None:
        tests.append(lambda value: (found := number(value)) is not None and found > over)
    if (at_least := source.at_least) is not None:
        tests.append(lambda value: (found := number(value)) is not None and found >= at_least)
    if (under := source.under) is not None:
        tests.append(lambda value: (found := number(value)) is not None and found < under)
    if (at_most := source.at_most) is not None:
        tests.append(lambda value: (found := number(value)) is not None and found <= at_most)
    return tests
