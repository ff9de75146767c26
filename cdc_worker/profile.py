"""A profile: what a CRM's tables mean, as read from a TOML file.

Strings in `fields`, `metadata`, `description` and `actor` are templates: Python format strings over `old`, `new`,
`row` (the new row, or the old one of a delete), a fact's name, `context`, `columns` and `changes`. A template that is
one bare name in braces, such as `"{new.status}"`, keeps the value's type; any other is text, in which NULL prints as
nothing. A description and an actor are always text.
"""

from __future__ import annotations

import tomllib
from decimal import Decimal
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from cdc_worker.changes import Operation
from cdc_worker.errors import ProfileError

Constant = bool | int | Decimal | str
Template = str | bool | int
Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*$", max_length=63)]

FIELDS = frozenset({"type", "description", "metadata", "occurred_at", "created_by", "change_key"})
"""The fields that every activity has; tables and rules add others."""


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


Names = Annotated[list[str], BeforeValidator(_as_list)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


_M = TypeVar("_M", bound=_Model)


def _unless(faults: list[str], model: _M) -> _M:
    if faults:
        raise ValueError("; ".join(faults))
    return model


class Target(_Model):
    """The table that activities are written to. `columns` maps its columns to fields, `constants` to fixed values.

    `prepare` names the files of `schema/` that setup runs to create or prepare the table.
    """

    table: str
    columns: dict[str, Name]
    constants: dict[str, Constant] = {}
    prepare: list[str] = []

    @model_validator(mode="after")
    def _key_is_written(self) -> Target:
        faults = []
        if "change_key" not in self.columns.values():
            faults.append("one of the target's columns must take the change_key")
        if both := sorted(self.columns.keys() & self.constants.keys()):
            faults.append(f"in columns as well as in constants: {', '.join(both)}")
        return _unless(faults, self)


class Mapped(_Model):
    """A column of the profile's own, drawn from a real one through a map. It counts as no column of the row."""

    column: str
    map: dict[str, str]
    default: str | None = None


class Fact(_Model):
    """A row of another table, written in the same transaction, that says more: `match` maps its columns to ours."""

    table: str
    match: Annotated[dict[str, str], Field(min_length=1)]


class Rule(_Model):
    """One line of the profile: which change it is `on`, and what that meant.

    `changed` names columns of which one must be distinct from before: `"*"` for any, `"unclaimed"` for any that no
    earlier rule which applied has named. `to` names the values that columns must have now. `type` also names the rule
    in change keys, unless `name` does.
    """

    on: Annotated[list[Operation], BeforeValidator(_as_list), Field(min_length=1)]
    type: str
    description: str
    name: str = ""
    changed: Names = []
    to: dict[str, Constant] = {}
    metadata: dict[str, Template] = {}
    fields: dict[Name, Template] = {}

    @model_validator(mode="after")
    def _changed_is_for_updates(self) -> Rule:
        if (self.changed or self.to) and self.on != ["update"]:
            raise ValueError('"changed" and "to" are for rules on updates alone')
        if "update" in self.on and not self.changed:
            raise ValueError('a rule on updates is on them alone, and says in "changed" which columns it is about')
        if len(set(self.on)) != len(self.on):
            raise ValueError('an operation stands twice in "on"')
        return self


class Table(_Model):
    """A captured table: its rules in order, and what their activities have in common.

    `identity` is kept in the metadata of every activity, so that it outlives its subject. `actor` is a template that
    names who did it where no context message does.
    """

    identity: dict[str, Template] = {}
    fields: dict[Name, Template] = {}
    actor: str | None = None
    mapped: dict[Name, Mapped] = {}
    facts: dict[Name, Fact] = {}
    rules: list[Rule] = []

    @model_validator(mode="after")
    def _rules_are_told_apart(self) -> Table:
        names = [rule.name or rule.type for rule in self.rules]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"rules that need a name of their own: {', '.join(twice)}")
        return self


class Profile(_Model):
    """A whole profile. `text_length` is where long texts in `changes` are cut, in characters."""

    name: Name
    target: Target
    tables: Annotated[dict[str, Table], Field(min_length=1)]
    text_length: Annotated[int, Field(ge=1)] = 200

    @model_validator(mode="after")
    def _fields_exist(self) -> Profile:
        known = FIELDS.union(*({*t.fields, *(f for r in t.rules for f in r.fields)} for t in self.tables.values()))
        faults = [
            f'target column "{column}" wants the field "{field}", which no table or rule has'
            for column, field in self.target.columns.items()
            if field not in known
        ]
        faults += [
            f'tables.{name} has a field "{field}", which is not for profiles to fill'
            for name, table in self.tables.items()
            for field in sorted(FIELDS & {*table.fields, *(f for r in table.rules for f in r.fields)})
        ]
        return _unless(faults, self)


def shipped() -> list[str]:
    """The names of the profiles that come with the package."""
    return sorted(p.name.removesuffix(".toml") for p in (resources.files("cdc_worker") / "profiles").iterdir())


def load(name_or_path: str) -> Profile:
    """Read a shipped profile by its name, or a file by its path. Raises ProfileError with every fault at once."""
    if name_or_path in shipped():
        text = (resources.files("cdc_worker") / "profiles" / f"{name_or_path}.toml").read_text("utf-8")
    else:
        try:
            text = Path(name_or_path).read_text("utf-8")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it isn't UTF-8 text"
            raise ProfileError(
                f'profile "{name_or_path}" can\'t be read: {reason}',
                hint=f"name a file, or one of the shipped profiles: {', '.join(shipped())}",
            ) from error
    return parse(text, source=name_or_path)


def parse(text: str, *, source: str) -> Profile:
    """Read a profile's text; `source` names it in errors."""
    try:
        content: dict[str, Any] = tomllib.loads(text, parse_float=Decimal)
    except tomllib.TOMLDecodeError as error:
        raise ProfileError(f'profile "{source}" is not TOML: {error}', hint="mend the file at that place") from error
    try:
        return Profile.model_validate(content)
    except ValidationError as error:
        faults = "\n".join(
            f"  {'.'.join(map(str, fault['loc'])) or '(top)'}: {fault['msg']}" for fault in error.errors()
        )
        raise ProfileError(f'profile "{source}" is wrong:\n{faults}', hint="mend each place named") from error
