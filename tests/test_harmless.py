"""The worker beside a database that must not notice it: what it writes, holds and asks for is counted."""

from __future__ import annotations

import random
import re
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, LiteralString

import psycopg
import pytest
from storms import Faults, Writers, recorded_exactly
from support import Crm, crm_on, either_plugin, eventually, role, storm
from test_sales_cookbook import add, change, use

from cdc_worker import postgres, shadow
from cdc_worker.cluster import Binaries, Cluster


@pytest.fixture(scope="module")
def quiet(binaries: Binaries) -> Iterator[Cluster]:
    """A server that does nothing by itself."""
    with Cluster(binaries, settings={"autovacuum": "off"}) as server:
        yield server


@pytest.fixture
def crm(quiet: Cluster, tmp_path: Path, plugin: str) -> Iterator[Crm]:
    with crm_on(quiet, tmp_path, prepared=True, plugin=plugin) as crm:
        yield crm


def name(crm: Crm) -> str:
    return f"cdc-worker {crm.slot}"


# Writes

NEXT: LiteralString = "SELECT pg_snapshot_xmax(pg_current_snapshot())::text"
"""The number that the next transaction gets which writes, anywhere in the cluster."""


@either_plugin
def test_what_it_writes_does_not_make_it_write(crm: Crm) -> None:
    """Its own commits come back to it, and the server is idle otherwise. All intervals pass many times."""
    with crm.worker(idle_advance_interval="0.05", idle_advance_bytes=str(1 << 16)):
        for _ in range(20):
            crm.add_leads(5)
        eventually(lambda: len(crm.types()) == 100)
        confirmed: LiteralString = """
            SELECT confirmed_flush_lsn = lsn FROM pg_replication_slots JOIN cdc_worker.checkpoint ON slot = slot_name
        """
        eventually(lambda: crm.value(confirmed))
        before = crm.value(NEXT)
        for _ in range(15):
            crm.value("SELECT pg_sleep(0.1)::text")
        assert crm.value(NEXT) == before


def test_beside_a_server_that_is_busy_elsewhere_it_writes_at_most_once_an_interval(crm: Crm) -> None:
    interval = 0.3
    crm.execute("CREATE TABLE other (filler text)")
    with crm.worker(idle_advance_interval=str(interval), idle_advance_bytes=str(1 << 16)) as worker:
        worker.wait_for("replication_started")
        crm.connection.execute(
            """
            CREATE TABLE written (at timestamptz);
            CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS
                'BEGIN INSERT INTO written VALUES (clock_timestamp()); RETURN NULL; END';
            CREATE TRIGGER note AFTER UPDATE ON cdc_worker.checkpoint EXECUTE FUNCTION note();
            """
        )

        def written() -> Any:
            crm.execute("INSERT INTO other SELECT repeat('x', 1000) FROM generate_series(1, 100)")
            return crm.value("SELECT count(*) FROM written") > 5

        eventually(written)
        assert worker.terminate() == 0
    ((count, seconds),) = crm.execute("SELECT count(*), extract(epoch FROM max(at) - min(at))::float FROM written")
    # The first may have been held up, of which the others know nothing.
    assert seconds >= (count - 2) * interval
    assert crm.types() == []


# What it holds


HELD: LiteralString = """
SELECT backend_type, coalesce(state, ''), backend_xid IS NOT NULL OR backend_xmin IS NOT NULL,
    xact_start IS NOT NULL AND backend_type <> 'walsender',
    ARRAY(SELECT coalesce(relation::regclass::text, locktype) FROM pg_locks l WHERE l.pid = a.pid AND granted)
FROM pg_stat_activity a WHERE application_name = %s
"""


def rests(crm: Crm, sessions: int) -> bool:
    """Whether there are so many sessions, and none has a transaction, a snapshot or a lock."""
    found = crm.execute(HELD, name(crm))
    return len(found) == sessions and all(row[2:] == (False, False, []) for row in found)


def holders(crm: Crm) -> int:
    """How many sessions have a snapshot, or a transaction that has written: what vacuum has to spare."""
    return sum(row[2] for row in crm.execute(HELD, name(crm)))


@either_plugin
def test_between_batches_nothing_is_held_nor_by_a_stand_by(crm: Crm) -> None:
    with crm.worker() as first, crm.worker() as second:
        for worker in (first, second):
            eventually(lambda: worker.events("replication_started") or worker.events("waiting_for_slot"))  # noqa: B023
        for count in range(1, 4):
            crm.add_leads(500)
            eventually(lambda: len(crm.types()) == 500 * count)  # noqa: B023
            eventually(lambda: rests(crm, 3), what="two sessions of the one that reads, one of the other")
        assert crm.value("SELECT temp_files FROM pg_stat_database WHERE datname = current_database()") == 0


@either_plugin
def test_what_a_locked_target_holds_up_does_not_hold_up_vacuum(crm: Crm) -> None:
    """The batch waits with neither a snapshot nor a transaction's number; for the slot catalogs alone are kept.

    ACCESS EXCLUSIVE would itself take a number, which holds up vacuum.
    """
    crm.execute("CREATE TABLE busy AS SELECT n, 0 AS count FROM generate_series(1, 1000) n")
    with crm.worker() as worker, psycopg.connect(crm.dsn) as locker:
        worker.wait_for("replication_started")
        locker.execute("LOCK TABLE activity IN EXCLUSIVE MODE")
        crm.add_leads(1000)
        waiting: LiteralString = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s AND wait_event = %s"
        eventually(lambda: crm.value(waiting, name(crm), "relation"), what="it waits for the target")
        eventually(lambda: holders(crm) == 0, what="but for who looks around for a moment")
        for _ in range(3):
            crm.execute("UPDATE busy SET count = count + 1")
        eventually(lambda: kept_by_vacuum(crm, "busy") == 0)
        locker.rollback()
        eventually(lambda: len(crm.types()) == 1000)


def kept_by_vacuum(crm: Crm, table: str) -> int:
    """How many dead rows a VACUUM had to leave, since somebody may still see them."""
    told: list[str] = []

    def tell(notice: psycopg.errors.Diagnostic) -> None:
        told.append(notice.message_primary or "")

    crm.connection.add_notice_handler(tell)
    crm.connection.execute(f"VACUUM (VERBOSE) {table}".encode())
    crm.connection.remove_notice_handler(tell)
    (kept,) = re.findall(r"(\d+) are dead but not yet removable", "".join(told))
    return int(kept)


def test_while_rows_are_looked_up_nothing_is_held_beyond_that(quiet: Cluster, tmp_path: Path) -> None:
    """A third session reads them; what it asks for may be locked."""
    with crm_on(quiet, tmp_path) as bare:
        crm = use(bare)
        with crm.worker() as worker, psycopg.connect(crm.dsn) as locker:
            worker.wait_for("replication_started")
            eventually(lambda: rests(crm, 3))
            worker.process.send_signal(signal.SIGSTOP)
            add(crm.connection, "core_lead", assigned_to_id=1)
            locker.execute("LOCK TABLE core_user")
            worker.process.send_signal(signal.SIGCONT)
            waiting: LiteralString = (
                "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s AND wait_event = %s"
            )
            eventually(lambda: crm.value(waiting, name(crm), "relation"), what="it waits for who is assigned to")
            eventually(lambda: holders(crm) == 1, what="the statement that waits")
            locker.rollback()
            eventually(lambda: crm.value("SELECT count(*) FROM core_interactionlog"))
            eventually(lambda: rests(crm, 3))


# What it takes


def test_under_load_it_has_two_connections_and_nobody_waits_for_them(crm: Crm, seed: int, faults: Faults) -> None:
    """And one more for a moment. No transaction of it is older than a batch."""
    shadow.install(crm.connection)
    connections: Counter[int] = Counter()
    blocked: LiteralString = """
        SELECT count(*) FROM pg_stat_activity a WHERE EXISTS (
            SELECT FROM pg_stat_activity w WHERE w.application_name = %s AND w.pid = ANY (pg_blocking_pids(a.pid)))
    """
    with crm.worker() as worker, Writers(crm, seed):
        worker.wait_for("replication_started")
        for _ in range(60):
            found = crm.execute(HELD, name(crm))
            connections[len(found)] += 1
            assert crm.value(blocked, name(crm)) == 0
            threading.Event().wait(0.02)
        assert worker.events("connection_lost") == []
    assert max(connections, key=connections.__getitem__) == 2
    assert set(connections) <= {2, 3}
    recorded_exactly(crm, faults)


def test_while_it_writes_the_application_may_lock_all_of_its_rows_and_tables(crm: Crm) -> None:
    """No row is ever locked. Of a table that the target refers to the server has a look at each row: for a moment."""
    crm.add_leads(10_000)
    crm.execute("INSERT INTO customer (customer_uid, name) VALUES (1, 'Acme')")
    locked = 0
    with crm.worker() as worker, closing(psycopg.connect(crm.dsn)) as application:
        worker.wait_for("replication_started")
        application.execute("SET lock_timeout = '500ms'")  # half of deadlock_timeout
        application.commit()
        while crm.value("SELECT count(*) FROM activity") < 10_001:
            application.execute("SELECT FROM lead FOR UPDATE NOWAIT")
            application.execute("SELECT FROM customer FOR UPDATE NOWAIT")
            application.rollback()
            application.execute("LOCK TABLE lead, customer, contact IN ACCESS EXCLUSIVE MODE")
            application.rollback()
            locked += 1
        assert worker.terminate() == 0
    assert locked > 3


# Deadlocks


WAITS: LiteralString = """
SELECT DISTINCT relation::regclass::text FROM pg_locks JOIN pg_stat_activity USING (pid)
WHERE application_name = %s AND NOT granted AND locktype = 'relation'
"""


def hasten(crm: Crm) -> float:
    """Have deadlocks looked for soon, so that many tries are quick; returns after how many seconds."""
    crm.connection.execute(f"ALTER DATABASE {crm.connection.info.dbname} SET deadlock_timeout = '300ms'".encode())
    return 0.3


@pytest.mark.parametrize("mode", ["ACCESS EXCLUSIVE", "EXCLUSIVE"])
def test_a_migration_that_locks_first_what_the_target_refers_to_and_then_the_target_never_waits_for_the_worker(
    crm: Crm, mode: LiteralString
) -> None:
    """The worker's batch is in hand, and can't go on until the migration has ended, which holds for long.

    It is the migration's wait that would be the first to be as long as deadlock_timeout.
    """
    deadlock_timeout = hasten(crm)
    with role(crm), crm.worker() as worker, psycopg.connect(crm.dsn) as migration:
        worker.wait_for("replication_started")
        migration.execute(f"LOCK TABLE lead IN {mode} MODE")
        crm.execute("INSERT INTO customer (customer_uid, name) SELECT n, 'Acme' FROM generate_series(1, 100) n")
        eventually(lambda: crm.execute(WAITS, name(crm)) == [("lead",)], what="it waits for lead")
        threading.Event().wait(2 * deadlock_timeout)
        (blocker,) = postgres.blockers(crm.connection, crm.slot)
        assert blocker.who.startswith(f"process {migration.info.backend_pid} ")
        migration.execute("LOCK TABLE activity IN ACCESS EXCLUSIVE MODE")
        migration.execute("ALTER TABLE lead ADD number uuid DEFAULT gen_random_uuid()")
        migration.commit()
        eventually(lambda: len(crm.types()) == 100)
        assert worker.terminate() == 0
        assert worker.events("connection_lost") == []


@storm(4, chaos=200)
def test_in_deadlocks_with_migrations_it_is_never_the_application_that_is_ended(
    crm: Crm, seed: int, faults: Faults, rounds: int
) -> None:
    """Each locks the target and a table that it refers to, in either order, for less and for longer than it takes to
    look for a deadlock, while others write. They write one table a transaction, so that they are safe from each other.
    """
    shadow.install(crm.connection)
    deadlock_timeout = hasten(crm)
    dice = random.Random(seed)
    stop = threading.Event()
    failures: list[Exception] = []
    modes = ("SHARE", "SHARE ROW EXCLUSIVE", "EXCLUSIVE", "ACCESS EXCLUSIVE")

    def write(dice: random.Random, source: str) -> None:
        try:
            with psycopg.connect(crm.dsn, autocommit=True) as connection:
                while not stop.is_set():
                    connection.execute(
                        dice.choice(
                            (
                                "INSERT INTO lead (full_name, source, bd_in_charge, type)"
                                " SELECT 'Lead', %(source)s, 'jane', 't' FROM generate_series(1, 20)",
                                "UPDATE lead SET status = random()::text"
                                " WHERE lead_id IN (SELECT lead_id FROM lead WHERE source = %(source)s LIMIT 5)",
                                "INSERT INTO customer (customer_uid, name)"
                                " SELECT random() * 1000000000, %(source)s FROM generate_series(1, 20)"
                                " ON CONFLICT DO NOTHING",
                            )
                        ),
                        {"source": source},
                    )
                    stop.wait(dice.random() * 0.02)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(random.Random(dice.random()), f"session {n}")) for n in (1, 2)]
    with crm.worker() as worker, closing(psycopg.connect(crm.dsn)) as migration:
        worker.wait_for("replication_started")
        for thread in threads:
            thread.start()
        ended = 0
        for _ in range(rounds):
            tables = ["activity", dice.choice(("lead", "customer"))]
            dice.shuffle(tables)
            try:
                for table in tables:
                    mode = dice.choice(modes[2:] if table != "activity" else modes)
                    migration.execute(f"LOCK TABLE {table} IN {mode} MODE".encode())
                    threading.Event().wait(dice.random() * 2 * deadlock_timeout)
            except psycopg.errors.DeadlockDetected:
                ended += 1
            migration.rollback()
            faults["tables locked by a migration"] += 1
            stop.wait(deadlock_timeout / 2)
        stop.set()
        for thread in threads:
            thread.join()
        assert (ended, failures) == (0, [])
        assert worker.terminate() == 0
        assert worker.events("connection_lost") == []
    recorded_exactly(crm, faults)


@storm(5, chaos=200)
def test_in_deadlocks_over_rows_it_is_never_the_application_that_is_ended(
    quiet: Cluster, tmp_path: Path, seed: int, faults: Faults, rounds: int
) -> None:
    """Django's log has foreign keys of its own, and each row of it locks a user, a lead and an organization.

    Sessions lock the same for update, in the order that suits them, and a migration locks tables. All of them lock in
    one order, so that they are safe from each other.
    """
    with crm_on(quiet, tmp_path) as bare:
        crm = use(bare)
        hasten(crm)
        statuses = ("new", "contacted", "qualified", "converted", "disqualified")
        leads = [add(crm.connection, "core_lead", assigned_to_id=1, organization_id=1) for _ in range(20)]
        expected = Counter(leads)
        failures: list[Exception] = []

        def act(dice: random.Random, leads: list[int]) -> None:
            states = dict.fromkeys(leads, "new")
            try:
                with psycopg.connect(crm.dsn, autocommit=True) as connection:
                    for _ in range(rounds):
                        chosen = sorted(dice.sample(leads, 3), reverse=True)
                        with connection.transaction():
                            for lead in chosen:
                                connection.execute("SELECT FROM core_lead WHERE id = %s FOR UPDATE", (lead,))
                                threading.Event().wait(dice.random() * 0.03)
                                states[lead] = dice.choice([of for of in statuses if of != states[lead]])
                                change(connection, "core_lead", lead, status=states[lead])
                            connection.execute("SELECT FROM core_organization WHERE id = 1 FOR UPDATE")
                            threading.Event().wait(dice.choice((0, 0, dice.random() * 0.4)))
                            connection.execute("SELECT FROM core_user WHERE id = 1 FOR UPDATE")
                        expected.update(chosen)
                        threading.Event().wait(dice.random() * 0.1)
            except Exception as error:
                failures.append(error)

        def migrate(dice: random.Random) -> None:
            try:
                with psycopg.connect(crm.dsn) as connection:
                    for _ in range(rounds // 3):
                        for table in dice.sample(("core_user", "core_interactionlog"), 2):
                            connection.execute(f"LOCK TABLE {table} IN EXCLUSIVE MODE".encode())
                            threading.Event().wait(dice.random() * 0.4)
                        connection.commit()
                        threading.Event().wait(dice.random())
            except Exception as error:
                failures.append(error)

        dice = random.Random(seed)
        threads = [
            threading.Thread(target=act, args=(random.Random(dice.random()), leads[:10])),
            threading.Thread(target=act, args=(random.Random(dice.random()), leads[10:])),
            threading.Thread(target=migrate, args=(random.Random(dice.random()),)),
        ]
        with crm.worker() as worker:
            worker.wait_for("replication_started")
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert failures == []
            eventually(lambda: crm.value("SELECT count(*) FROM core_interactionlog") >= expected.total())
            assert worker.terminate() == 0
            gave_way = [event["sqlstate"] for event in worker.events("connection_lost")]
        assert {*gave_way} <= {"55P03"}
        faults["the worker gave way to who locks rows"] += len(gave_way)
        rows = crm.execute("SELECT lead_id, count(*)::int FROM core_interactionlog GROUP BY lead_id")
        assert Counter(dict(rows)) == expected
        assert crm.value("SELECT count(*) FROM cdc_worker.dead_letter") == 0
