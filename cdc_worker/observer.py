"""Looks at the worker's state now and then, for whoever asks over HTTP, and remembers an hour of it."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Final

import psycopg

from cdc_worker import dead_letters, doctor, log, postgres, profile
from cdc_worker import status as state
from cdc_worker.config import Settings
from cdc_worker.dead_letters import Waiting
from cdc_worker.doctor import Report
from cdc_worker.errors import CdcWorkerError
from cdc_worker.profile import FIELDS, Map, Profile, Value
from cdc_worker.status import Status, Unreachable
from cdc_worker.templates import text
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

OTHER: Final = "other"
"""Activities whose types a profile doesn't name are counted as these."""


@dataclass(frozen=True, slots=True)
class Sample:
    """How it was at a time (monotonic). Lag is None while there was nobody to ask; activities are counts by type."""

    at: float
    lag_bytes: int | None
    lag_seconds: float | None
    activities: dict[str, int]


@dataclass(frozen=True, slots=True)
class Seen:
    """What was seen last, at a time (Unix). `connected` tells whether there was a database that let us in."""

    at: float
    found: Status | Unreachable
    waiting: list[Waiting]
    report: Report | None = None
    connected: bool = False
    clock: float = field(default_factory=time.monotonic)

    @property
    def age(self) -> float:
        """How many seconds ago that was, whatever has become of the machine's time."""
        return time.monotonic() - self.clock

    @property
    def status(self) -> Status | None:
        """The state, if there is a database to ask for it."""
        return self.found if isinstance(self.found, Status) and self.age < STALE else None

    @property
    def database_up(self) -> bool:
        """Whether there is a database to connect to, though it may not tell the state."""
        return self.status is not None or (self.connected and self.age < STALE)


class Observer(threading.Thread):
    """Looks through connections of its own, so that it sees a loop that hangs, and what another process does."""

    def __init__(self, settings: Settings, vitals: Vitals) -> None:
        super().__init__(name="observer", daemon=True)
        self.seen = Seen(time.time(), Unreachable(worker=settings.worker, late="nobody has looked yet"), [])
        self.samples: deque[Sample] = deque()
        self._settings, self._vitals = settings, vitals
        known = profile.load(settings.profile)
        self.types, self.links = frozenset(types(known)), links(known)
        self.examined_at = float("-inf")
        self._asked = threading.Event()
        self._asked_at = time.monotonic()  # at first much happens
        self._to_examine = False
        self._failures: set[str] = set()

    def named(self, kind: str) -> str:
        """A type by which activities may be told apart here: any other may be a value of a row."""
        return kind if kind in self.types else OTHER

    @property
    def activities(self) -> dict[str, int]:
        """How many were written, by type."""
        found: Counter[str] = Counter()
        for kind, count in list(self._vitals.activities.items()):
            found[self.named(kind)] += count
        return dict(found)

    def watched(self) -> None:
        """Somebody wants to know: look more often for a while, and examine."""
        self._to_examine = True
        self._asked_at = time.monotonic()
        self._asked.set()

    def run(self) -> None:
        """Look, for as long as the process is there."""
        while True:
            self.look()
            self._asked.clear()
            looked_at = time.monotonic()
            if not self._is_watched:
                self._asked.wait(INTERVAL)
            time.sleep(max(0.0, looked_at + WATCHED - time.monotonic()))

    def look(self) -> None:
        """Look once. What nobody has foreseen is logged once: what was seen before grows old, and says so."""
        try:
            self._see(next(state.watch(self._settings)))
        except Exception as error:
            name = type(error).__name__
            if name not in self._failures:
                self._failures.add(name)
                log.get().warning("observing_failed", error=name)

    @property
    def _is_watched(self) -> bool:
        return time.monotonic() < self._asked_at + ATTENTION

    def _see(self, found: Status | Unreachable) -> None:
        waiting: list[Waiting] = []
        lag_bytes = lag_seconds = None
        if isinstance(found, Status):
            lag_bytes, lag_seconds = found.lag_bytes, found.lag_seconds
            if found.dead_letters_waiting:
                with suppress(psycopg.Error, CdcWorkerError):  # it answered a moment ago, and will again
                    waiting = dead_letters.waiting(self._settings)
        connected = isinstance(found, Status) or self._connects()
        self.seen = Seen(time.time(), found, waiting, self.seen.report, connected)
        now = self.seen.clock
        if not self.samples or now >= self.samples[-1].at + INTERVAL - WATCHED / 2:
            self.samples.append(Sample(now, lag_bytes, lag_seconds, self.activities))
        while self.samples[0].at < now - HOUR:
            self.samples.popleft()
        if self._to_examine and self._is_watched and now > self.examined_at + EXAMINED:
            report = doctor.doctor(self._settings)
            self.examined_at = time.monotonic()
            self.seen = replace(self.seen, report=report)

    def _connects(self) -> bool:
        """Whether the database lets us in that hasn't told its state: tables that are locked are not down."""
        try:
            postgres.connect_briefly(self._settings.dsn.get_secret_value(), self._settings.worker).close()
        except (psycopg.Error, CdcWorkerError):
            return False
        return True


def types(known: Profile) -> Iterator[str]:
    """The types of activities that a profile names itself, by a constant or in a map."""
    for table in known.tables.values():
        for rule in table.rules:
            yield from _constants(rule.type, {**table.values, **rule.values})


def _constants(value: Value, named: Mapping[str, Value]) -> Iterator[str]:
    match value:
        case Map():
            for of in (*value.map.values(), *(() if value.default is None else (value.default,))):
                yield from _constants(of, named)
        case list():
            return
        case str() if "{" in value or "}" in value:
            name = value.removeprefix("{values.").removesuffix("}")
            if value == f"{{values.{name}}}" and name in named:
                # Of what it names itself no more is followed: values may name each other.
                yield from _constants(named[name], {})
        case _:
            yield text(value)


def links(known: Profile) -> tuple[str, ...]:
    """The fields of activities that hold the keys of captured rows."""
    target = known.target
    columns = {column for table in known.tables.values() for column in profile.links(table, target).values()}
    return tuple(of for column, of in target.columns.items() if column in columns and of not in FIELDS)
