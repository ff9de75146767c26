"""Where somebody else runs the server: on Amazon RDS the right to replicate is to be a member of rds_replication.

Stand-ins for that are an ordinary server with such a role, which refuses its members all the same, and one whose
functions for slots are its members' to call. No server lets them have a walsender.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest
from doctoring import ailing, healthy, mend
from psycopg import sql
from psycopg.conninfo import make_conninfo
from support import Crm, role
from test_bad_input import one_error
from test_setup import drop, owned
from test_slot_faults import gaps, recovered

from cdc_worker import errors, postgres

GRANT = 'as a member of rds_superuser: GRANT rds_replication TO "cdc"'
ALTER = 'as a superuser: ALTER ROLE "cdc" REPLICATION'


@pytest.fixture
def rds(bare_crm: Crm) -> Iterator[Crm]:
    """A database that is not set up, on a server that has the role."""
    with having_role(bare_crm):
        yield bare_crm


@contextmanager
def having_role(crm: Crm) -> Iterator[None]:
    crm.execute("CREATE ROLE rds_replication")
    try:
        yield
    finally:
        crm.execute("DROP OWNED BY rds_replication")
        crm.execute("DROP ROLE rds_replication")


def let_members_have_slots(crm: Crm) -> None:
    """Have the database's functions for slots run as who owns them, for members of the role.

    Under their own numbers the server would not ask what rights they run with: they are made anew.
    """
    functions = (
        "SELECT proname, oid::regprocedure::text, pg_get_functiondef(oid) FROM pg_proc"
        " WHERE pronamespace = 'pg_catalog'::regnamespace AND proname IN"
        " ('pg_create_logical_replication_slot', 'pg_copy_logical_replication_slot', 'pg_drop_replication_slot',"
        " 'pg_logical_slot_peek_binary_changes')"
    )
    for name, signature, definition in crm.execute(functions):
        for statement in (
            f"ALTER FUNCTION {signature} RENAME TO {name}_as_whoever_calls",
            definition.replace("LANGUAGE internal", "LANGUAGE internal SECURITY DEFINER"),
            f"REVOKE EXECUTE ON FUNCTION {signature} FROM PUBLIC",
            f"GRANT EXECUTE ON FUNCTION {signature} TO rds_replication",
        ):
            crm.connection.execute(statement.encode())


@contextmanager
def owner(crm: Crm, *rights: str) -> Iterator[str]:
    """Let the commands use a role that owns database and tables, and has these rights."""
    name = owned(crm)
    try:
        for right in rights:
            crm.connection.execute(right.format(role=sql.Identifier(name).as_string()).encode())
        yield name
    finally:
        del crm.settings["dsn"]
        drop(crm, name)


MEMBER = "GRANT rds_replication TO {role}"


# Who may


@pytest.mark.parametrize(
    ("statements", "may"),
    [
        ((), False),
        (("ALTER ROLE cdc REPLICATION",), True),
        (("ALTER ROLE cdc SUPERUSER",), True),
        (("GRANT rds_replication TO cdc",), True),
        (("ALTER ROLE cdc NOINHERIT", "GRANT rds_replication TO cdc"), True),
        (("GRANT rds_replication TO between", "GRANT between TO cdc"), True),  # as rds_superuser is
        (("GRANT cdc TO rds_replication",), False),
    ],
    ids=["nobody", "attribute", "superuser", "member", "noinherit", "indirectly", "the other way round"],
)
def test_who_has_the_attribute_or_is_a_member_may_replicate(rds: Crm, statements: tuple[str, ...], may: bool) -> None:
    rds.execute("CREATE ROLE between")
    try:
        with role(rds, granted=False):
            for statement in statements:
                rds.connection.execute(statement.encode())
            with postgres.connect(rds.settings["dsn"], "x") as connection:
                assert postgres.server(connection).may_replicate == may
            said = rds.succeed("setup", "--dry-run", "--role", "cdc", dsn=rds.dsn)
            assert ("GRANT rds_replication" in said) == (not may)
            assert "REPLICATION" not in said
    finally:
        rds.execute("DROP ROLE between")


def test_a_member_of_a_role_of_another_name_may_not(rds: Crm) -> None:
    rds.execute("CREATE ROLE rds_replication_of_ours")
    try:
        with (
            role(rds, "IN ROLE rds_replication_of_ours", granted=False),
            postgres.connect(rds.settings["dsn"], "x") as connection,
        ):
            assert not postgres.server(connection).may_replicate
    finally:
        rds.execute("DROP ROLE rds_replication_of_ours")


# What is asked for


def test_setup_makes_the_role_of_the_worker_a_member(rds: Crm) -> None:
    name = f"cdc_{rds.slot}"
    try:
        said = rds.succeed("setup", "--role", name).splitlines()
        assert [line for line in said if line.startswith("role ")] == [
            f"role {name} is made",
            f"role {name} may replicate",
        ]
        assert rds.execute(
            "SELECT rolcanlogin, rolreplication, pg_has_role(oid, 'rds_replication', 'MEMBER')"
            " FROM pg_roles WHERE rolname = %s",
            name,
        ) == [(True, False, True)]
        assert rds.succeed("setup", "--role", name).count("\n") == 1
    finally:
        drop(rds, name)


@pytest.mark.parametrize("made", [False, True])
def test_an_administrator_is_asked_for_membership_and_not_for_the_attribute(rds: Crm, made: bool) -> None:
    name = f"cdc_{rds.slot}"
    if made:
        rds.connection.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(name)))
    with owner(rds):
        done = rds.command("setup", "--role", name)
        assert done.returncode == 1
        _, *statements, last = done.stderr.splitlines()
        assert last == "hint: have an administrator do it, then the same again"
        assert statements == [
            *([] if made else [f'  CREATE ROLE "{name}" LOGIN;']),
            f'  GRANT rds_replication TO "{name}";',
            f"  SELECT lsn FROM pg_create_logical_replication_slot('{rds.slot}', 'pgoutput');",
        ]
        for statement in statements:
            rds.connection.execute(statement.encode())
        assert f'worker "{rds.slot}" begins at ' in rds.succeed("setup", "--role", name)
        drop(rds, name)


def test_the_doctor_and_the_commands_ask_for_membership(crm: Crm) -> None:
    with having_role(crm), role(crm):
        crm.execute("ALTER ROLE cdc NOREPLICATION")
        lacking, untried, refused = (ailing(crm, check) for check in ("role", "plugin", "replication"))
        assert (lacking.message, lacking.fix) == ('role "cdc" lacks rds_replication', GRANT)
        assert (untried.outcome, untried.fix) == ("unknown", GRANT)
        assert (refused.outcome, refused.fix) == ("failed", GRANT)
        assert one_error(crm, ["run"], errors.AuthenticationError.exit_code) == (refused.message, GRANT)
        assert one_error(crm, ["switch-plugin"], 1) == (
            'role "cdc" lacks rds_replication: it may not copy a slot',
            f"name the worker's role in CDC_WORKER_DSN, or {GRANT}",
        )
        mend(crm, GRANT)
        assert healthy(crm, "role")


# A member that is refused: the roles came along from RDS, and the server is another


def test_a_refused_member_is_told_of_the_attribute(crm: Crm) -> None:
    with having_role(crm), role(crm):
        crm.execute("ALTER ROLE cdc NOREPLICATION")
        crm.execute("GRANT rds_replication TO cdc")
        untried, refused = ailing(crm, "plugin"), ailing(crm, "replication")
        assert untried.message.startswith('the server refuses slots to the role "cdc": ')
        assert (untried.outcome, untried.fix, refused.fix) == ("failed", ALTER, ALTER)
        assert one_error(crm, ["run"], errors.AuthenticationError.exit_code) == (refused.message, ALTER)
        for arguments in ([], ["--dry-run"]):
            assert one_error(crm, ["switch-plugin", *arguments], 1) == (untried.message, ALTER)
        assert crm.value("SELECT array_agg(slot_name::text) FROM pg_replication_slots") == [crm.slot]
        mend(crm, ALTER)
        assert healthy(crm, "plugin")
        crm.succeed("switch-plugin")
        crm.add_leads(1)
        crm.record()
        assert crm.types() == ["lead_created"]


@pytest.mark.parametrize(("setting", "plugin"), [("wal2json", "wal2json"), ("auto", "pgoutput")])
def test_a_slot_that_a_member_is_refused_is_an_administrators_to_make(rds: Crm, setting: str, plugin: str) -> None:
    rds.settings["plugin"] = setting
    with owner(rds, MEMBER):
        assert f"'{plugin}'" in rds.succeed("setup", "--dry-run")
        said, hint = one_error(rds, ["setup"], 1)
        first, *statements = said.splitlines()
        assert first == "this needs more than the ownership of database and tables:"
        assert statements[-1] == f"  SELECT lsn FROM pg_create_logical_replication_slot('{rds.slot}', '{plugin}');"
        assert hint == "have an administrator do it, then the same again"
        for statement in statements:
            rds.connection.execute(statement.encode())
        assert f'worker "{rds.slot}" begins at ' in rds.succeed("setup")


def test_a_slot_that_a_member_may_not_drop_is_dropped_when_it_has_the_attribute(rds: Crm) -> None:
    """The slot keeps what it has until then, and the gap is noted."""
    with owner(rds, "ALTER ROLE {role} REPLICATION", MEMBER) as name:
        rds.setup()
        rds.add_leads(1)
        rds.record()
        rds.execute("UPDATE cdc_worker.checkpoint SET system_identifier = '1'")
        rds.connection.execute(sql.SQL("ALTER ROLE {} NOREPLICATION").format(sql.Identifier(name)))
        for _ in range(2):
            said, hint = one_error(rds, ["recover"], 1)
            assert said.startswith(f'the server refuses slots to the role "{name}": ')
            assert hint == f'as a superuser: ALTER ROLE "{name}" REPLICATION'
            assert len(gaps(rds)) == 1
        mend(rds, hint)
        recovered(rds)


# The whole way, but for the stream


def test_a_member_that_is_let_sets_up_switches_and_recovers(rds: Crm) -> None:
    let_members_have_slots(rds)
    with owner(rds) as name:
        with psycopg.connect(rds.settings["dsn"]) as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("SELECT pg_drop_replication_slot('x')")
        rds.connection.execute(MEMBER.format(role=sql.Identifier(name).as_string()).encode())
        said = rds.succeed("setup")
        assert "plugin: wal2json, for the server has and allows it" in said
        assert f'slot "{rds.slot}" created at ' in said
        for check in ("role", "plugin"):
            assert healthy(rds, check)
        rds.add_leads(1)
        assert f'slot "{rds.slot}" is copied to "{rds.slot}_pgoutput" with pgoutput' in rds.succeed("switch-plugin")
        rds.record(dsn=make_conninfo(rds.dsn))  # a superuser, for the stream
        assert rds.types() == ["lead_created"]
        rds.execute("SELECT pg_drop_replication_slot(%s)", f"{rds.slot}_pgoutput")
        done = rds.command("recover")
        assert f'slot "{rds.slot}_pgoutput" created at ' in done.stdout
        # Its worker comes as far as the stream.
        hint = f'as a superuser: ALTER ROLE "{name}" REPLICATION'
        assert f"hint: {hint}\n" in done.stderr
        mend(rds, hint)
        recovered(rds)
