"""The promise: whatever is killed, every committed change is recorded exactly once.

The oracle is the database: triggers keep a ledger of every committed change, and `cdc_worker.shadow` holds `activity`
against it, row by row and in order.
"""

from __future__ import annotations

import random
import threading

import pytest
from storms import BACKEND_TERMINATED, WALSENDER_TERMINATED, Faults, Writers, kill, killed_at_random, recorded_exactly
from support import Crm, either_plugin, eventually, storm

from cdc_worker import shadow
from cdc_worker.cluster import Cluster

pytestmark = either_plugin


@storm(3, chaos=100)
def test_random_kills_under_concurrent_writers_lose_and_double_nothing(
    crm: Crm, seed: int, faults: Faults, rounds: int
) -> None:
    shadow.install(crm.connection)
    with Writers(crm, seed) as writers, killed_at_random(crm, random.Random(seed), rounds, faults):
        pass
    assert writers.commits > 100
    recorded_exactly(crm, faults)


@storm(2, chaos=30)
def test_kills_within_one_large_transaction_lose_and_double_nothing(
    crm: Crm, seed: int, faults: Faults, rounds: int
) -> None:
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
            kill(worker, faults)
        inside += crm.value(position) > 0
    assert inside * 3 >= rounds, "it was killed within the transaction"
    recorded_exactly(crm, faults)
    assert crm.value("SELECT count(*) FROM activity") == leads


@storm(3, chaos=30)
def test_kills_while_rows_that_share_an_lsn_are_written(crm: Crm, seed: int, faults: Faults, rounds: int) -> None:
    dice = random.Random(seed)
    shadow.install(crm.connection)
    for _ in range(rounds):
        with crm.connection.cursor().copy("COPY lead (full_name, source, bd_in_charge, type) FROM STDIN") as copy:
            for number in range(1000):
                copy.write_row((f"Lead {number}", "import", "jane", "exchange"))
        with crm.worker() as worker:
            worker.wait_for("replication_started")
            threading.Event().wait(dice.random() * 0.2)
            kill(worker, faults)
    recorded_exactly(crm, faults)


@pytest.mark.parametrize("durable", [True, False], ids=["durable", "synchronous_commit off"])
@storm(1, chaos=20)
def test_crashes_of_the_server_lose_and_double_nothing(
    own_crm: Crm, own_server: Cluster, seed: int, faults: Faults, *, durable: bool, rounds: int
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
                faults["server crashed"] += 1
                own_server.start()
        crm.reconnect()
        assert worker.process.poll() is None, "it went on through every crash"
        assert worker.terminate() == 0
    assert writers.commits > 50
    recorded_exactly(crm, faults)


@storm(3, chaos=60)
def test_terminated_connections_lose_and_double_nothing(crm: Crm, seed: int, faults: Faults, rounds: int) -> None:
    dice = random.Random(seed)
    shadow.install(crm.connection)
    with crm.worker() as worker, Writers(crm, seed):
        for _ in range(rounds):
            eventually(lambda: crm.reader() or worker.process.poll() is not None)
            assert worker.process.poll() is None, worker.said
            threading.Event().wait(dice.random() * 0.5)
            reading = dice.random() < 0.5
            ended = crm.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE application_name = %s AND (backend_type = 'walsender') = %s",
                f"cdc-worker {crm.slot}",
                reading,
            )
            faults[WALSENDER_TERMINATED if reading else BACKEND_TERMINATED] += len(ended)
        assert worker.process.poll() is None, worker.said
    recorded_exactly(crm, faults)
