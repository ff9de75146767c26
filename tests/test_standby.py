"""A second worker with the same slot stands by, takes over, and what the first wakes up to is that it has ended."""

from __future__ import annotations

import random
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing
from importlib import resources
from pathlib import Path

import psycopg
import pytest
from application import Application, owed, statuses, told
from storms import TAKEN_OVER_ASLEEP, Faults
from support import Crm, WorkerProcess, crm_on, eventually, having, role, storm, stranger

from cdc_worker import shadow
from cdc_worker.cluster import Binaries, Cluster
from cdc_worker.errors import FencedError, SlotTakenError

FENCED = FencedError.exit_code


@pytest.fixture(scope="module")
def hasty(binaries: Binaries) -> Iterator[Cluster]:
    """A server that soon frees the slot of a worker which doesn't answer."""
    with Cluster(binaries, settings={"wal_sender_timeout": "1500ms"}) as server:
        yield server


@pytest.fixture
def hasty_crm(hasty: Cluster, tmp_path: Path) -> Iterator[Crm]:
    with crm_on(hasty, tmp_path, prepared=True) as crm:
        yield crm


def active(crm: Crm) -> WorkerProcess:
    """A worker that streams."""
    worker = crm.worker()
    worker.wait_for("replication_started")
    return worker


def standing_by(crm: Crm) -> WorkerProcess:
    """A worker that waits for the slot."""
    worker = crm.worker()
    worker.wait_for("waiting_for_slot")
    return worker


def stop(worker: WorkerProcess) -> None:
    """SIGSTOP: it is there, and does nothing."""
    worker.process.send_signal(signal.SIGSTOP)


def go_on(worker: WorkerProcess) -> None:
    """SIGCONT."""
    worker.process.send_signal(signal.SIGCONT)


def sessions(crm: Crm, condition: str) -> int:
    """How many sessions of the worker there are of which this is true."""
    query = f"SELECT count(*) FROM pg_stat_activity WHERE application_name = %s AND {condition}"
    ((count,),) = crm.connection.execute(query.encode(), [f"cdc-worker {crm.slot}"])
    return int(count)


def test_a_stand_by_is_ready_and_takes_over_when_the_active_worker_ends(crm: Crm) -> None:
    shadow.install(crm.connection)
    with active(crm) as first, standing_by(crm) as second:
        crm.add_leads(2)
        eventually(lambda: len(crm.types()) == 2)
        assert first.terminate() == 0
        crm.add_leads(3)
        eventually(lambda: len(crm.types()) == 5)
        assert second.terminate() == 0
    assert shadow.faults(crm.connection) == []


def test_a_stand_by_costs_the_server_one_quiet_session(crm: Crm) -> None:
    """No walsender, no transaction and no snapshot, which would hold up vacuum."""
    with active(crm), standing_by(crm) as second:
        assert sessions(crm, "backend_type = 'walsender'") == 1
        eventually(lambda: sessions(crm, "backend_type = 'client backend'") == 2)
        assert crm.value("SELECT count(*) FROM pg_locks WHERE NOT granted") == 0
        eventually(lambda: sessions(crm, "backend_type = 'client backend' AND backend_xmin IS NULL") == 2)
        assert second.process.poll() is None


def test_of_several_stand_bys_one_takes_over_and_the_others_go_on_waiting(crm: Crm) -> None:
    with ExitStack() as stack:
        first = stack.enter_context(active(crm))
        others = [stack.enter_context(standing_by(crm)) for _ in range(3)]
        first.kill()
        crm.add_leads(3)
        eventually(lambda: len(crm.types()) == 3)
        assert [bool(other.process.poll()) for other in others] == [False] * 3
        eventually(lambda: sessions(crm, "backend_type = 'walsender'") == 1, what="who came too late hangs up")


def test_takeover_takes_over_at_once_and_ends_the_active_worker(crm: Crm) -> None:
    crm.add_leads(30)
    with ExitStack() as stack:
        with Application(crm, statuses) as application:
            first = stack.enter_context(active(crm))
            application.go_on(30)
            second = stack.enter_context(crm.worker("--takeover"))
            second.wait_for("replication_started")
            assert first.wait() == FENCED
            application.go_on(30)
        eventually(lambda: told(crm) == Counter(owed(application.done)))
        assert second.terminate() == 0


def test_names_that_the_server_cuts_are_told_apart(crm: Crm) -> None:
    """Sessions have names of 63 bytes, and so much may the worker's name alone have."""
    for name in ("w" * 62 + "1", "w" * 63):
        crm.settings |= {"name": name, "slot": name.lower()}
        crm.setup()
        try:
            with active(crm) as first, crm.worker("--takeover") as second:
                assert first.wait() == FENCED
                assert crm.succeed("status").count(f"process {second.process.pid} on ") == 1
                assert second.terminate() == 0
        finally:
            crm.succeed("teardown", "--yes")


def test_takeover_of_another_roles_worker_says_what_it_takes(crm: Crm) -> None:
    with active(crm), role(crm):
        done = crm.command("run", "--takeover")
        assert done.returncode == SlotTakenError.exit_code
        assert done.stderr.endswith('hint: as a superuser: GRANT pg_signal_backend TO "cdc"\n')


def test_a_stand_by_takes_over_with_the_profile_as_it_is_by_then(crm: Crm) -> None:
    profile = crm.directory / "leadfi.toml"
    text = (resources.files("cdc_worker") / "profiles" / "leadfi.toml").read_text("utf-8")
    profile.write_text(text)
    crm.settings["profile"] = str(profile)
    with active(crm) as first, standing_by(crm) as second:
        profile.write_text(text.replace('"lead_created"', '"lead_arrived"'))
        first.process.send_signal(signal.SIGHUP)
        first.wait_for("profile_reloaded")
        crm.add_leads(1)
        eventually(lambda: crm.types() == ["lead_arrived"])
        first.kill()
        crm.add_leads(1)
        eventually(lambda: crm.types() == ["lead_arrived"] * 2)
        assert second.process.poll() is None


def test_takeover_waits_for_a_stranger(server: Cluster, crm: Crm) -> None:
    with stranger(server, crm) as (process, pid), crm.worker("--takeover") as worker:
        assert worker.wait_for("waiting_for_slot")["active_pid"] == pid
        crm.add_leads(1)
        assert process.poll() is None
        process.terminate()
        eventually(lambda: crm.types() == ["lead_created"])
        assert worker.terminate() == 0


def test_a_slot_that_a_stranger_reads_is_waited_for_and_the_stranger_named(server: Cluster, crm: Crm) -> None:
    with stranger(server, crm) as (process, pid), crm.worker() as worker:
        event = worker.wait_for("waiting_for_slot")
        named = [event[key] for key in ("level", "active_pid", "holder", "client")]
        assert named == ["warning", pid, "pg_recvlogical", "127.0.0.1"]
        process.terminate()
        worker.wait_for("replication_started")
        crm.add_leads(1)
        eventually(lambda: crm.types() == ["lead_created"])
        assert worker.terminate() == 0


def test_no_wait_exits_also_where_another_worker_is_active(crm: Crm) -> None:
    with active(crm) as first:
        done = crm.command("run", "--no-wait")
        assert done.returncode == SlotTakenError.exit_code
        assert f"read by process {crm.reader()} (cdc-worker {crm.slot}, 127.0.0.1)" in done.stderr
        assert first.terminate() == 0
    with crm.worker("--no-wait") as worker:
        worker.wait_for("replication_started")
        assert worker.terminate() == 0


def test_no_wait_and_takeover_exclude_each_other(crm: Crm) -> None:
    assert crm.command("run", "--no-wait", "--takeover").returncode == 2


@pytest.mark.parametrize("how", [["--takeover"], []], ids=["at once", "when the server frees the slot"])
def test_a_worker_that_was_stopped_within_a_batch_writes_nothing_when_it_wakes_up(
    hasty_crm: Crm, how: list[str]
) -> None:
    """Its batch is sent, and waits in the server for a lock. Nobody may write it when the lock is free."""
    crm = hasty_crm
    shadow.install(crm.connection)
    with closing(psycopg.connect(crm.dsn)) as locker, active(crm) as first:
        locker.execute("LOCK TABLE activity IN SHARE MODE")
        crm.add_leads(300)
        eventually(lambda: sessions(crm, "wait_event_type = 'Lock'"))
        stop(first)
        with crm.worker(*how) as second:
            second.wait_for("replication_started")
            eventually(lambda: sessions(crm, "wait_event_type = 'Lock'"))  # the second's: the first's has ended
            locker.rollback()
            eventually(lambda: crm.value("SELECT count(*) FROM activity") == 300)
            go_on(first)
            assert first.wait() == FENCED
            crm.execute("UPDATE lead SET status = '7. lost'")
            eventually(lambda: crm.value("SELECT count(*) FROM activity") == 600)
            assert second.terminate() == 0
    assert shadow.faults(crm.connection) == []


def test_a_worker_that_wakes_up_after_its_successor_has_ended_as_well_writes_nothing(crm: Crm) -> None:
    with active(crm) as first:
        crm.add_leads(1)
        eventually(lambda: len(crm.types()) == 1)
        stop(first)
        with crm.worker("--takeover") as second:
            second.wait_for("replication_started")
            assert second.terminate() == 0
        crm.add_leads(1)
        go_on(first)
        assert first.wait() == FENCED
    crm.record()
    assert len(crm.types()) == 2


def test_a_worker_that_slept_while_it_was_taking_over_stands_by(hasty_crm: Crm) -> None:
    """It had the slot, and was about to become the owner: meanwhile the server freed the slot, and another has it."""
    crm = hasty_crm
    with closing(psycopg.connect(crm.dsn)) as locker, ExitStack() as stack:
        locker.execute("SELECT FROM cdc_worker.checkpoint FOR UPDATE")
        first = stack.enter_context(crm.worker())
        eventually(lambda: sessions(crm, "wait_event_type = 'Lock'"))
        stop(first)
        second = stack.enter_context(crm.worker())
        eventually(lambda: sessions(crm, "wait_event_type = 'Lock'") == 2)
        locker.rollback()
        second.wait_for("replication_started")
        crm.add_leads(2)
        eventually(lambda: len(crm.types()) == 2)
        go_on(first)
        eventually(lambda: len(first.events("waiting_for_slot")))
        crm.add_leads(1)
        assert second.terminate() == 0
        eventually(lambda: len(crm.types()) == 3)
        assert first.terminate() == 0


def test_a_worker_that_slept_while_it_was_taking_over_ends_nobody(hasty: Cluster, hasty_crm: Crm) -> None:
    """Here the test is the successor, which becomes the owner while the other waits to."""
    crm = hasty_crm
    with closing(psycopg.connect(crm.dsn, autocommit=True)) as successor, ExitStack() as stack:
        with successor.transaction():
            successor.execute("SELECT FROM cdc_worker.checkpoint FOR UPDATE")
            first = stack.enter_context(crm.worker())
            eventually(lambda: sessions(crm, "wait_event_type = 'Lock'"))
            stop(first)
            eventually(lambda: crm.reader() is None)
            stack.enter_context(stranger(hasty, crm))
            successor.execute(
                "UPDATE cdc_worker.checkpoint SET owner = gen_random_uuid(), backend_pid = pg_backend_pid(),"
                " backend_start = (SELECT backend_start FROM pg_stat_activity WHERE pid = pg_backend_pid())"
            )
        go_on(first)
        first.wait_for("waiting_for_slot")
        successor.execute("SELECT")


@storm(2, chaos=16)
def test_workers_stopped_at_any_moment_write_nothing_twice(crm: Crm, seed: int, faults: Faults, rounds: int) -> None:
    """Each in turn is stopped under load, replaced, and woken up at some later time."""
    chance = random.Random(seed)
    crm.add_leads(30)
    with ExitStack() as stack:
        worker = stack.enter_context(active(crm))
        replaced: list[WorkerProcess] = []
        with Application(crm, statuses) as application:
            for _ in range(rounds):
                application.go_on(chance.randint(1, 20))
                stop(worker)
                replaced.append(worker)
                worker = stack.enter_context(crm.worker("--takeover"))
                faults[TAKEN_OVER_ASLEEP] += 1
                if chance.random() < 0.5:
                    go_on(chance.choice(replaced))
                worker.wait_for("replication_started")
        for other in replaced:
            go_on(other)
        assert [other.wait() for other in replaced] == [FENCED] * rounds
        eventually(lambda: told(crm) == Counter(owed(application.done)))
        assert worker.terminate() == 0
    assert crm.value("SELECT count(*) FROM cdc_worker.dead_letter") == 0


def test_a_fast_shutdown_ends_active_and_stand_by_and_one_of_them_goes_on(own_crm: Crm, own_server: Cluster) -> None:
    """Never held up: this server would wait for a walsender's client for ever."""
    crm = own_crm
    with closing(psycopg.connect(crm.dsn, autocommit=True)) as connection:
        connection.execute("ALTER SYSTEM SET wal_sender_timeout = 0")
        connection.execute("SELECT pg_reload_conf()")
    with active(crm) as first, standing_by(crm) as second:
        crm.add_leads(1)
        own_server.stop("fast")
        own_server.start()
        crm.reconnect()
        crm.add_leads(1)
        eventually(lambda: len(crm.types()) == 2)
        # Whoever came too late finds itself replaced, or waits.
        assert {worker.process.poll() for worker in (first, second)} <= {None, FENCED}


def test_a_take_over_that_was_written_but_not_answered_is_its_own(hasty: Cluster, hasty_crm: Crm) -> None:
    """The connection ends after the server has committed that this process is the owner, and before it says so."""
    crm = hasty_crm
    waits = "wait_event_type = '{}' AND backend_type = 'client backend'"
    with active(crm) as worker, psycopg.connect(crm.dsn) as holder:
        holder.execute("SELECT FROM cdc_worker.checkpoint FOR UPDATE")
        end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = %s"
        crm.execute(end, f"cdc-worker {crm.slot}")
        eventually(lambda: sessions(crm, waits.format("Lock")), what="it waits to become the owner again")
        with having(hasty, synchronous_standby_names="nobody"):
            holder.rollback()
            eventually(lambda: sessions(crm, "wait_event = 'SyncRep'"), what="its commit waits for a standby")
            crm.execute(end + " AND wait_event = 'SyncRep'", f"cdc-worker {crm.slot}")
        crm.add_leads(1)
        eventually(lambda: crm.types() or worker.process.poll() is not None)
        assert worker.process.poll() is None, worker.said
    assert crm.types() == ["lead_created"]
