"""A standby is promoted: the worker goes on there, where the server keeps its slot."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest
import servers
from promoted import Standby, of_both
from storms import Faults, Writers, recorded_exactly
from support import eventually, make_crm

from cdc_worker import shadow


@pytest.mark.parametrize(
    ("name", "plugin"),
    [
        pytest.param("17-wal2json", "wal2json", marks=pytest.mark.chaos),
        pytest.param("17-wal2json", "pgoutput", marks=pytest.mark.chaos),
        pytest.param("18", "pgoutput", marks=pytest.mark.chaos),
    ],
)
def test_the_worker_goes_on_at_a_standby_that_is_promoted(
    name: str, plugin: str, tmp_path: Path, seed: int, faults: Faults
) -> None:
    """It is synchronous: what the application was told is committed is there, and so is what the worker confirmed."""
    dice = random.Random(seed)
    with servers.a_server(name) as primary, Standby(primary) as standby:
        crm = make_crm(primary, tmp_path, plugin=plugin)
        crm.succeed("setup", "--failover")
        shadow.install(crm.connection)
        crm.dsn = of_both(primary, standby, crm.connection.info.dbname)
        with crm.worker() as worker, Writers(crm, seed) as writers:
            worker.wait_for("replication_started")
            standby.keep(crm.slot)
            before = writers.commits
            eventually(lambda: writers.commits > before + 20)
            threading.Event().wait(dice.random() / 2)
            primary.crash()
            before = writers.commits
            standby.promote()
            faults["standby promoted"] += 1
            eventually(lambda: writers.commits > before + 50, what="the application goes on there")
            eventually(lambda: len(worker.events("replication_started")) > 1 or worker.process.poll() is not None)
            assert worker.process.poll() is None, worker.said
            crm.reconnect()
            assert crm.connection.info.port == standby.port
            eventually(crm.reader, what="the worker goes on there")
        recorded_exactly(crm, faults)
        crm.close()
