"""Status: what a person on call sees, and a machine reads."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import ExitStack, closing
from datetime import datetime
from pathlib import Path
from socket import gethostname
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from support import Crm, WorkerProcess, crm_on, eventually, make_crm, role

from cdc_worker.cluster import Binaries, Cluster
from cdc_worker.config import load
from cdc_worker.lsn import LSN
from cdc_worker.status import Backfill, Counts, Failure, Process, Status, Unreachable, status


@pytest.fixture(scope="module")
def quiet(binaries: Binaries) -> Iterator[Cluster]:
    """A server to which the worker reports its progress often, as it does at a quarter of this timeout."""
    with Cluster(
        binaries, settings={"wal_sender_timeout": "2s", "autovacuum": "off", "max_prepared_transactions": "2"}
    ) as server:
        yield server


@pytest.fixture
def crm(quiet: Cluster, tmp_path: Path) -> Iterator[Crm]:
    with crm_on(quiet, tmp_path, prepared=True) as crm:
        yield crm


def seen(crm: Crm) -> Status:
    return status(load(None, {"dsn": crm.dsn, "slot": crm.slot}))


def late(crm: Crm) -> str:
    """Why activities are late; empty if they are not."""
    return seen(crm).late or ""


def test_the_fields_of_the_json_are_those_of_the_model_and_told_there(crm: Crm) -> None:
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        found = json.loads(crm.succeed("status", "--json"))
        assert list(found) == list(Status.model_fields)
        assert Status.model_validate(found).slot == crm.slot
        assert Status.model_validate(found).processes[0].pid == worker.process.pid
    for model in (Status, Process, Counts, Backfill, Failure, Unreachable):
        assert [name for name, field in model.model_fields.items() if not field.description] == []


def test_before_the_first_run(crm: Crm) -> None:
    found = seen(crm)
    assert (found.worker, found.slot, found.plugin) == (crm.slot, crm.slot, "wal2json")
    assert (found.streaming, found.active_pid, found.holder) == (False, None, None)
    assert (found.commit_lsn, found.changes, found.committed_at) == (None, 0, None)
    assert (found.dead_letters_waiting, found.processes, found.last_error) == (0, [], None)
    assert found.late == "not running: no worker has run yet"
    assert found.wal_status == "reserved"
    assert found.retained_bytes
    assert LSN.parse(found.wal_end) - LSN.parse(found.checkpoint) == found.lag_bytes


def test_no_lag_while_streaming_and_caught_up(crm: Crm) -> None:
    """Also where the WAL moves on with what is none of the worker's business, and the checkpoint stays."""
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        crm.add_leads(1)
        eventually(crm.activities)
        checkpoint = crm.value("SELECT lsn FROM cdc_worker.checkpoint")
        crm.execute("CREATE TABLE elsewhere ()")
        found = eventually(lambda: (found := seen(crm)).lag_bytes == 0 and found)
        assert found
        assert found.lag_seconds == 0
        assert found.streaming
        assert found.holder == f"cdc-worker {crm.slot}"
        assert found.active_pid is not None
        assert found.committed_at == commit_time(crm)
        assert LSN.parse(found.wal_end) > LSN.parse(found.checkpoint) >= LSN.parse(checkpoint)
        assert found.late is None
        said = crm.succeed("status")
        assert "late:         no\n" in said
        assert f"reader:       cdc-worker {crm.slot}, process {found.active_pid} of the server\n" in said
        assert worker.terminate() == 0
    eventually(lambda: not seen(crm).streaming)


def commit_time(crm: Crm) -> datetime:
    found = crm.value("SELECT committed_at FROM cdc_worker.checkpoint")
    assert isinstance(found, datetime)
    return found


def test_lag_in_bytes_and_seconds_while_the_target_is_locked(crm: Crm) -> None:
    with crm.worker() as worker, psycopg.connect(crm.dsn) as other:
        worker.wait_for("replication_started")
        eventually(lambda: seen(crm).lag_bytes == 0)
        other.execute("LOCK TABLE activity IN SHARE MODE")
        crm.add_leads(100)
        end = LSN.parse(crm.value("SELECT pg_current_wal_lsn()"))
        reached = LSN.parse(seen(crm).checkpoint)
        first = eventually(lambda: (found := seen(crm)).lag_seconds > 0 and found)
        assert first
        assert 0 < first.lag_bytes <= LSN.parse(first.wal_end) - reached
        assert first.streaming
        eventually(lambda: seen(crm).lag_seconds > first.lag_seconds)
        assert LSN.parse(seen(crm).checkpoint) < end
        other.rollback()
        eventually(lambda: seen(crm).lag_bytes == 0)
        assert len(crm.activities()) == 100


def test_a_stranger_at_the_slot_is_named_and_is_no_streaming_worker(quiet: Cluster, crm: Crm) -> None:
    dsn = make_conninfo(crm.dsn, application_name="pg_recvlogical", replication="database")
    with closing(psycopg.connect(dsn, autocommit=True)) as stranger:
        stranger.execute(f"START_REPLICATION SLOT {crm.slot} LOGICAL 0/0 (\"format-version\" '2')".encode())
        found = seen(crm)
        assert (found.streaming, found.holder) == (False, "pg_recvlogical")
        assert found.active_pid == stranger.info.backend_pid
        assert found.late == f"slot taken: it is read by process {found.active_pid} (pg_recvlogical, 127.0.0.1)"
        assert f"late:         {found.late}\n" in crm.succeed("status")


def test_dead_letters_are_counted(crm: Crm) -> None:
    crm.execute("ALTER TABLE activity ADD CHECK (description NOT LIKE '%%2%%')")
    crm.add_leads(3)
    crm.record()
    found = seen(crm)
    assert found.activities == Counts(minute=2, hour=2, day=2)
    assert found.dead_letters == Counts(minute=1, hour=1, day=1)
    assert found.dead_letters_waiting == 1
    said = crm.succeed("status")
    assert "activities:   2 in the last minute, 2 in the hour, 2 in the day\n" in said
    assert "dead letters: 1 in the last minute, 1 in the hour, 1 in the day; 1 waiting\n" in said


def test_wal_that_is_kept_for_a_stopped_worker_is_counted(crm: Crm) -> None:
    before = seen(crm)
    crm.add_leads(1000)
    after = seen(crm)
    assert (after.retained_bytes or 0) > (before.retained_bytes or 0)
    assert after.lag_bytes > before.lag_bytes
    assert after.checkpoint == before.checkpoint


# Why activities are late


def test_late_because_of_a_gap(crm: Crm) -> None:
    position = seen(crm).checkpoint
    crm.execute("SELECT pg_drop_replication_slot(%s)", crm.slot)
    found = seen(crm)
    assert (found.late or "").startswith(f'gap: slot "{crm.slot}" does not exist: changes from {position} (')
    assert (found.plugin, found.retained_bytes, found.wal_status) == (None, None, None)
    assert f"slot:         {crm.slot}, which is gone\n" in crm.succeed("status")


def test_late_because_no_worker_runs_and_how_the_last_one_ended(crm: Crm) -> None:
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        assert worker.terminate() == 0
        assert late(crm).startswith(
            f"not running: process {worker.process.pid} on {gethostname()} was asked to end at "
        )
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        worker.kill()
        killed = f"not running: process {worker.process.pid} on {gethostname()} was killed, is cut off, or tries again"
        eventually(lambda: late(crm).startswith(killed))
    crm.execute("ALTER TABLE activity DROP COLUMN created_by CASCADE")
    assert crm.command("run").returncode == 17
    found = seen(crm)
    assert found.last_error
    assert (found.last_error.exit_code, found.last_error.host) == (17, gethostname())
    assert "has no column created_by" in found.last_error.error
    assert (found.late or "").endswith(f" on {gethostname()} ended with 17: {found.last_error.error}")


def test_late_because_the_target_is_locked_and_by_whom(crm: Crm) -> None:
    with crm.worker() as worker, psycopg.connect(crm.dsn, application_name="pg_dump") as other:
        worker.wait_for("replication_started")
        other.execute("LOCK TABLE activity")
        crm.add_leads(1)
        locked = f"target locked: by process {other.info.backend_pid} (pg_dump, 127.0.0.1, idle in transaction, for "
        eventually(lambda: late(crm).startswith(locked))
        assert not seen(crm).healthy
        other.rollback()
        eventually(lambda: late(crm) == "")
        assert seen(crm).healthy


def test_what_the_watchdog_sees_is_the_last_error(crm: Crm) -> None:
    """Once the worker has had the time to write it down. It stays there when it is over, as all that went wrong."""
    with crm.worker() as worker, psycopg.connect(crm.dsn) as other:
        worker.wait_for("replication_started")
        other.execute("LOCK TABLE activity")
        crm.add_leads(1)
        reason = worker.wait_for("worker_unhealthy")["reason"]
        failure = eventually(lambda: seen(crm).last_error)
        assert failure is not None
        assert failure.error == f"unhealthy: {reason}"
        other.rollback()
        worker.wait_for("worker_healthy")


def test_late_because_a_prepared_transaction_locks_the_target(quiet: Cluster, crm: Crm) -> None:
    crm.execute("BEGIN; LOCK TABLE activity; PREPARE TRANSACTION 'forgotten'")
    try:
        with crm.worker() as worker:
            worker.wait_for("replication_started")
            crm.add_leads(1)
            eventually(lambda: late(crm) == "target locked: by the prepared transaction 'forgotten'")
    finally:
        crm.execute("ROLLBACK PREPARED 'forgotten'")


def test_late_because_the_active_worker_is_silent_while_another_stands_by(
    crm: Crm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdc_worker.status.SILENCE", 0.7)  # the server's patience is two seconds
    with ExitStack() as stack:
        first = stack.enter_context(crm.worker())
        first.wait_for("replication_started")
        second = stack.enter_context(crm.worker())
        second.wait_for("waiting_for_slot")
        roles = {(process.role, process.pid) for process in seen(crm).processes}
        assert roles == {("active", first.process.pid), ("standby", second.process.pid)}
        first.process.send_signal(signal.SIGSTOP)
        waits = f"; process {second.process.pid} on {gethostname()} waits until the server frees the slot; to replace "
        eventually(lambda: waits in late(crm))
        second.wait_for("replication_started")
        eventually(lambda: late(crm) == "")


def test_late_because_a_backlog_is_read(crm: Crm) -> None:
    """A transaction of the application that is still open when the worker begins is no backlog; this one is."""
    crm.add_leads(1)
    crm.record()
    crm.add_leads(1)
    crm.execute("UPDATE cdc_worker.checkpoint SET committed_at = now() - interval '1 hour'")
    with crm.worker() as worker, psycopg.connect(crm.dsn) as other:
        other.execute("LOCK TABLE cdc_worker.erased")  # the worker has the slot, and can't begin
        eventually(lambda: "active" in (process.role for process in seen(crm).processes))
        assert late(crm).startswith(("catching up: ", "target locked: "))
        other.rollback()
        worker.wait_for("replication_started")
        eventually(lambda: late(crm) == "")


def test_late_because_of_dead_letters(crm: Crm) -> None:
    crm.execute("ALTER TABLE activity ADD CHECK (description NOT LIKE '%%2%%')")
    crm.add_leads(3)
    with crm.worker() as worker:
        worker.wait_for("change_dead_lettered")
        eventually(lambda: seen(crm).lag_bytes == 0)
        assert late(crm) == (
            "dead letters: 1 changes wait to be seen to, the last because the target refused the row"
            " (SQLSTATE 23514, constraint activity_description_check); see: cdc-worker dead-letters list"
        )
        assert seen(crm).healthy, "no worker could do more"


def test_late_because_commits_wait_for_a_synchronous_standby(binaries: Binaries, tmp_path: Path) -> None:
    with Cluster(binaries) as server, crm_on(server, tmp_path) as crm:
        crm.setup()
        with crm.worker() as worker:
            worker.wait_for("replication_started")
            crm.add_leads(1)
            eventually(lambda: len(crm.types()) == 1)
            server.set(synchronous_standby_names="elsewhere")
            server.reload()
            with psycopg.connect(crm.dsn, autocommit=True, options="-c synchronous_commit=local") as application:
                application.execute("UPDATE lead SET status = 'x'")
                waits = "commits wait for a synchronous standby (synchronous_standby_names is elsewhere)"
                eventually(lambda: late(crm) == waits)
            server.set(synchronous_standby_names="")
            server.reload()
            eventually(lambda: late(crm) == "")


def test_a_server_that_is_down_is_watched_until_it_is_back(binaries: Binaries, tmp_path: Path) -> None:
    with Cluster(binaries) as server:
        crm = make_crm(server, tmp_path)
        crm.setup()
        with closing(crm), WorkerProcess(["status", "--watch", "--json"], crm.environment(), tmp_path / "log") as watch:

            def lines() -> list[dict[str, Any]]:
                return [json.loads(line) for line in watch.printed.read_text().splitlines()]

            assert eventually(lines)[0]["slot"] == crm.slot
            server.stop("fast")
            (down, *_) = eventually(lambda: [line for line in lines() if "slot" not in line])
            assert down["worker"] == crm.slot
            assert down["late"].startswith("server down: ")
            server.start()
            eventually(lambda: lines()[-1].get("slot") == crm.slot)
            watch.process.send_signal(signal.SIGINT)
            assert watch.wait() == 0


def test_what_went_wrong_last_is_told_also_when_it_has_healed(crm: Crm) -> None:
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        crm.execute("SELECT pg_terminate_backend(backend_pid) FROM cdc_worker.checkpoint")
        eventually(lambda: len(worker.events("replication_started")) == 2)
        found = eventually(lambda: (found := seen(crm)).last_error and found)
        assert found
        assert found.last_error
        assert (found.last_error.pid, found.last_error.exit_code) == (worker.process.pid, None)
        assert found.late is None


def test_counts_are_of_the_last_minute_hour_and_day(crm: Crm) -> None:
    """Told from what the checkpoint's counts were: each tally is moved into the past, as time would."""
    for count, age in ((1, "25 hours"), (10, "2 hours"), (100, "2 minutes")):
        crm.add_leads(count)
        crm.record()
        crm.connection.execute(f"UPDATE cdc_worker.tally SET at = at - interval '{age}'".encode())
    crm.add_leads(1000)
    crm.record()
    assert seen(crm).activities == Counts(minute=1000, hour=1100, day=1110)
    assert seen(crm).dead_letters == Counts(minute=0, hour=0, day=0)


def test_counts_begin_anew_with_the_checkpoint(crm: Crm) -> None:
    crm.add_leads(5)
    crm.record()
    crm.execute("UPDATE cdc_worker.tally SET at = at - interval '2 minutes'")
    crm.succeed("teardown", "--yes")
    crm.setup()
    assert seen(crm).activities == Counts(minute=0, hour=0, day=0)


def test_what_a_killed_worker_wrote_is_not_counted_later(crm: Crm) -> None:
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        for count in (1, 2):
            crm.add_leads(1)
            eventually(lambda count=count: len(crm.types()) == count)  # type: ignore[misc]
        worker.kill()
    crm.execute("UPDATE cdc_worker.tally SET at = at - interval '3 hours'")
    crm.execute("UPDATE cdc_worker.checkpoint SET written_at = written_at - interval '3 hours'")
    crm.record()
    assert seen(crm).activities == Counts(minute=0, hour=0, day=2)


def test_a_role_that_may_read_no_statistics_sees_no_lag_where_there_is_none(crm: Crm) -> None:
    """How far a walsender's client has read is shown to members of pg_read_all_stats, not to its own role."""
    with role(crm), crm.worker() as worker:
        worker.wait_for("replication_started")
        crm.add_leads(1)
        eventually(lambda: len(crm.types()) == 1)
        crm.execute("UPDATE cdc_worker.checkpoint SET committed_at = now() - interval '1 hour'")
        crm.execute("CREATE TABLE elsewhere ()")
        found = Status.model_validate_json(crm.succeed("status", "--json"))
        assert (found.late, found.lag_seconds, found.streaming) == (None, 0, True)


def test_tables_that_are_locked_are_told_with_who_locks_them(crm: Crm) -> None:
    with closing(psycopg.connect(crm.dsn, application_name="psql")) as other:
        other.execute("LOCK TABLE cdc_worker.checkpoint")
        done = crm.command("status")
        assert done.returncode == 1
        assert f"tables of cdc-worker are locked: by process {other.info.backend_pid} (psql, " in done.stderr


def test_tallies_are_kept_for_a_day_and_the_last_before(crm: Crm) -> None:
    for _ in range(3):
        crm.add_leads(1)
        crm.record()
    crm.execute("UPDATE cdc_worker.tally SET at = at - interval '2 days'")
    crm.add_leads(1)
    crm.record()
    counts = crm.execute("SELECT at > now() - interval '1 day', count(*) FROM cdc_worker.tally GROUP BY 1 ORDER BY 1")
    assert [kept for kept, _ in counts] == [False, True]
    assert counts[0] == (False, 1)
    assert seen(crm).activities.day == 1


OTHERS: LiteralString = (
    "INSERT INTO cdc_worker.process (process, worker, host, pid, version, started_at, backend_pid, backend_start)"
    " SELECT gen_random_uuid(), %s, 'db', n, '0', now() + interval '1 h', 0, now() FROM generate_series(1, 50) n"
)


def test_the_last_processes_are_remembered_and_those_that_run(crm: Crm) -> None:
    crm.execute(OTHERS, crm.slot)
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        crm.execute(OTHERS, crm.slot)
        assert crm.command("run", "--no-wait").returncode == 13
        assert crm.value("SELECT count(*) FROM cdc_worker.process WHERE host = 'db'") == 20
        assert [process.pid for process in seen(crm).processes] == [worker.process.pid]
