"""Settings: where they come from, which wins, and what is said of wrong ones."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from support import Crm, crm_on

from cdc_worker import config, profile
from cdc_worker.cluster import Binaries, Cluster
from cdc_worker.errors import ConnectionStringError, SettingsError

CANARY = "c4n4ry"


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper().startswith("CDC_WORKER_"):
            monkeypatch.delenv(name)


def file(directory: Path, text: str) -> Path:
    path = directory / "cdc-worker.toml"
    path.write_text(text)
    return path


# Sources


def test_defaults_file_environment_and_flags_win_in_rising_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = file(tmp_path, 'slot = "of_file"\nprofile = "of_file"\ntime_zone = "Europe/Berlin"\n')
    monkeypatch.setenv("CDC_WORKER_SLOT", "of_environment")
    monkeypatch.setenv("CDC_WORKER_PROFILE", "of_environment")
    found = config.load(path, {"slot": "of_flags", "profile": None})
    assert (found.slot, found.profile, found.time_zone, found.log_level) == (
        "of_flags",
        "of_environment",
        "Europe/Berlin",
        "info",
    )


def test_defaults_need_nothing() -> None:
    found = config.load()
    assert (found.slot, found.worker, found.profile, found.dsn.get_secret_value()) == (
        "cdc_worker",
        "cdc_worker",
        "leadfi",
        "",
    )


def test_a_wrong_value_that_is_overridden_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CDC_WORKER_SLOT", "Not A Slot")
    assert config.load(file(tmp_path, 'log_level = "loud"'), {"slot": "a_slot", "log_level": "debug"}).slot == "a_slot"


def test_the_worker_is_named_for_its_slot_unless_it_has_a_name() -> None:
    assert config.load(None, {"slot": "audit"}).worker == "audit"
    assert config.load(None, {"slot": "audit", "name": "crm-audit"}).worker == "crm-audit"


# Faults


def test_every_wrong_setting_is_named_at_once_with_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = file(tmp_path, 'idle_advance_interval = 0\ncolour = "red"\ndsn = 5\n')
    monkeypatch.setenv("CDC_WORKER_LOG_LEVEL", "loud")
    monkeypatch.setenv("cdc_worker_time_zone", "Mars/Olympus")
    with pytest.raises(SettingsError) as caught:
        config.load(path, {"slot": "Not A Slot"})
    assert str(caught.value).splitlines() == [
        "wrong settings:",
        f"  dsn ({path}): Input should be a valid string",
        "  slot = 'Not A Slot' (--slot): String should match pattern '^[a-z0-9_]{1,63}$'",
        "  time_zone = 'Mars/Olympus' (cdc_worker_time_zone): "
        'Value error, "Mars/Olympus" is not the name of a time zone such as Europe/Berlin',
        f"  idle_advance_interval = 0 ({path}): Input should be greater than 0",
        "  log_level = 'loud' (CDC_WORKER_LOG_LEVEL): Input should be 'debug', 'info', 'warning' or 'error'",
        f"  colour ({path}): Extra inputs are not permitted",
    ]
    assert caught.value.hint == "see: cdc-worker run --help"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "can't be read: No such file or directory"),
        (b"\xff\xfe", "can't be read: it isn't UTF-8 text"),
        (b"slot = \n", "is not TOML: Invalid value (at line 1, column 8)"),
    ],
)
def test_a_settings_file_that_cannot_be_read(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "cdc-worker.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingsError) as caught:
        config.load(path)
    assert str(caught.value) == f'settings file "{path}" {reason}'


def test_a_torn_line_of_the_settings_file_is_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        config.load(file(tmp_path, f'dsn = "password={CANARY}\n'))
    assert CANARY not in str(caught.value)


def test_an_unknown_variable_is_told_of_and_ignored(untouched: Crm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kubernetes tells of a service that is called cdc-worker in variables of that prefix."""
    monkeypatch.setenv("CDC_WORKER_PORT", f"tcp://10.0.0.1:{CANARY}")
    monkeypatch.setenv("CDC_WORKER_SLOTT", "typo")
    assert config.unknown_variables() == ["CDC_WORKER_PORT", "CDC_WORKER_SLOTT"]
    assert config.load().slot == "cdc_worker"
    done = untouched.command("status", port=f"tcp://10.0.0.1:{CANARY}", slott="typo")
    assert done.returncode == 0
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [(line["level"], line["event"], line["variable"]) for line in lines] == [
        ("warning", "setting_unknown", "CDC_WORKER_PORT"),
        ("warning", "setting_unknown", "CDC_WORKER_SLOTT"),
    ]
    assert CANARY not in done.stderr


# Passwords


@pytest.mark.parametrize(
    "dsn", [f"postgresql://jane:{CANARY}@db.example/crm", f"host=db.example user=jane password={CANARY} dbname=crm"]
)
def test_a_password_is_in_no_representation_of_the_settings(dsn: str) -> None:
    found = config.load(None, {"dsn": dsn})
    for shown in (repr(found), str(found), str(found.model_dump()), found.model_dump_json()):
        assert CANARY not in shown
    assert conninfo_to_dict(found.dsn.get_secret_value())["password"] == CANARY


@pytest.mark.parametrize(
    "dsn", [f"{CANARY}", f"password={CANARY} x", f"postgresql://u:a@{CANARY}@h/d", f"postgresql://u:{CANARY}/x@h/d"]
)
def test_a_password_in_a_torn_dsn_is_not_repeated(dsn: str) -> None:
    with pytest.raises(ConnectionStringError) as caught:
        config.load(None, {"dsn": dsn})
    assert CANARY not in f"{caught.value} {caught.value.hint}"
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_settings_do_not_change() -> None:
    found = config.load()
    with pytest.raises(ValueError, match="frozen"):
        found.slot = "another"


# libpq's own ways


@pytest.fixture(scope="module")
def scram(binaries: Binaries) -> Iterator[Cluster]:
    """A server that wants a password from the role cdc."""
    with Cluster(binaries) as server:
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            connection.execute(f"CREATE ROLE cdc SUPERUSER LOGIN PASSWORD '{CANARY}'".encode())
        server.write_hba("host all cdc 127.0.0.1/32 scram-sha-256", "host all postgres 127.0.0.1/32 trust")
        yield server


@pytest.fixture(scope="module")
def untouched(scram: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crm]:
    """A database that is set up, with a role that needs its password."""
    with crm_on(scram, tmp_path_factory.mktemp("crm")) as crm:
        crm.setup()
        yield crm


def recorded(crm: Crm, monkeypatch: pytest.MonkeyPatch, dsn: str, **variables: str) -> None:
    """Record through this DSN and libpq's variables, and see that it is done and nothing secret is said."""
    environment = crm.environment(dsn=dsn) | variables
    monkeypatch.setattr(crm, "environment", lambda **_: environment)
    before = len(crm.activities())
    crm.add_leads(1)
    for command in (["run", "--once", "--log-level", "debug"], ["status"], ["status", "--json"], ["setup"]):
        done = crm.command(*command)
        assert done.returncode == 0, done.stderr
        assert CANARY not in done.stdout + done.stderr
    assert len(crm.activities()) == before + 1


def test_a_url(untouched: Crm, monkeypatch: pytest.MonkeyPatch) -> None:
    of = conninfo_to_dict(untouched.dsn)
    recorded(untouched, monkeypatch, f"postgresql://cdc:{CANARY}@{of['host']}:{of['port']}/{of['dbname']}")


def test_keys_and_values(untouched: Crm, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded(untouched, monkeypatch, make_conninfo(untouched.dsn, user="cdc", password=CANARY, sslmode="prefer"))


def test_variables_of_libpq(untouched: Crm, monkeypatch: pytest.MonkeyPatch) -> None:
    of = conninfo_to_dict(untouched.dsn)
    variables = {"PGHOST": of["host"], "PGPORT": of["port"], "PGDATABASE": of["dbname"]}
    credentials = {"PGUSER": "cdc", "PGPASSWORD": CANARY, "PGSSLMODE": "disable"}
    recorded(untouched, monkeypatch, "", **{name: str(value) for name, value in variables.items()}, **credentials)


def test_options_of_libpq_reach_the_server(untouched: Crm, monkeypatch: pytest.MonkeyPatch) -> None:
    dsn = make_conninfo(untouched.dsn, user="cdc", password=CANARY)
    untouched.execute("ALTER ROLE cdc SET role = 'pg_monitor'")
    try:
        recorded(untouched, monkeypatch, dsn, PGOPTIONS="-c role=none")
    finally:
        untouched.execute("ALTER ROLE cdc RESET role")


def test_a_service_and_a_password_file(untouched: Crm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    of = conninfo_to_dict(untouched.dsn)
    services, passwords = tmp_path / "pg_service.conf", tmp_path / "pgpass"
    services.write_text(
        f"[crm]\nhost={of['host']}\nport={of['port']}\ndbname={of['dbname']}\nuser=cdc\nsslmode=disable\n"
    )
    passwords.write_text(f"{of['host']}:{of['port']}:*:cdc:{CANARY}\n")
    passwords.chmod(0o600)
    recorded(untouched, monkeypatch, "service=crm", PGSERVICEFILE=str(services), PGPASSFILE=str(passwords))


def test_the_databases_time_zone_is_compared_as_it_does_and_has_to_be_known() -> None:
    given = profile.load("leadfi")
    assert config.load(None, {}).zone(given, "europe/BERLIN") == "Europe/Berlin"
    assert config.load(None, {"time_zone": "Asia/Tokyo"}).zone(given, "<+03>-03") == "Asia/Tokyo"
    with pytest.raises(SettingsError) as raised:
        config.load(None, {}).zone(given, "<+03>-03")
    assert str(raised.value).startswith('the database\'s time zone: "<+03>-03" is not the name of a time zone such as')
    assert raised.value.hint == "name one in CDC_WORKER_TIME_ZONE, or for the database"
