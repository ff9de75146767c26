"""`cdc_worker.set_context`: the context message for those who write SQL."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from psycopg.types.json import Jsonb
from support import Crm

from cdc_worker.context import MAX_LENGTH, signature

SAY = "SELECT cdc_worker.set_context(%s)"
ADD = "INSERT INTO lead (full_name, source, bd_in_charge, type) VALUES ('x', 'web', 'bob', 'otc')"


def longest(length: int = MAX_LENGTH) -> Jsonb:
    """A context that has so many characters as text."""
    return Jsonb({"changed_by": "x" * (length - len('{"changed_by": ""}'))})


def test_what_it_says_is_heard_up_to_the_longest_message(crm: Crm) -> None:
    for said in ({"changed_by": 'jane "é" 😀'}, longest().obj):
        with crm.connection.transaction():
            assert crm.value("SELECT %s < cdc_worker.set_context(%s)", "0/0", Jsonb(said))
            crm.execute(ADD)
    crm.record()
    jane, long = (activity["metadata"]["changed_by"] for activity in crm.activities())
    assert (jane, long) == ('jane "é" 😀', "x" * len(longest().obj["changed_by"]))


def test_what_the_profile_keeps_of_it_goes_to_the_metadata(crm: Crm, tmp_path: Path) -> None:
    profile = tmp_path / "profile.toml"
    shipped = (resources.files("cdc_worker") / "profiles" / "leadfi.toml").read_text("utf-8")
    profile.write_text('context = ["request_id", "reason", "not said"]\n' + shipped)
    with crm.connection.transaction():
        crm.execute(SAY, Jsonb({"changed_by": "jane", "request_id": "r-17", "reason": 7, "source": "not kept"}))
        crm.execute(ADD)
    crm.record(profile=str(profile))
    (activity,) = crm.activities()
    assert activity["metadata"].items() >= {"changed_by": "jane", "request_id": "r-17", "reason": 7}.items()
    assert activity["metadata"]["source"] == "web", "the row's, which the rule tells"
    assert "not said" not in activity["metadata"]


def test_a_message_may_be_signed_within_a_savepoint_and_is_worth_nothing_afterwards(crm: Crm) -> None:
    key = "a key of sixteen or more"
    with crm.connection.transaction(), crm.connection.transaction():
        xid = int(crm.value("SELECT pg_current_xact_id()::xid::text"))
        payload = '{"changed_by": "jane"}'
        said = Jsonb({"signed": payload, "signature": signature(key.encode(), xid, payload)})
        crm.execute(SAY, said)
        crm.execute(ADD)
    with crm.connection.transaction():
        crm.execute(SAY, said)
        crm.execute(ADD)
    crm.record(context_key=key)
    assert [activity["created_by"] for activity in crm.activities()] == ["jane", "system"]


@pytest.mark.parametrize("said", ["[]", '"jane"', "null", "7", None])
def test_what_is_no_object_is_refused(crm: Crm, said: str | None) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="a context is a JSON object"):
        crm.execute(SAY, said)


def test_what_would_be_too_long_to_be_heard_is_refused(crm: Crm) -> None:
    with pytest.raises(psycopg.errors.ProgramLimitExceeded):
        crm.execute(SAY, longest(MAX_LENGTH + 1))


def test_whoever_may_use_the_schema_may_call_it(crm: Crm) -> None:
    crm.execute("CREATE ROLE application")
    try:
        with crm.connection.transaction(force_rollback=True):
            crm.execute("SET LOCAL ROLE application")
            with pytest.raises(psycopg.errors.InsufficientPrivilege), crm.connection.transaction():
                crm.execute(SAY, Jsonb({}))
            crm.execute("RESET ROLE")
            crm.execute("GRANT USAGE ON SCHEMA cdc_worker TO application")
            crm.execute("SET LOCAL ROLE application")
            crm.execute(SAY, Jsonb({}))
    finally:
        crm.execute("DROP ROLE application")


def test_it_calls_nothing_that_its_caller_has_put_in_the_way(crm: Crm) -> None:
    crm.execute("CREATE SCHEMA mine")
    for name, arguments, returns in (
        ("jsonb_typeof", "jsonb", "text"),
        ("length", "text", "integer"),
        ("pg_logical_emit_message", "boolean, text, text", "pg_lsn"),
    ):
        function = sql.SQL("CREATE FUNCTION mine.{}({}) RETURNS {} LANGUAGE sql AS 'SELECT 1/0; SELECT NULL::{}'")
        types = sql.SQL(arguments), sql.SQL(returns)
        crm.connection.execute(function.format(sql.Identifier(name), *types, sql.SQL(returns)))
    crm.execute("SET search_path = mine, pg_catalog")
    with pytest.raises(psycopg.errors.DivisionByZero):
        crm.execute("SELECT length('x'::text)")
    assert crm.value(SAY, Jsonb({"changed_by": "jane"}))
