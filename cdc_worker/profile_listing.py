"""The rules of a profile as a table, for people who decide whether that is what they meant."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from typing import Any, Final

from pydantic import BaseModel, Field

from cdc_worker.profile import Condition, Delta, Map, Match, Matcher, Part, Profile, Rule, Value
from cdc_worker.templates import text


class Row(BaseModel):
    """A rule in words. These are the fields of `profile show --json`."""

    table: str = Field(description="captured table")
    rule: str = Field(description="what the rule is called in change keys")
    on: list[str] = Field(description="operations")
    condition: str = Field(description="what else must hold of a change")
    type: str = Field(description="type of the activity")
    description: str = Field(description="its text")
    backfill: str | None = Field(description="how a backfill dates it; null if it tells nothing by this rule")


def rows(profile: Profile) -> Iterator[Row]:
    """All rules, in order."""
    for name, table in profile.tables.items():
        for rule in table.rules:
            says = (f"function {rule.rule}", "") if rule.rule else (_value(rule.type), _value(rule.description))
            yield Row(
                table=name,
                rule=rule.label,
                on=[*rule.on],
                condition=", ".join(_conditions(rule)),
                type=says[0],
                description=says[1],
                backfill=_value(rule.backfill.at) if rule.backfill is not None else None,
            )


_HEAD: Final = ("rule", "on", "condition", "type", "description")
_WIDTHS: Final = (24, 8, 44, 24, 60)


def lines(profile: Profile) -> Iterator[str]:
    """A table for each captured table."""
    found = [*rows(profile)]
    yield f"profile {profile.name}, written to {profile.target.table}"
    for name, table in profile.tables.items():
        yield f"\n{name}"
        cells = [(r.rule, ", ".join(r.on), r.condition, r.type, r.description) for r in found if r.table == name]
        yield from _table([_HEAD, *cells]) if cells else ["  no rules: captured for what it tells of others"]
        yield from (f"  {{values.{of}}}: {_value(value)}" for of, value in table.values.items())
        for rule in table.rules:
            if rule.backfill is not None:
                text_, at = _value(rule.backfill.description), _value(rule.backfill.at)
                yield f"  backfill of {rule.label}: {text_} (dated {at})"
            yield from (f"  {{values.{of}}} of {rule.label}: {_value(value)}" for of, value in rule.values.items())


def _table(cells: list[tuple[str, ...]]) -> Iterator[str]:
    wrapped = [[textwrap.wrap(cell, width) for cell, width in zip(row, _WIDTHS, strict=True)] for row in cells]
    widths = [max((len(line) for row in wrapped for line in row[n]), default=0) for n in range(len(_WIDTHS))]
    for row in wrapped:
        for line in zip_longest(*row, fillvalue=""):
            yield ("  " + "  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True))).rstrip()


def _conditions(rule: Rule) -> Iterator[str]:
    if rule.changed == ["*"]:
        yield "any column changed"
    elif rule.changed == ["unclaimed"]:
        yield "a column changed that no rule above was about"
    elif rule.changed:
        yield f"{' or '.join(rule.changed)} changed"
    yield from (f"{column} was {_matcher(matcher)}" for column, matcher in rule.from_.items())
    yield from (f"{column} is {_matcher(matcher)}" for column, matcher in rule.to.items())
    yield from (f"{column} changed by {_delta(delta)}" for column, delta in rule.delta.items())
    if rule.when is not None:
        yield _condition(rule.when)
    if rule.skip_unless:
        yield f"{' and '.join(rule.skip_unless)} not empty"


def _condition(condition: Condition) -> str:
    plain: dict[str, Mapping[str, Matcher]] = {
        "old": condition.old,
        "new": condition.new,
        "row": condition.row,
        "values": condition.values,
        "context": condition.context,
        **{f"lookup.{name}": of for name, of in condition.lookup.items()},
    }
    said = [f"{of}.{name} is {_matcher(matcher)}" for of, all_ in plain.items() for name, matcher in all_.items()]
    said += [f"{column} changed by {_delta(delta)}" for column, delta in condition.delta.items()]
    said += [_condition(one) for one in condition.all]
    if condition.any is not None:
        said.append(f"({' or '.join(map(_condition, condition.any))})")
    if condition.not_ is not None:
        said.append(f"not ({_condition(condition.not_)})")
    return " and ".join(said) or "always"


_COMPARED: Final = {"over": ">", "at_least": ">=", "under": "<", "at_most": "<="}


def _matcher(matcher: Matcher) -> str:
    match matcher:
        case list():
            return (
                f"one of {', '.join(map(_matcher, matcher))}" if len(matcher) > 1 else "".join(map(_matcher, matcher))
            )
        case Match():
            given = matcher.model_dump(exclude_none=True)
            said = [f"{_COMPARED[name]} {text(value)}" for name, value in given.items() if name in _COMPARED]
            said += [f"{'' if given[name] else 'not '}{word}" for name, word in _IS.items() if name in given]
            if matcher.not_ is not None:
                said.append(f"anything but {_matcher(matcher.not_)}")
            return " and ".join(said) or "anything"
        case str():
            return f'"{matcher}"'
        case _:
            return text(matcher)


_IS: Final = {"null": "NULL", "empty": "empty"}


def _delta(delta: Delta) -> str:
    of_old = " of the old value"
    parts: dict[str, Any] = {
        "more than {}": delta.over,
        "{} or more": delta.at_least,
        "more than {}" + of_old: delta.over_ratio,
        "{} or more" + of_old: delta.at_least_ratio,
        "an amount {} zero": None if delta.grows is None else "above" if delta.grows else "below",
    }
    return " and ".join(words.format(text(value)) for words, value in parts.items() if value is not None) or "anything"


def _value(value: Value) -> str:
    match value:
        case Map():
            said = [f"{key}: {_value(of)}" for key, of in value.map.items()]
            said += [] if value.default is None else [f"else: {_value(value.default)}"]
            return f"by {value.by} ({'; '.join(said)})"
        case list():
            return "".join(part if isinstance(part, str) else _part(part) for part in value)
        case _:
            return text(value)


def _part(part: Part) -> str:
    otherwise = f" else {part.otherwise}" if part.otherwise else ""
    return f"[{part.text} if {_condition(part.when)}{otherwise}]"
