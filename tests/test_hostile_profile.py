"""Names, constants and rows that mean harm, on a real server: they are written as they are, where they belong."""

from __future__ import annotations

import json
from typing import Any

import pytest
from doctoring import report
from psycopg import sql
from psycopg.conninfo import make_conninfo
from support import Crm

from cdc_worker import profile

HOSTILE = "x'y\"z; DROP TABLE victim; --\\N $1 %s {0}, $$"
"""What a schema, a table, a column, a rule and a value are called."""

CAPTURED = f"{HOSTILE}.{HOSTILE}"
LOOKED_UP = f"{HOSTILE}.looked"

NOTHING_ELSE = "SELECT nspname, relname FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace WHERE relkind = 'r'"


def prepared(crm: Crm, *, key: bool) -> Crm:
    """A database of hostile names, and a profile with them; with a column for the change keys or without."""
    name = sql.Identifier(HOSTILE)
    statements: list[sql.SQL | sql.Composed] = [
        sql.SQL("CREATE TABLE victim (id int)"),
        sql.SQL("CREATE SCHEMA {0}").format(name),
        sql.SQL("CREATE TABLE {0}.{0} (id int PRIMARY KEY, {0} text, other text, secret text)").format(name),
        sql.SQL("CREATE TABLE {0}.looked ({0} text PRIMARY KEY, note text, secret text)").format(name),
        sql.SQL("INSERT INTO {0}.looked VALUES ({1}, {1}, 's3cr3t')").format(name, HOSTILE),
        sql.SQL(
            "CREATE TABLE {0}.target (id serial PRIMARY KEY, {0} text, kind text CHECK (kind <> 'refused'),"
            " constant text, details jsonb, key text UNIQUE)"
        ).format(name),
    ]
    for statement in statements:
        crm.connection.execute(statement)
    columns = {HOSTILE: "description", "kind": "type", "details": "metadata"} | ({"key": "change_key"} if key else {})
    rule = {"on": "update", "changed": HOSTILE, "name": HOSTILE, "type": "{new.other}"}
    escaped = HOSTILE.replace("{", "{{").replace("}", "}}")
    told = toml(
        {
            "name": "hostile",
            "target": {"table": f"{HOSTILE}.target", "columns": columns, "constants": {"constant": HOSTILE}},
            "tables": {
                CAPTURED: {
                    "key": "id",
                    "masked": ["secret"],
                    "identity": {HOSTILE: "{row.id}"},
                    "mapped": {"kind": {"column": HOSTILE, "map": {HOSTILE: HOSTILE}, "default": "none"}},
                    "lookups": {"by": {"table": LOOKED_UP, "match": {HOSTILE: "other"}}},
                    "rules": [
                        {**rule, "description": "{new.kind}", "metadata": {"changes": "{changes}"}},
                        {
                            "on": ["insert", "delete"],
                            "type": escaped,
                            "name": "there\n\t\\N",
                            "description": "{row.other}",
                            "metadata": {"note": "{lookup.by.note}", "secret": "{lookup.by.secret}"},
                        },
                    ],
                },
                LOOKED_UP: {"key": HOSTILE, "masked": ["secret"]},
            },
        }
    )
    path = crm.directory / "hostile.toml"
    path.write_text(told, "utf-8")
    crm.settings["profile"] = str(path)
    assert profile.load(str(path)).target.constants == {"constant": HOSTILE}
    return crm


def toml(value: dict[str, Any]) -> str:
    """As TOML: what JSON has in braces and texts is nearly the same."""

    def inline(of: Any) -> str:
        match of:
            case dict():
                return "{" + ", ".join(f"{json.dumps(key)} = {inline(one)}" for key, one in of.items()) + "}"
            case list():
                return "[" + ", ".join(map(inline, of)) + "]"
            case _:
                return json.dumps(of)

    return "".join(f"{json.dumps(key)} = {inline(of)}\n" for key, of in value.items())


@pytest.mark.parametrize("key", [True, False], ids=["with a column for keys", "without"])
def test_hostile_names_and_values_are_written_as_they_are_and_nowhere_else(
    bare_crm: Crm, request: pytest.FixtureRequest, key: bool
) -> None:
    crm = prepared(bare_crm, key=key)
    crm.succeed("setup", "--role", "cdc")
    request.addfinalizer(lambda: [crm.execute(drop) for drop in ("DROP OWNED BY cdc CASCADE", "DROP ROLE cdc")])
    crm.execute("ALTER ROLE cdc LOGIN")
    crm.settings["dsn"] = make_conninfo(crm.dsn, user="cdc")
    assert [(f.check, f.message) for f in report(crm) if f.outcome == "failed"] == []
    tables = set(crm.execute(NOTHING_ELSE))
    name = sql.Identifier(HOSTILE)
    for statement in (
        "INSERT INTO {0}.{0} SELECT n, 'before', {1}, 's3cr3t' FROM generate_series(1, 3) n",
        "UPDATE {0}.{0} SET {0} = {1} WHERE id = 1",
        "UPDATE {0}.{0} SET {0} = 'x', other = 'refused' WHERE id = 2",
        "DELETE FROM {0}.{0} WHERE id = 3",
    ):
        crm.connection.execute(sql.SQL(statement).format(name, HOSTILE))
    crm.record()
    written = sql.SQL("SELECT {0}, kind, constant, details ->> {1} FROM {0}.target ORDER BY id").format(name, HOSTILE)
    assert crm.connection.execute(written).fetchall() == [
        *((HOSTILE, HOSTILE, HOSTILE, str(number)) for number in (1, 2, 3)),
        (HOSTILE, HOSTILE, HOSTILE, "1"),
        (HOSTILE, HOSTILE, HOSTILE, "3"),
    ]
    told = sql.SQL("SELECT DISTINCT details ->> 'note', details ->> 'secret' FROM {0}.target WHERE {0} = {1}")
    assert (HOSTILE, "***") in crm.connection.execute(told.format(name, HOSTILE)).fetchall()
    ((kind, constraint),) = crm.execute("SELECT kind, constraint_name FROM cdc_worker.dead_letter")
    assert (kind, constraint) == ("refused", "target_kind_check")
    assert set(crm.execute(NOTHING_ELSE)) == tables
    crm.record()
    assert crm.connection.execute(sql.SQL("SELECT count(*) FROM {0}.target").format(name)).fetchone() == (5,)


def test_no_masked_value_is_told_of_a_change_that_the_target_refuses(bare_crm: Crm) -> None:
    crm = prepared(bare_crm, key=True)
    crm.setup()
    name = sql.Identifier(HOSTILE)
    crm.connection.execute(sql.SQL("INSERT INTO {0}.{0} VALUES (1, 'a', 'b', 's3cr3t')").format(name))
    crm.connection.execute(
        sql.SQL("UPDATE {0}.{0} SET {0} = 'x', other = 'refused', secret = 's3cr3t too'").format(name)
    )
    crm.record()
    ((change,),) = crm.execute("SELECT change FROM cdc_worker.dead_letter")
    assert (change["old"]["secret"], change["new"]["secret"]) == ("***", "***")
    assert change["new"]["other"] == "refused"
    for table in ("cdc_worker.dead_letter", "cdc_worker.checkpoint", "cdc_worker.process"):
        rows = crm.connection.execute(f"SELECT t::text FROM {table} t".encode()).fetchall()
        assert "s3cr3t" not in str(rows)
