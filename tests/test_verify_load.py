"""A true log is found to be true, whatever goes on beside it."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psycopg
from psycopg.rows import TupleRow
from support import Crm, eventually, storm
from test_verify import caught_up, running, verified

INSERT = """
INSERT INTO lead (lead_id, full_name, company_name, source, bd_in_charge, type, status)
VALUES (%s, %s, 'Acme', 'web', 'jane', 'exchange', '1')
"""


class Application(threading.Thread):
    """A CRM at work: leads come and go, change, and get other keys, also such as others had."""

    def __init__(self, dsn: str, seed: int, *, keys: int) -> None:
        super().__init__()
        self._dsn, self._chance, self._keys = dsn, random.Random(seed), keys
        self.stop = threading.Event()
        self.done = 0
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            with psycopg.connect(self._dsn, autocommit=True) as connection:
                for number in itertools.count():
                    if self.stop.is_set():
                        return
                    with suppress(psycopg.errors.UniqueViolation, psycopg.errors.DeadlockDetected):
                        self._act(connection, f"name {number}")
                        self.done += 1
                    self.stop.wait(0.002)
        except BaseException as error:
            self.failure = error

    def _act(self, connection: psycopg.Connection[TupleRow], name: str) -> None:
        # Some keys are much sought after.
        key, other = (int(self._keys * self._chance.random() ** 3) + 1 for _ in range(2))
        match self._chance.randrange(8):
            case 0:
                connection.execute(INSERT, (key, name))
            case 1:
                connection.execute("DELETE FROM lead WHERE lead_id = %s", (key,))
            case 2:
                with connection.transaction():
                    connection.execute("DELETE FROM lead WHERE lead_id = %s", (key,))
                    connection.execute(INSERT, (key, name))
            case 3:
                connection.execute("UPDATE lead SET lead_id = %s, email = %s WHERE lead_id = %s", (other, name, key))
            case 4:
                with connection.transaction():
                    connection.execute("UPDATE lead SET full_name = %s WHERE lead_id = %s", (name, key))
                    connection.execute(
                        "UPDATE lead SET bd_in_charge = 'joe', status = %s WHERE lead_id = %s", (name, other)
                    )
            case 5:
                connection.execute("UPDATE lead SET is_converted = NOT is_converted WHERE lead_id = %s", (key,))
            case _:
                connection.execute("UPDATE lead SET status = %s WHERE lead_id = %s", (name, key))


@contextmanager
def at_work(crm: Crm, seed: int, *, keys: int) -> Iterator[list[Application]]:
    """With two applications."""
    applications = [Application(crm.dsn, seed + number, keys=keys) for number in range(2)]
    for application in applications:
        application.start()
    try:
        yield applications
    finally:
        for application in applications:
            application.stop.set()
            application.join()
    assert [application.failure for application in applications] == [None, None]


@storm(1, chaos=6)
def test_nothing_is_found_in_a_true_log_of_thousands_of_rows_under_load(crm: Crm, seed: int, rounds: int) -> None:
    rows = 3_000 if rounds == 1 else 10_000
    with running(crm):
        crm.add_leads(rows)
        with at_work(crm, seed, keys=rows + 300) as applications:
            number = 0
            while number < rounds or sum(application.done for application in applications) < 1_000:
                disagreements, done = verified(crm, "lead", chunk_size=(1_000, 300)[number % 2])
                assert disagreements == []
                assert done["lead"].subjects >= rows * 0.9
                number += 1
        disagreements, _ = verified(crm)
        assert disagreements == []


@storm(1, chaos=3)
def test_a_log_that_is_damaged_under_load_is_repaired_under_load(crm: Crm, seed: int, rounds: int) -> None:
    chance = random.Random(seed)
    with running(crm):
        crm.add_leads(100)  # first: the application takes keys as it likes
        with at_work(crm, seed, keys=150):
            for _ in range(rounds):
                eventually(lambda: crm.value("SELECT count(*) > 200 FROM activity"))
                crm.execute("DELETE FROM activity WHERE random() < %s", chance.choice((0.01, 0.1, 0.5)))
                for _ in range(2):
                    verified(crm, "lead", repair=True, chunk_size=chance.choice((7, 1_000)), patience=2)
        caught_up(crm)
        found, _ = verified(crm, "lead", repair=True)
        assert {of.repaired for of in found} <= {"yes"}
        for _ in range(2):
            verified(crm, "lead", repair=True)
        disagreements, _ = verified(crm, "lead")
        assert disagreements == []
