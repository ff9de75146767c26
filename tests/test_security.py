"""What an outsider or a curious reader of logs could get: no value, no password, no statement of his own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import LiteralString

import psycopg
import pytest
from canaries import CANARY, caught, hear, keep, keep_printed
from doctoring import report
from psycopg import sql
from psycopg.conninfo import make_conninfo
from support import HOLD_ROWS_UP, Crm, eventually, let_rows_wait
from test_hostile_profile import HOSTILE, prepared

from cdc_worker import config, errors, postgres, shadow
from cdc_worker.errors import ConnectionStringError, SettingsError
from cdc_worker.sink import MAX_AT_ONCE

# What finds them


def test_the_canary_is_found_wherever_it_must_not_be(tmp_path: Path) -> None:
    """This is what every test of the suite is held to when it is over."""
    log = tmp_path / "worker.log"
    keep(log)
    line = {"event": "progress", "level": "info"}
    shown = json.dumps(line | {"description": f"Lead of {CANARY}"})
    debug = json.dumps(line | {"level": "debug", "description": CANARY})
    log.write_text(f"{json.dumps(line)}\n{debug}\n{shown}\n{shown[:-1]}\n2026-02-03 [debug    ] read {CANARY}\n")
    hear(["setup"], f"role {CANARY}\n", f"error: wrong\nhint: {CANARY.upper()}\n")
    hear(["dead-letters", "show", "1"], f"what was asked for: {CANARY}\n", "")
    for command in ("verify", "recover"):
        printed = tmp_path / f"{command}.stdout"
        printed.write_text(f"printed by {command}: {CANARY}\n")
        keep_printed([command], printed)
    assert sorted(caught(f"Traceback of {CANARY}")) == sorted(
        [
            shown,
            shown[:-1],
            f"printed by recover: {CANARY}",
            f"role {CANARY}",
            f"hint: {CANARY.upper()}",
            f"Traceback of {CANARY}",
        ]
    )
    assert caught() == [], "each is looked at once"


def test_a_test_whose_commands_give_a_value_away_fails(tmp_path: Path) -> None:
    """By what conftest.py does at the end of each."""
    probe = tmp_path / "test_probe.py"
    probe.write_text(f"import canaries\n\n\ndef test_it():\n    canaries.hear(['run'], '', 'error: {CANARY}')\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-p", "no:cacheprovider", str(probe)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "a password or a row's value was printed:" in done.stdout


# Errors of the server, whose words hold values

TELLTALE = """
CREATE TABLE public.weather (code text, away regclass);
GRANT SELECT ON public.weather TO PUBLIC;
CREATE FUNCTION public.tell() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE code text := (SELECT w.code FROM public.weather w WHERE away = TG_RELID);
BEGIN
    IF code = '42601' THEN
        EXECUTE format('SELECT %s c4n4ry-', to_jsonb(NEW));
    ELSIF code = '22P02' THEN
        PERFORM (to_jsonb(NEW) #>> '{}')::integer;
    ELSIF code IS NOT NULL THEN
        RAISE EXCEPTION 'c4n4ry %', to_jsonb(NEW) USING
            ERRCODE = code, DETAIL = 'c4n4ry', HINT = 'c4n4ry', SCHEMA = 'public', TABLE = 'lead';
    END IF;
    RETURN NEW;
END $$;
"""

TELL = "CREATE TRIGGER a_tell BEFORE INSERT OR UPDATE ON {} FOR EACH ROW EXECUTE FUNCTION tell()"

CODES = ["22P02", "40001", "42601", "XX000"]
"""Whatever they ask of the worker: its words are not the server's."""

KEPT = """
SELECT string_agg(t, ' ') FROM (
    SELECT failure FROM cdc_worker.process UNION ALL SELECT concat(reason, constraint_name) FROM cdc_worker.dead_letter
) kept (t)
"""


def telling(crm: Crm, *tables: str) -> None:
    """Give these tables a trigger that tells everything, once the weather says so."""
    crm.connection.execute(TELLTALE.encode())
    for table in tables:
        crm.connection.execute(TELL.format(table).encode())


def silent(crm: Crm, *command: str) -> str:
    """Run a command, and assert that it tells nothing that it should not; returns what it says."""
    done = crm.command(*command)
    said = done.stderr + done.stdout
    assert CANARY not in said.lower()
    assert CANARY not in str(crm.value(KEPT)).lower()
    return said


def test_a_worker_tells_no_words_of_the_server_that_hold_values(crm: Crm) -> None:
    telling(crm, "activity", "cdc_worker.checkpoint")
    for code in CODES:
        crm.add_leads(1)
        crm.execute("INSERT INTO weather VALUES (%s, 'activity')", code)
        told = silent(crm, "run", "--once")
        assert f"SQLSTATE {code}" in told or f'"sqlstate": "{code}"' in told
        crm.execute("UPDATE weather SET away = 'cdc_worker.checkpoint'")
        assert f"(SQLSTATE {code})" in silent(crm, "run", "--once") or code == "22P02"
        crm.execute("TRUNCATE weather")
    crm.record()
    silent(crm, "status", "--json")
    assert CANARY not in " ".join(found.message + (found.fix or "") for found in report(crm)).lower()


@pytest.mark.parametrize("rows", [1, MAX_AT_ONCE + 1])
def test_the_last_words_of_a_connection_are_told_without_the_row_that_it_was_at(crm: Crm, rows: int) -> None:
    """They come with the context of a COPY, and libpq makes one text of all that."""
    let_rows_wait(crm)
    with crm.worker() as worker, psycopg.connect(crm.dsn) as locker:
        worker.wait_for("replication_started")
        locker.execute(HOLD_ROWS_UP)
        crm.add_leads(rows)
        waiting = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'advisory' AND datname = current_database()"
        ((pid,),) = eventually(lambda: crm.execute(waiting))
        worker.process.send_signal(signal.SIGSTOP)  # so that it hears all of it at once, and that the connection ended
        crm.execute("SELECT pg_terminate_backend(%s, 60000)", pid)
        worker.process.send_signal(signal.SIGCONT)
        lost = worker.wait_for("connection_lost")
        locker.rollback()
        assert lost["reason"].endswith(("administrator command", "server closed the connection unexpectedly"))
        assert CANARY not in worker.said.lower()
        eventually(crm.types)
        assert worker.terminate() == 0


REAL: dict[str, LiteralString] = {
    "22P02": "ALTER TABLE activity ADD made int GENERATED ALWAYS AS ((metadata ->> 'company_name')::int) STORED",
    "23505": "CREATE UNIQUE INDEX made ON activity ((left(metadata ->> 'company_name', 8)))",
    "23514": "ALTER TABLE activity ADD CONSTRAINT made CHECK (metadata ->> 'company_name' NOT LIKE 'Company%%')",
}
"""Each has the row, or its value, in MESSAGE, DETAIL or the context of a COPY."""


@pytest.mark.parametrize("code", REAL)
def test_what_types_and_constraints_say_of_a_value_is_not_passed_on(crm: Crm, code: str) -> None:
    crm.execute(REAL[code])
    crm.add_leads(2)
    silent(crm, "run", "--once")
    letters = crm.execute("SELECT sqlstate, change -> 'new' ->> 'company_name' FROM cdc_worker.dead_letter")
    assert {state for state, _ in letters} == {code}
    assert all(CANARY in payload for _, payload in letters), "it is kept where it is looked for"
    assert f"SQLSTATE {code}" in silent(crm, "dead-letters", "list")
    assert CANARY not in " ".join(found.message for found in report(crm))


OURS = "INSERT INTO weather SELECT %s, oid FROM pg_class WHERE relnamespace = 'cdc_worker'::regnamespace"


def test_no_command_tells_words_of_the_server_that_hold_values(new_crm: Crm) -> None:
    crm = new_crm
    crm.add_leads(1)
    crm.setup()
    recording = crm.directory / "recording"
    recording.mkdir()
    crm.execute("ALTER TABLE activity ADD CONSTRAINT none CHECK (lead_id <> 3)")
    crm.add_leads(2)
    crm.record(recording_directory=str(recording))
    crm.execute("ALTER TABLE activity DROP CONSTRAINT none")
    with crm.connection.transaction():
        crm.execute("SET LOCAL session_replication_role = replica")
        crm.execute("DELETE FROM activity")
    tables = crm.execute("SELECT schemaname, tablename FROM pg_tables WHERE schemaname = 'cdc_worker'")
    telling(crm, "activity", *(sql.Identifier(*table).as_string() for table in tables))

    def met(code: str, *command: str) -> None:
        assert re.search(f'SQLSTATE {code}|"sqlstate": "{code}"', silent(crm, *command)), command

    with crm.worker() as worker:
        worker.wait_for("replication_started")
        crm.execute("INSERT INTO weather VALUES ('42601', 'activity')")
        for command in (
            ["verify", "--repair"],
            ["backfill", "lead"],
            ["replay", str(recording)],
            ["dead-letters", "retry", "--all"],
        ):
            met("42601", *command)
        crm.execute("TRUNCATE weather")
        for code in ("22P02", "42501"):
            crm.execute(OURS, code)
            for command in (["setup", "--role", crm.slot], ["forget", "--lead", "1", "--yes"]):
                met(code, *command)
            crm.execute("TRUNCATE weather")
    crm.execute(OURS, "42501")
    met("42501", "switch-plugin")
    met("42501", "run", "--once")
    crm.connection.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(sql.Identifier(crm.slot)))


# Names that mean harm

EVIL = [
    "x'; DROP TABLE sentinel; --",
    'x"; DROP TABLE sentinel; --',
    "x\\'; DROP TABLE sentinel; --",
    "x\"'); DROP TABLE sentinel; SELECT ('",
    "$$; DROP TABLE sentinel; $$",
    "%s {0} %(name)s",
    "a\nb",
    "a\n",
    "Übel, \u2028",
    "-- ",
    "a.b",
]
"""Of names that the worker may be given by its operator."""


@pytest.fixture
def sentinel(crm: Crm) -> Crm:
    """A CRM with a table that must survive."""
    crm.execute("CREATE TABLE sentinel AS SELECT 1")
    return crm


def unharmed(crm: Crm) -> None:
    assert crm.value("SELECT count(*) FROM sentinel") == 1


@pytest.mark.parametrize("setting", ["slot", "time_zone", "plugin", "log_level", "log_format"])
@pytest.mark.parametrize("value", [*EVIL, "", "a" * 64, "a\0b"])
def test_a_setting_that_can_only_be_a_word_is_refused(setting: str, value: str) -> None:
    with pytest.raises(SettingsError, match=setting):
        config.load(None, {setting: value})


@pytest.mark.parametrize("value", [value for value in (*EVIL, "", "a" * 64, "a\0b") if value != "a.b"])
def test_a_name_of_a_worker_is_refused_that_would_not_stay_what_it_is(value: str) -> None:
    with pytest.raises(SettingsError, match="name"):
        config.load(None, {"name": value})


@pytest.mark.parametrize("value", ["", "a" * 64, "ü" * 32, "a\0b"])
def test_a_publication_that_the_server_would_call_otherwise_is_refused(value: str) -> None:
    with pytest.raises(SettingsError, match="publication"):
        config.load(None, {"publication": value})


def test_a_publication_may_have_any_name(new_crm: Crm) -> None:
    crm, name = new_crm, f"{EVIL[3]}{EVIL[5]}{EVIL[8]}"
    crm.execute("CREATE TABLE sentinel AS SELECT 1")
    crm.settings |= {"plugin": "pgoutput", "publication": name}
    crm.setup()
    crm.succeed("setup")
    assert crm.execute("SELECT pubname FROM pg_publication") == [(name,)]
    crm.add_leads(1)
    crm.record()
    assert crm.types() == ["lead_created"]
    assert [found.message for found in report(crm) if found.outcome == "failed"] == []
    crm.succeed("status")
    del crm.settings["plugin"]
    for plugin in ("wal2json", "pgoutput"):
        crm.succeed("switch-plugin", "--to", plugin)
    crm.add_leads(1)
    crm.record()
    crm.succeed("teardown", "--yes", "--all")
    assert crm.types() == ["lead_created"] * 2
    assert crm.execute("SELECT pubname FROM pg_publication") == []
    unharmed(crm)


@pytest.mark.parametrize("name", [EVIL[3], "".join(EVIL[5:9])])
def test_a_role_may_have_any_name(sentinel: Crm, name: str) -> None:
    crm = sentinel
    role = sql.Identifier(name)
    crm.connection.execute(sql.SQL("DROP ROLE IF EXISTS {}").format(role))
    crm.succeed("setup", "--role", name)
    crm.connection.execute(sql.SQL("ALTER ROLE {} LOGIN").format(role))
    owner = crm.settings.get("dsn", crm.dsn)
    try:
        crm.settings["dsn"] = make_conninfo(crm.dsn, user=name)
        assert [found.message for found in report(crm) if found.outcome == "failed"] == []
        crm.add_leads(1)
        crm.record()
        assert crm.types() == ["lead_created"]
        crm.connection.execute(sql.SQL("REVOKE INSERT ON activity FROM {}").format(role))
        done = crm.command("run", "--once")
        assert done.returncode == errors.TargetUnusableError.exit_code
        crm.connection.execute(done.stderr.partition("hint: as the owner: ")[2].encode())  # as it is printed
        crm.record()
    finally:
        crm.settings["dsn"] = owner
        crm.connection.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(role))
    unharmed(crm)


def test_a_profile_of_hostile_names_meets_every_command(bare_crm: Crm) -> None:
    crm = prepared(bare_crm, key=True)
    crm.execute("CREATE TABLE sentinel AS SELECT 1")
    crm.setup()
    hostile = sql.Identifier(HOSTILE)
    crm.connection.execute(
        sql.SQL("INSERT INTO {0}.{0} SELECT n, {1}, {1}, 's' FROM generate_series(1, 3) n").format(hostile, HOSTILE)
    )
    crm.record()
    crm.succeed("status", "--json")
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        for command in (["verify", "--repair"], ["backfill", HOSTILE], ["dead-letters", "list", "--table", HOSTILE]):
            assert "Traceback" not in crm.command(*command).stderr
    crm.succeed("switch-plugin")
    crm.record()
    crm.succeed("teardown", "--yes", "--all")
    written = sql.SQL("SELECT count(*) FROM {}.target").format(hostile)
    assert crm.connection.execute(written).fetchone() == (3,)
    assert crm.value("SELECT count(*) FROM victim") == 0
    unharmed(crm)


def test_a_recording_may_be_kept_anywhere(sentinel: Crm) -> None:
    crm = sentinel
    names = [EVIL[2], EVIL[6], EVIL[8]]
    for number, name in enumerate(names, start=1):
        directory = crm.directory / name
        directory.mkdir()
        crm.add_leads(1)
        crm.record(recording_directory=str(directory))
        assert list(directory.iterdir())
        if number == 1:
            crm.succeed("replay", str(directory))
    assert len(crm.types()) == len(names)
    unharmed(crm)


def test_what_applications_say_and_store_is_written_as_it_is(sentinel: Crm) -> None:
    crm = sentinel
    values = [*EVIL, "\\N", "\\.", "\t\r\n\\", "NULL", "{new.status}", "'{}'"]
    for value in values:
        with crm.connection.transaction():
            shadow.act_as(crm.connection, value)
            crm.execute(
                "INSERT INTO lead (full_name, source, bd_in_charge, type, company_name) VALUES (%s, %s, 'b', 't', %s)",
                *[value] * 3,
            )
    crm.record()
    assert [
        (a["metadata"]["lead_name"], a["metadata"]["source"], a["metadata"]["changed_by"], a["created_by"])
        for a in crm.activities()
    ] == [(value,) * 4 for value in values]
    unharmed(crm)


# Secrets


def test_no_secret_is_shown_by_the_settings_that_have_it() -> None:
    secrets = {"dsn": f"host=h password={CANARY}", "context_key": CANARY * 3, "mask_key": CANARY * 3}
    settings = config.load(None, secrets)
    assert CANARY not in f"{settings!r} {settings} {settings.model_dump_json()}"
    for wrong in ({"context_key": CANARY}, {"mask_key": CANARY}, {"dsn": f"host=h port={CANARY}"}):
        with pytest.raises((SettingsError, ConnectionStringError)) as refused:
            config.load(None, secrets | wrong)
        assert CANARY not in f"{refused.value} {refused.value.hint}"


def test_a_connection_that_fails_shows_no_password_in_its_traceback() -> None:
    with pytest.raises((errors.CdcWorkerError, psycopg.Error)) as failed:
        postgres.connect(f"host=127.0.0.1 port=1 password={CANARY}", "w")
    assert CANARY not in "".join(traceback.format_exception(failed.value))
