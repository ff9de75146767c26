"""A first profile, drawn from a database's catalog: its names, rules that check takes, and comments to go on from."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from cdc_worker import catalog, postgres
from cdc_worker.catalog import Column
from cdc_worker.config import Settings
from cdc_worker.errors import CatalogMismatchError
from cdc_worker.postgres import Connection
from cdc_worker.profile import Target
from cdc_worker.profile_checks import PROFILE, READ_ONLY
from cdc_worker.rules import qualified
from cdc_worker.templates import Expression, parse

Name = tuple[str, str]


def _plain(name: Name) -> str:
    """A table's name as profiles have it."""
    return name[1] if name[0] == "public" else ".".join(name)


# Ordinary tables and roots of partitioned ones, whose changes are in the WAL.
_TABLES: Final = """
SELECT nspname::text, relname::text, ARRAY(
    SELECT attname::text FROM pg_index CROSS JOIN unnest(indkey) WITH ORDINALITY AS part (number, place)
    JOIN pg_attribute ON attrelid = indrelid AND attnum = number
    WHERE indrelid = c.oid AND indisprimary ORDER BY place)
FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace
WHERE relkind IN ('r', 'p') AND relpersistence = 'p' AND NOT relispartition
  AND nspname NOT IN ('pg_catalog', 'information_schema', 'cdc_worker')
ORDER BY nspname, relname
"""

_FOREIGN_KEYS: Final = """
SELECT n.nspname::text, c.relname::text, other_n.nspname::text, other.relname::text,
       ARRAY(SELECT attname::text FROM unnest(conkey) WITH ORDINALITY AS part (number, place)
             JOIN pg_attribute ON attrelid = conrelid AND attnum = number ORDER BY place),
       ARRAY(SELECT attname::text FROM unnest(confkey) WITH ORDINALITY AS part (number, place)
             JOIN pg_attribute ON attrelid = confrelid AND attnum = number ORDER BY place)
FROM pg_constraint
JOIN pg_class c ON c.oid = conrelid JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN pg_class other ON other.oid = confrelid JOIN pg_namespace other_n ON other_n.oid = other.relnamespace
WHERE contype = 'f' AND conparentid = 0
ORDER BY conname
"""

_CHECKS: Final = """
SELECT attname::text, pg_get_constraintdef(k.oid)
FROM pg_constraint k JOIN pg_attribute ON attrelid = conrelid AND attnum = conkey[1]
WHERE conrelid = to_regclass(format('%%I.%%I', %s::text, %s::text)) AND contype = 'c' AND cardinality(conkey) = 1
"""


@dataclass(frozen=True, slots=True)
class _ForeignKey:
    """Columns of ours that are a key of the table `of`."""

    of: Name
    ours: tuple[str, ...]
    theirs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Table:
    """A table as the catalog has it. `short` is its name as types and texts have it."""

    name: Name
    key: tuple[str, ...]
    columns: Mapping[str, Column]
    foreign_keys: Sequence[_ForeignKey]
    short: str

    @property
    def section(self) -> str:
        """Its key in the profile."""
        return _key(_plain(self.name))

    def usable(self, column: str) -> bool:
        """Whether a template can name the column."""
        try:
            return column.isprintable() and parse(f"{{new.{column}}}") == [Expression((f"new.{column}",))]
        except ValueError:
            return False

    def first(self, pattern: str, wanted: Callable[[Column], bool] = lambda column: True) -> str | None:
        """The first column with such a name, by the order of the pattern's alternatives."""
        for alternative in pattern.split("|"):
            for name, column in self.columns.items():
                if re.fullmatch(alternative, name.lower()) and self.usable(name) and wanted(column):
                    return name
        return None

    @property
    def called(self) -> str | None:
        """The column that a person would call a row by."""
        return self.first(_CALLED, _is_text) or next((column for column in self.key if self.usable(column)), None)

    @property
    def status(self) -> str | None:
        """The column that says how far it has come."""
        return self.first("status|stage|state|.*_status|.*_stage|.*_state", lambda column: column.category in "SE")


def _is_text(column: Column) -> bool:
    return column.category == "S" and not column.labels


# What columns of a target are called that take a field, in the order of preference.
_TYPE: Final = "activity_type|event_type|type|kind|action|event"
_DESCRIPTION: Final = "description|summary|body|text|message|content|notes?|details?|subject|title"
_OCCURRED_AT: Final = "occurred_at|happened_at|date_created|created_at|timestamp|created|time|date|.*_at|.*date.*"
_CREATED_BY: Final = "created_by|author|actor|changed_by|performed_by"
_TARGETS: Final = (
    "activity|activities|.*activity|.*activities|.*interaction.*|.*timeline.*|.*diary|.*journal|.*history|.*events?|.*log"
    "|.*notes?"
)
_OWNER: Final = "owner(_id)?|.*in_charge|assigned_to(_id)?|.*owner.*|.*assign.*|user_id|created_by_id|(.*_)?user(_id)?"
_CALLED: Final = "name|full_?name|display_?name|user_?name|title|subject|label|.*_name|.*name|email|code"
_IGNORED: Final = (
    r"(last_)?(updated|modified|changed|touched)(_at|_on)?|(date|time)_(updated|modified)|.*_updated_at"
    r"|last_(login|seen)(_at)?"
)
_MASKED: Final = r".*(password|passwd|secret|token|api_?key).*"
_OF_FRAMEWORKS: Final = (
    r"django_.*|auth_(group|permission|user_).*|alembic_version|schema_migrations|ar_internal_.*|flyway_.*"
)


def draft(
    settings: Settings, *, tables: Sequence[str] = (), target: str | None = None, schema: str = "public"
) -> Iterator[str]:
    """The lines of a profile for these tables, or for all of a schema.

    Raises CatalogMismatchError if there are none, or none that could be written to the target, and what connecting
    raises.
    """
    with postgres.connect(settings.dsn.get_secret_value(), settings.worker, name=PROFILE) as connection:
        connection.execute(READ_ONLY)
        found = _catalog(connection)
        into = _find(found, target) if target else _likeliest_target(found, schema)
        if tables:
            captured = [_find(found, name) for name in dict.fromkeys(tables)]
        else:
            captured = [
                table
                for table in found.values()
                if table.name[0] == schema and table.key and not re.fullmatch(_OF_FRAMEWORKS, table.name[1])
            ]
        captured = [table for table in captured if into is None or table.name != into.name]
        if not captured:
            raise CatalogMismatchError(
                f'there is no table with a primary key in the schema "{schema}"', hint="name tables with --table"
            )
        lines = _Draft(connection, _shortened(captured), into, found).lines(settings)
    return iter(lines)


def _catalog(connection: Connection) -> dict[Name, _Table]:
    keys = {(schema, name): tuple(key) for schema, name, key in connection.execute(_TABLES)}
    foreign_keys: dict[Name, list[_ForeignKey]] = {}
    for schema, name, *other, ours, theirs in connection.execute(_FOREIGN_KEYS):
        if (of := (other[0], other[1])) in keys:
            foreign_keys.setdefault((schema, name), []).append(_ForeignKey(of, tuple(ours), tuple(theirs)))
    columns = catalog.columns(connection, *keys)
    # A dot parts the schema from the name, so one within a name can't be told.
    return {
        name: _Table(name, key, columns[name], foreign_keys.get(name, []), _word(name[1]))
        for name, key in keys.items()
        if "." not in name[1]
    }


def _find(found: Mapping[Name, _Table], name: str) -> _Table:
    table = found.get(qualified(name))
    if table is None:
        raise CatalogMismatchError(
            f'there is no table "{name}" whose changes could be read, or that could be written',
            hint="write its name as the catalog has it, with the schema if that isn't public; views have no changes",
        )
    return table


def _likeliest_target(found: Mapping[Name, _Table], schema: str) -> _Table | None:
    for wanted in dict.fromkeys((schema, "public")):
        for pattern in _TARGETS.split("|"):
            for (of, name), table in found.items():
                if of == wanted and re.fullmatch(pattern, name.lower()) and table.first(_DESCRIPTION, _is_text):
                    return table
    return None


def _word(name: str) -> str:
    """A name as types and lookups may have it."""
    word = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")[:50]
    return word if re.match("[a-z]", word) else f"t_{word}".rstrip("_")


def _shortened(tables: Sequence[_Table]) -> list[_Table]:
    """Without what all their names begin with, as `core_`."""
    first, last = min(t.short for t in tables), max(t.short for t in tables)
    alike = next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), 0)
    cut = first.rfind("_", 0, alike) + 1
    return [
        _Table(t.name, t.key, t.columns, t.foreign_keys, t.short[cut:] if re.match("[a-z]", t.short[cut:]) else t.short)
        for t in tables
    ]


def _string(value: str) -> str:
    """A string of TOML."""
    if '"' in value and "'" not in value and value.isprintable():
        return f"'{value}'"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _key(name: str) -> str:
    """A key of TOML."""
    return (
        name
        if re.fullmatch(r"[A-Za-z0-9_-]+", name)
        else json.dumps(name, ensure_ascii=False).replace("\x7f", "\\u007f")
    )


def _inline(values: Mapping[str, str]) -> str:
    return "{ " + ", ".join(f"{_key(key)} = {_string(value)}" for key, value in values.items()) + " }"


def _strings(values: Sequence[str]) -> str:
    return _string(values[0]) if len(values) == 1 else "[" + ", ".join(map(_string, values)) + "]"


def _literally(value: str) -> str:
    """A text in a template."""
    return value.replace("{", "{{").replace("}", "}}")


@dataclass(slots=True)
class _Into:
    """How the target is filled. `links` are the fields that link to rows, with the table and whether they must."""

    columns: dict[str, str] = field(default_factory=dict)
    constants: dict[str, str] = field(default_factory=dict)
    links: dict[str, tuple[str, Name, bool]] = field(default_factory=dict)
    types: list[str] = field(default_factory=list)
    length: int | None = None
    unknown: list[str] = field(default_factory=list)

    @property
    def metadata(self) -> bool:
        return "metadata" in self.columns.values()


_SUGGESTED: Final = """\
CREATE TABLE activity (
    activity_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    type text NOT NULL,
    description text NOT NULL,
    metadata jsonb,
    occurred_at timestamptz NOT NULL,
    created_by text,
    change_key text UNIQUE
);
"""


class _Draft:
    def __init__(
        self, connection: Connection, tables: Sequence[_Table], target: _Table | None, found: Mapping[Name, _Table]
    ) -> None:
        self._tables = tables
        self._target = target
        self._found = found
        self._into = _Into() if target is None else self._filled(connection, target)

    def _filled(self, connection: Connection, target: _Table) -> _Into:
        into = _Into()
        lengths = catalog.target_table(
            connection, Target.model_construct(table=".".join(target.name), columns={})
        ).lengths
        allowed = {name: column.labels for name, column in target.columns.items() if column.labels}
        for name, definition in connection.execute(_CHECKS, target.name):
            if "= ANY (" in definition and (said := re.findall(r"'((?:[^']|'')*)'::", definition)):
                allowed.setdefault(name, [one.replace("''", "'") for one in said])
        free = {name: c for name, c in target.columns.items() if not c.generated and c.identity != "a"}

        def take(field_: str, pattern: str, wanted: Callable[[Column], bool]) -> None:
            name = target.first(pattern, lambda c: c.name in free and c.name not in into.columns and wanted(c))
            if name is not None:
                into.columns[name] = field_

        take("change_key", "change_key", _is_text)
        take("type", _TYPE, lambda c: c.category in "SE")
        take("description", _DESCRIPTION, _is_text)
        take("metadata", ".*meta.*|.*data|.*", lambda c: c.base == "jsonb")
        take("occurred_at", _OCCURRED_AT, lambda c: c.base.startswith("timestamp"))
        take("created_by", _CREATED_BY, _is_text)
        for name, field_ in into.columns.items():
            if field_ == "type":
                into.types, into.length = list(allowed.get(name, [])), lengths.get(name)
        for name, (of, required) in self._linking(target, free, into).items():
            into.links[name] = _unlike(_word(re.sub("_(id|uid|uuid)$", "", name.lower())), into), of, required
        into.columns |= {name: field_ for name, (field_, _, _) in into.links.items()}
        for name, column in free.items():
            if name in into.columns:
                continue
            if "system" in allowed.get(name, []) or (column.required and not column.filled):
                self._constant(into, column, allowed.get(name, []))
        return into

    def _constant(self, into: _Into, column: Column, allowed: Sequence[str]) -> None:
        if column.category == "D":
            into.columns[column.name] = "occurred_at"
        elif column.category in "SE":
            into.constants[column.name] = _string("system" if "system" in allowed else allowed[0] if allowed else "")
        elif column.category in "BN":
            into.constants[column.name] = "false" if column.category == "B" else "0"
        else:
            into.unknown.append(column.name)

    def _linking(self, target: _Table, free: Mapping[str, Column], into: _Into) -> dict[str, tuple[Name, bool]]:
        """The target's columns that a captured table can fill with a key, and of which table that is."""
        linking: dict[str, Name] = {}
        for foreign_key in target.foreign_keys:
            if len(foreign_key.ours) == 1:
                linking.setdefault(foreign_key.ours[0], foreign_key.of)
        for table in self._tables:  # where foreign keys were dropped, names say it
            if len(table.key) == 1:
                (key,) = table.key
                for name in {key, f"{table.short}_id"} - {"id"}:
                    if name in free and free[name].base == table.columns[key].base:
                        linking.setdefault(name, table.name)
        found = {}
        for name, of in linking.items():
            if (
                name in free
                and name not in into.columns
                and any(self._source(table, name, of) for table in self._tables)
            ):
                found[name] = of, free[name].required and not free[name].filled
        return found

    def _source(self, table: _Table, name: str, of: Name) -> str | None:
        """The column of a captured table with the key of a row of another."""
        if table.name == of:
            return table.key[0] if len(table.key) == 1 and table.usable(table.key[0]) else None
        ours = [
            fk.ours[0] for fk in table.foreign_keys if fk.of == of and len(fk.ours) == 1 and table.usable(fk.ours[0])
        ]
        if name in ours:
            return name
        return next((o for p in _OWNER.split("|") for o in ours if re.fullmatch(p, o)), ours[0] if ours else None)

    # The text

    def lines(self, settings: Settings) -> list[str]:
        """All of it."""
        if self._target is not None and not self._into.columns:
            raise CatalogMismatchError(
                f"no column of {'.'.join(self._target.name)} is named for what activities have",
                hint="name the table that activities are written to with --target",
            )
        sections = {table.name: self._section(table) for table in self._tables}
        return [
            *self._head(sections),
            *(line for lines in sections.values() for line in lines),
            *self._examples(sections),
        ]

    def _head(self, sections: Mapping[Name, Sequence[str]]) -> Iterator[str]:
        if not any(line.startswith("[") for lines in sections.values() for line in lines):
            assert self._target is not None
            lacking = ", ".join(name for name, (_, _, required) in self._into.links.items() if required)
            raise CatalogMismatchError(
                f"nothing of these tables can be written to {'.'.join(self._target.name)}:"
                f" {lacking} must have a value there",
                hint="name another target with --target, or tables with --table",
            )
        yield "# What changes mean, and how they are recorded. Lines that begin with # and no blank are to be had."
        yield "# What is wrong with it:        cdc-worker profile check THIS_FILE --dsn …"
        yield "# What it would write:          cdc-worker profile try THIS_FILE --change …"
        yield "# For editors that have Taplo:  cdc-worker profile schema > profile.schema.json"
        yield "#:schema ./profile.schema.json"
        yield ""
        yield f'name = "{_word(self._target.short if self._target else "crm")[:40]}"'
        yield ""
        yield "# Keys of context messages, in which the application says who does what, that go to the metadata."
        yield '#context = ["request_id"]'
        yield "# Characters after which long texts in {changes} are cut."
        yield "#text_length = 200"
        yield ""
        yield "[target]"
        if self._target is None:
            yield "# There is no table yet that activities could be written to. This one would do:"
            yield from (f"#   {line}" for line in _SUGGESTED.splitlines())
            yield 'table = "activity"'
            columns = {
                name: name for name in ("type", "description", "metadata", "occurred_at", "created_by", "change_key")
            }
        else:
            yield f"table = {_string(_plain(self._target.name))}"
            columns = self._into.columns
        yield "# The zone of its timestamps without one; the database's if not given."
        yield '#time_zone = "Europe/Berlin"'
        yield ""
        yield "[target.columns] # column = field of the activity"
        yield from (f"{_key(column)} = {_string(field_)}" for column, field_ in columns.items())
        if "change_key" not in columns.values():
            yield "# Without a column for it, setup makes a table for the keys by which nothing is written twice."
            yield '#change_key = "change_key"'
        for name in self._into.unknown:
            yield f"# {_key(name)} must have a value, and what isn't known here."
        if self._into.constants:
            yield ""
            yield "[target.constants] # columns that always take the same"
            yield from (f"{_key(column)} = {value}" for column, value in self._into.constants.items())
        yield ""

    def _section(self, table: _Table) -> list[str]:
        """A captured table."""
        links, required = {}, []
        for name, (field_, of, must) in self._into.links.items():
            source = self._source(table, name, of)
            if source is not None:
                links[field_] = f"{{row.{source}}}"
                if must and not table.columns[source].required:
                    required.append(f"row.{source}")
            elif must:
                return [
                    "",
                    f"# Nothing of {table.section} says {_key(name)}, which must have a value: it isn't captured.",
                ]
        found = ["", f"[tables.{table.section}]"]
        if table.key:
            found.append(f"key = {_strings(table.key)}")
        if owner := table.first(_OWNER):
            found += [
                '# Whose row it is: fills a column of the target that has the field "owner".',
                f"#owner = {_string(owner)}",
            ]
        if actor := table.first("updated_by|modified_by|changed_by|created_by", _is_text):
            found += ["# Who did it, where no context message says so.", f"#actor = {_string(f'{{row.{actor}}}')}"]
        if ignored := [name for name in table.columns if re.fullmatch(_IGNORED, name.lower())]:
            found += ["# Changes of these alone mean nothing.", f"ignored = {_strings(ignored)}"]
        masked = [n for n in table.columns if re.fullmatch(_MASKED, n.lower()) and n not in table.key]
        if masked:
            found += [
                "# That they changed is recorded; their values are not.",
                f"masked = [{', '.join(map(_string, masked))}]",
            ]
        identity = {name: f"{{row.{name}}}" for name in (*table.key, table.called) if name and table.usable(name)}
        if self._metadata and identity:
            found += ["# Kept in the metadata of every activity.", f"identity = {_inline(identity)}"]
        if links:
            found.append(f"fields = {_inline(links)}")
        return [*found, *self._lookups(table), *self._rules(table, required), ""]

    @property
    def _metadata(self) -> bool:
        return self._target is None or self._into.metadata

    def _lookups(self, table: _Table) -> Iterator[str]:
        names: set[str] = set()
        for foreign_key in table.foreign_keys:
            name = _word(re.sub("_(id|uid|uuid)$", "", foreign_key.ours[0].lower()))
            name = next(n for n in (name, *(f"{name}_{i}" for i in range(2, 1000))) if n not in names)
            names.add(name)
            other = self._found.get(foreign_key.of)
            if other is None:
                continue
            yield ""
            if other.called:
                yield f"# In templates: {{lookup.{name}.{other.called}}}"
            yield f"[tables.{table.section}.lookups.{name}]"
            yield f"table = {_string(_plain(foreign_key.of))}"
            yield f"match = {_inline(dict(zip(foreign_key.theirs, foreign_key.ours, strict=True)))}"

    def _rules(self, table: _Table, required: Sequence[str]) -> Iterator[str]:
        status = table.status
        yield from self._rule(table, "insert", "created", required)
        if status is not None:
            moved = f'{_literally(status)} changed from "{{old.{status}}}" to "{{new.{status}}}"'
            values = {f"old_{status}": f"{{old.{status}}}", f"new_{status}": f"{{new.{status}}}"}
            yield from self._rule(
                table, "update", f"{_word(status)}_changed", required, changed=status, said=moved, metadata=values
            )
        changes, said = {"changes": "{changes}"}, "updated: {columns}"
        yield from self._rule(table, "update", "updated", required, changed="unclaimed", said=said, metadata=changes)
        yield from self._rule(table, "delete", "deleted", required)

    def _rule(
        self,
        table: _Table,
        on: str,
        event: str,
        required: Sequence[str],
        *,
        changed: str | None = None,
        said: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Iterator[str]:
        label = f"{table.short}_{event}"
        type_ = label
        if self._into.types:
            type_ = next((t for t in ("system", "note", "other") if t in self._into.types), self._into.types[0])
        elif self._into.length is not None and len(label) > self._into.length:
            type_ = event[: self._into.length]
        called = f' "{{row.{table.called}}}"' if table.called else ""
        subject = table.short.replace("_", " ").capitalize()
        yield ""
        yield f"[[tables.{table.section}.rules]]"
        yield f"on = {_string(on)}"
        if changed is not None:
            yield f"changed = {_string(changed)}" + (" # by none of the rules above" if changed == "unclaimed" else "")
        if type_ != label:
            yield f"name = {_string(label)}"
        yield f"type = {_string(type_)}"
        yield f"description = {_string(f'{subject}{called} {said or event}')}"
        if required:
            yield f"skip_unless = {_strings(required)}"
        if metadata and self._metadata:
            yield f"metadata = {_inline(metadata)}"

    def _examples(self, sections: Mapping[Name, Sequence[str]]) -> Iterator[str]:
        """A rule for each thing that a profile can say, of a table that is there."""
        tables = [table for table in self._tables if any(line.startswith("[") for line in sections[table.name])]
        yield ""
        yield "# Examples of what else there is. A rule counts where it stands among those of its table."
        number = next(((t, c) for t in tables for c in t.columns if self._is_amount(t, c)), None)
        if number is not None:
            table, amount = number
            yield from _example(
                "By how much a number changes: by at least 1000, and by more than a tenth of what it was.",
                f"[[tables.{table.section}.rules]]",
                'on = "update"',
                f"changed = {_string(amount)}",
                f"delta.{_key(amount)} = {{ at_least = 1000, over_ratio = 0.1 }}",
                f'type = "{table.short}_amount_changed"',
                f'description = [{_string(f"{{old.{amount}:,.2f}} to {{new.{amount}:,.2f}}")}, {{ text = " (up)",'
                f' when = {{ delta.{_key(amount)} = {{ grows = true }} }}, otherwise = " (down)" }}]',
            )
        table = next((table for table in tables if table.status), tables[0])
        column = table.status or table.called or next((c for c in table.columns if table.usable(c)), None)
        if column is None:
            return
        now = f"Now {{new.{column} or 'unknown':cut 40}}"
        yield from _example(
            "From certain values to others; words by a value; a text for NULL; a text that is cut.",
            f"[[tables.{table.section}.rules]]",
            'on = "update"',
            f"changed = {_string(column)}",
            f'from.{_key(column)} = {{ not = ["won", "lost"] }}',
            f'to.{_key(column)} = ["won", "lost"]',
            f'type = "{table.short}_ended"',
            'description = "{values.what}"',
            f'values.what = {{ by = {_string(f"new.{column}")}, map = {{ won = "Won!" }}, default = {_string(now)} }}',
        )
        yield from _example(
            "Any, all or none of several conditions; what the application's context message says.",
            f"[[tables.{table.section}.rules]]",
            'on = ["insert", "delete"]',
            f'when = {{ any = [{{ row.{_key(column)} = {{ empty = true }} }}, {{ context.source = "import" }}] }}',
            f'type = "{table.short}_imported"',
            "description = \"by {context.changed_by or 'nobody'}\"",
        )
        if not any(required for _, _, required in self._into.links.values()):
            yield from _example(
                "All rows at once.",
                f"[[tables.{table.section}.rules]]",
                'on = "truncate"',
                f'type = "{table.short}_truncated"',
                'description = "all rows removed"',
            )
        yield from _example(
            "A function of your own, from a module that the setting rule_modules allows.",
            f"[[tables.{table.section}.rules]]",
            'on = "insert"',
            'name = "own"',
            'rule = "crm_rules:told"',
        )

    def _is_amount(self, table: _Table, column: str) -> bool:
        keys = {*table.key, *(name for key in table.foreign_keys for name in key.ours)}
        return table.columns[column].category == "N" and column not in keys and table.usable(column)


def _example(why: str, *code: str) -> Iterator[str]:
    yield ""
    yield f"# {why}"
    yield from (f"#{line}" for line in code)


def _unlike(name: str, into: _Into) -> str:
    """A field that no other column takes."""
    taken = {*into.columns.values(), "owner", *(field_ for field_, _, _ in into.links.values())}
    return next(n for n in (name, *(f"{name}_{i}" for i in range(2, 1000))) if n not in taken)


def joined(lines: Iterable[str]) -> str:
    """The text, without blank lines in a row."""
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"
