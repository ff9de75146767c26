"""What a worker looks at now and then beside its stream: does it harm the server, and is it held up."""

from __future__ import annotations

from contextlib import closing
from typing import Final

import psycopg

from cdc_worker import checkpoint, errors, postgres, process, slot
from cdc_worker.config import Settings
from cdc_worker.log import Logger
from cdc_worker.postgres import Blocker
from cdc_worker.process import Process

INTERVAL: Final = 10.0
"""Seconds between two looks, at least."""

MOVED: Final = 1 << 20
"""After so many bytes of WAL there is something to look at."""


class Watch:
    """Looks through connections of its own, since a target that is locked holds up the writing one.

    Raises an alarm when the server keeps more WAL for the slot than `retained_alarm_bytes`, again at each doubling,
    and says when it is over.
    """

    def __init__(self, settings: Settings, own: Process, log: Logger) -> None:
        self._settings = settings
        self._own = own
        self._log = log
        self._alarm_at = settings.retained_alarm_bytes
        self._held_up = False

    def look(self, *, held_up: bool = False) -> None:
        """Look, and tally what was written. Raises SlotGivenUpError beyond `retained_limit_bytes`.

        `held_up` says that a batch is being written for long. What keeps it from looking may heal by the next time.
        """
        settings = self._settings
        try:
            with closing(postgres.connect(settings.dsn.get_secret_value(), settings.worker)) as connection:
                checkpoint.tally(connection, settings.worker)
                found = slot.read(connection, settings.slot)
                known = checkpoint.read(connection, settings.worker)
                if held_up and known.backend_pid is not None:
                    self._tell_of(postgres.blockers(connection, known.backend_pid))
                if found is not None:
                    self.retained(found, known)
                process.failed(connection, self._own)
        except errors.SlotGivenUpError:
            raise
        except (psycopg.Error, errors.CdcWorkerError) as error:
            self._log.debug("look_failed", error=type(error).__name__)

    def _tell_of(self, blockers: list[Blocker]) -> None:
        if blockers and not self._held_up:
            self._log.warning("write_held_up", by=[str(blocker) for blocker in blockers])
        self._held_up = bool(blockers)

    def retained(self, found: slot.Slot, known: checkpoint.Checkpoint) -> None:
        """Raise an alarm if the server keeps much WAL for the slot. Raises SlotGivenUpError if it is too much."""
        settings = self._settings
        limit = settings.retained_limit_bytes
        if limit is not None and found.retained > limit:
            raise slot.given_up(found, known, limit)
        if found.retained > self._alarm_at:
            self._alarm_at = 2 * found.retained
            self._own.failure = f"the server kept {found.retained:,} bytes of WAL for the slot"
            self._log.warning(
                "wal_retained",
                retained_bytes=found.retained,
                alarm_bytes=settings.retained_alarm_bytes,
                wal_status=found.wal_status,
                lsn=str(known.position.lsn),
                mend="cdc-worker status says what holds it up",
            )
        elif found.retained <= settings.retained_alarm_bytes < self._alarm_at:
            self._alarm_at = settings.retained_alarm_bytes
            self._log.info("wal_released", retained_bytes=found.retained)
