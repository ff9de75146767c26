"""A profile: what a CRM's tables mean, as read from a TOML file.

A *value* is a constant, a template, a map or a list of parts. A template is a Python format string over paths:
`{old.status}`, `{new.status}`, `{row.status}` (the new row, or the old one of a delete), `{lookup.user.name}`,
`{values.action}`, `{context.request_id}`, and the bare names `{columns}` and `{changes}`. Within the braces `or` falls
back on another path, or on a text in single quotes, where there is NULL or nothing: `{new.company or 'Unknown'}`. A
template that is one pair of braces and nothing else keeps the value's type; any other is text, in which NULL prints as
nothing. Format specifications are Python's, and `cut 100` or `cut 100 ...`, which shortens.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Iterator, Sequence
from decimal import Decimal
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic.json_schema import GenerateJsonSchema

from cdc_worker.changes import Happening
from cdc_worker.errors import Place, ProfileError, ProfileFault


def _kind(value: object) -> str | None:
    """What TOML calls it: so that of several kinds of value one is read, and its faults are told alone."""
    kinds = {
        bool: "<boolean>",
        int: "<integer>",
        Decimal: "<float>",
        float: "<float>",
        str: "<string>",
        list: "<array>",
    }
    return "<table>" if isinstance(value, (dict, BaseModel)) else kinds.get(type(value))


_of_kind = Discriminator(
    _kind,
    custom_error_type="kind",
    custom_error_message="Input should be of another kind: such values have no meaning here",
)
_Boolean = Annotated[bool, Tag("<boolean>")]
_Integer = Annotated[int, Tag("<integer>")]
_Float = Annotated[Decimal, Tag("<float>")]
_String = Annotated[str, Tag("<string>")]

Constant = Annotated[_Boolean | _Integer | _Float | _String, _of_kind]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*$", max_length=63)]
Path_ = Annotated[str, StringConstraints(pattern=r"^(old|new|row|lookup|values|context)\.[^{}:!']+$")]
"""What a template has in its braces: `new.status`, `lookup.user.name`."""

FIELDS = frozenset({"type", "description", "metadata", "occurred_at", "created_by", "change_key", "owner"})
"""The fields that every activity has; tables and rules add others."""


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _hidden(value: object) -> object:
    return dict.fromkeys(value, "hidden") if isinstance(value, list) else value


Names = Annotated[list[str], BeforeValidator(_as_list, json_schema_input_type=str | list[str])]
Paths = Annotated[list[Path_], BeforeValidator(_as_list, json_schema_input_type=Path_ | list[Path_])]
Happenings = Annotated[
    list[Happening],
    BeforeValidator(_as_list, json_schema_input_type=Happening | Annotated[list[Happening], Field(min_length=1)]),
    Field(min_length=1),
]
Masked = Annotated[
    dict[str, Literal["hidden", "hash"]],
    BeforeValidator(_hidden, json_schema_input_type=dict[str, Literal["hidden", "hash"]] | list[str]),
]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, use_attribute_docstrings=True)


_M = TypeVar("_M", bound=_Model)


class _WrongError(ValueError):
    """What is wrong between parts of a model, each with its place in there."""

    def __init__(self, faults: list[ProfileFault]) -> None:
        super().__init__("; ".join(fault.message for fault in faults))
        self.faults = faults


def _unless(faults: list[ProfileFault], model: _M) -> _M:
    if faults:
        raise _WrongError(faults)
    return model


class Match(_Model):
    """What a value must be like, where a constant or a list of them doesn't say it. All that is given must hold."""

    null: bool | None = None
    """Whether it is NULL."""
    empty: bool | None = None
    """Whether it is NULL or a text without characters."""
    not_: Annotated[Matcher | None, Field(alias="not")] = None
    """Anything but this. NULL is something else than any constant."""
    over: Decimal | None = None
    """A number greater than this; NULL and what is no number are none."""
    at_least: Decimal | None = None
    """A number of this or more."""
    under: Decimal | None = None
    """A number less than this."""
    at_most: Decimal | None = None
    """A number of this or less."""


_Match = Annotated[Match, Tag("<table>")]
_OneOf = Annotated[list[Annotated[_Boolean | _Integer | _Float | _String | _Match, _of_kind]], Tag("<array>")]
Matcher = Annotated[_Boolean | _Integer | _Float | _String | _Match | _OneOf, _of_kind]
"""A value that is meant, several of which one is, or what it must be like."""


class Delta(_Model):
    """By how much a number must change: all that is given. From or to NULL it never does, and from 0 by no ratio."""

    over: Annotated[Decimal, Field(ge=0)] | None = None
    """By more than this."""
    at_least: Annotated[Decimal, Field(ge=0)] | None = None
    """By this or more."""
    over_ratio: Annotated[Decimal, Field(ge=0)] | None = None
    """By more than this part of the old value: 0.1 is ten per cent."""
    at_least_ratio: Annotated[Decimal, Field(ge=0)] | None = None
    """By this part or more."""
    grows: bool | None = None
    """Whether it must have grown, or shrunk."""


class Condition(_Model):
    """What must hold of a change: all of it. Columns are named by the row that has them."""

    old: dict[str, Matcher] = {}
    """Columns of the old row."""
    new: dict[str, Matcher] = {}
    """Columns of the new row."""
    row: dict[str, Matcher] = {}
    """Columns of the new row, or of the old one of a delete."""
    lookup: dict[Name, dict[str, Matcher]] = {}
    """Columns of rows that are looked up; not in a rule's own condition."""
    values: dict[Name, Matcher] = {}
    """Values that the table or the rule has named; not in a rule's own condition."""
    context: dict[str, Matcher] = {}
    """Keys of the context message."""
    delta: dict[str, Delta] = {}
    """By how much columns must change, in a rule on updates."""
    all: list[Condition] = []
    """Conditions that all hold."""
    any: Annotated[list[Condition], Field(min_length=1)] | None = None
    """Conditions of which one holds."""
    not_: Annotated[Condition | None, Field(alias="not")] = None
    """A condition that doesn't hold."""


class Map(_Model):
    """A value by another value, as text: the first is `map["proposal"]` where `by` is "proposal"."""

    by: Path_
    """The value that decides."""
    map: Annotated[dict[str, Value], Field(min_length=1)]
    """What it is for each; booleans are named true and false."""
    default: Value | None = None
    """What it is for any other, and for NULL; nothing if not given."""


class Part(_Model):
    """A piece of a text that is there if a condition holds."""

    text: str
    """A template."""
    when: Condition
    """When it is there."""
    otherwise: str = ""
    """A template for when it isn't."""


_Map = Annotated[Map, Tag("<table>")]
_Parts = Annotated[list[Annotated[_String | Annotated[Part, Tag("<table>")], _of_kind]], Tag("<array>")]
Value = Annotated[_Boolean | _Integer | _Float | _String | _Map | _Parts, _of_kind]
"""A constant, a template, a map, or a text in parts."""


class Target(_Model):
    """The table that activities are written to."""

    table: str
    """Its name, with the schema if that isn't public."""
    columns: Annotated[dict[str, Name], Field(min_length=1)]
    """Its columns that take a field. Without one for `change_key` the worker keeps the keys in a table of its own."""
    constants: dict[str, Constant] = {}
    """Its columns that always take the same."""
    lengths: dict[str, Annotated[int, Field(ge=1)]] = {}
    """Characters that a column takes, where its type doesn't say so."""
    time_zone: str | None = None
    """Zone of its timestamps without one; the settings' or the database's if not given."""
    category: str | None = None
    """Its column that tells who writes a row, by which people select: "manual", also where it is NULL, or "system"."""
    visible: str | None = None
    """Its column that is false for what isn't shown to everybody, by which people select."""
    prepare: list[Annotated[str, StringConstraints(pattern=r"^\w+\.sql$")]] = []
    """Files of the package's `schema/` that setup runs to make or prepare the table."""

    @model_validator(mode="after")
    def _columns_are_told_apart(self) -> Target:
        both = sorted(self.columns.keys() & self.constants.keys())
        unknown = sorted(self.lengths.keys() - self.columns.keys())
        faults = [
            ProfileFault(("constants", column), f"in columns as well as in constants: {column}") for column in both
        ]
        faults += [ProfileFault(("lengths", column), f"in lengths and not in columns: {column}") for column in unknown]
        return _unless(faults, self)


class Mapped(_Model):
    """A column of the profile's own, drawn from a real one through a map. It counts as no column of the row."""

    column: str
    """The real column."""
    map: dict[str, str]
    """What it is for each of its values, as text."""
    default: str | None = None
    """What it is for any other, and for NULL; NULL if not given."""


class Lookup(_Model):
    """A row of another table that says more: `{lookup.user.name}`. One that isn't there has no columns."""

    table: str
    """The table, which is captured, so that what is remembered of it stays true."""
    match: Annotated[dict[str, str], Field(min_length=1)]
    """Its columns, each with the column of ours that it equals, or with a path such as `lookup.quote.account_id`."""
    where: dict[str, Constant] = {}
    """Its columns that must have a certain value. Of several rows it is the first by the table's key."""
    same_transaction: bool | Literal["deleted"] = False
    """Whether only a row counts that was written in the same transaction, before or after the change; or "deleted" in
    it, perhaps along with ours."""


class Backfill(_Model):
    """How a rule's activity is made from a row that was there before the worker: it says no more than is known.

    Who did it is not. The row's values are those of when it was read, and metadata says so: it has `backfilled`,
    `as_of` and `as_of_lsn` beside the table's identity.
    """

    at: Value
    """When it happened, mostly a column: `{row.created_at}`. Where that is NULL or missing, nothing is told."""
    description: Value
    """The text of the activity."""
    when: Condition | None = None
    """What must hold of the row; if not given, the condition of a rule on inserts."""
    metadata: dict[str, Value] = {}
    """Keys and values of the metadata's `values`: how the row was when it was read."""
    fields: dict[Name, Value] = {}
    """Fields in place of the rule's."""


class Rule(_Model):
    """One line of the profile: which change it is about, and what that meant."""

    on: Happenings
    """The operation or operations: insert, update, delete, truncate."""
    type: Value = ""
    """The type of the activity."""
    description: Value = ""
    """Its text."""
    name: str = ""
    """Names the rule in change keys; its type does if not given."""
    changed: Names = []
    """Columns of which an update must change one: `"*"` for any, `"unclaimed"` for any that no earlier rule which
    applied has named."""
    from_: Annotated[dict[str, Matcher], Field(alias="from")] = {}
    """What columns must have been."""
    to: dict[str, Matcher] = {}
    """What columns must be now."""
    delta: dict[str, Delta] = {}
    """By how much columns must change."""
    when: Condition | None = None
    """What else must hold."""
    skip_unless: Paths = []
    """Values without which there is no activity: neither NULL nor empty. The columns of the rule count as named all the
    same."""
    values: dict[Name, Value] = {}
    """Values with a name, for templates: `{values.action}`."""
    metadata: dict[str, Value] = {}
    """Keys and values of the metadata."""
    fields: dict[Name, Value] = {}
    """Further fields of the activity."""
    rule: Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")] | None = None
    """A Python function `package.module:function` in place of type and description. Metadata and fields that it returns
    are added to what the rule has."""
    backfill: Backfill | None = None
    """How `cdc-worker backfill` makes it from rows that are there already; it leaves out rules without one."""

    @property
    def label(self) -> str:
        """What the rule is called in change keys."""
        return self.name or (self.type if isinstance(self.type, str) else "")

    @property
    def certain(self) -> bool:
        """Whether it applies to whatever it is about."""
        return not any((self.to, self.from_, self.delta, self.when, self.skip_unless, self.rule))

    @model_validator(mode="after")
    def _says_what_it_is_about(self) -> Rule:
        if (self.changed or self.to or self.from_ or self.delta) and self.on != ["update"]:
            raise ValueError('"changed", "from", "to" and "delta" are for rules on updates alone')
        if "update" in self.on and not self.changed:
            raise ValueError('a rule on updates is on them alone, and says in "changed" which columns it is about')
        if len(set(self.on)) != len(self.on):
            raise ValueError('an operation stands twice in "on"')
        if self.rule is not None:
            if self.type != "" or self.description != "":
                raise ValueError('"rule" stands in place of type and description')
            if not self.name:
                raise ValueError('"rule" needs a "name" beside it')
        elif lacking := sorted({"type", "description"} - self.model_fields_set):
            raise ValueError(f"it says no {' and no '.join(lacking)}")
        if self.backfill is not None and (self.rule is not None or self.on not in (["insert"], ["update"])):
            raise ValueError('"backfill" is for rules with a type, on inserts alone or on updates alone')
        if not self.label or (not self.name and "{" in self.label):
            raise ValueError('a rule whose type isn\'t constant needs a "name"')
        if "/" in self.label:
            raise ValueError('"/" parts what change keys are made of: the rule needs a "name" without it')
        return self


class Table(_Model):
    """A captured table: its rules in order, and what their activities have in common."""

    key: Names = []
    """The columns that tell its rows apart."""
    owner: str | None = None
    """The column that says whose row it is: the field `owner`."""
    actor: str | None = None
    """A template that names who did it, where no context message does."""
    ignored: Names = []
    """Columns whose changes mean nothing."""
    masked: Masked = {}
    """Columns whose changes are recorded and whose values are not: hidden, or a keyed hash in their place."""
    identity: dict[str, Value] = {}
    """Kept in the metadata of every activity, so that it outlives its subject."""
    fields: dict[Name, Value] = {}
    """Further fields of every activity."""
    values: dict[Name, Value] = {}
    """Values with a name, for templates: `{values.action}`."""
    mapped: dict[Name, Mapped] = {}
    """Columns of the profile's own."""
    lookups: dict[Name, Lookup] = {}
    """Rows of other tables."""
    rules: list[Rule] = []
    """What its changes mean, in order."""

    @model_validator(mode="after")
    def _rules_are_told_apart(self) -> Table:
        names = [rule.label for rule in self.rules]
        faults = [
            ProfileFault(("rules", number), f"rules that need a name of their own: {name}")
            for number, name in enumerate(names)
            if names.index(name) < number and name not in names[number + 1 :]
        ]
        both = sorted(self.masked.keys() & {*self.key, self.owner})
        faults += [ProfileFault(("masked",), f"masked, and part of the key or the owner: {column}") for column in both]
        return _unless(faults, self)


def _all_fields(table: Table) -> Iterator[tuple[Place, dict[str, Value]]]:
    yield (), table.fields
    for number, rule in enumerate(table.rules):
        yield ("rules", number), rule.fields


class Profile(_Model):
    """A whole profile."""

    name: Name
    """What it is called."""
    target: Target
    """Where activities are written to."""
    tables: Annotated[dict[str, Table], Field(min_length=1)]
    """What is captured, each by its name, with the schema if that isn't public."""
    context: list[str] = []
    """Keys of context messages that go into the metadata, beside `changed_by`."""
    text_length: Annotated[int, Field(ge=1)] = 200
    """Characters after which long texts in `changes` are cut."""

    @model_validator(mode="after")
    def _fields_exist(self) -> Profile:
        tables = self.tables.values()
        known = FIELDS.union(*({*t.fields, *(f for r in t.rules for f in r.fields)} for t in tables))
        free = any(rule.rule for table in tables for rule in table.rules)  # a function's fields are its own
        faults = [
            ProfileFault(
                ("target", "columns", column),
                f'target column "{column}" wants the field "{field}", which no table or rule has',
            )
            for column, field in self.target.columns.items()
            if field not in known and not free
        ]
        faults += [
            ProfileFault(
                ("tables", name, *where, "fields", field),
                f'tables.{name} has a field "{field}", which is not for profiles to fill',
            )
            for name, table in self.tables.items()
            for where, fields in _all_fields(table)
            for field in sorted(FIELDS & fields.keys())
        ]
        faults += [
            ProfileFault(
                ("tables", name, "rules", number, "backfill"),
                f"tables.{name}, rule {number + 1} ({rule.label}): what was recorded of a row is found by its key, and"
                f" {lacking}",
            )
            for name, table in self.tables.items()
            for number, rule in enumerate(table.rules)
            if rule.backfill is not None and (lacking := _unfindable(table, self.target))
        ]
        return _unless(faults, self)


def links(table: Table, target: Target) -> dict[str, str]:
    """Of a table's key columns those that activities link to, each with the column of the target that does."""
    columns = {field: column for column, field in target.columns.items()}
    fields = {source: field for field, source in table.fields.items() if isinstance(source, str)}
    found = {column: columns.get(fields.get(f"{{row.{column}}}", "")) for column in table.key}
    return {column: link for column, link in found.items() if link is not None}


def _unfindable(table: Table, target: Target) -> str:
    """Why a row's activities can't be found, if so."""
    if not table.key:
        return 'the table has no "key"'
    if lacking := [column for column in table.key if column not in links(table, target)]:
        return f"no column of the target takes a field that is {' or '.join(f'{{row.{c}}}' for c in lacking)}"
    return ""


def backfilled(profile: Profile) -> Profile:
    """The profile by which rows that are there already are read: of its rules those with a `backfill`.

    Rules keep their numbers. What was looked up in a change's own transaction is looked up as it is now.
    """
    tables = {}
    for name, table in profile.tables.items():
        lookups = {
            of: lookup.model_copy(update={"same_transaction": False}) if lookup.same_transaction is True else lookup
            for of, lookup in table.lookups.items()
        }
        rules = [_NO_RULE if rule.backfill is None else _read(rule, rule.backfill) for rule in table.rules]
        update = {"lookups": lookups, "rules": rules, "owner": None, "actor": None}
        tables[name] = table.model_copy(update=update)
    return profile.model_copy(update={"tables": tables})


def _read(rule: Rule, backfill: Backfill) -> Rule:
    when = rule.when if backfill.when is None and rule.on == ["insert"] else backfill.when
    return Rule.model_construct(
        on=["read"],
        name=rule.label,
        type=rule.type,
        description=backfill.description,
        when=when,
        skip_unless=rule.skip_unless,
        values=rule.values,
        metadata=backfill.metadata,
        fields={**rule.fields, **backfill.fields, "occurred_at": backfill.at},
    )


class _JsonSchema(GenerateJsonSchema):
    """JSON Schema as editors want it: a value is of one of several kinds, and a whole number is of two of them."""

    def tagged_union_schema(self, schema: Any) -> dict[str, Any]:
        made = super().tagged_union_schema(schema)
        made["anyOf"] = made.pop("oneOf")
        return made

    def dict_schema(self, schema: Any) -> dict[str, Any]:
        made = super().dict_schema(schema)
        return {**made, "additionalProperties": False} if "patternProperties" in made else made

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def json_schema() -> dict[str, Any]:
    """What a profile may say, as JSON Schema: its form, not what its names and templates mean."""
    return {
        "$schema": GenerateJsonSchema.schema_dialect,
        **Profile.model_json_schema(by_alias=True, schema_generator=_JsonSchema),
    }


def shipped() -> list[str]:
    """The names of the profiles that come with the package."""
    return sorted(p.name.removesuffix(".toml") for p in (resources.files("cdc_worker") / "profiles").iterdir())


def load(name_or_path: str) -> Profile:
    """Read a shipped profile by its name, or a file by its path. Raises ProfileError with every fault at once."""
    return parse(read(name_or_path), source=name_or_path)


def read(name_or_path: str) -> str:
    """The text of a shipped profile, by its name, or of a file, by its path. Raises ProfileError."""
    if name_or_path in shipped():
        return (resources.files("cdc_worker") / "profiles" / f"{name_or_path}.toml").read_text("utf-8")
    try:
        return Path(name_or_path).read_text("utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it isn't UTF-8 text"
        raise ProfileError(
            f'profile "{name_or_path}" can\'t be read: {reason}',
            hint=f"name a file, or one of the shipped profiles: {', '.join(shipped())}",
        ) from error


def parse(text: str, *, source: str) -> Profile:
    """Read a profile's text; `source` names it in errors."""
    content = _content(text, source)
    try:
        return Profile.model_validate(content)
    except ValidationError as error:
        raise ProfileError.of(source, _faults(error)) from error


def parse_parts(text: str, *, source: str) -> tuple[Profile, list[ProfileFault]]:
    """As much of a profile as can be read, and what is wrong with the rest. Raises ProfileError if it isn't TOML.

    A rule that can't be read is one on no operation, and a table is left out if more of it is wrong than rules; a
    target has no columns.
    """
    content = _content(text, source)
    try:
        return Profile.model_validate(content), []
    except ValidationError as error:
        faults = _faults(error)
    tables = content.get("tables")
    found = {}
    for name, table in tables.items() if isinstance(tables, dict) else ():
        wrong = [fault.place[2:] for fault in faults if fault.place[:2] == ("tables", name)]
        rules = {number for of, number, *_ in (place for place in wrong if len(place) > 1) if of == "rules"}
        try:
            if all(place[:1] == ("rules",) and len(place) > 1 for place in wrong):
                found[name] = _without_rules(table, rules)
        except ValidationError as error:
            faults += _faults(error, ("tables", name))
    sound = not any(fault.place[:1] == ("target",) for fault in faults) and "target" in content
    target = Target.model_validate(content["target"]) if sound else Target.model_construct(table="", columns={})
    return Profile.model_construct(name=source, target=target, tables=found), faults


def without(profile: Profile, faults: Sequence[ProfileFault]) -> Profile:
    """What is left of a profile without the rules, or tables, that have these faults."""
    tables = {}
    for name, table in profile.tables.items():
        wrong = [fault.place[2:] for fault in faults if fault.place[:2] == ("tables", name)]
        if all(place[:1] == ("rules",) for place in wrong):
            rules = [_NO_RULE if ("rules", n) in [p[:2] for p in wrong] else r for n, r in enumerate(table.rules)]
            tables[name] = table.model_copy(update={"rules": rules})
    return profile.model_copy(update={"tables": tables})


_NO_RULE: Final = Rule.model_construct(on=[])

_TAGS: Final = ("<boolean>", "<integer>", "<float>", "<string>", "<array>", "<table>")


def _without_rules(table: Any, numbers: Collection[int | str]) -> Table:
    """A table without some rules, which keep their numbers."""
    rules = [rule for number, rule in enumerate(table.get("rules", ())) if number not in numbers]
    found = Table.model_validate({**table, "rules": rules} if numbers else table)
    kept = iter(found.rules)
    all_ = [_NO_RULE if n in numbers else next(kept) for n in range(len(found.rules) + len(numbers))]
    return found.model_copy(update={"rules": all_})


def _content(text: str, source: str) -> dict[str, Any]:
    try:
        content = tomllib.loads(text, parse_float=Decimal)
    except (ValueError, ArithmeticError, RecursionError) as error:
        raise ProfileError(f'profile "{source}" is not TOML: {error}', hint="mend the file at that place") from error
    if faults := [*_unusable(content, ())]:
        raise ProfileError.of(source, faults)
    return content


_MAX_DEPTH: Final = 24
"""No profile means more tables and arrays within each other. Whatever walks through them needs no more stack."""

_MAX_DIGITS: Final = 1_000


def _unusable(value: Any, place: Place) -> Iterator[ProfileFault]:
    """What TOML can say and neither columns nor memory could hold."""
    fault = ""
    match value:
        case dict() | list() if len(place) > _MAX_DEPTH:
            fault = "this is nested too deeply"
        case dict():
            if any("\0" in key for key in value):
                fault = "a key has the character NUL, which PostgreSQL doesn't"
            for key, of in value.items():
                yield from _unusable(of, (*place, key))
        case list():
            for number, of in enumerate(value):
                yield from _unusable(of, (*place, number))
        case str() if "\0" in value:
            fault = "it has the character NUL, which PostgreSQL doesn't"
        case int() if not -(2**63) <= value < 2**63:
            fault = "a number of TOML has 64 bits"
        case Decimal() if value.is_finite() and abs(value.adjusted()) > _MAX_DIGITS:
            fault = f"it is a number of more than {_MAX_DIGITS:,} digits"
    if fault:
        yield ProfileFault(place, f"{'.'.join(map(str, place)) or '(top)'}: {fault}")


def _faults(error: ValidationError, within: Place = ()) -> list[ProfileFault]:
    """What pydantic found, at places as they are in the file: of several kinds of value it names the one as well."""
    found = []
    for fault in error.errors():
        place = (*within, *(step for step in fault["loc"] if step not in _TAGS))
        where = ".".join(map(str, place)) or "(top)"
        cause = fault.get("ctx", {}).get("error")
        if isinstance(cause, _WrongError):
            found += [ProfileFault((*place, *of.place), f"{where}: {of.message}") for of in cause.faults]
        else:
            found.append(ProfileFault(place, f"{where}: {fault['msg'].removeprefix('Value error, ')}"))
    return found
