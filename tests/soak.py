"""`make soak`: all that goes wrong, at random and together, on one server and one database, for SOAK_SECONDS.

An application writes all the while, now and then in large transactions. Two workers serve it, of which one stands by,
through a network that cuts, stalls, forgets, divides and delays. Processes are killed and put to sleep, sessions
terminated, the server is crashed and restarted, the target locked, the plugin switched. Each fault comes at a moment
of its own, whatever the others are at. Then all that was committed is held against `activity`.

SOAK_SECONDS is for how long, CDC_TEST_SEED the seed of the faults; when they meet what is up to the machine.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import secrets
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psycopg
from proxy import KINDS, Proxy
from storms import (
    BACKEND_TERMINATED,
    DOUBLED,
    HELD,
    LOST,
    RANDOM_KILL,
    WALSENDER_TERMINATED,
    Faults,
    Writers,
    recorded_exactly,
)
from support import Crm, WorkerProcess, eventually, make_crm

from cdc_worker import shadow
from cdc_worker.cluster import Cluster, find_binaries
from cdc_worker.errors import FencedError

TIMEOUT: Final = 2.0
"""wal_sender_timeout, in seconds: what lasts longer is noticed by both sides."""

SETTINGS: Final = {"wal_sender_timeout": f"{TIMEOUT:g}s", "max_wal_size": "2GB"}

PAUSE: Final = 6.0
"""So many seconds there are between two faults of a storm, at most: more often, a worker would hardly come to work."""

WORKERS: Final = 2

LARGE: Final = 20_000
"""So many rows a large transaction may have."""

EXPECTED: Final = {
    0: "SIGTERM",
    -signal.SIGTERM: "SIGTERM, before it listened or when it was ending already",
    -signal.SIGKILL: "SIGKILL",
    FencedError.exit_code: "replaced while asleep",
}
"""How a worker may end, who is never to end by itself."""

_LAG: Final = """
SELECT (pg_current_wal_flush_lsn() - lsn)::bigint, extract(epoch FROM clock_timestamp() - committed_at)::float8
FROM cdc_worker.checkpoint
"""

_TERMINATE: Final = """
SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
WHERE application_name = %s AND (backend_type = 'walsender') = %s
"""


@dataclass
class Peaks:
    """The most that was seen, some times a second."""

    memory: int = 0
    lag_bytes: int = 0
    lag_seconds: float = 0.0


@dataclass
class Soak:
    """A storm that lasts. `run` raises what ended a worker, or its storm, before the time."""

    server: Cluster
    crm: Crm
    proxy: Proxy
    seed: int
    faults: Faults = field(default_factory=Faults)
    peaks: Peaks = field(default_factory=Peaks)
    commits: int = 0
    started: int = 0

    def __post_init__(self) -> None:
        self._workers: list[WorkerProcess] = []
        self._over = threading.Event()
        self._problems: list[BaseException] = []
        self._handling = threading.Lock()  # who ends a worker or the server, and who looks which have ended

    def run(self, seconds: float) -> None:
        """Let all happen for so long, then see that what was committed is recorded."""
        shadow.install(self.crm.connection)
        storms = (self._processes, self._network, self._database)
        threads = [
            *(
                threading.Thread(target=self._storm, args=(random.Random(f"{self.seed}/{of.__name__}"), of()))
                for of in storms
            ),
            threading.Thread(target=self._watch),
        ]
        try:
            self._replenish()
            with Writers(self.crm, self.seed) as writers:
                for thread in threads:
                    thread.start()
                self._over.wait(seconds)
                self._over.set()
                for thread in threads:
                    thread.join()
            self.commits = writers.commits
            if self._problems:
                raise self._problems[0]
            self._settle()
        finally:
            self._over.set()
            for worker in self._workers:
                worker.kill()

    def _settle(self) -> None:
        """Let the workers come to the end of it, by themselves."""
        self.proxy.heal()
        self.crm.reconnect()
        self._replenish()
        eventually(lambda: self.crm.execute(_LAG)[0][0] < 1 << 20, what="it has caught up", patience=600)
        for worker in self._workers:
            code = worker.terminate()
            assert code in EXPECTED, worker.said
        self._workers.clear()
        recorded_exactly(self.crm, self.faults)

    def _storm(self, dice: random.Random, kinds: Sequence[Callable[[random.Random], object]]) -> None:
        """One fault after the other, until it is over."""
        try:
            while not self._over.wait(dice.random() * PAUSE):
                # Where the server is away, there is nothing to terminate or to lock.
                with suppress(psycopg.OperationalError):
                    dice.choice(kinds)(dice)
        except BaseException as problem:
            self._problems.append(problem)
            self._over.set()

    # Processes

    def _processes(self) -> Sequence[Callable[[random.Random], object]]:
        return self._kill, self._kill, self._kill, self._ask_to_end, self._put_to_sleep, self._crash, self._restart

    def _replenish(self) -> None:
        """Start new workers for those that have ended, as they may."""
        with self._handling:
            for worker in [*self._workers]:
                if (code := worker.process.poll()) is not None:
                    assert code in EXPECTED, f"a worker ended with {code}:\n{worker.said[-5000:]}"
                    self._workers.remove(worker)
            while len(self._workers) < WORKERS:
                self._workers.append(self.crm.worker(dsn=self.proxy.dsn(self.crm.dsn)))
                self.started += 1

    def _kill(self, dice: random.Random) -> None:
        with self._handling:
            worker = dice.choice(self._workers)
            worker.kill()
            self.faults[RANDOM_KILL] += worker.process.returncode == -signal.SIGKILL
        self._replenish()

    def _ask_to_end(self, dice: random.Random) -> None:
        with self._handling:
            dice.choice(self._workers).process.send_signal(signal.SIGTERM)
        self.faults["SIGTERM"] += 1

    def _put_to_sleep(self, dice: random.Random) -> None:
        """For longer than the server waits: it frees the slot, and the stand-by takes over."""
        worker = dice.choice(self._workers)
        worker.process.send_signal(signal.SIGSTOP)
        self._over.wait(TIMEOUT * (1.2 + dice.random()))
        worker.process.send_signal(signal.SIGCONT)
        self.faults["SIGSTOP for longer than the timeouts, SIGCONT"] += 1

    def _crash(self, dice: random.Random) -> None:
        with self._handling:
            self.server.crash()
            self.server.start()
        self.faults["server crashed"] += 1

    def _restart(self, dice: random.Random) -> None:
        with self._handling:
            self.server.restart("fast")
        self.faults["server shut down fast"] += 1

    # The network

    def _network(self) -> Sequence[Callable[[random.Random], object]]:
        return self._cut, self._cut, self._stall, self._forget, self._forget, self._break, self._slow_down

    def _cut(self, dice: random.Random) -> None:
        reset = dice.random() < 0.5
        cut = self.proxy.cut(dice.choice((None, "replication", "writing")), reset=reset)
        self.faults[f"network: connection cut ({'RST' if reset else 'FIN'})"] += cut

    def _stall(self, dice: random.Random) -> None:
        to_server, to_client = dice.choice(((True, True), (True, False), (False, True)))
        with self.proxy.stalled(to_server=to_server, to_client=to_client):
            self._over.wait(TIMEOUT * (0.5 + dice.random() * 1.5))
        self.faults["network: stall"] += 1

    def _forget(self, dice: random.Random) -> None:
        self.faults["network: connection half-open"] += self.proxy.half_open(dice.choice((None, *KINDS)))

    def _break(self, dice: random.Random) -> None:
        """New connections, wherever they are in what they begin with."""
        self.proxy.breaking = {kind: dice.randrange(4000) for kind in KINDS}
        before = self.proxy.accepted
        self._over.wait(2 + dice.random() * 2)
        self.proxy.breaking = {}
        self.faults["network: connection half-open"] += self.proxy.accepted - before

    def _slow_down(self, dice: random.Random) -> None:
        self.proxy.piece, self.proxy.delay = dice.choice(((1, 0.0), (100, 0.0), (1 << 16, 0.05)))
        self._over.wait(2 + dice.random() * 3)
        self.proxy.piece, self.proxy.delay = 1 << 16, 0.0
        self.faults["network: slow, or in pieces"] += 1

    # The database

    def _database(self) -> Sequence[Callable[[random.Random], object]]:
        return self._terminate, self._terminate, self._terminate, self._lock, self._write_much, self._switch

    def _connected(self) -> contextlib.closing[psycopg.Connection[tuple[object, ...]]]:
        return closing(psycopg.connect(self.crm.dsn, connect_timeout=5))

    def _terminate(self, dice: random.Random) -> None:
        walsender = dice.random() < 0.5
        with self._connected() as connection:
            ended = connection.execute(_TERMINATE, (f"cdc-worker {self.crm.slot}", walsender)).fetchall()
        self.faults[WALSENDER_TERMINATED if walsender else BACKEND_TERMINATED] += int(str(ended[0][0]))

    def _lock(self, dice: random.Random) -> None:
        with self._connected() as connection:
            connection.execute("LOCK TABLE activity")
            self._over.wait(dice.random() * TIMEOUT * 2)
        self.faults["target locked"] += 1

    def _write_much(self, dice: random.Random) -> None:
        with self._connected() as connection, connection.transaction():
            connection.execute(
                "INSERT INTO lead (full_name, source, bd_in_charge, type)"
                " SELECT 'Lead ' || n, 'import', 'jane', 't' FROM generate_series(1, %s) n",
                (dice.randrange(LARGE),),
            )
            connection.execute("UPDATE lead SET status = '7. lost' WHERE source = 'import'")
            if dice.random() < 0.5:
                connection.execute("DELETE FROM lead WHERE source = 'import'")
        self.faults["large transaction"] += 1

    def _switch(self, dice: random.Random) -> None:
        """Which is refused where no worker answers, and may be killed: then it is gone on with the next time."""
        log = self.crm.directory / f"switch_{time.monotonic_ns()}.log"
        with WorkerProcess(["switch-plugin"], self.crm.environment(), log) as switching:
            deadline = time.monotonic() + 5 + dice.random() * 10
            while switching.process.poll() is None and time.monotonic() < deadline:
                self._over.wait(0.1)
        self.faults["plugin switched" if switching.process.returncode == 0 else "switch of the plugin given up"] += 1

    # What is seen

    def _watch(self) -> None:
        try:
            for _ in itertools.count():
                if self._over.wait(0.2):
                    return
                self._replenish()
                for worker in [*self._workers]:
                    with suppress(OSError, IndexError):  # it has ended
                        self.peaks.memory = max(self.peaks.memory, worker.memory())
                with suppress(psycopg.OperationalError), self._connected() as connection:
                    ((lag_bytes, lag_seconds),) = connection.execute(_LAG).fetchall()
                    self.peaks.lag_bytes = max(self.peaks.lag_bytes, int(str(lag_bytes)))
                    self.peaks.lag_seconds = max(self.peaks.lag_seconds, float(str(lag_seconds or 0)))
        except BaseException as problem:
            self._problems.append(problem)
            self._over.set()

    def table(self, seconds: float) -> Iterator[str]:
        """What was done and what came of it."""
        results = {name: self.faults.get(name, 0) for name in (HELD, LOST, DOUBLED)}
        done = sorted((kind, times) for kind, times in self.faults.items() if kind not in results)
        yield "| A soak | |"
        yield "| --- | ---: |"
        yield f"| seconds of faults | {seconds:,.0f} |"
        yield f"| seed | {self.seed} |"
        yield f"| commits of the application's four sessions | {self.commits:,} |"
        for kind, times in done:
            yield f"| {kind} | {times:,} |"
        yield f"| worker processes | {self.started:,} |"
        yield f"| peak memory of one of them | {self.peaks.memory / 1e6:,.0f} MB |"
        yield f"| peak lag | {self.peaks.lag_bytes / 1e6:,.0f} MB, {self.peaks.lag_seconds:,.0f} s |"
        for name, count in results.items():
            yield f"| **{name}** | **{count:,}** |"


@contextmanager
def soaking(seed: int) -> Iterator[Soak]:
    """All that a soak needs, of its own."""
    with ExitStack() as stack:
        server = stack.enter_context(Cluster(find_binaries(plugin="wal2json"), settings=SETTINGS))
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        crm = make_crm(server, Path(directory))
        stack.callback(crm.close)
        crm.setup()
        yield Soak(server, crm, stack.enter_context(Proxy(server.port)), seed)


def main() -> None:
    seconds = float(os.environ.get("SOAK_SECONDS") or 1200)
    seed = int(os.environ.get("CDC_TEST_SEED") or secrets.randbelow(1 << 32))
    print(f"CDC_TEST_SEED={seed}, for {seconds:,.0f} s", file=sys.stderr)  # noqa: T201
    with soaking(seed) as soak:
        try:
            soak.run(seconds)
        finally:
            print("\n".join(soak.table(seconds)))  # noqa: T201


if __name__ == "__main__":
    main()
