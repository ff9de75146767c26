"""The promise: whatever is killed, every committed change is recorded exactly once.

The oracle is the database: triggers keep a ledger of every committed change, and `cdc_worker.shadow` holds `activity`
against it, row by row and in order.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest
from psycopg.rows import TupleRow
from support import Crm, either_plugin, eventually, storm

from cdc_worker import shadow
from cdc_worker.cluster import Cluster

pytestmark = either_plugin

STATUSES = ("1. lead generated", "2. proposal", "3. negotiation", "6. closed won", "7. lost", None)


class Writers:
    """Sessions of an application that change rows at random until they are told to stop."""

    def __init__(self, crm: Crm, seed: int, *, sessions: int = 4) -> None:
        self._crm = crm
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._write, args=(number, random.Random(f"{seed}/{number}")), daemon=True)
            for number in range(sessions)
        ]
        self.commits = 0
        self.failures: list[Exception] = []

    def __enter__(self) -> Writers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        assert self.failures == []

    def _write(self, number: int, dice: random.Random) -> None:
        while not self._stop.is_set():
            try:
                with psycopg.connect(self._crm.dsn, connect_timeout=5) as connection:
                    while not self._stop.is_set():
                        self._transaction(connection, number, dice)
                        self.commits += 1
                        self._stop.wait(dice.random() * 0.02)
            except (psycopg.OperationalError, psycopg.Rollback):
                self._stop.wait(0.05)  # the server was crashed: what was not committed is not in the ledger either
            except Exception as error:
                self.failures.append(error)
                raise

    def _transaction(self, connection: psycopg.Connection[TupleRow], number: int, dice: random.Random) -> None:
        with connection.transaction():
            if dice.random() < 0.3:
                shadow.act_as(connection, dice.choice(("jane", "bob")))
            for _ in range(dice.choice((1, 1, 1, 2, 5, 40))):
                self._change(connection, number, dice)
            if dice.random() < 0.1:
                raise psycopg.Rollback

    def _change(self, connection: psycopg.Connection[TupleRow], number: int, dice: random.Random) -> None:
        # Each session has rows of its own, so that no deadlock ends it.
        mine = "lead_id = (SELECT lead_id FROM lead WHERE source = %s ORDER BY random() LIMIT 1)"
        source = f"session {number}"
        match dice.randrange(10):
            case 0 | 1 | 2:
                connection.execute(
                    "INSERT INTO lead (full_name, source, bd_in_charge, type, background)"
                    " VALUES (%s, %s, 'jane', 't', %s)",
                    (f"Lead {dice.randrange(1000)} {{x}} %", source, "long " * dice.choice((0, 10, 2000))),
                )
            case 3 | 4 | 5:
                connection.execute(f"UPDATE lead SET status = %s WHERE {mine}", (dice.choice(STATUSES), source))
            case 6:
                connection.execute(
                    f"UPDATE lead SET bd_in_charge = %s, title = %s WHERE {mine}",
                    (dice.choice(("jane", "bob")), dice.choice(("CTO", None)), source),
                )
            case 7:
                connection.execute(f"DELETE FROM lead WHERE {mine}", (source,))
            case 8:
                self._convert(connection, dice.randrange(1 << 30), source)
            case 9:
                connection.execute(f"UPDATE lead SET title = title WHERE {mine}", (source,))

    def _convert(self, connection: psycopg.Connection[TupleRow], customer: int, source: str) -> None:
        row = connection.execute("SELECT lead_id FROM lead WHERE source = %s LIMIT 1", (source,)).fetchone()
        if row is not None:
            connection.execute("INSERT INTO customer (customer_uid, name) VALUES (%s, 'Acme')", (customer,))
            connection.execute("UPDATE lead SET is_converted = true WHERE lead_id = %s", row)
            connection.execute("INSERT INTO contact (customer_uid, lead_id) VALUES (%s, %s)", (customer, *row))


def recorded_exactly(crm: Crm) -> None:
    """Record what is left, and hold `activity` against the ledger."""
    crm.record()
    assert shadow.faults(crm.connection) == []
    expected, recorded = shadow.counts(crm.connection)
    assert expected == recorded > 0
    assert crm.value("SELECT count(*) FROM cdc_worker.dead_letter") == 0


@contextmanager
def killed_at_random(crm: Crm, dice: random.Random, times: int) -> Iterator[None]:
    """Start the worker and kill it, so often, at moments from before it connects to well after it has caught up."""
    for _ in range(times):
        with crm.worker() as worker:
            if dice.random() < 0.9:
                worker.wait_for("replication_started")
            threading.Event().wait(dice.random() ** 3)
            worker.kill()
    yield


@storm(6, chaos=100)
def test_random_kills_under_concurrent_writers_lose_and_double_nothing(crm: Crm, seed: int, rounds: int) -> None:
    shadow.install(crm.connection)
    with Writers(crm, seed) as writers, killed_at_random(crm, random.Random(seed), rounds):
        pass
    assert writers.commits > 100
    recorded_exactly(crm)


@storm(4, chaos=30)
def test_kills_within_one_large_transaction_lose_and_double_nothing(crm: Crm, seed: int, rounds: int) -> None:
    dice = random.Random(seed)
    shadow.install(crm.connection)
    leads = rounds * 8000
    crm.add_leads(leads)
    position = "SELECT changes FROM cdc_worker.checkpoint"
    inside = 0
    for _ in range(rounds):
        with crm.worker() as worker:
            before = crm.value(position)
            eventually(lambda: worker.process.poll() is not None or crm.value(position) != before)  # noqa: B023  # at once
            threading.Event().wait(dice.random() * 0.3)
            worker.kill()
        inside += crm.value(position) > 0
    assert inside * 3 >= rounds, "it was killed within the transaction"
    recorded_exactly(crm)
    assert crm.value("SELECT count(*) FROM activity") == leads


@storm(3, chaos=30)
def test_kills_while_rows_that_share_an_lsn_are_written(crm: Crm, seed: int, rounds: int) -> None:
    dice = random.Random(seed)
    shadow.install(crm.connection)
    for _ in range(rounds):
        with crm.connection.cursor().copy("COPY lead (full_name, source, bd_in_charge, type) FROM STDIN") as copy:
            for number in range(1000):
                copy.write_row((f"Lead {number}", "import", "jane", "exchange"))
        with crm.worker() as worker:
            worker.wait_for("replication_started")
            threading.Event().wait(dice.random() * 0.2)
            worker.kill()
    recorded_exactly(crm)


@pytest.mark.parametrize("durable", [True, False], ids=["durable", "synchronous_commit off"])
@storm(2, chaos=20)
def test_crashes_of_the_server_lose_and_double_nothing(
    own_crm: Crm, own_server: Cluster, seed: int, durable: bool, rounds: int
) -> None:
    """Also where the role's default is synchronous_commit = off: the checkpoint must not survive its activities."""
    dice = random.Random(seed)
    crm = own_crm
    shadow.install(crm.connection)
    if not durable:
        crm.execute("ALTER ROLE postgres SET synchronous_commit = off")
    with crm.worker() as worker:
        with Writers(crm, seed) as writers:
            for _ in range(rounds):
                worker.wait_for("replication_started")
                threading.Event().wait(0.3 + dice.random())
                own_server.crash()
                own_server.start()
        crm.reconnect()
        assert worker.process.poll() is None, "it went on through every crash"
        assert worker.terminate() == 0
    assert writers.commits > 50
    recorded_exactly(crm)


@storm(6, chaos=60)
def test_terminated_connections_lose_and_double_nothing(crm: Crm, seed: int, rounds: int) -> None:
    dice = random.Random(seed)
    shadow.install(crm.connection)
    with crm.worker() as worker, Writers(crm, seed):
        for _ in range(rounds):
            eventually(lambda: crm.reader() or worker.process.poll() is not None)
            assert worker.process.poll() is None, worker.said
            threading.Event().wait(dice.random() * 0.5)
            crm.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE application_name = %s AND (backend_type = 'walsender') = %s",
                f"cdc-worker {crm.slot}",
                dice.random() < 0.5,
            )
        assert worker.process.poll() is None, worker.said
    recorded_exactly(crm)
