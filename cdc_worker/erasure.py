"""Erasure of a person: what was recorded of them is blanked, and a register keeps the worker from telling it again.

One transaction, which begins with a new nonce and so holds the worker's checkpoint: what the worker wrote before is
blanked, and before it writes again it must read the register.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import psycopg
from psycopg import sql
from pydantic import BaseModel, Field

from cdc_worker import catalog, checkpoint, errors, failpoints, kept, postgres
from cdc_worker.activities import Person
from cdc_worker.catalog import TargetTable
from cdc_worker.config import Settings
from cdc_worker.history import recorded
from cdc_worker.postgres import Connection
from cdc_worker.profile import Profile
from cdc_worker.rules import Rules, qualified
from cdc_worker.subjects import key, theirs
from cdc_worker.transform import ERASED, blank

OUT_OF_REACH: Final = (
    "the application's own rows, and who else is told of the person there",
    "activities of others that name the person, and those of other workers",
    "other keys that the person had, or will have",
    "recordings of the stream, and backups",
    "WAL that the server, its archive or a slot still keeps, and row versions that no VACUUM has removed",
)


class Erasure(BaseModel):
    """What was done about persons, and what is left. These are the fields of `forget --json`."""

    worker: str
    persons: dict[str, str] = Field(description="who was erased: key by field")
    activities: int = Field(description="activities of theirs that were blanked")
    dead_letters: int = Field(description="dead letters of theirs that were blanked")
    application_activities: int = Field(description="activities of theirs that are the application's, and left to it")
    linked: dict[str, list[str]] = Field(
        description="persons, keys by field, to whom activities of theirs link as well"
    )
    out_of_reach: list[str] = Field(description="what may still tell of them")


def lines(done: Erasure) -> Iterator[str]:
    """An erasure as a person reads it."""
    yield f"forgotten: {' and '.join(f'{field} {key}' for field, key in done.persons.items())}"
    yield f"{done.activities:,} of their activities and {done.dead_letters:,} of their dead letters were blanked"
    yield f"{done.application_activities:,} of their activities are the application's, and left to it"
    for field, keys in done.linked.items():
        for of in keys:
            yield f"an activity of theirs links to {field} {of} as well: cdc-worker forget --person {field} {of}"
    yield "out of reach:"
    for what in done.out_of_reach:
        yield f"  {what}"


_UNREAD: Final = "SELECT count(*) FROM cdc_worker.dead_letter WHERE worker = %s AND raw IS NOT NULL"


_BE_RID: Final = sql.SQL("UPDATE cdc_worker.dead_letter SET raw = NULL WHERE worker = {}")


def _unread(connection: Connection, worker: str) -> list[str]:
    """Messages of which nobody knows whom they tell of."""
    (count,) = postgres.fetch_one(connection, _UNREAD, worker)
    what = f"{count:,} message{'' if count == 1 else 's'} that could not be read, in dead letters; to be rid of them"
    return [f"{what}: {_BE_RID.format(worker).as_string()}"] if count else []


_REGISTER: Final = """
INSERT INTO cdc_worker.erased (worker, field, key, erased_lsn) VALUES (%s, %s, %s, pg_current_wal_insert_lsn())
"""


def forget(settings: Settings, profile: Profile, persons: Mapping[str, str]) -> Erasure:
    """Erase persons, each the key in a field of the profile. May be repeated.

    Raises SettingsError for a field that has no persons, or a key that can be nobody's, and TargetUnusableError where
    the worker's rows can't be told from others.
    """
    rules, worker = settings.rules(profile), settings.worker
    target = _Target(profile, rules, worker)
    links = {field: target.link(field) for field in persons}
    with postgres.connect(settings.dsn.get_secret_value(), worker) as connection:
        table = catalog.check(connection, profile, rules)
        types, change_key = table.columns, _change_key(profile, table)
        erased = {field: key(connection, field, given, types[links[field]]) for field, given in persons.items()}
        checkpoint.read(connection, worker)
        # Each statement must see what was committed before it, such as the batch for whose end the first one waits.
        connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
        with connection.transaction():
            connection.execute("SET LOCAL cdc_worker.protect = off")
            connection.execute("SET LOCAL row_security = off")  # an error, where a policy would hide rows from us
            connection.execute(checkpoint.new_nonce(worker).encode())
            for person in erased.items():
                connection.execute(_REGISTER, (worker, *person))
            failpoints.reach("person_registered")
            linked = target.linked(connection, erased)
            application_activities = target.application_activities(connection, erased, change_key)
            activities = target.blank(connection, erased, change_key, types)
            unread = _unread(connection, worker)
            dead_letters = sum(
                _blank_dead_letters(connection, rules, worker, person, links[person[0]]) for person in erased.items()
            )
            failpoints.reach("person_blanked")
    return Erasure(
        worker=worker,
        persons=erased,
        activities=activities,
        dead_letters=dead_letters,
        application_activities=application_activities,
        linked=linked,
        out_of_reach=[*OUT_OF_REACH, *unread],
    )


def _change_key(profile: Profile, table: TargetTable) -> sql.Composable:
    """A row's change key in SQL: NULL if it is the application's."""
    key = catalog.row_key(profile.target, table)
    if key is None:
        raise errors.TargetUnusableError(
            f"which rows of {profile.target.table} are the worker's can't be told: it has no column for change keys,"
            " and no primary key from a sequence",
            hint="blank by hand what is told of the person",
        )
    return key


_LINKED: Final = sql.SQL("""
SELECT DISTINCT {link}::text FROM {table}
WHERE ({theirs}) AND {link} IS NOT NULL AND NOT EXISTS (
    SELECT FROM cdc_worker.erased AS erased
    WHERE erased.worker = {worker} AND erased.field = {field} AND erased.key = {link}::text AND until_lsn IS NULL)
ORDER BY 1
""")

_OF_APPLICATION: Final = sql.SQL("SELECT count(*) FROM {table} WHERE ({theirs}) AND {change_key} IS NULL")

_BLANK: Final = sql.SQL("""
UPDATE {table} SET {blank} WHERE ({theirs}) AND starts_with({change_key}, {prefix}) AND ({told})
""")


_MOVED: Final = sql.SQL("""
CASE WHEN jsonb_typeof({metadata} -> {name}) = 'object' AND {metadata} -> {name} ?| {keys}::text[] THEN
    jsonb_build_object({name}::text, (
        SELECT jsonb_object_agg(key, value) FROM jsonb_each({metadata} -> {name}) WHERE key = ANY ({keys}::text[])))
ELSE '{{}}'::jsonb END""")


class _Target:
    """The target's columns, and its rows of persons."""

    def __init__(self, profile: Profile, rules: Rules, worker: str) -> None:
        self._worker = worker
        self._profile = profile
        self._table = sql.Identifier(*qualified(profile.target.table))
        self._columns = {field: column for column, field in profile.target.columns.items()}
        are_persons = {field for table in rules.values() for field in table.persons}
        self._persons = sorted(are_persons & self._columns.keys())

    def link(self, field: str) -> str:
        """The column of a field that links to persons."""
        if field not in self._persons:
            raise errors.SettingsError(
                f'the profile "{self._profile.name}" has no persons "{field}"',
                hint=f"those it has: {', '.join(self._persons) or 'none'}",
            )
        return self._columns[field]

    def linked(self, connection: Connection, persons: Mapping[str, str]) -> dict[str, list[str]]:
        """Whom their rows link to as well, keys by field, but for those who were erased."""
        found = {}
        for field in self._persons:
            link = sql.Identifier(self._columns[field])
            query = _LINKED.format(
                link=link, table=self._table, theirs=theirs(self._profile, persons), worker=self._worker, field=field
            )
            found[field] = [key for (key,) in connection.execute(query)]
        return {field: keys for field, keys in found.items() if keys}

    def application_activities(
        self, connection: Connection, persons: Mapping[str, str], change_key: sql.Composable
    ) -> int:
        """How many of their rows are not the worker's."""
        query = _OF_APPLICATION.format(table=self._table, theirs=theirs(self._profile, persons), change_key=change_key)
        ((count,),) = connection.execute(query)
        return int(count)

    def blank(
        self,
        connection: Connection,
        persons: Mapping[str, str],
        change_key: sql.Composable,
        types: Mapping[str, str],
    ) -> int:
        """Blank their rows that this worker wrote; returns how many were not blank before. `types` are its columns'."""
        blank, told = [], []
        if "description" in self._columns:
            column = sql.Identifier(self._columns["description"])
            blank.append(sql.SQL("{} = ''").format(column))
            told.append(sql.SQL("{} IS DISTINCT FROM ''").format(column))
        if "metadata" in self._columns:
            column = sql.Identifier(self._columns["metadata"])
            kind = {"jsonb": "jsonb", "json": "json"}.get(types[self._columns["metadata"]], "text")
            blank.append(sql.SQL("{} = ({})::text::{}").format(column, self._left(column), sql.SQL(kind)))
            told.append(sql.SQL("{}::jsonb ->> 'erased' IS DISTINCT FROM 'true'").format(column))
        if not blank:
            return 0
        query = _BLANK.format(
            table=self._table,
            blank=sql.SQL(", ").join(blank),
            theirs=theirs(self._profile, persons),
            change_key=change_key,
            prefix=f"{self._worker}/",
            told=sql.SQL(" OR ").join(told),
        )
        return connection.execute(query).rowcount

    def _left(self, column: sql.Identifier) -> sql.Composed:
        """What is left of metadata: which key a row had before, without which nobody knows what became of it."""
        keys: dict[str, set[str]] = {}
        for table, spec in self._profile.tables.items():
            for names in recorded(self._profile, table).changes.values():
                for name in names:
                    keys.setdefault(name, set()).update(spec.key)
        metadata = sql.SQL("{}::jsonb").format(column)
        moved = (
            _MOVED.format(metadata=metadata, name=name, keys=sorted(of)) for name, of in sorted(keys.items()) if of
        )
        return sql.SQL(" || ").join([sql.SQL("""jsonb '{{"erased": true}}'""").format(), *moved])


_DEAD_LETTERS: Final = """
SELECT dead_letter_id, change::text, num_nonnulls(context, found, raw) > 0 FROM cdc_worker.dead_letter
WHERE worker = %(worker)s AND (
    fields ->> %(link)s = %(key)s
    OR EXISTS (
        SELECT FROM unnest(%(schemas)s::text[], %(tables)s::text[], %(lookups)s::text[], %(columns)s::text[])
            AS t (schema, name, lookup, link)
        WHERE change ->> 'schema' = schema AND change ->> 'table' = name
          AND CASE WHEN lookup IS NULL THEN %(key)s IN (change -> 'old' ->> link, change -> 'new' ->> link)
              ELSE %(key)s = found -> 'rows' -> lookup ->> link END))
FOR UPDATE
"""

_BLANK_DEAD_LETTER: Final = """
UPDATE cdc_worker.dead_letter
SET change = %s::jsonb, reason = %s, fields = NULL, context = NULL, found = NULL, raw = NULL
WHERE dead_letter_id = %s
"""


def _blank_dead_letters(connection: Connection, rules: Rules, worker: str, person: Person, link: str) -> int:
    """Blank a person's dead letters; returns how many were not blank before. `link` is their column in the target."""
    field, key = person
    tables: list[tuple[str, str, str | None, str]] = []
    for of in rules.values():
        tables += [(*of.name, None, of.links[field])] if field in of.links else []
        tables += [(*of.name, lookup, column) for lookup, column in of.found.get(field, ())]
    schemas, names, lookups, columns = ([*column] for column in zip(*tables, strict=True))
    where = {"schemas": schemas, "tables": names, "lookups": lookups, "columns": columns}
    parameters = where | {"worker": worker, "link": link, "key": key}
    count = 0
    for dead_letter_id, found, told in connection.execute(_DEAD_LETTERS, parameters).fetchall():
        change = kept.change(found)
        table = rules.get((change.schema, change.table))
        left = blank(change, table.links if table else {})
        if left != change or told:
            connection.execute(_BLANK_DEAD_LETTER, (kept.encoded_change(left), ERASED, dead_letter_id))
            count += 1
    return count
