"""A busy application: sessions that write to LeadFi's tables all the time, and count what they did and what failed."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

import psycopg
from psycopg.rows import TupleRow
from support import Crm, eventually

Connection = psycopg.Connection[TupleRow]
Work = Callable[[Connection, int, int], None]
"""Given a connection, the number of the session and of the turn: one transaction's worth."""


class Application:
    """Sessions that do their work again and again, each in a transaction, until the context is left.

    A failure is kept, and ends the session. Leaving the context raises when there was one. Sessions that rest do so
    for as long as they have worked: who locks all of their tables at once finds a moment, however slow the disk is.
    """

    def __init__(self, crm: Crm, work: Work, *, sessions: int = 3, rest: bool = False) -> None:
        self.done = [0] * sessions
        self.failures: list[psycopg.Error] = []
        self._crm = crm
        self._work = work
        self._rest = rest
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(sessions)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        self.go_on(1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        if self.failures:
            raise self.failures[0]

    def go_on(self, turns: int) -> None:
        """Return when each session has done so many more of them."""
        goals = [done + turns for done in self.done]

        def reached() -> bool:
            assert not self.failures, self.failures
            return all(done >= goal for done, goal in zip(self.done, goals, strict=True))

        eventually(reached, what="the application goes on")

    def _run(self, session: int) -> None:
        try:
            with psycopg.connect(self._crm.dsn, autocommit=True) as connection:
                for turn in itertools.count():
                    if self._stop.is_set():
                        break
                    began = time.monotonic()
                    with connection.transaction():
                        self._work(connection, session, turn)
                    self.done[session] += 1
                    if self._rest:
                        self._stop.wait(time.monotonic() - began)
        except psycopg.Error as error:
            self.failures.append(error)


def statuses(connection: Connection, session: int, turn: int) -> None:
    """Give a lead of the session's own a status that no other turn gives."""
    lead = session * 10 + turn % 10 + 1
    connection.execute("UPDATE lead SET status = %s WHERE lead_id = %s", (f"{session}.{turn}", lead))


def everything(connection: Connection, session: int, turn: int) -> None:
    """Change a lead and a customer and write a manual activity, in this order, in one transaction."""
    statuses(connection, session, turn)
    connection.execute("UPDATE customer SET name = %s WHERE customer_uid = %s", (f"Name {turn}", session + 1))
    connection.execute(
        "INSERT INTO activity (lead_id, activity_type, description) VALUES (%s, 'call', %s)",
        (session * 10 + 1, f"manual {session}.{turn}"),
    )


def owed(done: Sequence[int]) -> set[str]:
    """The statuses that were given in so many turns of each session."""
    return {f"{session}.{turn}" for session, turns in enumerate(done) for turn in range(turns)}


def told(crm: Crm) -> Counter[str]:
    """How often each new status is told of, by whomever."""
    rows = crm.execute(
        "SELECT metadata ->> 'new_status', count(*) FROM activity"
        " WHERE activity_type = 'status_changed' AND lead_id IS NOT NULL GROUP BY 1"
    )
    return Counter(dict(rows))
