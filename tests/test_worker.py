"""The worker beside a living database: what it survives, what it leaves alone, and how it ends."""

from __future__ import annotations

import threading
import time
from unittest import mock

import psycopg
import pytest
from psycopg import sql
from support import Crm, either_plugin, eventually

from cdc_worker import config, profile, shadow
from cdc_worker.cluster import Cluster
from cdc_worker.stop import Stop
from cdc_worker.worker import Worker

pytestmark = either_plugin

WALSENDER = "SELECT active_pid FROM pg_replication_slots WHERE slot_name = %s"
UPDATES = "SELECT n_tup_upd FROM pg_stat_user_tables WHERE relname = 'checkpoint'"


def test_a_lock_on_the_target_costs_neither_the_stream_nor_a_row(crm: Crm) -> None:
    """It is held for three times wal_sender_timeout, while changes go on."""
    impatient = psycopg.conninfo.make_conninfo(crm.dsn, options="-c wal_sender_timeout=1000")
    with crm.worker(dsn=impatient) as worker, psycopg.connect(crm.dsn) as locker:
        worker.wait_for("replication_started")
        walsender = crm.value(WALSENDER, crm.slot)
        locker.execute("LOCK TABLE activity")
        until = time.monotonic() + 3
        while time.monotonic() < until:
            crm.add_leads(50)
            time.sleep(0.05)
        assert crm.value(WALSENDER, crm.slot) == walsender
        locker.rollback()
        owed = crm.value("SELECT count(*) FROM lead")
        eventually(lambda: crm.value("SELECT count(*) FROM activity") == owed)
        assert worker.events("connection_lost") == []


def test_an_idle_server_gets_no_writes(crm: Crm) -> None:
    crm.add_leads(1)
    with crm.worker(idle_advance_interval="0.05") as worker:
        eventually(lambda: crm.types() == ["lead_created"])
        walsender = crm.value(WALSENDER, crm.slot)
        before = crm.execute("SELECT *, xmin FROM cdc_worker.checkpoint")
        for _ in range(10):  # status updates are answered, and the interval passes many times
            crm.value("SELECT pg_sleep(0.1)::text")
        assert crm.execute("SELECT *, xmin FROM cdc_worker.checkpoint") == before
        assert crm.value(WALSENDER, crm.slot) == walsender
        assert worker.terminate() == 0


def test_a_server_busy_with_other_tables_has_its_wal_released(crm: Crm) -> None:
    crm.execute("CREATE TABLE other (filler text)")
    confirmed = "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = %s"
    with crm.worker(idle_advance_interval="0.1", idle_advance_bytes=str(1 << 20)) as worker:
        worker.wait_for("replication_started")
        before = crm.value("SELECT pg_current_wal_lsn()::text")
        for _ in range(8):
            crm.execute("INSERT INTO other SELECT repeat('x', 1000) FROM generate_series(1, 1000)")
        eventually(lambda: crm.value("SELECT %s::pg_lsn > %s::pg_lsn", crm.value(confirmed, crm.slot), before))
    assert crm.types() == []


def test_a_server_that_reads_a_long_transaction_of_other_tables_is_waited_for(
    crm: Crm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may not answer meanwhile, and if it were given up it would begin anew, for ever."""
    for name, value in {"stream.SILENCE": 0.1, "stream.STATUS_INTERVAL": 0.05, "worker.gc": mock.Mock()}.items():
        monkeypatch.setattr(f"cdc_worker.{name}", value)
    database = sql.Identifier(crm.connection.info.dbname)
    crm.connection.execute(sql.SQL("ALTER DATABASE {} SET wal_sender_timeout = 0").format(database))
    crm.execute("CREATE TABLE other AS SELECT generate_series(1, 600000) AS id")
    crm.add_leads(1)
    settings = config.load(None, {"dsn": crm.dsn, "slot": crm.slot} | crm.settings)
    stop = Stop()
    running = threading.Thread(target=Worker(settings, profile.load(settings.profile), stop=stop, log=mock.Mock()).run)
    running.start()
    try:
        eventually(crm.types)
    finally:
        stop.request()
        running.join()


def test_the_worker_does_not_feed_itself(crm: Crm) -> None:
    """Its own commits come back as empty transactions. Were each answered with a write, it would never end."""
    with crm.worker(idle_advance_interval="0.05") as worker:
        worker.wait_for("replication_started")
        for _ in range(20):
            crm.add_leads(1)
        eventually(lambda: len(crm.types()) == 20)
        position = crm.value("SELECT lsn::text FROM cdc_worker.checkpoint")
        for _ in range(10):
            crm.value("SELECT pg_sleep(0.1)::text")
        assert crm.value("SELECT lsn::text FROM cdc_worker.checkpoint") == position


def test_sigterm_finishes_the_batch_in_hand(crm: Crm) -> None:
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        crm.add_leads(3)
        eventually(lambda: len(crm.types()) == 3)
        assert worker.terminate() == 0
    assert [event["event"] for event in worker.events()][-1] == "worker_stopped"
    confirmed = crm.value("SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = %s", crm.slot)
    assert confirmed == crm.value("SELECT lsn::text FROM cdc_worker.checkpoint")


def test_sigterm_rolls_back_what_a_lock_holds_up(crm: Crm) -> None:
    with crm.worker() as worker, psycopg.connect(crm.dsn) as locker:
        worker.wait_for("replication_started")
        locker.execute("LOCK TABLE activity")
        crm.add_leads(3)
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND application_name LIKE %s"
        eventually(lambda: crm.value(waiting, f"%{crm.slot}"))
        assert worker.terminate() == 0, "it ended while the lock was held"
        eventually(lambda: not crm.value(waiting, f"%{crm.slot}"), what="its statement was cancelled")
    assert worker.events("batch_rolled_back")
    crm.record()
    assert crm.types() == ["lead_created"] * 3


def test_sigterm_ends_a_worker_that_waits_for_its_server(crm: Crm) -> None:
    unreachable = psycopg.conninfo.make_conninfo(crm.dsn, port=1)
    with crm.worker(dsn=unreachable) as worker:
        worker.wait_for("connection_lost")
        assert worker.terminate() == 0


def test_a_worker_whose_checkpoint_has_another_owner_stops(crm: Crm) -> None:
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        crm.execute("UPDATE cdc_worker.checkpoint SET owner = gen_random_uuid()")
        crm.add_leads(1)
        assert worker.wait() == 18
    assert crm.types() == []
    crm.record()
    assert crm.types() == ["lead_created"]


def test_a_successor_ends_the_writing_of_its_predecessor_first(crm: Crm) -> None:
    """The predecessor's backend hangs in a lock, with all of its batch sent: it must not commit later."""
    with psycopg.connect(crm.dsn) as locker:
        locker.execute("LOCK TABLE activity")
        with crm.worker() as first:
            first.wait_for("replication_started")
            crm.add_leads(3)
            waiting = (
                "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND application_name LIKE %s"
            )
            eventually(lambda: crm.value(waiting, f"%{crm.slot}"))
            backend = crm.value("SELECT backend_pid FROM cdc_worker.checkpoint")
            first.kill()
        with crm.worker() as second:
            second.wait_for("replication_started")
            assert crm.value("SELECT count(*) FROM pg_stat_activity WHERE pid = %s", backend) == 0
            locker.rollback()
            eventually(lambda: len(crm.types()) == 3)
            assert second.terminate() == 0
    assert crm.types() == ["lead_created"] * 3


def test_what_is_there_already_is_done_already(crm: Crm) -> None:
    """A checkpoint that was set back, with its slot, brings the same changes under the same keys."""
    crm.execute("SELECT pg_copy_logical_replication_slot(%s, %s)", crm.slot, f"{crm.slot}_again")
    position = crm.value("SELECT lsn::text FROM cdc_worker.checkpoint")
    crm.add_leads(300)
    crm.execute("UPDATE lead SET status = '7. lost', bd_in_charge = 'bob'")
    crm.record()
    before = crm.activities()
    crm.execute("UPDATE cdc_worker.checkpoint SET lsn = %s::pg_lsn, slot = slot || '_again'", position)
    crm.execute("UPDATE lead SET title = 'CTO'")
    crm.record(slot=f"{crm.slot}_again", name=crm.slot, publication=crm.slot)
    assert crm.activities()[: len(before)] == before
    assert crm.types()[len(before) :] == ["lead_updated"] * 300
    assert crm.value("SELECT count(*) FROM cdc_worker.dead_letter") == 0


@pytest.mark.parametrize("lagging", [False, True], ids=["caught up", "lagging"])
def test_a_fast_shutdown_of_the_server_is_not_held_up(own_crm: Crm, own_server: Cluster, lagging: bool) -> None:
    crm = own_crm
    own_server.set(wal_sender_timeout="0")  # the server would wait for ever
    own_server.reload()
    shadow.install(crm.connection)
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        locker = psycopg.connect(crm.dsn)
        if lagging:
            locker.execute("LOCK TABLE activity")
        crm.add_leads(20_000)
        if not lagging:
            eventually(lambda: crm.value("SELECT count(*) FROM activity") == 20_000)
        own_server.stop("fast")  # raises when it takes longer than its patience
        locker.close()
        own_server.start()
        crm.reconnect()
        eventually(lambda: crm.value("SELECT count(*) FROM activity") == 20_000)
        assert worker.terminate() == 0
    assert shadow.faults(crm.connection) == []


def test_the_worker_waits_for_no_lock_of_the_application(crm: Crm) -> None:
    """A foreign key from its rows would: here leads are deleted, and not yet committed, whose history it writes."""
    crm.add_leads(3)
    crm.execute("UPDATE lead SET status = '7. lost'")
    with psycopg.connect(crm.dsn) as application:
        application.execute("DELETE FROM lead")
        crm.record()
        assert crm.types() == ["lead_created"] * 3 + ["status_changed"] * 3
    crm.record()
    assert crm.types()[6:] == ["lead_deleted"] * 3


def test_a_second_worker_waits_for_the_slot_and_goes_on_where_the_first_was_killed(crm: Crm) -> None:
    with crm.worker() as first:
        first.wait_for("replication_started")
        with crm.worker() as second:
            second.wait_for("waiting_for_slot")
            crm.add_leads(3)
            eventually(lambda: len(crm.types()) == 3)
            first.kill()
            crm.add_leads(2)
            eventually(lambda: len(crm.types()) == 5)
            assert second.process.poll() is None
            assert second.terminate() == 0
