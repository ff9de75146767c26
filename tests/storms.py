"""What storms share: an application that writes, the oracle, and a count of what was done, by kind."""

from __future__ import annotations

import random
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, LiteralString

import psycopg
import pytest
from launcher import FAIL_POINT
from psycopg.rows import TupleRow
from support import Crm, WorkerProcess

from cdc_worker import shadow
from cdc_worker.failpoints import Point

Faults = Counter[str]
"""How often what was done, by kind: `make chaos` ends with the sums of all tests. See the fixture `faults`."""

HELD = "activities held against the ledger"
LOST = "lost"
DOUBLED = "doubled"

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
        assert not self.failures, self.failures

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
                    (f"Lead {dice.randrange(1000)} c4n4ry {{x}} %", source, "c4n4ry " * dice.choice((0, 10, 2000))),
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
            connection.execute(
                "INSERT INTO customer (customer_uid, name) VALUES (%s, 'Acme') ON CONFLICT DO NOTHING", (customer,)
            )
            connection.execute("UPDATE lead SET is_converted = true WHERE lead_id = %s", row)
            connection.execute("INSERT INTO contact (customer_uid, lead_id) VALUES (%s, %s)", (customer, *row))


_DIFFERENCE: Final[LiteralString] = """
SELECT coalesce(sum(missing) FILTER (WHERE missing > 0), 0), coalesce(-sum(missing) FILTER (WHERE missing < 0), 0)
FROM shadow.difference
"""


def recorded_exactly(crm: Crm, faults: Faults) -> None:
    """Record what is left, and hold `activity` against the ledger."""
    crm.record()
    expected, recorded = shadow.counts(crm.connection)
    ((lost, doubled),) = crm.execute(_DIFFERENCE)
    faults.update({HELD: expected, LOST: int(lost), DOUBLED: int(doubled)})
    wrong = shadow.faults(crm.connection)
    assert not wrong, "\n".join(wrong)
    assert expected == recorded > 0, (expected, recorded)
    assert crm.value("SELECT count(*) FROM cdc_worker.dead_letter") == 0


RANDOM_KILL = "SIGKILL at random"
TAKEN_OVER_ASLEEP = "SIGSTOP, a take-over, SIGCONT"
WALSENDER_TERMINATED = "walsender terminated"
BACKEND_TERMINATED = "writing backend terminated"


def kill(process: WorkerProcess, faults: Faults) -> None:
    """SIGKILL, which counts if it hasn't ended before."""
    process.kill()
    faults[RANDOM_KILL] += process.process.returncode == -signal.SIGKILL


@contextmanager
def killed_at_random(crm: Crm, dice: random.Random, times: int, faults: Faults) -> Iterator[None]:
    """Start the worker and kill it, so often, at moments from before it connects to well after it has caught up."""
    for _ in range(times):
        with crm.worker() as worker:
            if dice.random() < 0.9:
                worker.wait_for("replication_started")
            threading.Event().wait(dice.random() ** 3)
            kill(worker, faults)
    yield


def kills_at(*points: Point) -> pytest.MarkDecorator:
    """Say that a test has processes killed at these points. The fixture `faults` fails it unless it has, at each."""
    return pytest.mark.kills_at(*points)


def kill_at(point: Point) -> str:
    """How such a kill is counted."""
    return f"SIGKILL at {point}"


def drawn(points: Sequence[Point], times: int, dice: random.Random) -> list[Point]:
    """Each of them so often, in any order."""
    return dice.sample(points, k=len(points) * times, counts=[times] * len(points))


def killed(crm: Crm, faults: Faults, point: Point, number: int, *command: str, **settings: str) -> None:
    """Run a command that is killed when it has come to a point so many times. Fails where it ends in another way."""
    environment = crm.environment(**settings) | {FAIL_POINT: f"{point}:{number}"}
    with WorkerProcess(command, environment, crm.directory / "killed.log") as process:
        try:
            code: int | None = process.wait()
        except TimeoutError:
            code = None
        said = f"{' '.join(command)} was not killed at {point}, time {number}: {code}\n{process.said}"
        assert code == -signal.SIGKILL, said
    faults[kill_at(point)] += 1
