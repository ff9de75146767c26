"""A loop that hangs is interrupted, and one that sleeps or turns is not."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any
from unittest import mock

import pytest
from support import Crm, eventually

from cdc_worker import config, errors, process, profile
from cdc_worker.cluster import Cluster
from cdc_worker.stop import Hung, Stop
from cdc_worker.stream import ASKING_INTERVAL
from cdc_worker.vitals import Vitals
from cdc_worker.watch import Watch
from cdc_worker.worker import Worker


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cdc_worker.stop.HANG", 0.6)


def hang(*arguments: Any) -> None:
    """As a function of a profile may, which catches whatever it meets."""
    while True:
        try:
            time.sleep(0.01)
        except Exception:
            time.sleep(0.02)


def test_a_worker_that_hangs_ends_with_its_own_code_and_writes_nothing(
    crm: Crm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdc_worker.transform.Transformer.feed", hang)
    monkeypatch.setattr("cdc_worker.worker.gc", mock.Mock())
    settings = config.load(None, {"dsn": crm.dsn, "slot": crm.slot} | crm.settings)
    log = mock.Mock()
    crm.add_leads(1)
    with pytest.raises(errors.HungError, match=r"the worker has hung for 1 s in hang \(test_hang.py, line \d+\)"):
        Worker(settings, profile.load(settings.profile), stop=Stop(), log=log).run()
    assert "worker_unhealthy" in [call.args[0] for call in log.warning.mock_calls]
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    monkeypatch.undo()
    crm.record()
    assert crm.types() == ["lead_created"]


def test_a_loop_that_turns_is_not_interrupted_however_long_it_does() -> None:
    stop = Stop()
    with stop.turning():
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            stop.turned()
            time.sleep(0.05)


def test_one_turn_may_take_its_time() -> None:
    """As that does in which a process was put to sleep: it is looked at twice."""
    with Stop().turning():
        time.sleep(0.25)


def test_what_hangs_is_interrupted() -> None:
    with pytest.raises(Hung), Stop().turning():
        hang()


def test_in_another_thread_nothing_is_looked_at() -> None:
    done: list[bool] = []

    def work() -> None:
        with Stop().turning():
            done.append(signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]


def test_whoever_is_silent_again_after_a_new_beginning_is_a_problem_again(crm: Crm) -> None:
    vitals = Vitals()
    settings = config.load(None, {"dsn": crm.dsn, "slot": crm.slot} | crm.settings)
    watch = Watch(settings, process.Process(settings.worker), mock.Mock(), vitals)
    for why in ("the stream is silent", "the stream is silent again"):
        vitals.became("active")
        assert vitals.ready
        watch.unhealthy(why)
        assert vitals.problems == {"silence": why}
        assert not vitals.ready
    watch.healthy()
    assert vitals.ready


def test_a_server_that_is_frozen_between_two_batches_is_left(own_server: Cluster, own_crm: Crm) -> None:
    """Of what waits for no lock there is no other reason to be unanswered, and nobody can ask after it."""
    crm = own_crm
    postmaster = int((own_server.data / "postmaster.pid").read_text().splitlines()[0])
    with crm.worker(dsn=f"{crm.dsn} connect_timeout=2") as worker:
        worker.wait_for("replication_started")
        crm.add_leads(1)
        eventually(lambda: crm.types() == ["lead_created"])
        writing = crm.value("SELECT backend_pid FROM cdc_worker.checkpoint")
        threading.Event().wait(2 * ASKING_INTERVAL)
        for pid in (postmaster, writing):
            os.kill(pid, signal.SIGSTOP)
        try:
            crm.add_leads(1)
            assert "an answer of the server did not come" in worker.wait_for("connection_lost")["reason"]
        finally:
            for pid in (writing, postmaster):
                os.kill(pid, signal.SIGCONT)
        eventually(lambda: len(crm.types()) == 2)
        assert worker.terminate() == 0
