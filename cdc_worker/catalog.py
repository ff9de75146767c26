"""What the database's catalog says of the profile's tables, and whether the two fit each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Final, Literal

import psycopg
from psycopg import sql

from cdc_worker import errors, pgoutput, values, wal2json
from cdc_worker.config import known_time_zone
from cdc_worker.errors import Place
from cdc_worker.postgres import Connection, fetch_one
from cdc_worker.profile import Condition, Constant, Match, Matcher, Profile, Rule, Table, Target
from cdc_worker.rules import Rules, other_lookup, qualified
from cdc_worker.templates import text
from cdc_worker.values import Value
from cdc_worker.written import Source, Written, names, written

_COLUMNS: Final = """
WITH RECURSIVE relation AS (
    SELECT schema, name, to_regclass(format('%%I.%%I', schema, name)) AS oid
    FROM unnest(%s::text[], %s::text[]) AS asked (schema, name)
), base AS (
    SELECT attrelid, attnum, atttypid AS oid FROM pg_attribute
    WHERE attrelid IN (SELECT oid FROM relation) AND attnum > 0 AND NOT attisdropped
    UNION ALL
    SELECT attrelid, attnum, typbasetype FROM base JOIN pg_type USING (oid) WHERE typtype = 'd'
)
SELECT schema, relation.name, attname::text, a.atttypid::regtype::text, t.oid::regtype::text, t.typcategory::text,
       format_type(a.atttypid, a.atttypmod),
       attnotnull OR EXISTS (SELECT FROM base d JOIN pg_type USING (oid)
                             WHERE (d.attrelid, d.attnum) = (a.attrelid, a.attnum) AND typnotnull),
       atthasdef OR attidentity <> '' OR EXISTS (
           SELECT FROM base d JOIN pg_type USING (oid)
           WHERE (d.attrelid, d.attnum) = (a.attrelid, a.attnum) AND typdefault IS NOT NULL),
       attidentity::text, attgenerated::text, ARRAY(SELECT enumlabel::text FROM pg_enum WHERE enumtypid = t.oid)
FROM base JOIN pg_type t USING (oid) JOIN pg_attribute a USING (attrelid, attnum)
JOIN relation ON relation.oid = attrelid
WHERE t.typtype <> 'd'
ORDER BY attrelid, attnum
"""


@dataclass(frozen=True, slots=True)
class Column:
    """A column as the catalog has it. `type` is its type, `base` the one below domains, `declared` has its modifier.

    `category` is that of `base`, as in pg_type; `labels` it has if it is an enum. It is `filled` if who leaves it out
    gets more than a NULL; its `identity` is as in pg_attribute, and so is how it is `generated`, if it is.
    """

    name: str
    type: str
    base: str
    category: str
    declared: str
    required: bool
    filled: bool
    identity: str
    generated: str
    labels: list[str]


Columns = Mapping[tuple[str, str], Mapping[str, Column]]
"""The columns of tables, by (schema, name) and by their own."""


def columns(connection: Connection, *tables: tuple[str, str]) -> Columns:
    """The columns of tables; of one that isn't there, none."""
    found: dict[tuple[str, str], dict[str, Column]] = {table: {} for table in tables}
    for schema, table, *column in connection.execute(_COLUMNS, ([s for s, _ in found], [name for _, name in found])):
        found[schema, table][column[0]] = Column(*column)
    return found


_OIDS: Final = {
    "boolean": values.BOOLEAN,
    "smallint": values.SMALLINT,
    "integer": values.INTEGER,
    "bigint": values.BIGINT,
    "oid": values.OID,
    "numeric": values.NUMERIC,
    "real": values.REAL,
    "double precision": values.DOUBLE,
    "bytea": values.BYTEA,
}


def value(printed: bytes | None, column: Column) -> Value:
    """A column's value as the stream has it, from how Postgres prints it. What is of a domain comes as text there."""
    return None if printed is None else values.value(_OIDS.get(column.type, 0), printed.decode())


# By these names types are of the length one.
_UNBOUNDED: Final = {"character": "bpchar", "bit": "varbit"}


def cast(column: Column) -> sql.SQL:
    """The type that a value is read as which a column is compared with: one that cuts nothing off."""
    return sql.SQL(_UNBOUNDED.get(column.base, column.base))


# Of a partitioned table its partitions, which store its rows.
_UNDECODED: Final = """
WITH RECURSIVE part AS (
    SELECT to_regclass(format('%%I.%%I', %s::text, %s::text))::oid AS oid, true AS whole
    UNION ALL
    SELECT inhrelid, false FROM part JOIN pg_partitioned_table ON partrelid = oid JOIN pg_inherits ON inhparent = oid
)
SELECT whole, nspname || '.' || relname,
       CASE WHEN relkind IN ('v', 'm') THEN 'a view: it has no changes of its own'
            WHEN relkind = 'f' THEN 'foreign: its changes are another server''s'
            WHEN relkind <> 'r' THEN 'no table'
            WHEN relpersistence = 'u' THEN 'unlogged: its changes are not in the WAL'
            WHEN relpersistence = 't' THEN 'temporary: its changes are not in the WAL' END,
       CASE WHEN relkind IN ('v', 'm') THEN 'capture the tables that it shows in its place'
            WHEN relkind = 'f' THEN 'capture it there'
            WHEN relpersistence = 'u' THEN format('as its owner: ALTER TABLE %%I.%%I SET LOGGED', nspname, relname)
            ELSE 'capture another one in its place' END
FROM part JOIN pg_class c USING (oid) JOIN pg_namespace n ON n.oid = relnamespace
WHERE relkind <> 'p' AND (relkind, relpersistence) <> ('r', 'p')
ORDER BY 2
"""


@dataclass(frozen=True, slots=True)
class TargetTable:
    """What the sink must know of the table that it writes to, beyond what the profile says.

    `columns` are all of its columns, with their types; `lengths` are in characters, of the columns that have one, by
    their type or by the profile.
    `foreign_keys` are the constraints, with their columns, that hold for what the worker writes: each of its rows
    locks the row that it refers to. A target that setup prepared has none. `referred` are the tables that any foreign
    key refers to: these are locked for a moment with each row, whatever the row has in the key's columns. Where no
    column takes the change keys, `numbered` is its primary key, with the sequence that it comes from, if it does.
    `shape` is what `shape` tells. If it has `rules` on INSERT, that does something else than a COPY.
    """

    columns: dict[str, str]
    lengths: dict[str, int]
    foreign_keys: dict[str, tuple[str, ...]]
    deferrable: bool
    row_security: bool
    deadlock_timeout: float
    shape: str
    numbered: tuple[str, str] | None = None
    referred: tuple[tuple[str, str], ...] = ()
    rules: bool = False


_LENGTHS: Final = """
WITH RECURSIVE type AS (
    SELECT attname, atttypid AS oid, atttypmod AS modifier
    FROM pg_attribute
    WHERE attrelid = to_regclass(format('%%I.%%I', %s::text, %s::text)) AND attnum > 0 AND NOT attisdropped
    UNION ALL
    SELECT attname, typbasetype, typtypmod FROM type JOIN pg_type USING (oid) WHERE typtype = 'd'
)
SELECT attname, modifier - 4 FROM type WHERE oid IN ('varchar'::regtype, 'bpchar'::regtype) AND modifier > 0
"""

_FOREIGN_KEYS: Final = """
SELECT conname, (SELECT array_agg(attname::text) FROM pg_attribute WHERE attrelid = conrelid AND attnum = ANY (conkey))
FROM pg_constraint
WHERE conrelid = to_regclass(format('%%I.%%I', %s::text, %s::text)) AND contype = 'f'
"""

_REFERRED: Final = """
SELECT DISTINCT nspname::text, relname::text
FROM pg_constraint c JOIN pg_class r ON r.oid = confrelid JOIN pg_namespace n ON n.oid = relnamespace
WHERE conrelid = to_regclass(format('%%I.%%I', %s::text, %s::text)) AND contype = 'f' ORDER BY 1, 2
"""

_TARGET: Final = """
SELECT EXISTS (SELECT FROM pg_constraint WHERE conrelid = target AND condeferrable), row_security_active(target),
       extract(epoch FROM current_setting('deadlock_timeout')::interval)::float,
       EXISTS (SELECT FROM pg_rewrite WHERE ev_class = target AND ev_type = '3')
FROM to_regclass(format('%%I.%%I', %s::text, %s::text)) AS target
"""

# A sequence may have been left with a column that has its values from elsewhere.
_NUMBERED: Final = """
SELECT attname::text, pg_get_serial_sequence(name, attname)
FROM format('%%I.%%I', %s::text, %s::text) AS name
JOIN pg_index ON indrelid = to_regclass(name) AND indisprimary AND indnkeyatts = 1
JOIN pg_attribute ON attrelid = indrelid AND attnum = indkey[0]
LEFT JOIN pg_attrdef d ON adrelid = attrelid AND adnum = attnum
WHERE attidentity <> '' OR (
    pg_get_expr(adbin, adrelid) ~ '^nextval\\(''[^'']+''::regclass\\)$'
    AND EXISTS (SELECT FROM pg_depend WHERE classid = 'pg_attrdef'::regclass AND objid = d.oid
                AND refobjid = pg_get_serial_sequence(name, attname)::regclass))
"""


def key_column(target: Target) -> str | None:
    """The target's column for change keys; None where they are in cdc_worker.written_key."""
    return next((column for column, field in target.columns.items() if field == "change_key"), None)


def zoned(target: Target, table: TargetTable) -> bool:
    """Whether the target's column for when something happened has a zone."""
    dates = (column for column, of in target.columns.items() if of == "occurred_at")
    return table.columns.get(next(dates, "")) == "timestamp with time zone"


# Not analysed, the table would be read in the order of its keys until the row's number comes: OFFSET 0 forbids that.
_KEY: Final = sql.SQL(
    "(SELECT max(change_key) FROM (SELECT change_key FROM cdc_worker.written_key"
    " WHERE table_name = {name} AND row_id = {table}.{column} OFFSET 0) AS own)"
)


def row_key(target: Target, table: TargetTable) -> sql.Composable | None:
    """A row's change key in SQL, NULL where the row is not a worker's. None if that can't be told."""
    if (column := key_column(target)) is not None:
        return sql.Identifier(column)
    if table.numbered is None:
        return None
    name = qualified(target.table)
    return _KEY.format(name=".".join(name), table=sql.Identifier(*name), column=sql.Identifier(table.numbered[0]))


def number(connection: Connection, target: Target) -> tuple[str, str] | None:
    """The primary key of the target, with the sequence that it comes from, if it does."""
    found = connection.execute(_NUMBERED, qualified(target.table)).fetchone()
    return None if found is None else (found[0], found[1])


def target_table(connection: Connection, target: Target) -> TargetTable:
    """What there is to know of a target, if it is there."""
    table = qualified(target.table)
    written = target.columns.keys() | target.constants.keys()
    types = {name: column.type for name, column in columns(connection, table)[table].items()}
    lengths: dict[str, int] = dict(connection.execute(_LENGTHS, table).fetchall())
    lengths |= {column: min(length, lengths.get(column, length)) for column, length in target.lengths.items()}
    foreign_keys = {
        name: tuple(own)
        for name, own in connection.execute(_FOREIGN_KEYS, table)
        if not written.isdisjoint(own)  # others are on columns that the worker leaves alone
    }
    referred = tuple((schema, name) for schema, name in connection.execute(_REFERRED, table))
    numbered: tuple[str, str] | None = None
    if key_column(target) is None:
        found = number(connection, target)
        if found is not None and found[0] not in written:
            numbered = found
    deferrable, row_security, deadlock_timeout, rules = fetch_one(connection, _TARGET, *table)
    ((told,),) = connection.execute(shape(target))
    return TargetTable(
        types, lengths, foreign_keys, deferrable, row_security, deadlock_timeout, told, numbered, referred, rules
    )


_SHAPE: Final = sql.SQL("""
SELECT coalesce(string_agg(concat_ws(' ', quote_ident(attname), atttypid::oid, atttypmod, attnotnull, atthasdef,
                                     attidentity, attgenerated), ', ' ORDER BY attnum), '')
FROM pg_attribute
WHERE attrelid = to_regclass(format('%I.%I', {}::text, {}::text)) AND attnum > 0 AND NOT attisdropped
""")


def shape(target: Target) -> sql.Composed:
    """The query of a target's columns, with all that decides on which values they take, in one text."""
    return _SHAPE.format(*qualified(target.table))


def check(
    connection: Connection,
    profile: Profile,
    rules: Rules,
    *,
    plugin: str | None = None,
    tell: Callable[[list[str]], None] | None = None,
) -> TargetTable:
    """Hold a profile against the database, and the plugin; returns what there is to know of its target.

    CatalogMismatchError has every fault with which a table, or a rule, would come to nothing. Where those of captured
    tables are no reason to stop, `tell` hears of them.
    """
    certain = [fault for fault in faults(connection, profile, rules, plugin=plugin) if fault.certain]
    if tell is not None:
        tell([fault.message for fault in certain if fault.captured])
        certain = [fault for fault in certain if not fault.captured]
    if certain:
        lines = "\n".join(f"  {fault.message}" for fault in certain)
        raise errors.CatalogMismatchError(
            f'profile "{profile.name}" does not fit the database:\n{lines}',
            hint="mend the profile, or run: cdc-worker setup; of each fault tells: cdc-worker doctor",
        )
    return target_table(connection, profile.target)


@dataclass(frozen=True, slots=True)
class Fault:
    """Where a profile and the database disagree, and what mends it. If it isn't `certain`, some rows would do.

    `missing` are columns that the table, or the stream, doesn't have. It is about a `captured` table, or about the
    target; `place` is where in the profile.
    """

    message: str
    fix: str
    certain: bool = True
    missing: tuple[str, ...] = ()
    captured: bool = False
    place: Place = ("target",)


def faults(connection: Connection, profile: Profile, rules: Rules, *, plugin: str | None = None) -> Iterator[Fault]:
    """Where a profile and the database disagree, and what the plugin doesn't send. None stands for either of them."""
    captured = columns(connection, *rules)
    for table in rules.values():
        name = ".".join(table.name)
        found = captured[table.name]
        where, place = f"[tables.{section(table.name)}] of the profile", _place(profile, table.name)
        if not found:
            message = f"captured table {name} does not exist"
            yield Fault(message, f"rename {where}, or take it out", captured=True, place=place)
        elif missing := tuple(sorted(table.columns - found.keys())):
            message = f"captured table {name} has no column {', '.join(missing)}"
            fix = f"name columns that it has in {where}"
            yield Fault(message, fix, missing=missing, captured=True, place=place)
        for whole, part, fate, fix in connection.execute(_UNDECODED, table.name).fetchall():
            described = f"captured table {name}" if whole else f"partition {part} of captured table {name}"
            yield Fault(f"{described} is {fate}", fix, certain=whole, captured=True, place=place)
    yield from _never_sent(connection, profile, rules, captured, plugin)
    yield from _never_told(connection, profile, captured)
    yield from _never_found(connection, profile, captured)
    yield from _half_seen(connection, profile, rules, captured)
    yield from _target_faults(connection, profile, captured)


_STORED_SENT: Final = 180000
"""From this version on pgoutput sends stored generated columns."""


def _never_sent(
    connection: Connection, profile: Profile, rules: Rules, captured: Columns, plugin: str | None
) -> Iterator[Fault]:
    """Generated columns that rules name, and whose values don't come."""
    for table in rules.values():
        name, found = ".".join(table.name), captured[table.name]
        used = [found[column] for column in sorted((table.columns - table.ignored) & found.keys())]
        fix, place = "name the columns that it is made of in its place", _place(profile, table.name)
        if virtual := tuple(column.name for column in used if column.generated == "v"):
            yield Fault(
                f"captured table {name} has {', '.join(virtual)} as a virtual generated column, which no plugin sends",
                fix,
                missing=virtual,
                captured=True,
                place=place,
            )
        stored = tuple(column.name for column in used if column.generated == "s")
        if stored and connection.info.server_version < _STORED_SENT and plugin != wal2json.PLUGIN:
            yield Fault(
                f"captured table {name} has {', '.join(stored)} as a generated column, which pgoutput doesn't send"
                " before PostgreSQL 18",
                fix,
                certain=plugin is not None,
                missing=stored,
                captured=True,
                place=place,
            )


def as_told(connection: Connection, profile: Profile, rules: Rules, plugin: str | None) -> Profile:
    """A profile that ignores what a plugin doesn't tell: changes of generated columns. Rules name none of them."""
    if plugin != pgoutput.PLUGIN or connection.info.server_version >= _STORED_SENT:
        return profile
    captured, tables = columns(connection, *rules), dict(profile.tables)
    for name, table in profile.tables.items():
        found = captured[qualified(name)]
        untold = {column for column in found if found[column].generated} - rules[qualified(name)].columns
        tables[name] = table.model_copy(update={"ignored": [*table.ignored, *sorted(untold)]})
    return profile.model_copy(update={"tables": tables})


def _half_seen(connection: Connection, profile: Profile, rules: Rules, captured: Columns) -> Iterator[Fault]:
    """Tables that are looked into, and not as they are."""
    for table in rules.values():
        if not (table.looked_up and captured[table.name]):
            continue
        name, place = ".".join(table.name), _place(profile, table.name)
        where = f"[tables.{section(table.name)}] of the profile"
        if not table.key:
            yield Fault(
                f"table {name} is looked into without a key: what the stream tells of its rows is not remembered",
                f'give {where} its "key"',
                certain=False,
                place=place,
            )
        if connection.execute(_ROW_SECURITY, table.name).fetchone() == (True,):
            yield Fault(
                f"row security is on for table {name}, which is looked into: rows that it hides are taken as missing",
                f"as its owner: CREATE POLICY cdc_worker ON {sql.Identifier(*table.name).as_string()} FOR SELECT"
                f" TO {sql.Identifier(connection.info.user).as_string()} USING (true)",
                certain=False,
                place=place,
            )


_ROW_SECURITY: Final = "SELECT row_security_active(to_regclass(format('%%I.%%I', %s::text, %s::text)))"


def section(table: tuple[str, str]) -> str:
    """A table's key in a profile."""
    return table[1] if table[0] == "public" else f'"{".".join(table)}"'


def _place(profile: Profile, table: tuple[str, str]) -> Place:
    """Where a profile has a table: in a section of its own, or in the first lookup that looks for its rows."""
    lookups = (("tables", name, "lookups", of) for name, spec in profile.tables.items() for of in spec.lookups)
    sections: Iterator[Place] = (("tables", name) for name in profile.tables if qualified(name) == table)
    looked_up = (at for at in lookups if qualified(profile.tables[at[1]].lookups[at[3]].table) == table)
    return next(sections, None) or next(looked_up, ())


def _never_told(connection: Connection, profile: Profile, captured: Columns) -> Iterator[Fault]:
    """Rules that wait for a value which their column can never have."""
    for name, table in profile.tables.items():
        for number, rule in enumerate(table.rules):
            place = ("tables", name, "rules", number)
            described = f"rule {rule.label} of {'.'.join(qualified(name))}"
            for column, constants in _awaited(rule):
                of = captured[qualified(name)].get(column)
                if of is None or column in table.mapped or any(_can_be(connection, of, c) for c in constants):
                    continue
                what = " or ".join(f'"{text(constant)}"' for constant in constants)
                yield Fault(
                    f"{described} is about {column} = {what}, which a {of.declared} is never",
                    _writable(of),
                    captured=True,
                    place=place,
                )
            for column in dict.fromkeys([*rule.delta, *(_moving(rule.when) if rule.when else ())]):
                of = captured[qualified(name)].get(column)
                if of is not None and of.base not in _NUMBERS:
                    yield Fault(
                        f"{described} is about how much {column} changes, which is no number but a {of.declared}",
                        'name a column of numbers in the "delta" of the rule',
                        captured=True,
                        place=(*place, "delta", column),
                    )


def _never_found(connection: Connection, profile: Profile, captured: Columns) -> Iterator[Fault]:
    """Lookups by values that their columns can't have, or that the stream tells in another way than ours."""
    for name, table in profile.tables.items():
        for of, lookup in table.lookups.items():
            described, place = f"lookup {of} of {'.'.join(qualified(name))}", ("tables", name, "lookups", of)
            their_table = ".".join(qualified(lookup.table))
            found = captured[qualified(lookup.table)]
            for column, constant in lookup.where.items():
                if column in found and not _can_be(connection, found[column], constant):
                    yield Fault(
                        f'{described} is about {column} = "{text(constant)}" of {their_table},'
                        f" which a {found[column].declared} is never",
                        _writable(found[column]),
                        captured=True,
                        place=place,
                    )
            for theirs, ours in lookup.match.items():
                own = _own(table, captured, qualified(name), ours)
                if own is not None and theirs in found and _printed_as(own) != _printed_as(found[theirs]):
                    yield Fault(
                        f"{described} finds {theirs} of {their_table}, of the type {found[theirs].declared}, by {ours},"
                        f" of the type {own.declared}: what the stream tells of both is never the same",
                        "match columns of one type",
                        captured=True,
                        place=place,
                    )


def _own(table: Table, captured: Columns, name: tuple[str, str], ours: str) -> Column | None:
    """The column from which a lookup starts, if there is one."""
    other = other_lookup(ours)
    if other is not None:
        return captured[qualified(table.lookups[other[0]].table)].get(other[1])
    return None if ours in table.mapped else captured[name].get(ours)


def _printed_as(column: Column) -> str:
    """What the values have in common of columns whose equal values are the same to the stream."""
    if column.type in _EXACT_NUMBERS:
        return "a number"
    if column.base in ("text", "character varying"):
        return "a text"
    # Numbers and booleans of a domain come as text, which has its own ways to be equal.
    return column.base if column.base not in (*_NUMBERS, "boolean") else column.type


def _awaited(rule: Rule) -> Iterator[tuple[str, list[Constant]]]:
    """The columns that must have one of certain values, and these."""
    compared = [*rule.from_.items(), *rule.to.items()]
    if rule.when is not None:
        compared += _all_compared(rule.when)
    for column, matcher in compared:
        values = matcher if isinstance(matcher, list) else [matcher]
        constants = [value for value in values if not isinstance(value, Match)]
        if len(constants) == len(values):
            yield column, constants


def _all_compared(condition: Condition) -> list[tuple[str, Matcher]]:
    """The columns of the captured table that a condition compares whatever else holds."""
    own = [*condition.old.items(), *condition.new.items(), *condition.row.items()]
    return own + [pair for one in condition.all for pair in _all_compared(one)]


def _writable(column: Column) -> str:
    """What to do about a constant that a column never has."""
    if column.type == "boolean":
        return "write true or false there, without quotes"
    if column.type in _NUMBERS:
        return "write a number there, without quotes"
    return f"write a value of {column.declared} there, in quotes, as PostgreSQL prints it"


def _moving(condition: Condition) -> Iterator[str]:
    """The columns of which a condition says by how much they change."""
    yield from condition.delta
    for one in (*condition.all, *(condition.any or ()), *([condition.not_] if condition.not_ else ())):
        yield from _moving(one)


_PRINTED: Final = "SELECT format('%%s', %s::{})"


def _can_be(connection: Connection, column: Column, value: Constant) -> bool:
    """Whether a decoded value of the column can equal a constant of a profile."""
    if column.type == "boolean":
        return isinstance(value, bool)
    if column.type in _NUMBERS:
        return not isinstance(value, (bool, str))
    if not isinstance(value, str):
        return False
    try:
        (printed,) = connection.execute(_PRINTED.format(column.declared).encode(), (value,)).fetchone() or (None,)
    except psycopg.errors.InsufficientPrivilege:
        return not column.labels or value in column.labels
    except (psycopg.DataError, psycopg.IntegrityError):
        return False
    except psycopg.OperationalError:
        raise
    except psycopg.DatabaseError:  # a function of the type's own raised it, or there is no such object as yet
        return True
    # Texts and enums print as they are written, but for what a length does to them; others can be written in many ways.
    return column.category not in ("S", "E") or printed == value


INTEGERS: Final = ("smallint", "integer", "bigint", "oid")
_FLOATS: Final = ("real", "double precision")
_EXACT_NUMBERS: Final = (*INTEGERS, "numeric")
_NUMBERS: Final = (*_EXACT_NUMBERS, *_FLOATS)

_SAMPLES: Final = {
    "smallint": ("1", "32767"),
    "integer": ("1", "20010203", "2147483647"),
    "bigint": ("1", "20010203", "9223372036854775807"),
    "oid": ("1", "4294967295"),
    "numeric": ("1", "0.5"),
    "real": ("1", "0.5"),
    "double precision": ("1", "0.5"),
    "boolean": ("t", "f"),
    "uuid": ("00000000-0000-0000-0000-000000000000",),
    "date": ("2001-02-03",),
    "timestamp without time zone": ("2001-02-03 04:05:06",),
    "timestamp with time zone": ("2001-02-03 04:05:06+00",),
    "json": ("{}", "[]"),
    "jsonb": ("{}", "[]"),
}
"""Values of each type, of which another type that is to take them should read all."""


# COPY goes into a view only where a trigger is there INSTEAD OF (64) an INSERT (4).
_KIND: Final = """
SELECT CASE WHEN relkind IN ('v', 'm') THEN
                CASE WHEN told THEN 'a view: nothing in it is unique, and what its trigger does can''t be told'
                ELSE 'a view: it takes no rows' END
            WHEN relkind = 'f' THEN 'foreign: a crash between the commits of both servers loses or doubles rows'
            WHEN relkind NOT IN ('r', 'p') THEN 'no table' END, NOT told
FROM pg_class c, LATERAL (SELECT EXISTS (
    SELECT FROM pg_trigger WHERE tgrelid = c.oid AND tgtype & 68 = 68 AND tgenabled IN ('O', 'A'))) AS trigger (told)
WHERE c.oid = to_regclass(format('%%I.%%I', %s::text, %s::text))
"""


def no_target(connection: Connection, target: Target) -> Fault | None:
    """Why there is no table to write to, if so."""
    table = qualified(target.table)
    name = ".".join(table)
    found = connection.execute(_KIND, table).fetchone()
    if found is None:
        fix = "cdc-worker setup" if target.prepare else "make it, or name another one in [target] of the profile"
        return Fault(f"target table {name} does not exist", fix)
    kind, certain = found
    fix = "in [target] of the profile, name the table where the rows are to be"
    return None if kind is None else Fault(f"target {name} is {kind}", fix, certain=certain)


# Of what isn't partitioned, pg_partition_tree has nothing.
_PARTS: Final = """
SELECT nspname::text, relname::text, format('%%I.%%I', nspname, relname), relkind = 'r', relpersistence::text
FROM to_regclass(format('%%I.%%I', %s::text, %s::text)) AS target
JOIN pg_class c ON c.oid = target OR c.oid IN (SELECT relid FROM pg_partition_tree(target))
JOIN pg_namespace n ON n.oid = relnamespace
ORDER BY c.oid <> target, 1, 2
"""


def _target_parts(connection: Connection, profile: Profile) -> Iterator[Fault]:
    """What of the target, or of its partitions, gets lost, or comes back as a change."""
    inserts = {qualified(name) for name, table in profile.tables.items() for r in table.rules if "insert" in r.on}
    for schema, relname, relation, stores, persistence in connection.execute(_PARTS, qualified(profile.target.table)):
        name = f"{schema}.{relname}"
        if (schema, relname) in inserts:
            yield Fault(
                f"target table {name} is captured, with a rule on insert: each activity would make another, for ever",
                f"take the rules on insert out of [tables.{section((schema, relname))}] of the profile",
            )
        if stores and persistence == "u":
            yield Fault(
                f"target table {name} is unlogged: a crash of the server empties it, and nothing is written again",
                f"as its owner: ALTER TABLE {relation} SET LOGGED",
            )
        elif stores and persistence == "t":
            yield Fault(
                f"target table {name} is temporary: it is gone with its session",
                "name another one in [target] of the profile",
            )


_NO_KEYS: Final = "SELECT to_regclass('cdc_worker.written_key') IS NULL"


def _target_faults(connection: Connection, profile: Profile, captured: Columns) -> Iterator[Fault]:
    target, table = profile.target, qualified(profile.target.table)
    name, relation = ".".join(table), sql.Identifier(*table).as_string()
    alter = f"as its owner: ALTER TABLE {relation}"
    if (fault := no_target(connection, target)) is not None:
        yield fault
        if fault.certain:
            return
    yield from _target_parts(connection, profile)
    if target.time_zone is not None:
        try:
            known_time_zone(target.time_zone)
        except ValueError as error:
            yield Fault(f"the target's time zone: {error}", "name another one in [target] of the profile")
    if key_column(target) is None and fetch_one(connection, _NO_KEYS) == (True,):
        yield Fault(f"{name} has no column for change keys, and there is no table for them", "cdc-worker setup")
    found = columns(connection, table)[table]
    rules = list(written(profile))
    sources: dict[tuple[str, Source], list[Written]] = {}
    for rule in rules:
        for column, source in rule.values.items():
            sources.setdefault((column, source), []).append(rule)
    if missing := sorted({*target.columns, *target.constants} - found.keys()):
        # Where rules differ, a column of a captured table tells most.
        told = sorted(sources, key=lambda of: of[1].column is not None)
        types = {column: _wanted(target, column, source, captured) for column, source in told}
        added = ", ".join(f"ADD COLUMN {quoted(c)} {types.get(c, 'text')}" for c in missing)
        message = f"target table {name} has no column {', '.join(missing)}"
        yield Fault(message, f"{alter} {added}", missing=(*missing,), place=_column(target, missing[0]))
    for (to, source), by in sources.items():
        if to not in found:
            continue
        if found[to].generated:
            if source is rules[0].values[to]:  # once
                message = f"target column {name}.{to} is generated, and takes no values"
                fix = f"{alter} ALTER COLUMN {quoted(to)} DROP EXPRESSION"
                yield Fault(message, fix, place=_column(target, to))
        elif (misfit := _misfit(connection, source, found[to], captured)) is not None:
            taker, certain = found[to], misfit == "none"
            value = source.samples[0] if source.certain else None
            what = f"the field {target.columns[to]}" if value is None else f'"{value}"'
            if source.column is not None:
                what = f"{'.'.join(source.column[0])}.{source.column[1]}"
            how = "can't be read" if certain else "can't always be read, and such rows become dead letters"
            wanted = _wanted(target, to, source, captured)
            retype = f"{alter} ALTER COLUMN {quoted(to)} TYPE {wanted} USING {quoted(to)}::text::{wanted}"
            add = f"as the owner of the type: ALTER TYPE {taker.base} ADD VALUE {sql.quote(value)}"
            yield Fault(
                f"target column {name}.{to} is of the type {taker.declared}, as which {what} {how}:"
                f" {'all rules' if len(by) == len(rules) else names(by)}",
                add if value is not None and taker.labels else retype,
                certain=certain,
                captured=source.column is not None,
                place=_column(target, to),
            )


def _column(target: Target, name: str) -> Place:
    """Where a profile has a column of the target."""
    return ("target", "columns" if name in target.columns else "constants", name)


def quoted(name: str) -> str:
    """A name as it stands in SQL."""
    return sql.Identifier(name).as_string()


_FIELDS: Final = {"metadata": "jsonb", "occurred_at": "timestamptz"}
_CONSTANTS: Final = {bool: "boolean", int: "bigint", Decimal: "numeric", str: "text"}


def _wanted(target: Target, to: str, source: Source, captured: Columns) -> str:
    """A type for a target's column that takes all values of a source."""
    if source.column is not None and (of := captured[source.column[0]].get(source.column[1])) is not None:
        return of.declared
    if to in target.constants:
        return _CONSTANTS[type(target.constants[to])]
    return _FIELDS.get(target.columns[to], "text")


def _misfit(
    connection: Connection, source: Source, target: Column, captured: Columns
) -> Literal["some", "none"] | None:
    """How much a target's column can read of a source; None is all."""
    if target.category == "S" and target.type == target.base:
        return None
    samples = [sample for sample in source.samples if sample is not None]
    if source.column is not None:
        of = captured[source.column[0]].get(source.column[1])
        if of is None or of.base == target.base:
            return None
        samples = of.labels or [*_SAMPLES.get(of.base, ())]
    elif source.certain and not samples:
        return None  # it is always NULL
    read = [_reads(connection, target, sample) for sample in samples]
    if read and all(read):
        return None
    doubtful = None in read and not source.certain
    return "some" if any(read) or not read or doubtful else "none"


_READ: Final = "SELECT %s::{}"


def _reads(connection: Connection, column: Column, sample: str) -> bool | None:
    """Whether a column takes a value. None: not this one, which says nothing of others."""
    try:
        connection.execute(_READ.format(column.type).encode(), (sample,))
    except psycopg.errors.StringDataRightTruncation:
        return True  # what is too long is cut when it is written
    except psycopg.errors.InsufficientPrivilege:
        return not column.labels or sample in column.labels  # to write takes no right to the type
    except (psycopg.DataError, psycopg.IntegrityError):
        return False
    except psycopg.OperationalError:
        raise
    except psycopg.DatabaseError:  # a function of the type's own raised it, or it names an object that isn't there
        return None
    return True
