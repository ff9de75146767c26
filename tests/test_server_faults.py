"""Faults of the server under the real worker and an application that writes: exact by the ledger afterwards."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from storms import Faults, Writers, recorded_exactly
from support import PATIENCE, Crm, WorkerProcess, crm_on, eventually, having, storm

from cdc_worker import config, errors, fence, log, postgres, shadow
from cdc_worker.cluster import Binaries, Cluster
from cdc_worker.fence import Fence


@pytest.fixture(scope="module")
def doomed(binaries: Binaries) -> Iterator[Cluster]:
    """A server of this module's own: it is stopped, crashed, filled and set as the tests like."""
    with Cluster(binaries) as server:
        yield server


@pytest.fixture
def crm(doomed: Cluster, tmp_path: Path, plugin: str) -> Iterator[Crm]:
    """A database on it, set up for the worker."""
    with crm_on(doomed, tmp_path, prepared=True, plugin=plugin) as crm:
        yield crm


# Shutdowns and crashes


SHUTDOWN = 2.0
"""So many seconds a fast shutdown may take, whatever the worker has in hand. Of several the quickest counts: the
machine may be busy, but what waits for the worker waits each time."""


OF_LEADS = "SELECT count(*) FROM activity WHERE metadata ->> 'source' = 'website'"
"""Activities of those that the test adds; the application's have other sources."""


@pytest.mark.parametrize("state", ["caught up", "behind", "locked out"])
@storm(1, chaos=5)
def test_a_fast_shutdown_is_over_within_two_seconds_and_loses_nothing(
    doomed: Cluster, crm: Crm, seed: int, faults: Faults, *, state: str, rounds: int
) -> None:
    shadow.install(crm.connection)
    took: list[float] = []
    with having(doomed, wal_sender_timeout="0"), crm.worker() as worker, Writers(crm, seed) as writers:
        while len(took) < rounds or min(took) > SHUTDOWN:
            assert len(took) < rounds + 4, f"none was over in time: {took}"
            eventually(crm.reader)
            before = writers.commits
            eventually(lambda: writers.commits > before + 10)  # noqa: B023  # at once
            with closing(psycopg.connect(crm.dsn)) as other:
                if state == "locked out":
                    other.execute("LOCK TABLE activity")
                if state != "caught up":
                    crm.add_leads(10_000)
                    ((done,),) = other.execute(OF_LEADS).fetchall()
                    assert done < 10_000 * (len(took) + 1), "it is behind"
                began = time.monotonic()
                doomed.stop("fast")
                took.append(time.monotonic() - began)
            faults[f"fast shutdown, worker {state}"] += 1
            doomed.start()
            crm.reconnect()
        assert worker.process.poll() is None, worker.said
    recorded_exactly(crm, faults)


@pytest.mark.parametrize("default", ["DATABASE", *(pytest.param(of, marks=pytest.mark.chaos) for of in ("ROLE", ""))])
@storm(3, chaos=15)
def test_an_immediate_shutdown_sets_the_confirmed_position_back_and_nothing_is_lost_or_comes_twice(
    doomed: Cluster, crm: Crm, seed: int, faults: Faults, *, default: str, rounds: int
) -> None:
    """Also where synchronous_commit = off is the default, and the server forgets what it has said was committed."""
    dice = random.Random(seed)
    shadow.install(crm.connection)
    confirmed: LiteralString = "SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = %s"
    done = back = 0
    if default:
        of = {"DATABASE": crm.connection.info.dbname, "ROLE": "postgres"}[default]
        crm.connection.execute(f"ALTER {default} {of} SET synchronous_commit = off".encode())
    with crm.worker() as worker, Writers(crm, seed):
        while done < rounds or not back:  # it may just have been saved
            assert done < rounds + 20
            eventually(crm.reader)
            threading.Event().wait(0.2 + dice.random())
            worker.process.send_signal(signal.SIGSTOP)
            before = crm.value(confirmed, crm.slot)
            doomed.crash()
            doomed.start()
            crm.reconnect()
            assert crm.value("SHOW synchronous_commit") == ("off" if default else "on")
            back += crm.value(confirmed, crm.slot) < before
            faults["immediate shutdown"] += 1
            done += 1
            worker.process.send_signal(signal.SIGCONT)
        assert worker.process.poll() is None, worker.said
    crm.execute("ALTER ROLE postgres RESET synchronous_commit")
    faults["confirmed position set back"] += back
    recorded_exactly(crm, faults)


@pytest.mark.parametrize("default", ["DATABASE", pytest.param("ROLE", marks=pytest.mark.chaos)])
@storm(2, chaos=10)
def test_what_is_confirmed_outlives_a_crash_whatever_synchronous_commit_is_by_default(
    doomed: Cluster, crm: Crm, faults: Faults, *, default: str, rounds: int
) -> None:
    """The server writes the slot's new position to disk at once, for which a CHECKPOINT has given it reason."""
    shadow.install(crm.connection)
    confirmed: LiteralString = """
        SELECT confirmed_flush_lsn = lsn FROM pg_replication_slots JOIN cdc_worker.checkpoint ON slot = slot_name
    """
    of = {"DATABASE": crm.connection.info.dbname, "ROLE": "postgres"}[default]
    crm.connection.execute(f"ALTER {default} {of} SET synchronous_commit = off".encode())
    with having(doomed, wal_writer_delay="10s"), crm.worker() as worker:
        for count in range(1, rounds + 1):
            eventually(lambda: crm.reader() or worker.process.poll() is not None)
            assert worker.process.poll() is None, worker.said
            crm.execute("SET synchronous_commit = on")
            crm.execute("CHECKPOINT")
            crm.add_leads(1)
            eventually(lambda: len(crm.types()) == count)  # noqa: B023  # at once
            eventually(lambda: crm.value(confirmed))
            doomed.crash()
            faults["immediate shutdown"] += 1
            doomed.start()
            crm.reconnect()
        crm.execute("ALTER ROLE postgres RESET synchronous_commit")
        eventually(lambda: crm.reader() or worker.process.poll() is not None)
        assert worker.process.poll() is None, worker.said
    recorded_exactly(crm, faults)


@storm(3, chaos=40)
def test_a_server_that_is_started_again_and_again_is_waited_for_without_haste(
    doomed: Cluster, crm: Crm, seed: int, faults: Faults, rounds: int
) -> None:
    dice = random.Random(seed)
    shadow.install(crm.connection)
    with crm.worker() as worker, Writers(crm, seed):
        worker.wait_for("replication_started")
        doomed.stop()
        lost = eventually(lambda: (events := worker.events("connection_lost"))[4:] and events)
        assert [event["attempt"] for event in lost][:5] == [1, 2, 3, 4, 5]
        doomed.start()
        for _ in range(rounds):
            doomed.restart(dice.choice(("fast", "immediate")))
            faults["restart"] += 1
        crm.reconnect()
        eventually(crm.reader)
        assert worker.process.poll() is None, worker.said
        assert len(worker.events("connection_lost")) < 10 * (rounds + 1)
    recorded_exactly(crm, faults)


# Nothing to write to


@contextmanager
def full(path: Path) -> Iterator[None]:
    """In place of a file that is empty, or none yet, a disk on which there is no room."""
    aside = path.with_name(f"{path.name}.aside")
    if there := path.exists():
        path.rename(aside)
    path.symlink_to("/dev/full")
    try:
        yield
    finally:
        path.unlink()
        if there:
            aside.rename(path)


def test_a_full_disk_is_waited_for_without_dead_letters(doomed: Cluster, crm: Crm, seed: int, faults: Faults) -> None:
    """SQLSTATE 53100: the target can't be extended by its first block."""
    shadow.install(crm.connection)
    file = doomed.data / crm.value("SELECT pg_relation_filepath('activity')")
    checkpoint: LiteralString = "SELECT lsn, activities FROM cdc_worker.checkpoint"
    before = crm.execute(checkpoint)
    with Writers(crm, seed), crm.worker() as worker:
        with full(file):
            eventually(lambda: [e["sqlstate"] for e in worker.events("connection_lost")][:3] == ["53100"] * 3)
            faults["disk full"] += 1
            assert crm.value("SELECT count(*) FROM cdc_worker.dead_letter") == 0
            assert crm.execute(checkpoint) == before
        eventually(lambda: crm.execute(checkpoint) != before, what="it goes on")
        assert worker.terminate() == 0
    recorded_exactly(crm, faults)


def test_a_full_disk_for_the_wal_ends_the_server_until_there_is_room_and_loses_nothing(
    doomed: Cluster, crm: Crm, seed: int, faults: Faults
) -> None:
    """It PANICs, recovers, and PANICs again, for want of a place where to write that it has recovered."""
    shadow.install(crm.connection)
    panic = "PANIC:  could not write to log file"
    with Writers(crm, seed) as writers, crm.worker() as worker:
        worker.wait_for("replication_started")
        eventually(lambda: writers.commits > 20)
        size: LiteralString = "SELECT setting::bigint FROM pg_settings WHERE name = 'wal_segment_size'"
        name = crm.value(f"SELECT pg_walfile_name(pg_current_wal_lsn() + ({size}))")
        with full(doomed.data / "pg_wal" / name):
            with suppress(psycopg.OperationalError):
                crm.execute("SELECT pg_switch_wal()")
            eventually(lambda: doomed.log.read_text().count(panic) > 1)
            faults["disk of the WAL full"] += 1
        before = writers.commits
        eventually(lambda: writers.commits > before + 20, what="the server is back")
        crm.reconnect()
        eventually(crm.reader)
        assert worker.terminate() == 0
    recorded_exactly(crm, faults)


def test_a_server_that_becomes_read_only_ends_it_with_the_reason(
    doomed: Cluster, crm: Crm, seed: int, faults: Faults
) -> None:
    """Of the application we assume that it may still write: else there is nothing to record."""
    shadow.install(crm.connection)
    crm.settings["dsn"] = crm.dsn
    crm.dsn = make_conninfo(crm.dsn, options="-c default_transaction_read_only=off")
    crm.reconnect()
    with Writers(crm, seed), crm.worker() as worker:
        worker.wait_for("replication_started")
        with having(doomed, default_transaction_read_only="on"):
            faults["read-only"] += 1
            assert worker.wait() == errors.TargetUnusableError.exit_code
            assert "25006" in worker.said
            done = crm.command("run")
            assert done.returncode == errors.TargetUnusableError.exit_code
            assert "default_transaction_read_only is on: nothing can be written (SQLSTATE 25006)" in done.stderr
    recorded_exactly(crm, faults)


# Timeouts and limits


TIMEOUTS = (
    *("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"),
    *("idle_session_timeout", "transaction_timeout"),
)


@pytest.mark.parametrize("each_server", ["18", pytest.param("distribution", marks=pytest.mark.chaos)], indirect=True)
def test_timeouts_that_are_defaults_do_not_hold_for_the_worker(
    each_server: Cluster, tmp_path: Path, seed: int, faults: Faults
) -> None:
    """A target that is locked for longer than all of them, and a commit that takes longer to read."""
    with crm_on(each_server, tmp_path, prepared=True) as crm:
        shadow.install(crm.connection)
        query: LiteralString = "SELECT name FROM pg_settings WHERE name = ANY (%s)"
        known = [name for (name,) in crm.execute(query, [*TIMEOUTS])]
        for name in known:
            crm.connection.execute(f"ALTER DATABASE {crm.connection.info.dbname} SET {name} = '20ms'".encode())
        crm.settings["dsn"] = crm.dsn
        crm.dsn = make_conninfo(crm.dsn, options=" ".join(f"-c {name}=0" for name in known))
        waits: LiteralString = """
            SELECT count(*) FROM pg_stat_activity WHERE application_name = %s AND wait_event_type = 'Lock'
            AND query_start < clock_timestamp() - interval '200 ms'
        """
        with crm.worker() as worker, Writers(crm, seed), psycopg.connect(crm.dsn) as locker:
            worker.wait_for("replication_started")
            locker.execute("LOCK TABLE activity IN SHARE MODE")
            crm.add_leads(20_000)
            eventually(lambda: crm.value(waits, f"cdc-worker {crm.slot}"))
            locker.rollback()
            eventually(lambda: crm.value("SELECT count(*) FROM activity") >= 20_000)
            faults["timeouts as defaults"] += len(known)
            assert worker.events("connection_lost") == []
            assert worker.terminate() == 0
        recorded_exactly(crm, faults)


@pytest.fixture(scope="module")
def tight(binaries: Binaries) -> Iterator[Cluster]:
    """A server with room for one walsender, one slot, and few connections."""
    limits = {"max_wal_senders": "1", "max_replication_slots": "1", "max_connections": "10", "autovacuum": "off"}
    with Cluster(binaries, settings=limits) as server:
        yield server


@pytest.fixture
def tight_crm(tight: Cluster, tmp_path: Path) -> Iterator[Crm]:
    with crm_on(tight, tmp_path, prepared=True) as crm:
        shadow.install(crm.connection)
        yield crm


def senders(crm: Crm) -> Iterator[psycopg.Connection[Any]]:
    """Connections that a server with one walsender has no second one of."""
    yield psycopg.connect(crm.dsn, replication="database", autocommit=True)


def clients(crm: Crm) -> Iterator[psycopg.Connection[Any]]:
    """Connections until there are no more."""
    with suppress(psycopg.OperationalError):
        while True:
            yield psycopg.connect(crm.dsn)


@pytest.mark.parametrize(("exhaust", "said"), [(senders, "max_wal_senders"), (clients, "too many clients already")])
def test_where_a_connection_is_not_to_be_had_it_says_why_and_waits(
    tight_crm: Crm, faults: Faults, exhaust: Callable[[Crm], Iterator[psycopg.Connection[Any]]], said: str
) -> None:
    """At its start, and after it has lost what it had."""
    crm = tight_crm

    def told(worker: WorkerProcess) -> int:
        return sum(said in (event["reason"] or "") for event in worker.events("connection_lost"))

    with ExitStack() as stack:
        taken = [stack.enter_context(closing(connection)) for connection in exhaust(crm)]
        crm.add_leads(1)
        worker = stack.enter_context(crm.worker())
        eventually(lambda: told(worker))
        faults[f"{said}"] += 1
        for connection in taken:
            connection.close()
        eventually(lambda: len(crm.types()) == 1)
        worker.process.send_signal(signal.SIGSTOP)
        crm.execute(
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE application_name = %s",
            f"cdc-worker {crm.slot}",
        )
        before = told(worker)
        taken = [stack.enter_context(closing(connection)) for connection in exhaust(crm)]
        worker.process.send_signal(signal.SIGCONT)
        crm.add_leads(1)
        eventually(lambda: told(worker) > before)
        faults[f"{said}"] += 1
        for connection in taken:
            connection.close()
        eventually(lambda: len(crm.types()) == 2)
        assert worker.terminate() == 0
    recorded_exactly(crm, faults)


def test_a_switch_for_which_there_is_no_slot_to_spare_leaves_the_worker_as_it_is(
    tight_crm: Crm, faults: Faults
) -> None:
    crm = tight_crm
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        done = crm.command("switch-plugin", "--to", "pgoutput")
        assert done.returncode == 1
        assert (
            "error: all replication slots of the server are taken\nhint: raise max_replication_slots\n" in done.stderr
        )
        crm.add_leads(1)
        eventually(crm.types)
        assert worker.terminate() == 0
    recorded_exactly(crm, faults)


# Commands beside it


def check(crm: Crm) -> None:
    """What `backfill` and `verify` begin with."""
    with closing(postgres.connect(crm.dsn, crm.slot)) as connection:
        Fence(connection, config.load(None, {"dsn": crm.dsn, "slot": crm.slot}), log.get()).check()


def test_a_command_that_begins_while_the_worker_connects_anew_waits_for_it(
    crm: Crm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fence, "RETURN", PATIENCE)
    with crm.worker() as worker, ThreadPoolExecutor() as pool:
        worker.wait_for("replication_started")
        worker.process.send_signal(signal.SIGSTOP)
        crm.execute("SELECT pg_terminate_backend(active_pid, 10000) FROM pg_replication_slots WHERE active")
        eventually(lambda: crm.reader() is None)
        checking = pool.submit(check, crm)
        threading.Event().wait(0.3)
        worker.process.send_signal(signal.SIGCONT)
        assert checking.result() is None
        assert worker.terminate() == 0
    monkeypatch.setattr(fence, "RETURN", PATIENCE * 100)
    with pytest.raises(errors.NotRunningError):
        check(crm)  # at once: it has said that it ended


def test_a_worker_that_was_killed_is_not_waited_for_long(crm: Crm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fence, "RETURN", 0.1)
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        worker.kill()
        eventually(lambda: crm.reader() is None)
        with pytest.raises(errors.NotRunningError, match="nobody reads the slot"):
            check(crm)


# A synchronous standby


@contextmanager
def receiving(server: Cluster, directory: Path) -> Iterator[None]:
    """A real standby, as far as commits can wait for it."""
    directory.mkdir()
    command = [server.binaries.program("pg_receivewal"), "--synchronous", "--no-loop", "--directory", str(directory)]
    process = subprocess.Popen(command, env=server.environment(), stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("names", "recorded"),
    [
        ("*", True),
        ("*", False),
        pytest.param("FIRST 1 ({}, *)", True, marks=pytest.mark.chaos),
        pytest.param("FIRST 1 ({}, *)", False, marks=pytest.mark.chaos),
        pytest.param("ANY 1 (pg_receivewal, {})", True, marks=pytest.mark.chaos),
    ],
)
def test_who_is_made_a_synchronous_standby_while_it_runs_sees_it_and_ends_before_the_application_hangs(
    doomed: Cluster, crm: Crm, seed: int, faults: Faults, *, names: str, recorded: bool
) -> None:
    """The worker's own commit would wait for itself, or it would never confirm what is none of its business."""
    shadow.install(crm.connection)
    crm.execute("CREATE TABLE other (id int)")
    name = f"cdc-worker {crm.slot}"
    names = names.replace("{}", f'"{name.upper()}"')
    with receiving(doomed, crm.directory / "received"), crm.worker() as worker:
        worker.wait_for("replication_started")
        faults["made a synchronous standby"] += 1
        with ExitStack() as stack:
            if recorded:
                writers = stack.enter_context(Writers(crm, seed))
                eventually(lambda: writers.commits > 20)
            with having(doomed, synchronous_standby_names=names):
                crm.execute("INSERT INTO other VALUES (1)")
                assert worker.wait() == errors.SynchronousStandbyError.exit_code
                assert "synchronous_standby_names is " in worker.said
                hint = worker.said.partition("\nhint: ")[2]
                crm.execute("INSERT INTO other VALUES (1)")
                if recorded:
                    before = writers.commits
                    eventually(lambda: writers.commits > before + 20, what="the application goes on")
                refused = crm.command("run")
                assert refused.returncode == errors.SynchronousStandbyError.exit_code
                assert hint in refused.stderr
                for statement in re.findall(r"(?:ALTER|SELECT) [^;\n]+", hint):
                    crm.connection.execute(statement.encode())
                crm.add_leads(1)
                with crm.worker() as again:
                    again.wait_for("replication_started")
                    eventually(crm.types)
                    assert again.terminate() == 0
    recorded_exactly(crm, faults)
