"""Positions of the WAL that a worker is to have passed, before what depends on it is done beside it."""

from __future__ import annotations

import time
from collections import deque
from decimal import Decimal
from typing import Final, NamedTuple

from cdc_worker import checkpoint, errors, process, slot
from cdc_worker.activities import Position
from cdc_worker.changes import MARKER_PREFIX
from cdc_worker.config import Settings
from cdc_worker.log import Logger
from cdc_worker.lsn import INVALID, LSN
from cdc_worker.postgres import Connection, fetch_one
from cdc_worker.slot import Slot

ABSENCE: Final = 30.0
"""A worker that is away for so many seconds is not waited for any longer: somebody has stopped it."""

RETURN: Final = 5.0
"""So many seconds a worker may need to come back, of which it isn't known that it ended."""

SLOW: Final = 5.0
"""After so many seconds of waiting it is told what is waited for."""

AGAIN: Final = 60.0
"""So many seconds later it is told again."""

PATIENCE: Final = 30.0
"""So many seconds the transactions of others may go on, of which it isn't known whether they are about to be seen."""

SAMPLES: Final = 1_000
"""Of so many positions it is remembered, at most, which transactions were in progress there."""

PAUSES: Final = (0.002, 0.1)
"""Seconds between two looks, at first and in the end."""


class _Sample(NamedTuple):
    """A position, and a transaction that is newer than all that had begun by then."""

    lsn: LSN
    newest: Decimal


class Fence:
    """Waits, through a connection that is otherwise idle, until a worker has written all up to a position."""

    def __init__(self, connection: Connection, settings: Settings, log: Logger) -> None:
        self._connection = connection
        self._worker, self._base = settings.worker, settings.slot
        self._log = log
        self._sampled: deque[_Sample] = deque()
        self._horizon = INVALID
        self._in_vain = Decimal(-1)  # what was waited for and did not end
        # The marker is not waited for on stand-bys, only until it is in the WAL that the worker may read.
        connection.execute("SET synchronous_commit = local")

    def here(self) -> LSN:
        """Where the WAL is now: whatever anybody sees by now was committed at or before it."""
        return slot.committed_so_far(self._connection)

    def check(self) -> None:
        """Raise unless a worker runs that could pass anything. One that was not told to end may be about to come back.

        For a moment nobody reads the slot while a worker goes on with another profile or scope, or connects anew.
        """
        slot.check_checkpoint(self._connection, self._worker, self._base)
        until = None
        while not _running(reader := self._reader()):
            if until is None:
                until = time.monotonic() + (RETURN if process.unended(self._connection, self._worker) else 0)
            if reader is not None or time.monotonic() >= until:
                raise self._not_running(reader)
            time.sleep(PAUSES[1])

    def passed(self, position: LSN) -> bool:
        """Whether all commits up to a position are written."""
        return self._written().lsn >= position

    def wait_for(self, position: LSN) -> None:
        """Wait until they are. A quiet worker is made to write where it is."""
        if self.passed(position):
            return
        mark(self._connection)
        seen = time.monotonic()
        pause, tell, at = PAUSES[0], seen + SLOW, self._written()
        while at.lsn < position:
            now, reader, before = time.monotonic(), self._reader(), at
            at = self._written()
            if _running(reader) or at != before:
                seen = now
            elif now > seen + ABSENCE:
                raise self._not_running(reader)
            if now > tell:
                tell = now + AGAIN
                self._log.info("waiting_for_worker", lsn=str(position), running=_running(reader))
            time.sleep(pause)
            pause = min(2 * pause, PAUSES[1])

    def horizon(self) -> LSN:
        """Up to where all that was committed is seen by whoever looks from now on.

        A commit may be in the WAL, and recorded, before others see it. So this is a position at which all transactions
        that were in progress are over by now.
        """
        self._sampled.append(self._sample())
        oldest = self._oldest()
        while self._sampled and self._sampled[0].newest < oldest:
            self._horizon = max(self._horizon, self._sampled.popleft().lsn)
        if len(self._sampled) > SAMPLES:
            del self._sampled[1]  # some transaction takes very long: those in between may be fewer
        return self._horizon

    def settle(self, timeout: float = PATIENCE) -> bool:
        """Wait until all transactions are over that are in progress now; returns whether that was in time.

        Then the horizon is where the WAL is now, or later. If it was not, the same transactions are not waited for
        again.
        """
        sample = self._sample()
        deadline, pause = time.monotonic() + timeout, PAUSES[0]
        while (oldest := self._oldest()) <= sample.newest:
            if time.monotonic() > deadline or oldest <= self._in_vain:
                self._in_vain = max(self._in_vain, oldest)
                return False
            time.sleep(pause)
            pause = min(2 * pause, PAUSES[1])
        self._horizon = max(self._horizon, sample.lsn)
        return True

    def _sample(self) -> _Sample:
        here = self.here()
        return _Sample(here, *fetch_one(self._connection, "SELECT pg_current_xact_id()::text::numeric"))

    def _oldest(self) -> Decimal:
        """The oldest transaction that is in progress, or that could be next."""
        (oldest,) = fetch_one(self._connection, "SELECT pg_snapshot_xmin(pg_current_snapshot())::text::numeric")
        return Decimal(oldest)

    def _written(self) -> Position:
        return checkpoint.read(self._connection, self._worker).position

    @property
    def _slot(self) -> str:
        return slot.own(self._connection, self._worker, self._base)

    def _reader(self) -> Slot | None:
        """The slot, if it has a reader."""
        found = slot.read(self._connection, self._slot)
        return None if found is None or found.active_pid is None else found

    def _not_running(self, reader: Slot | None) -> errors.NotRunningError:
        told = "what is committed by now is not recorded before a worker runs"
        if reader is not None:
            taken = slot.taken(reader)
            return errors.NotRunningError(f"{taken}, which is no cdc-worker: {told}", hint=taken.hint)
        return errors.NotRunningError(
            f'nobody reads the slot "{self._slot}": {told}', hint="run: cdc-worker run, beside this command"
        )


def _running(reader: Slot | None) -> bool:
    return reader is not None and reader.held_by_worker


def mark(connection: Connection) -> None:
    """Have the worker write where it is, when it comes to the end of the transaction."""
    connection.execute(_MARK, (MARKER_PREFIX,))


_MARK: Final = "SELECT pg_logical_emit_message(true, %s, '{\"fence\": true}')"
