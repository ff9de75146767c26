"""Checks of the target: what it asks of the worker's rows, what it does to them, and what else may.

What the target would refuse stops no worker at its start: such rows become dead letters, from which they can still be
written once the target takes them, while all others go on. What no row gets past is a fault of the profile (catalog).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Final

import psycopg
from psycopg import sql

from cdc_worker import catalog, ddl
from cdc_worker.catalog import Column, Columns, TargetTable, quoted
from cdc_worker.checks import Check, Finding, Look, failed, ok, unknown, warning
from cdc_worker.rules import qualified
from cdc_worker.written import Source, Written, longest_key, names, written


@dataclass(frozen=True, slots=True)
class _Target:
    """The target and what is written to it. `relation` is its name in SQL, `rules` what each of them writes.

    Its `key` is the column for change keys, if it has one. `captured` are the columns from which they write, and
    `known` is what expressions come to for each rule, once asked.
    """

    name: str
    relation: str
    key: str | None
    columns: Mapping[str, Column]
    table: TargetTable
    rules: list[Written]
    captured: Columns
    known: dict[str, Mapping[Written, bool | None]] = field(default_factory=dict)

    @property
    def alter(self) -> str:
        """How what mends it begins."""
        return f"as its owner: ALTER TABLE {self.relation}"

    def written(self, column: str) -> bool:
        """Whether the worker writes to a column."""
        return any(column in rule.values for rule in self.rules)


def _on_target(check: Callable[[Look, _Target], Iterable[Finding]]) -> Check:
    """A check that is made where there is a target."""

    @wraps(check)
    def made(look: Look) -> Iterator[Finding]:
        spec = look.profile.target
        if (fault := catalog.no_target(look.connection, spec)) is not None:
            yield unknown(fault.message, fault.fix)
            return
        name = qualified(spec.table)
        columns = catalog.columns(look.connection, name, *look.rules)
        key = catalog.key_column(spec)
        table = catalog.target_table(look.connection, spec)
        relation = sql.Identifier(*name).as_string()
        rules = list(written(look.profile))
        yield from check(look, _Target(".".join(name), relation, key, columns[name], table, rules, columns))

    return made


def otherwise(findings: Iterable[Finding], message: str) -> list[Finding]:
    """What was found, or that all is well."""
    return [*findings] or [ok(message)]


def _query(look: Look, target: _Target, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
    return look.connection.execute(query.encode(), (target.relation, *parameters)).fetchall()


def setup_would(look: Look, words: str) -> bool:
    """Whether `cdc-worker setup` has something to do, to prepare the target, in which these words stand."""
    with look.connection.transaction():
        look.connection.execute("SET LOCAL search_path = public")  # as setup has it
        steps = [step for name in look.profile.target.prepare for step in ddl.steps(ddl.schema(name)) if step.generates]
        statements = [statement for step in steps for statement in step.statements(look.connection)]
    return any(re.search(rf"(?<!\w){re.escape(words)}(?!\w)", statement) for statement in statements)


# What columns ask


@_on_target
def target(look: Look, target: _Target) -> Iterable[Finding]:
    """What the target's columns ask of a row: a value, and that it isn't too long."""
    spec = look.profile.target
    keeps = "metadata" in spec.columns.values()
    cut = sorted((target.table.lengths if keeps else spec.lengths).keys() & spec.columns.keys() - {target.key})
    said = f"; texts too long for {', '.join(cut)} are cut" if cut else ""
    said += ", and stand in the metadata whole" if cut and keeps else ""
    findings = [*_left_out(look, target), *_without_value(look, target), *_too_long(look, target)]
    return otherwise(
        findings,
        f"{target.name} takes what the profile's {len({rule.described for rule in target.rules})} rules write{said}",
    )


def _left_out(look: Look, target: _Target) -> Iterator[Finding]:
    triggers = [trigger for trigger in _triggers(look, target) if trigger.fires]
    if any(trigger.replaces for trigger in triggers):
        given = {*target.columns}  # or some of them
    else:
        given = {column for trigger in triggers for column in trigger.assigned}
    for column in target.columns.values():
        if target.written(column.name):
            if column.identity == "a" and target.table.row_security:
                yield failed(
                    f"column {column.name} is GENERATED ALWAYS: with row security, rows are inserted, and none may give"
                    " it a value",
                    f"{target.alter} ALTER COLUMN {quoted(column.name)} SET GENERATED BY DEFAULT",
                )
        elif column.required and not column.filled and column.name not in given:
            yield failed(
                f"column {column.name} must have a value, has no default, and isn't in the profile: no row is taken",
                _relaxed(look, target, column),
            )


def _without_value(look: Look, target: _Target) -> Iterator[Finding]:
    for column in target.columns.values():
        if not column.required or column.name == target.key:
            continue
        sources = [(rule, rule.values[column.name]) for rule in target.rules if column.name in rule.values]
        never = [rule for rule, source in sources if source.certain and source.samples == (None,)]
        at_times = [rule for rule, source in sources if rule not in never and _may_be_null(source, target.captured)]
        if never:
            yield failed(
                f"column {column.name} must have a value, and these rules have none, so that their rows become dead"
                f" letters: {names(never)}",
                _relaxed(look, target, column),
            )
        elif at_times:
            yield warning(
                f"column {column.name} must have a value, and these rules don't always have one; rows without become"
                f" dead letters: {names(at_times)}",
                _relaxed(look, target, column),
            )


def _may_be_null(source: Source, captured: Columns) -> bool:
    if source.certain:
        return source.samples == (None,)
    column = captured[source.column[0]].get(source.column[1]) if source.column is not None else None
    return not source.required and (source.optional or (column is not None and not column.required))


_PRIMARY: Final = """
SELECT attname::text FROM pg_index JOIN pg_attribute ON attrelid = indrelid AND attnum = ANY (indkey)
WHERE indrelid = to_regclass(%s) AND indisprimary
"""


def _relaxed(look: Look, target: _Target, column: Column) -> str:
    """What lets the worker's rows have no value in a column, and no others."""
    name = quoted(column.name)
    primary = [part for (part,) in _query(look, target, _PRIMARY)]
    if column.name in primary:
        if target.written(column.name) or primary != [column.name]:
            return f"name a table in [target] of the profile whose primary key isn't {', '.join(primary)}"
        if column.base == "uuid":
            return f"{target.alter} ALTER COLUMN {name} SET DEFAULT gen_random_uuid()"
        if column.type not in ("smallint", "integer", "bigint"):
            return f"as its owner: give {column.name} a default that is never the same twice"
        sequence = f"pg_get_serial_sequence({sql.quote(target.relation)}, {sql.quote(column.name)})"
        begin = (
            f"SELECT setval({sequence}, coalesce(max({name}), 0) + 1, false)"  # noqa: S608  # printed, with names quoted
            f" FROM {target.relation}"
        )
        return f"{target.alter} ALTER COLUMN {name} ADD GENERATED BY DEFAULT AS IDENTITY; {begin}"
    if setup_would(look, f"ALTER COLUMN {column.name} DROP NOT NULL"):
        return "cdc-worker setup"
    drop = f"ALTER COLUMN {name} DROP IDENTITY, " if column.identity else ""
    retype = f", ALTER COLUMN {name} TYPE {column.base}" if column.type != column.base else ""
    relaxed = f"{target.alter} {drop}ALTER COLUMN {name} DROP NOT NULL{retype}"
    if target.key is None:
        return relaxed
    return f"{relaxed}, ADD CHECK ({quoted(target.key)} IS NOT NULL OR {name} IS NOT NULL) NOT VALID"


def _too_long(look: Look, target: _Target) -> Iterator[Finding]:
    fields, lengths = look.profile.target.columns, target.table.lengths
    keeps = "metadata" in fields.values()
    longest = longest_key(look.profile, look.settings.worker)
    for column, length in lengths.items():
        widen = f"{target.alter} ALTER COLUMN {quoted(column)} TYPE text"
        sources = {rule: rule.values[column] for rule in target.rules if column in rule.values}
        constant = [r for r, s in sources.items() if s.certain and len(s.samples[0] or "") > length]
        if column == target.key:
            if longest > length:
                yield failed(
                    f"column {column} has {length} characters, and a key of this worker up to {longest}", widen
                )
        elif column in look.profile.target.lengths:
            continue  # it is cut
        elif constant and not (keeps and column in fields):
            yield failed(
                f"column {column} has {length} characters, too few for what these rules write; their rows become dead"
                f" letters: {names(constant)}",
                widen,
            )
        elif not keeps and (longer := [r for r, s in sources.items() if _length(s, target.captured) > length]):
            yield warning(
                f"column {column} has {length} characters, and with no metadata to keep the whole of it, what is longer"
                f" becomes a dead letter: {names(longer)}",
                widen,
            )


_DECLARED: Final = re.compile(r"\((\d+)\)$")


def _length(source: Source, captured: Columns) -> float:
    """Characters in the longest text of a source."""
    if source.certain:
        return len(source.samples[0] or "")
    column = captured[source.column[0]].get(source.column[1]) if source.column is not None else None
    if column is None:
        return max(map(len, filter(None, source.samples)), default=float("inf"))
    declared = _DECLARED.search(column.declared)
    return (int(declared[1]) if declared else float("inf")) if column.category == "S" else 0


# What is evaluated


_NOT_IMMUTABLE: Final = "SELECT count(*) FROM pg_proc WHERE provolatile <> 'i' AND proname = ANY (%s)"

_OF_THE_SESSION: Final = re.compile(r"\b(?:CURRENT_|SESSION_USER|SYSTEM_USER|LOCALTIME|USER\b)")


def _holds(look: Look, target: _Target, expression: str, rule: Written) -> bool | None:
    """What an expression over the target's columns comes to for all rows of a rule; None if that can't be told.

    A CHECK that comes to NULL holds.
    """
    if expression not in target.known:
        rows = {rule: _row(target, expression, rule) for rule in target.rules}
        found = _evaluated(look, expression, list(dict.fromkeys(row for row in rows.values() if row is not None)))
        target.known[expression] = {rule: None if row is None else found.get(row) for rule, row in rows.items()}
    return target.known[expression][rule]


def _row(target: _Target, expression: str, rule: Written) -> str | None:
    """What a rule writes to the columns of an expression, as a query; None if that can't be told."""
    row = []
    for name, column in target.columns.items():
        if not re.search(_named(name), expression):
            continue
        source = rule.values.get(name)
        if source is None:
            if column.filled or column.generated:
                return None
            value = f"NULL::{column.type}"
        elif source.certain:
            value = f"{_literal(source.samples[0])}::{column.type}"
        elif _may_be_null(source, target.captured) or re.search(_named(name), _without_tests(expression, name)):
            return None
        else:  # no matter which value
            value = "'{}'::jsonb" if column.base == "jsonb" else "'{}'::text"
        row.append(f"{value} AS {quoted(name)}")
    return f"SELECT {', '.join(row) or '1 AS one'}"


_AT_ONCE: Final = 100


def _evaluated(look: Look, expression: str, rows: Sequence[str]) -> dict[str, bool]:
    """What an expression comes to for each row of which that can be told."""
    if not rows or _OF_THE_SESSION.search(expression):
        return {}
    called = re.findall(r"(\w+)\s*\(", expression)
    if look.connection.execute(_NOT_IMMUTABLE, (called,)).fetchone() != (0,):
        return {}
    found: dict[str, bool] = {}
    for begin in range(0, len(rows), _AT_ONCE):
        part = rows[begin : begin + _AT_ONCE]
        came_to = _evaluated_at_once(look, expression, part)
        for row in part:
            found |= (came_to if came_to is not None else _evaluated_at_once(look, expression, [row])) or {}
    return found


def _evaluated_at_once(look: Look, expression: str, rows: Sequence[str]) -> dict[str, bool] | None:
    query = " UNION ALL ".join(
        f"SELECT {number}, ({expression}) IS NOT FALSE FROM ({row}) AS written"  # noqa: S608  # the catalog's
        for number, row in enumerate(rows)
    )
    try:
        with look.connection.transaction():
            look.connection.execute("SET TRANSACTION READ ONLY")
            return {rows[number]: came_to for number, came_to in look.connection.execute(query.encode())}
    except psycopg.OperationalError:
        raise
    except psycopg.DatabaseError:  # its operators want other types, or it can't be evaluated for such a row
        return None


def _named(column: str) -> str:
    return rf'(?<![\w"]){re.escape(column)}(?![\w"])|"{re.escape(column)}"'


def _without_tests(expression: str, column: str) -> str:
    """An expression without what asks of a column only whether it is NULL, or, of JSON, what it is."""
    found = re.sub(r"num_(?:non)?nulls\([^()]*\)", "", expression)
    return re.sub(rf"(?:{_named(column)}) IS (?:NOT )?NULL|jsonb_typeof\((?:{_named(column)})\)", "", found)


def _literal(value: str | None) -> str:
    return "NULL" if value is None else sql.quote(value)


_CHECKS: Final = """
SELECT conname::text, pg_get_expr(conbin, conrelid) FROM pg_constraint
WHERE conrelid = to_regclass(%s) AND contype = 'c' ORDER BY 1
"""


@_on_target
def target_checks(look: Look, target: _Target) -> Iterable[Finding]:
    """CHECK constraints that refuse what a rule writes."""
    return otherwise(_refusing(look, target), "no CHECK refuses what the profile's rules write, as far as can be told")


def _refusing(look: Look, target: _Target) -> Iterator[Finding]:
    for name, expression in _query(look, target, _CHECKS):
        if refused := [rule for rule in target.rules if _holds(look, target, expression, rule) is False]:
            relaxed = f"{target.alter} DROP CONSTRAINT {quoted(name)}"
            if target.key is not None:
                condition = f"{quoted(target.key)} IS NOT NULL OR {expression}"
                relaxed += f", ADD CONSTRAINT {quoted(name)} CHECK ({condition}) NOT VALID"
            yield failed(
                f'CHECK "{name}" refuses all that these rules write, which becomes dead letters: {names(refused)}',
                "cdc-worker setup" if setup_would(look, f"DROP CONSTRAINT {name}") else relaxed,
            )


# What is unique


_UNIQUE: Final = """
SELECT c.relname::text, format('%%I.%%I', nspname, c.relname), conname::text, contype::text,
       pg_get_constraintdef(k.oid), pg_get_indexdef(indexrelid), pg_get_expr(indpred, indrelid),
       ARRAY(SELECT attname::text FROM unnest(indkey) WITH ORDINALITY AS key (number, place)
             LEFT JOIN pg_attribute ON attrelid = indrelid AND attnum = number
             WHERE place <= indnkeyatts ORDER BY place),
       indisvalid AND indisready, indimmediate
FROM pg_index i JOIN pg_class c ON c.oid = indexrelid JOIN pg_namespace n ON n.oid = relnamespace
LEFT JOIN pg_constraint k ON conindid = indexrelid AND conrelid = indrelid AND contype IN ('p', 'u', 'x')
WHERE indrelid = to_regclass(%s) AND (indisunique OR indisexclusion)
ORDER BY 1
"""


@dataclass(frozen=True, slots=True)
class _Unique:
    """A unique index, or an excluding one, as the catalog has it. Expressions are None in `columns`."""

    name: str
    relation: str
    constraint: str | None
    kind: str | None
    constraint_definition: str | None
    definition: str
    predicate: str | None
    columns: Sequence[str | None]
    valid: bool
    immediate: bool


# Expressions have no column.
_PARTING: Final = """
SELECT CASE relkind WHEN 'p' THEN ARRAY(
    SELECT attname::text FROM pg_partitioned_table CROSS JOIN unnest(partattrs) AS part (number)
    LEFT JOIN pg_attribute ON attrelid = partrelid AND attnum = number AND number > 0
    WHERE partrelid = c.oid) END
FROM pg_class c WHERE oid = to_regclass(%s)
"""


@_on_target
def target_key(look: Look, target: _Target) -> Iterable[Finding]:
    """Whether the target takes each change once, and any number of them."""
    found = [_Unique(*row) for row in _query(look, target, _UNIQUE)]
    if target.key is None:
        clashing = [finding for index in found for finding in _clashing(look, target, index)]
        return otherwise(
            clashing, "keys have a table of their own, and nothing that the worker writes has to be unique"
        )
    ((parting,),) = _query(look, target, _PARTING)
    # Of a partitioned table, a unique index has all columns that part it: they are of the change, as its key is.
    unique = {target.key} if parting is None else {target.key, *parting}
    keys = [index for index in found if {*index.columns} == unique]
    others = [index for index in found if target.key not in index.columns]
    every = re.compile(rf"\((?:{_named(target.key)}) IS NOT NULL\)")
    findings = [finding for index in others for finding in _clashing(look, target, index)]
    if not any(
        index.valid and index.immediate and (index.predicate is None or every.fullmatch(index.predicate))
        for index in keys
    ):
        findings.append(
            failed(
                f"column {target.key} has no unique index of its own that is valid, not deferrable, and holds all keys:"
                " what is written again after a restore or a replay would be there twice",
                _made_unique(target, target.key, [index.relation for index in keys if not index.valid], parting),
            )
        )
    return otherwise(findings, f"{target.key} is unique, and nothing else that the worker writes has to be")


def _made_unique(target: _Target, column: str, invalid: Sequence[str], parting: Sequence[str | None] | None) -> str:
    """What makes the keys unique, and shows before which of them stand in its way."""
    key = quoted(column)
    if parting is not None and not all(column is not None and target.written(column) for column in parting):
        return (
            f"{target.name} is partitioned by what the worker doesn't write, and so can't be unique by {key}:"
            " in [target] of the profile, name a table that isn't"
        )
    columns = ", ".join([key, *(quoted(part) for part in parting or () if part and part != column)])
    doubles = (
        f"SELECT {columns}, count(*) FROM {target.relation} WHERE {key} IS NOT NULL"  # noqa: S608  # likewise printed
        f" GROUP BY {columns} HAVING count(*) > 1"
    )
    concurrently = " CONCURRENTLY" if parting is None else ""  # of a partitioned table there is no other
    drop = "".join(f"DROP INDEX{concurrently} {relation}; " for relation in invalid)
    return (
        f"as its owner, see which rows are there twice, and delete all but the first: {doubles}; then: {drop}"
        f"CREATE UNIQUE INDEX{concurrently} ON {target.relation} ({columns}) WHERE {key} IS NOT NULL"
    )


def _clashing(look: Look, target: _Target, index: _Unique) -> Iterator[Finding]:
    if not all(column is not None and target.written(column) for column in index.columns):
        return  # what the worker leaves out tells its rows apart, and of expressions nothing is known
    null = Source((None,), certain=True)
    concerned = [
        rule
        for rule in target.rules
        if null not in [rule.values.get(column or "") for column in index.columns]
        and (index.predicate is None or _holds(look, target, index.predicate, rule) is not False)
    ]
    if not concerned:
        return
    body = (index.constraint_definition if index.kind == "x" else index.definition) or ""
    if index.predicate is not None:
        body = body[: body.rindex(" WHERE ")]
    if index.constraint is not None:
        fix = f"{target.alter} DROP CONSTRAINT {quoted(index.constraint)}"
    else:
        fix = f"as its owner: DROP INDEX {index.relation}"
    if target.key is not None:
        own = f"{quoted(target.key)} IS NULL" + (f" AND {index.predicate}" if index.predicate is not None else "")
        added = f", ADD CONSTRAINT {quoted(index.constraint or '')} " if index.kind == "x" else "; "
        fix += f"{added}{body} WHERE ({own})"
    yield warning(
        f'"{index.name}" lets equal values of {", ".join(filter(None, index.columns))} be there once only; of the rows'
        f" that these rules write all but the first become dead letters: {names(concerned)}",
        fix,
    )


# What else is there


_FOREIGN_KEYS: Final = """
SELECT conname::text, format('%%I.%%I', nspname, relname), confdeltype::text
FROM pg_constraint JOIN pg_class c ON c.oid = confrelid JOIN pg_namespace n ON n.oid = relnamespace
WHERE conrelid = to_regclass(%s) AND contype = 'f' AND conname = ANY (%s) ORDER BY 1
"""

_ON_DELETE: Final = {
    "c": "takes its history along",
    "n": "takes it out of its history",
    "d": "takes it out of its history",
}


@_on_target
def target_foreign_keys(look: Look, target: _Target) -> Iterable[Finding]:
    """Foreign keys that hold for the worker's rows."""
    return otherwise(_linking(look, target), "no foreign key holds for what the worker writes")


def _linking(look: Look, target: _Target) -> Iterator[Finding]:
    for name, other, action in _query(look, target, _FOREIGN_KEYS, [*target.table.foreign_keys]):
        columns = ", ".join(target.table.foreign_keys[name])
        yield warning(
            f'foreign key "{name}" on {columns}: each row that the worker writes locks a row of {other}, so it'
            f" writes few at a time; and a DELETE there {_ON_DELETE.get(action, 'is refused while it has history')}",
            "cdc-worker setup"
            if setup_would(look, f"DROP CONSTRAINT {name}")
            else f"{target.alter} DROP CONSTRAINT {quoted(name)}",
        )


_TRIGGERS: Final = r"""
SELECT tgname::text, format('%%I.%%I', nspname, proname), pg_get_triggerdef(t.oid), tgenabled = 'A',
       tgtype & 1 = 0 OR tgtype & 8 <> 0, tgtype & 3 = 3,
       regexp_replace(coalesce(pg_get_function_sqlbody(p.oid), prosrc), '--[^\n]*|/\*.*?\*/', ' ', 'g')
FROM pg_trigger t JOIN pg_proc p ON p.oid = tgfoid JOIN pg_namespace n ON n.oid = pronamespace
WHERE tgrelid = to_regclass(%s) AND NOT tgisinternal AND tgenabled IN ('O', 'A')
  AND tgtype & 4 <> 0 -- of the others: FOR EACH ROW 1, BEFORE 2, DELETE 8
  AND prolang NOT IN (SELECT oid FROM pg_language WHERE lanname IN ('c', 'internal'))
ORDER BY 1
"""

_ASSIGNED: Final = re.compile(
    r"""(?:^|;|\b(?:begin|then|else|loop)\b|\binto\b(?:\s+strict\b)?)\s*new\.(?:(\w+)|"([^"]+)")\s*(?::?=|\bfrom\b|;)""",
    re.IGNORECASE,
)
_REPLACED: Final = re.compile(
    r"(?:(?:^|;|\b(?:begin|then|else|loop)\b)\s*new\s*:?=|\binto\b(?:\s+strict\b)?\s*new\s*(?:\bfrom\b|;)"
    r"|\breturn\s+(?!(?:new|old|null|coalesce\s*\(\s*new\s*,\s*old\s*\))\s*;)\S)",
    re.IGNORECASE,
)
_SKIPPED: Final = re.compile(r"\breturn\s+null\b", re.IGNORECASE)
_SKIPPED_ON_INSERT: Final = re.compile(r"\A(?!.*\btg_op\b).*\breturn\s+old\b", re.IGNORECASE | re.DOTALL)
_WHEN: Final = re.compile(r" WHEN \((.*)\) EXECUTE (?:FUNCTION|PROCEDURE) ", re.DOTALL)


@dataclass(frozen=True, slots=True)
class _Trigger:
    """A trigger that is there for INSERTs; `fires` says whether for those of the worker as well.

    It is `unconditional` if no WHEN can ask for a new row's columns. What it does to the row is in `assigned`, columns,
    and `replaces` or `skips` it whole; to others, in `later`.
    """

    name: str
    function: str
    definition: str
    always: bool
    unconditional: bool
    assigned: frozenset[str]
    replaces: bool
    skips: bool
    later: Sequence[str]
    fires: bool


def _relation(table: tuple[str, str]) -> str:
    """What a table is called in the text of a statement, as a pattern."""
    schema, name = map(re.escape, table)
    return rf'(?:only\s+)?(?:"?{schema}"?\s*\.\s*)?"?{name}"?(?!\s*\.)(?=[\s;(]|\Z)'


def _triggers(look: Look, target: _Target) -> Iterator[_Trigger]:
    itself = _relation(qualified(look.profile.target.table))
    change = r"\b(?:update|merge\s+into)\s+"
    does = {
        "change rows that are there": change + itself,
        "remove rows that are there": rf"\b(?:delete\s+from|truncate(?:\s+table)?)\s+{itself}",
    }
    for table in sorted({rule.table for rule in target.rules} - {qualified(look.profile.target.table)}):
        does[f"write {'.'.join(table)}, whose changes are recorded in turn, which may never end"] = (
            rf"(?:{change}|\binsert\s+into\s+|\bdelete\s+from\s+){_relation(table)}"
        )
    later = {what: re.compile(pattern, re.IGNORECASE) for what, pattern in does.items()}
    for name, function, definition, always, unconditional, before, source in _query(look, target, _TRIGGERS):
        assigned = [plain.lower() or quoted_ for plain, quoted_ in _ASSIGNED.findall(source)] if before else []
        when = _WHEN.search(definition)
        yield _Trigger(
            name,
            function,
            definition,
            always,
            unconditional,
            frozenset(assigned),
            before and _REPLACED.search(source) is not None,
            before and any(skipped.search(source) for skipped in (_SKIPPED, _SKIPPED_ON_INSERT)),
            [what for what, pattern in later.items() if pattern.search(source)],
            fires=when is None or not _passes_by(look, target, when[1]),
        )


def _passes_by(look: Look, target: _Target, condition: str) -> bool:
    """Whether a WHEN is never true of the worker's rows."""
    own = target.key is not None and re.search(rf'new\."?{re.escape(target.key)}"? IS NULL', condition)
    if own and " OR " not in condition:
        return True
    expression = re.sub(r"\bnew\.", "", condition)
    return all(_holds(look, target, expression, rule) is False for rule in target.rules)


_RULES: Final = """
SELECT rulename::text FROM pg_rewrite
WHERE ev_class = to_regclass(%s) AND ev_type = '3' AND is_instead AND ev_enabled IN ('O', 'A') ORDER BY 1
"""


@_on_target
def target_triggers(look: Look, target: _Target) -> Iterable[Finding]:
    """Triggers and rules that change, or leave out, what the worker writes."""
    return otherwise(_changing(look, target), "no trigger changes what the worker writes, as far as their text tells")


def _changing(look: Look, target: _Target) -> Iterator[Finding]:
    for trigger in _triggers(look, target):
        changed = sorted(column for column in trigger.assigned if target.written(column))
        done = [f"sets {', '.join(changed)}"] if changed else []
        done += ["may change any column"] if trigger.replaces else []
        done += ["may leave a row out without an error"] if trigger.skips else []
        done += [f"may {what}" for what in trigger.later]
        if trigger.fires and done:
            yield warning(
                f'trigger "{trigger.name}" ({trigger.function}) {" and ".join(done)}, also of what the worker writes',
                "cdc-worker setup" if setup_would(look, f"TRIGGER {trigger.name}") else _conditional(target, trigger),
            )
    # COPY passes rules by.
    for (name,) in _query(look, target, _RULES) if target.table.row_security else ():
        yield warning(
            f'rule "{name}" does something else in place of the INSERTs that the worker sends under row security',
            f"as its owner: DROP RULE {quoted(name)} ON {target.relation}",
        )


def _conditional(target: _Target, trigger: _Trigger) -> str:
    """What keeps a trigger from the worker's rows, and leaves it to all others."""
    if target.key is None:
        return f"as its owner: have {trigger.function} leave rows as they are that the worker's role inserts"
    if trigger.unconditional:
        return f"as its owner: have {trigger.function} leave rows as they are that have a {target.key}"
    condition = f"new.{quoted(target.key)} IS NULL"
    definition = trigger.definition.replace("CREATE TRIGGER", "CREATE OR REPLACE TRIGGER", 1)
    if definition.startswith("CREATE CONSTRAINT"):  # which nothing replaces
        definition = f"DROP TRIGGER {quoted(trigger.name)} ON {target.relation}; {definition}"
    if _WHEN.search(definition):
        definition = definition.replace(" WHEN (", f" WHEN ({condition} AND ", 1)
    else:
        definition = definition.replace(" FOR EACH ROW ", f" FOR EACH ROW WHEN ({condition}) ", 1)
    enable = f"; ALTER TABLE {target.relation} ENABLE ALWAYS TRIGGER {quoted(trigger.name)}" if trigger.always else ""
    return f"as its owner: {definition}{enable}"


_POLICIES: Final = """
SELECT count(*) FROM pg_policy
WHERE polrelid = to_regclass(%s) AND polpermissive AND polcmd IN ('a', '*')
  AND EXISTS (SELECT FROM unnest(polroles) AS of WHERE of = 0 OR pg_has_role(of, 'USAGE'))
"""


@_on_target
def row_security(look: Look, target: _Target) -> Iterable[Finding]:
    """Whether policies of the target hold for the worker."""
    role = look.server.role
    if not target.table.row_security:
        yield ok(f'none of {target.name} holds for the role "{role}"')
        return
    fix = f"as a superuser: ALTER ROLE {quoted(role)} BYPASSRLS"
    ((policies,),) = _query(look, target, _POLICIES)
    if policies:
        yield warning(
            f'row security of {target.name} holds for the role "{role}": rows are inserted, which is slower than'
            " to copy them, and what a policy refuses becomes a dead letter",
            fix,
        )
    else:
        yield failed(
            f'row security of {target.name} holds for the role "{role}", and no policy lets it insert anything',
            fix,
        )


_TRUNCATORS: Final = """
WITH RECURSIVE reaching AS (
    SELECT conrelid, confrelid FROM pg_constraint WHERE contype = 'f' AND conrelid = to_regclass(%s)
    UNION
    SELECT c.conrelid, c.confrelid FROM reaching r JOIN pg_constraint c ON c.conrelid = r.confrelid AND contype = 'f'
)
SELECT CASE grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(rolname) END,
       ARRAY(SELECT DISTINCT confrelid::regclass::text FROM reaching WHERE confrelid <> c.oid AND EXISTS (
           SELECT FROM pg_roles other
           WHERE NOT other.rolsuper AND (grantee = 0 OR pg_has_role(other.oid, grantee, 'USAGE'))
             AND has_table_privilege(other.oid, confrelid, 'TRUNCATE')) ORDER BY 1)
FROM pg_class c, aclexplode(coalesce(relacl, acldefault('r', relowner))) LEFT JOIN pg_roles r ON r.oid = grantee
WHERE c.oid = (SELECT conrelid FROM reaching LIMIT 1) AND privilege_type = 'TRUNCATE' AND rolsuper IS NOT TRUE
ORDER BY 1
"""


@_on_target
def truncate(look: Look, target: _Target) -> Iterable[Finding]:
    """Who may empty the target by a TRUNCATE … CASCADE of another table, which nothing else keeps from it."""
    found = [(role, tables) for role, tables in _query(look, target, _TRUNCATORS) if tables]
    if not found:
        return [ok(f"no role but superusers empties {target.name} with a TRUNCATE … CASCADE of another table")]
    roles = [role for role, _ in found]
    reaching = sorted({table for _, tables in found for table in tables})
    fix = "; ".join(f"REVOKE TRUNCATE ON {target.relation} FROM {role}" for role in roles)
    return [
        warning(
            f"a TRUNCATE … CASCADE of {' or '.join(reaching)} empties {target.name} as well, and these roles may"
            f" do that: {', '.join(roles)}",
            f"as its owner: {fix}",
        )
    ]


CHECKS: Final[tuple[Check, ...]] = (
    target,
    target_checks,
    target_key,
    target_foreign_keys,
    target_triggers,
    row_security,
    truncate,
)
