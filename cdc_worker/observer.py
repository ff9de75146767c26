"""Looks at the worker's state now and then, for whoever asks over HTTP, and remembers an hour of it."""

from __future__ import annotations

import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import psycopg

from cdc_worker import dead_letters, doctor
from cdc_worker import status as state
from cdc_worker.config import Settings
from cdc_worker.dead_letters import Waiting
from cdc_worker.doctor import Report
from cdc_worker.errors import CdcWorkerError
from cdc_worker.status import Status, Unreachable
from cdc_worker.vitals import Vitals

INTERVAL: Final = 10.0
"""Seconds between two looks."""

WATCHED: Final = 2.0
"""Seconds between them while somebody watches."""

ATTENTION: Final = 10.0
"""Who has asked in so many seconds is watching."""

EXAMINED: Final = 60.0
"""Seconds between two looks of the doctor, who comes only while somebody watches."""

STALE: Final = 60.0
"""What was seen so many seconds ago is no longer told as what is so."""

HOUR: Final = 3600.0


@dataclass(frozen=True, slots=True)
class Sample:
    """How it was at a time (Unix). Lag is None while there was nobody to ask; activities are counts by type."""

    at: float
    lag_bytes: int | None
    lag_seconds: float | None
    activities: dict[str, int]


@dataclass(frozen=True, slots=True)
class Seen:
    """What was seen last, at a time (Unix)."""

    at: float
    found: Status | Unreachable
    waiting: list[Waiting]
    report: Report | None = None

    @property
    def status(self) -> Status | None:
        """The state, if there is a database to ask for it."""
        return self.found if isinstance(self.found, Status) and time.time() < self.at + STALE else None


class Observer(threading.Thread):
    """Looks through connections of its own, so that it sees a loop that hangs, and what another process does."""

    def __init__(self, settings: Settings, vitals: Vitals) -> None:
        super().__init__(name="observer", daemon=True)
        self.seen = Seen(time.time(), Unreachable(worker=settings.worker, late="nobody has looked yet"), [])
        self.samples: deque[Sample] = deque()
        self._settings, self._vitals = settings, vitals
        self._asked = threading.Event()
        self._asked_at = time.monotonic()  # at first much happens
        self._examined_at = float("-inf")
        self._to_examine = False

    def watched(self) -> None:
        """Somebody wants to know: look more often for a while, and examine."""
        self._to_examine = True
        self._asked_at = time.monotonic()
        self._asked.set()

    def run(self) -> None:
        """Look, for as long as the process is there."""
        for found in state.watch(self._settings):
            self._see(found)
            self._asked.clear()
            looked_at = time.monotonic()
            if not self._is_watched:
                self._asked.wait(INTERVAL)
            time.sleep(max(0.0, looked_at + WATCHED - time.monotonic()))

    @property
    def _is_watched(self) -> bool:
        return time.monotonic() < self._asked_at + ATTENTION

    def _see(self, found: Status | Unreachable) -> None:
        now, report = time.time(), self.seen.report
        waiting: list[Waiting] = []
        lag_bytes = lag_seconds = None
        if isinstance(found, Status):
            lag_bytes, lag_seconds = found.lag_bytes, found.lag_seconds
            if found.dead_letters_waiting:
                with suppress(psycopg.Error, CdcWorkerError):  # it answered a moment ago, and will again
                    waiting = dead_letters.waiting(self._settings)
        if self._to_examine and self._is_watched and time.monotonic() > self._examined_at + EXAMINED:
            report = doctor.doctor(self._settings)
            self._examined_at = time.monotonic()
        self.seen = Seen(now, found, waiting, report)
        if not self.samples or now >= self.samples[-1].at + INTERVAL - WATCHED / 2:
            self.samples.append(Sample(now, lag_bytes, lag_seconds, dict(self._vitals.activities)))
        while self.samples[0].at < now - HOUR:
            self.samples.popleft()
