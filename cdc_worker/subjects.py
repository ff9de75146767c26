"""Whose the rows of a target are: by the link that a row has, or where that is NULL by what its metadata tells."""

from __future__ import annotations

from collections.abc import Mapping

import psycopg
from psycopg import sql

from cdc_worker import errors
from cdc_worker.postgres import Connection
from cdc_worker.profile import Profile


def key(connection: Connection, field: str, given: str, type_name: str) -> str:
    """The key as the database prints it. Raises SettingsError where it can't be one of this type."""
    try:
        (printed,) = connection.execute(f"SELECT %s::{type_name}::text".encode(), (given,)).fetchone() or ("",)
    except psycopg.DataError:
        printed = ""
    if not printed:
        raise errors.SettingsError(
            f'"{given}" can\'t be the key of a {field}, which is of type {type_name}', hint=f"name the key of a {field}"
        )
    return str(printed)


def theirs(profile: Profile, subjects: Mapping[str, str], *, change_key: sql.Composable | None = None) -> sql.Composed:
    """That a row is of one of these subjects, each the key in a field that links.

    With a `change_key` only rows that have one are sought by their metadata, and that by its identity alone if it has
    one, as an index has them.
    """
    columns = {field: column for column, field in profile.target.columns.items()}
    own = sql.SQL("") if change_key is None else sql.SQL("{} IS NOT NULL AND ").format(change_key)
    of = []
    for field, value in subjects.items():
        link = sql.Identifier(columns[field])
        of.append(sql.SQL("{} = {}").format(link, value))
        if "metadata" in columns:
            metadata = sql.Identifier(columns["metadata"])
            told = [sql.SQL("{}::jsonb ->> {}").format(metadata, name) for name in _identities(profile, field)]
            if change_key is None or not told:
                told.append(sql.SQL("{}::jsonb #>> {}").format(metadata, ["unlinked", columns[field]]))
            of += [sql.SQL("({}{} IS NULL AND {} = {})").format(own, link, at, value) for at in told]
    return sql.SQL(" OR ").join(of)


def _identities(profile: Profile, field: str) -> list[str]:
    """The names under which metadata has the key of this field, and nothing else in any other table."""
    tables = profile.tables.values()
    names = {name for table in tables for name, source in table.identity.items() if source == table.fields.get(field)}
    others = {name for table in tables for name, source in table.identity.items() if source != table.fields.get(field)}
    return sorted(names - others)
