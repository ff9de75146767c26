"""Positions of the WAL that a worker is to have passed, before what depends on it is done beside it."""

from __future__ import annotations

import time
from typing import Final

from cdc_worker import checkpoint, errors, slot
from cdc_worker.changes import CUTOVER_PREFIX
from cdc_worker.config import Settings
from cdc_worker.log import Logger
from cdc_worker.lsn import LSN
from cdc_worker.postgres import Connection, fetch_one

ABSENCE: Final = 30.0
"""A worker that is away for so many seconds is not waited for any longer: somebody has stopped it."""

SLOW: Final = 5.0
"""After so many seconds of waiting it is told what is waited for."""

PATIENCE: Final = 30.0
"""So many seconds the transactions of others may go on, of which it isn't known whether they are about to be seen."""

PAUSES: Final = (0.002, 0.1)
"""Seconds between two looks, at first and in the end."""


class Fence:
    """Waits, through a connection that is otherwise idle, until a worker has written all up to a position."""

    def __init__(self, connection: Connection, settings: Settings, log: Logger) -> None:
        self._connection = connection
        self._worker, self._slot = settings.worker, settings.slot
        self._log = log
        # The marker is not waited for on stand-bys, only until it is in the WAL that the worker may read.
        connection.execute("SET synchronous_commit = local")

    def here(self) -> LSN:
        """Where the WAL is now: whatever anybody sees by now was committed at or before it."""
        return slot.committed_so_far(self._connection)

    def check(self) -> None:
        """Raise unless a worker runs that could pass anything."""
        slot.check_checkpoint(self._connection, self._worker, self._slot)
        if not self._running():
            raise self._not_running()

    def passed(self, position: LSN) -> bool:
        """Whether all commits up to a position are written."""
        return checkpoint.read(self._connection, self._worker).position.lsn >= position

    def pass_(self, position: LSN) -> None:
        """Wait until they are. A quiet worker is made to write where it is."""
        if self.passed(position):
            return
        self._connection.execute(_MARK, (CUTOVER_PREFIX,))
        began = seen = time.monotonic()
        pause, told = PAUSES[0], False
        while not self.passed(position):
            now = time.monotonic()
            if self._running():
                seen = now
            elif now > seen + ABSENCE:
                raise self._not_running()
            if now > began + SLOW and not told:
                told = True
                self._log.info("waiting_for_worker", lsn=str(position), running=seen == now)
            time.sleep(pause)
            pause = min(2 * pause, PAUSES[1])

    def settle(self, timeout: float = PATIENCE) -> bool:
        """Wait until all transactions are over that are in progress now; returns whether that was in time.

        A commit may be in the WAL, and recorded, before others see it.
        """
        (newest,) = fetch_one(self._connection, "SELECT pg_current_xact_id()::text::numeric")
        deadline, pause = time.monotonic() + timeout, PAUSES[0]
        while True:
            (oldest,) = fetch_one(self._connection, "SELECT pg_snapshot_xmin(pg_current_snapshot())::text::numeric")
            if oldest > newest:
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(pause)
            pause = min(2 * pause, PAUSES[1])

    def _running(self) -> bool:
        (pid,) = fetch_one(self._connection, _READER, self._slot)
        return pid is not None

    def _not_running(self) -> errors.NotRunningError:
        return errors.NotRunningError(
            f'nobody reads the slot "{self._slot}": what is committed by now is not recorded before a worker runs',
            hint="run: cdc-worker run, beside this command",
        )


_READER: Final = "SELECT max(active_pid) FROM pg_replication_slots WHERE slot_name = %s"

_MARK: Final = "SELECT pg_logical_emit_message(true, %s, '{\"fence\": true}')"
