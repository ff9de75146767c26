"""The worker beyond a network that cuts, stalls, delays and forgets: nothing is lost or doubled, and it goes on."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import LiteralString
from unittest import mock

import psycopg
import pytest
from proxy import Kind, Proxy
from psycopg import sql
from psycopg.conninfo import make_conninfo
from storms import Faults, Writers, recorded_exactly
from support import Crm, WorkerProcess, either_plugin, eventually, storm
from test_lookups import add, looking_crm, told

from cdc_worker import config, decoders, postgres, profile, shadow
from cdc_worker.cluster import Cluster
from cdc_worker.lsn import LSN
from cdc_worker.replication import Replication
from cdc_worker.stop import Stop
from cdc_worker.stream import SILENCE
from cdc_worker.worker import Worker


@pytest.fixture
def proxy(server: Cluster) -> Iterator[Proxy]:
    with Proxy(server.port) as proxy:
        yield proxy


def wal_sender_timeout(crm: Crm, timeout: str) -> None:
    """After so long the server takes a walsender's client for dead, and the worker the server."""
    database = sql.Identifier(crm.connection.info.dbname)
    statement = sql.SQL("ALTER DATABASE {} SET wal_sender_timeout = {}")
    crm.connection.execute(statement.format(database, sql.Literal(timeout)))


def beyond(proxy: Proxy, crm: Crm, patience: int = 2, **settings: str) -> WorkerProcess:
    """A worker that reaches its server through the proxy, and waits so many seconds for its answers."""
    shadow.install(crm.connection)
    return crm.worker(dsn=make_conninfo(proxy.dsn(crm.dsn), connect_timeout=patience), **settings)


def streams(worker: WorkerProcess, proxy: Proxy) -> Callable[[], bool]:
    """Whether the worker streams through links that hold, once more than it has by now."""
    before = len(worker.events("replication_started"))

    def fact() -> bool:
        assert worker.process.poll() is None, worker.said
        return len(worker.events("replication_started")) > before and proxy.links("replication") > 0

    return fact


@storm(4, chaos=30)
def test_cuts_at_random_moments_lose_and_double_nothing(
    crm: Crm, proxy: Proxy, seed: int, faults: Faults, rounds: int
) -> None:
    dice = random.Random(seed)
    with beyond(proxy, crm) as worker, Writers(crm, seed):
        for _ in range(rounds):
            eventually(lambda: worker.events("replication_started") and proxy.links("replication"))
            threading.Event().wait(dice.random() * 0.4)
            reset = dice.random() < 0.5
            cut = proxy.cut(dice.choice((None, "replication", "writing")), reset=reset)
            faults[f"network: connection cut ({'RST' if reset else 'FIN'})"] += cut
        assert worker.process.poll() is None, worker.said
        assert worker.terminate() == 0
    recorded_exactly(crm, faults)


@either_plugin
def test_what_comes_in_pieces_is_put_together(crm: Crm, proxy: Proxy, seed: int, faults: Faults) -> None:
    """Whatever a message of the protocol, a change in it and a row of the COPY are cut into."""
    proxy.piece = 1
    with beyond(proxy, crm, patience=60) as worker:  # a write of many bytes takes its time
        worker.wait_for("replication_started")
        with Writers(crm, seed, sessions=1) as writers:
            eventually(lambda: writers.commits > 8)
        eventually(crm.types)
        assert worker.events("connection_lost") == []
        proxy.piece = 1 << 16
        assert worker.terminate() == 0
    recorded_exactly(crm, faults)


def test_a_slow_network_costs_time_alone(crm: Crm, proxy: Proxy, seed: int, faults: Faults) -> None:
    proxy.delay = 0.02
    with beyond(proxy, crm) as worker:
        worker.wait_for("replication_started")
        with Writers(crm, seed) as writers:
            eventually(lambda: writers.commits > 60)
        eventually(crm.types)
        assert worker.events("connection_lost") == []
        assert worker.terminate() == 0
    recorded_exactly(crm, faults)


def test_a_row_that_takes_longer_than_the_timeouts_to_come_is_no_silence(crm: Crm, proxy: Proxy) -> None:
    """No message is whole for that long, and were it given up, it would begin to come anew, for ever."""
    wal_sender_timeout(crm, "2s")
    with beyond(proxy, crm) as worker:
        worker.wait_for("replication_started")
        crm.add_leads(1)
        eventually(crm.types)
        proxy.piece, proxy.delay = 2048, 0.01
        crm.execute("UPDATE lead SET background = (SELECT string_agg(md5(n::text), '') FROM generate_series(1, 2e4) n)")
        eventually(lambda: len(crm.types()) == 2)
        assert worker.events("connection_lost") == []
        assert worker.terminate() == 0


@storm(1, chaos=8)
def test_stalls_for_longer_than_both_timeouts_lose_and_double_nothing(
    crm: Crm, proxy: Proxy, seed: int, faults: Faults, rounds: int
) -> None:
    dice = random.Random(seed)
    wal_sender_timeout(crm, "1s")
    with beyond(proxy, crm) as worker, Writers(crm, seed):
        for _ in range(rounds):
            worker.wait_for("replication_started")
            threading.Event().wait(dice.random())
            directions = dice.choice(((True, True), (True, False), (False, True)))
            with proxy.stalled(to_server=directions[0], to_client=directions[1]):
                threading.Event().wait(3.5)
            faults["network: stall longer than the timeouts"] += 1
        eventually(crm.types)
        assert worker.process.poll() is None, worker.said
        assert worker.terminate() == 0
    recorded_exactly(crm, faults)


@storm(2, chaos=12)
def test_half_open_connections_are_noticed_and_replaced(
    crm: Crm, proxy: Proxy, seed: int, faults: Faults, rounds: int
) -> None:
    """What was sent is taken, by somebody, and nobody ever answers."""
    wal_sender_timeout(crm, "1s")
    dice = random.Random(seed)
    with beyond(proxy, crm) as worker, Writers(crm, seed):
        worker.wait_for("replication_started")
        kinds: tuple[Kind | None, ...] = ("replication", "writing", None)
        for number in range(rounds):
            threading.Event().wait(dice.random() * 0.5)
            again = streams(worker, proxy)
            faults["network: connection half-open"] += proxy.half_open(kinds[number % 3])
            # Without a wal_sender_timeout nobody is asked after for half a minute.
            eventually(again, what="it streams through another connection", patience=SILENCE / 2)
        worker.wait_for("worker_unhealthy")
        worker.wait_for("worker_healthy")
        assert worker.terminate() == 0
    recorded_exactly(crm, faults)


@pytest.mark.parametrize("committed", [True, False])
def test_a_commit_whose_answer_never_comes_is_there_once(
    crm: Crm, proxy: Proxy, faults: Faults, committed: bool
) -> None:
    """Whether the server has heard of it or not."""
    wal_sender_timeout(crm, "1s")
    with beyond(proxy, crm) as worker:
        worker.wait_for("replication_started")
        again = streams(worker, proxy)
        proxy.stall("writing", to_server=not committed, to_client=committed)
        crm.add_leads(3)
        if committed:
            eventually(lambda: len(crm.types()) == 3)
        proxy.half_open("writing")
        faults["network: connection half-open"] += 1
        eventually(again)
        crm.add_leads(2)
        eventually(lambda: len(crm.types()) == 5)
        assert worker.terminate() == 0
    lost = worker.events("connection_lost")[0]
    assert "a batch was being written" in lost["reason"]
    recorded_exactly(crm, faults)


def test_a_half_open_connection_for_lookups_is_replaced(crm: Crm, proxy: Proxy, faults: Faults, tmp_path: Path) -> None:
    crm = looking_crm(crm, tmp_path)
    wal_sender_timeout(crm, "1s")
    with crm.worker(dsn=proxy.dsn(crm.dsn)) as worker:
        worker.wait_for("replication_started")
        again = streams(worker, proxy)
        faults["network: connection half-open"] += proxy.half_open("reading")
        add(crm, "call", 1)
        eventually(again)
        eventually(lambda: told(crm) == ["call for jane of sales under jane"])
        assert worker.terminate() == 0
    assert "a row was being looked up" in worker.events("connection_lost")[0]["reason"]


@pytest.mark.parametrize(("kind", "after"), [("writing", 0), ("writing", 600), ("replication", 600)])
def test_connections_that_are_half_open_from_the_first_are_given_up(
    crm: Crm, proxy: Proxy, faults: Faults, kind: Kind, after: int
) -> None:
    """At connect, and while the worker makes sure that all is as it should be."""
    proxy.breaking[kind] = after
    with beyond(proxy, crm) as worker:
        worker.wait_for("connection_lost")
        faults["network: connection half-open"] += 1
        proxy.breaking.clear()
        crm.add_leads(2)
        eventually(lambda: len(crm.types()) == 2)
        assert worker.terminate() == 0
    recorded_exactly(crm, faults)


@pytest.mark.parametrize("after", [0, pytest.param(600, marks=pytest.mark.chaos)])
def test_a_half_open_connection_to_look_around_holds_nothing_up_for_long(
    crm: Crm, proxy: Proxy, faults: Faults, after: int
) -> None:
    """At connect, or while something is asked through it. The stream and what is written are left as they are."""
    proxy.breaking["brief"] = after
    with beyond(proxy, crm) as worker:
        worker.wait_for("replication_started")
        crm.add_leads(1)
        worker.wait_for("look_failed")
        faults["network: connection half-open"] += 1
        crm.add_leads(1)
        eventually(lambda: len(crm.types()) == 2)
        assert worker.events("connection_lost") == []
        assert worker.terminate() == 0
    recorded_exactly(crm, faults)


@contextmanager
def impatient(crm: Crm, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[mock.Mock]:
    """A worker in this process that waits a second for what others wait a minute for. Yields its log."""
    patched = {"stream.SILENCE": 1.0, "worker.SILENCE": 1.0, "stream.STATUS_INTERVAL": 0.1, "worker.gc": mock.Mock()}
    for name, value in patched.items():
        monkeypatch.setattr(f"cdc_worker.{name}", value)
    settings = config.load(None, {"dsn": proxy.dsn(crm.dsn), "slot": crm.slot} | crm.settings)
    stop, log = Stop(), mock.Mock()
    running = threading.Thread(target=Worker(settings, profile.load(settings.profile), stop=stop, log=log).run)
    running.start()
    try:
        yield log
    finally:
        stop.request()
        running.join()


def events(log: mock.Mock) -> list[str]:
    """What it has logged, but for what is of no interest."""
    return [call.args[0] for call in log.mock_calls if call[0] in ("info", "warning")]


def test_the_worker_does_not_wait_for_its_own_stale_walsender(
    crm: Crm, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, faults: Faults
) -> None:
    """The server would take it for one that reads the slot, for ever where it has no wal_sender_timeout."""
    wal_sender_timeout(crm, "0")
    crm.add_leads(1)
    with impatient(crm, proxy, monkeypatch) as log:
        eventually(crm.types)
        stale = crm.reader()
        faults["network: connection half-open"] += proxy.half_open()
        crm.add_leads(1)
        eventually(lambda: len(crm.types()) == 2)
        assert crm.reader() != stale
        assert crm.value("SELECT count(*) FROM pg_stat_activity WHERE pid = %s", stale) == 0
    assert "own_sessions_ended" in events(log)
    assert "waiting_for_slot" not in events(log)


def test_a_stale_walsender_from_whom_nobody_takes_what_he_sends_is_ended_as_well(crm: Crm) -> None:
    """Told to end, he would first say so to his client, and wait for ever until that is sent."""
    wal_sender_timeout(crm, "0")
    state: LiteralString = "SELECT wait_event FROM pg_stat_activity WHERE pid = %s"
    with Replication(sender := postgres.connect_replication(crm.dsn, crm.slot)) as stream:
        stale = postgres.session(sender)
        plugin = crm.value("SELECT plugin FROM cdc_worker.checkpoint")
        options, optional = decoders.options(plugin, [("public", "lead")], (), publication=crm.slot)
        stream.start(crm.slot, LSN(0), options, encoding="UTF8", optional=optional)
        crm.execute(
            "INSERT INTO lead (full_name, source, bd_in_charge, type, background)"
            " SELECT 'Lead', 's', 'jane', 't', repeat('c4n4ry', 5000) FROM generate_series(1, 1000)"
        )
        eventually(lambda: crm.value(state, stale.pid) == "WalSenderWriteData", what="there is no more room")
        assert postgres.end(crm.connection, crm.slot, [stale]) == 1
        assert crm.reader() is None
    assert postgres.end(crm.connection, crm.slot, [stale]) == 0


def test_a_server_that_is_away_for_long_makes_the_worker_unhealthy_until_it_is_back(
    crm: Crm, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    with impatient(crm, proxy, monkeypatch) as log:
        eventually(lambda: "replication_started" in events(log))
        proxy.refuse()
        proxy.cut()
        eventually(lambda: "worker_unhealthy" in events(log))
        proxy.accept()
        eventually(lambda: "worker_healthy" in events(log))
    assert events(log).count("worker_unhealthy") == 1


def test_a_lock_makes_the_worker_unhealthy_and_is_no_reason_to_begin_anew(crm: Crm) -> None:
    """Begun anew, all that is in hand would have to be done again, and would wait for the same lock."""
    wal_sender_timeout(crm, "3s")
    with crm.worker() as worker, psycopg.connect(crm.dsn) as other:
        worker.wait_for("replication_started")
        other.execute("LOCK TABLE activity")
        crm.add_leads(1)
        reason = worker.wait_for("worker_unhealthy")["reason"]
        assert reason.startswith("a batch was being written for ")
        assert reason.endswith(" waits (Lock: relation)")
        time.sleep(3)  # it is asked after again
        assert worker.events("worker_healthy") == []
        other.rollback()
        eventually(crm.types)
        worker.wait_for("worker_healthy")
        assert len(worker.events("worker_unhealthy")) == 1
        assert worker.events("connection_lost") == []
        assert worker.terminate() == 0


@pytest.mark.parametrize("name", [None, postgres.DOCTOR])
def test_a_command_waits_for_what_the_server_is_at_and_for_nothing_that_was_lost(
    crm: Crm, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, faults: Faults, name: str | None
) -> None:
    monkeypatch.setattr(postgres, "PATIENCE", 0.5)
    dsn = make_conninfo(proxy.dsn(crm.dsn), connect_timeout=0)
    with closing(postgres.connect(dsn, crm.slot, name=name)) as connection:
        connection.execute("SELECT pg_sleep(1.5)")
        faults["network: connection half-open"] += proxy.half_open()
        with pytest.raises(psycopg.OperationalError, match="did not come"):
            connection.execute("SELECT")


def test_a_command_that_writes_gives_up_a_half_open_connection(crm: Crm, proxy: Proxy, faults: Faults) -> None:
    crm.add_leads(3)
    crm.record()
    crm.execute("SET cdc_worker.protect = off")
    crm.execute("DELETE FROM activity")
    environment = crm.environment(dsn=make_conninfo(proxy.dsn(crm.dsn), connect_timeout=1))
    with crm.worker() as worker, psycopg.connect(crm.dsn) as other:
        worker.wait_for("replication_started")
        other.execute("LOCK TABLE activity IN SHARE MODE")
        with WorkerProcess(["verify", "--repair", "lead"], environment, crm.directory / "verify.log") as verify:
            waits = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'activity'::regclass"
            eventually(lambda: verify.process.poll() is not None or crm.value(waits))
            time.sleep(2)  # it is asked after meanwhile
            assert verify.process.poll() is None, verify.said
            faults["network: connection half-open"] += proxy.half_open()
            other.rollback()
            assert verify.wait() == 1
            assert "error: an answer of the server did not come for 1 s" in verify.said
        crm.succeed("verify", "--repair", "lead")  # of the other, which had a part of it in hand, nothing is left
    assert len(crm.types()) == 3
