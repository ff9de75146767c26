"""What a worker looks at now and then beside its stream: does it harm the server, and is it held up."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from contextlib import closing
from typing import Final

import psycopg

from cdc_worker import checkpoint, errors, postgres, process, slot
from cdc_worker.checkpoint import Checkpoint
from cdc_worker.config import Settings
from cdc_worker.log import Logger
from cdc_worker.postgres import Blocker, Connection
from cdc_worker.process import Process
from cdc_worker.vitals import Vitals

INTERVAL: Final = 10.0
"""Seconds between two looks, at least."""

MOVED: Final = 1 << 20
"""After so many bytes of WAL there is something to look at."""


class Watch:
    """Looks through connections of its own, since a target that is locked holds up the writing one.

    Raises an alarm when the server keeps more WAL for the slot than `retained_alarm_bytes`, again at each doubling,
    and says when it is over. `owner` is the process's token, once it has one.
    """

    def __init__(self, settings: Settings, own: Process, log: Logger, vitals: Vitals) -> None:
        self.owner: uuid.UUID | None = None
        self._settings = settings
        self._own = own
        self._log = log
        self._vitals = vitals
        self._alarm_at = settings.retained_alarm_bytes
        self._held_up = False
        self._unhealthy = False
        self._sees = True

    @property
    def pending(self) -> bool:
        """Whether something went wrong that is not written down yet."""
        return self._own.failure is not None

    def unhealthy(self, why: str) -> None:
        """Raise an alarm: somebody is silent. Once, until it is over."""
        if not self._unhealthy:
            self._log.warning("worker_unhealthy", reason=why)
            self._own.failure = f"unhealthy: {why}"
        self._vitals.problems["silence"] = why  # also after it has become active again
        self._unhealthy = True

    def healthy(self) -> None:
        """Say that nobody is silent, if somebody was."""
        if self._unhealthy:
            self._log.info("worker_healthy")
            self._vitals.problems.pop("silence", None)
        self._unhealthy = False

    def look(self, *, held_up: bool = False, also: Callable[[Connection], None]) -> None:
        """Look, and tally what was written. Raises SlotGivenUpError beyond `retained_limit_bytes`.

        `held_up` says that a batch is being written for long; `also` looks at something else, and may raise
        PublicationError or SynchronousStandbyError. What keeps it from looking may heal by the next time.
        """
        settings = self._settings
        try:
            with closing(postgres.connect_briefly(settings.dsn.get_secret_value(), settings.worker)) as connection:
                self._tell_of(postgres.blockers(connection, settings.worker) if held_up else [])
                known = checkpoint.read(connection, settings.worker)
                found = slot.read(connection, known.slot)
                if found is not None and known.owner == self.owner:
                    self.retained(found, known)
                process.failed(connection, self._own)
                checkpoint.tally(connection, settings.worker)
                also(connection)
        except (errors.SlotGivenUpError, errors.PublicationError, errors.SynchronousStandbyError):
            raise
        except (psycopg.Error, errors.CdcWorkerError) as error:
            if self._sees:
                sqlstate = error.sqlstate if isinstance(error, psycopg.Error) else None
                self._log.warning("look_failed", error=type(error).__name__, sqlstate=sqlstate)
            self._sees = False
        else:
            self._sees = True

    def _tell_of(self, blockers: list[Blocker]) -> None:
        if blockers and not self._held_up:
            self._log.warning("write_held_up", by=[str(blocker) for blocker in blockers])
        self._held_up = bool(blockers)
        if blockers:
            self._vitals.problems["target"] = f"target locked: by {', '.join(map(str, blockers))}"
        else:
            self._vitals.problems.pop("target", None)

    def retained(self, found: slot.Slot, known: Checkpoint) -> None:
        """Raise an alarm if the server keeps much WAL for the slot. Raises SlotGivenUpError if it is too much."""
        limit = self._settings.retained_limit_bytes
        if limit is not None and found.retained > limit:
            raise slot.given_up(found, known, limit)
        self.alarm(found, known)

    def alarm(self, found: slot.Slot, known: Checkpoint) -> None:
        """Raise an alarm if the server keeps much WAL for the slot, and no more."""
        settings = self._settings
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
