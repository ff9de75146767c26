"""What is wrong around the rows and not with them: no dead letter, nothing lost, and it is exact once it is mended."""

from __future__ import annotations

import threading
from typing import LiteralString
from unittest import mock

import pytest
from support import Crm, eventually, role

from cdc_worker import config, errors, profile, shadow
from cdc_worker.stop import Stop
from cdc_worker.worker import Worker

WEATHER = """
CREATE TABLE weather (code text);
CREATE SEQUENCE attempt;
CREATE FUNCTION raise_it() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE code text := (SELECT code FROM public.weather w);
BEGIN
    IF code IS NOT NULL AND NEW.metadata ->> 'lead_name' = 'Lead 50' THEN
        PERFORM nextval('public.attempt');
        RAISE EXCEPTION 'of the row %', NEW USING ERRCODE = code;
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER raise_it BEFORE INSERT ON activity FOR EACH ROW EXECUTE FUNCTION raise_it();
"""
"""A trigger of the target that raises what the table `weather` names, for one row of a hundred."""

HEALING = ["08006", "40001", "40P01", "53100", "53200", "53300", "55006", "57014", "57P03", "58030"]
"""But for 55P03: a lock that is not to be had is waited for, and the batch tried again on the same connection."""

STOPPING = ["0A000", "25006", "42501", "42703", "42804", "42P01", "P0002", "XX000"]


@pytest.fixture
def weather(crm: Crm) -> Crm:
    """A CRM whose target raises whatever the table `weather` has."""
    crm.connection.execute(WEATHER.encode())
    shadow.install(crm.connection)
    return crm


def exact(crm: Crm) -> None:
    """Assert that the ledger is recorded, all of it, and that nothing became a dead letter."""
    crm.record()
    assert shadow.faults(crm.connection) == []
    expected, recorded = shadow.counts(crm.connection)
    assert expected == recorded > 0
    assert crm.value("SELECT count(*) FROM cdc_worker.dead_letter") == 0


def test_what_may_heal_is_waited_for_and_each_try_is_one_attempt(weather: Crm) -> None:
    """A batch isn't divided for it: that would be a storm of attempts on a server in trouble."""
    crm = weather
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        for number, code in enumerate(HEALING, start=1):
            crm.execute("INSERT INTO weather VALUES (%s)", code)
            crm.add_leads(100)
            eventually(lambda: code in {event["sqlstate"] for event in worker.events("connection_lost")})  # noqa: B023
            crm.execute("TRUNCATE weather")
            eventually(lambda: crm.value("SELECT count(*) FROM activity") == number * 100)  # noqa: B023
        lost = worker.events("connection_lost")
        assert {event["reason"] for event in lost} == {None}
        # What it waits for before it tries again grows with each attempt, on average.
        assert all(event["retry_in"] <= 0.2 * 2 ** event["attempt"] for event in lost)
        assert crm.value("SELECT last_value FROM attempt") == len(lost)
        assert worker.terminate() == 0
    exact(crm)


def test_what_does_not_heal_by_itself_stops_the_worker_at_once(weather: Crm) -> None:
    crm = weather
    for number, code in enumerate(STOPPING, start=1):
        crm.execute("INSERT INTO weather VALUES (%s)", code)
        crm.add_leads(100)
        done = crm.command("run")
        assert done.returncode == errors.TargetUnusableError.exit_code, (code, done.stderr)
        assert f"(SQLSTATE {code})" in done.stderr
        assert "Lead 50" not in done.stderr + str(crm.execute("SELECT failure FROM cdc_worker.process"))
        assert crm.value("SELECT last_value FROM attempt") == number
        crm.execute("TRUNCATE weather")
    exact(crm)


# What somebody has done to the database. The mending is what the hint says, or the way back.

REVOKED: dict[str, tuple[LiteralString, LiteralString]] = {
    "INSERT on the target": ("INSERT ON activity", "cdc"),
    "the sequence": ("USAGE ON SEQUENCE activity_activity_id_seq", "cdc"),
    "UPDATE of the checkpoint": ("UPDATE ON cdc_worker.checkpoint", "cdc"),
    "the worker's schema": ("USAGE ON SCHEMA cdc_worker", "cdc"),
    "the target's schema": ("USAGE ON SCHEMA public", "PUBLIC"),
}
"""Rights, and whose they are."""

ALTERED: dict[str, tuple[LiteralString, LiteralString, int, int]] = {
    "a column is gone": (
        "ALTER TABLE activity RENAME description TO told",
        "ALTER TABLE activity RENAME told TO description",
        21,
        17,
    ),
    "the target is gone": ("ALTER TABLE activity RENAME TO gone", "ALTER TABLE gone RENAME TO activity", 21, 17),
    "the checkpoint's table is gone": (
        "ALTER TABLE cdc_worker.checkpoint RENAME TO gone",
        "ALTER TABLE cdc_worker.gone RENAME TO checkpoint",
        21,
        10,
    ),
    "a column of another type": (
        "ALTER TABLE activity RENAME description TO told; ALTER TABLE activity ADD description integer",
        "ALTER TABLE activity DROP description; ALTER TABLE activity RENAME told TO description",
        17,
        17,
    ),
}
"""What is done to it, the way back, and the exit code of a worker that runs, and of one that starts."""


def stops(crm: Crm, harm: LiteralString, mending: LiteralString, running: int, starting: int) -> None:
    """Assert with what a worker stops that meets this while it runs, then one that starts; and that all is exact."""
    shadow.install(crm.connection)
    with crm.worker() as worker:
        crm.add_leads(10)
        eventually(lambda: len(crm.types()) == 10)
        crm.connection.execute(harm)
        crm.add_leads(10)
        assert worker.wait() == running, worker.said
    done = crm.command("run", "--once")
    assert done.returncode == starting, done.stderr
    assert "hint: " in done.stderr
    assert "Lead 1" not in worker.said + done.stderr
    crm.connection.execute(mending)
    assert crm.value("SELECT count(*) FROM cdc_worker.dead_letter") == 0
    exact(crm)


@pytest.mark.parametrize("right", REVOKED)
def test_a_right_that_is_revoked_makes_no_dead_letters(crm: Crm, right: str) -> None:
    granted, who = REVOKED[right]
    with role(crm):
        stops(crm, f"REVOKE {granted} FROM {who}", f"GRANT {granted} TO {who}", 21, 21)


def test_a_dead_letter_that_the_role_may_not_write_is_no_reason_to_go_on_without_it(crm: Crm) -> None:
    crm.execute("ALTER TABLE activity ADD CHECK (metadata ->> 'lead_name' <> 'Lead 5')")
    with role(crm), crm.worker() as worker:
        worker.wait_for("replication_started")
        crm.execute("REVOKE INSERT ON cdc_worker.dead_letter FROM cdc")
        crm.add_leads(10)
        assert worker.wait() == 21
        assert crm.types() == []
        crm.execute("GRANT INSERT ON cdc_worker.dead_letter TO cdc")
        crm.record()
    assert len(crm.types()) == 9
    assert crm.value("SELECT count(*) FROM cdc_worker.dead_letter") == 1


@pytest.mark.parametrize("what", ALTERED)
def test_a_target_that_is_altered_makes_no_dead_letters(crm: Crm, what: str) -> None:
    stops(crm, *ALTERED[what])


def test_a_column_that_becomes_short_is_written_as_far_as_it_goes_from_then_on(crm: Crm) -> None:
    """As at a start: what is cut stands in the metadata. The rows are not taken for bad ones."""
    with crm.worker() as worker:
        crm.add_leads(1)
        eventually(crm.types)
        crm.execute("ALTER TABLE activity RENAME description TO told")
        crm.execute("ALTER TABLE activity ADD description varchar(4)")
        crm.add_leads(1)
        eventually(lambda: len(crm.types()) == 2)
        assert worker.terminate() == 0
    assert crm.activities()[1]["description"] == "Lea…"
    assert crm.activities()[1]["metadata"]["untruncated"] == {"description": 'Lead "Lead 1" created by jane'}
    assert crm.value("SELECT count(*) FROM cdc_worker.dead_letter") == 0


def test_a_captured_table_that_is_gone_while_the_worker_runs_is_told_of(
    crm: Crm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another name its changes are not asked for: nothing else would be heard of them. A start would be refused."""
    for name, value in {"stream.WATCH_INTERVAL": 0.1, "stream.MOVED": 0, "worker.gc": mock.Mock()}.items():
        monkeypatch.setattr(f"cdc_worker.{name}", value)
    log, stop = mock.Mock(), Stop()
    settings = config.load(None, {"dsn": crm.dsn, "slot": crm.slot} | crm.settings)
    running = threading.Thread(target=Worker(settings, profile.load(settings.profile), stop=stop, log=log).run)
    running.start()
    try:
        crm.add_leads(1)
        eventually(crm.types)
        crm.execute("ALTER TABLE lead RENAME TO prospect")
        crm.execute("INSERT INTO customer (customer_uid, name) VALUES (1, 'Acme')")
        told = mock.call.warning(
            "profile_misfits",
            faults=["captured table public.lead does not exist"],
            mend="the profile, then SIGHUP",
        )
        eventually(lambda: told in log.mock_calls)
    finally:
        stop.request()
        running.join()
    assert crm.value("SELECT count(*) FROM cdc_worker.dead_letter") == 0
