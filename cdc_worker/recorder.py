"""Keeps what the stream has brought, in segments: files of a directory that workers and their stand-bys may share.

What is added is durable after `write`, and only then the checkpoint may pass it. So whatever it has passed is recorded;
what it hasn't comes again, and is recorded again, by whoever goes on from there.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import zstandard

from cdc_worker import failpoints, recording, wal2json
from cdc_worker.changes import Payload, Row, Transaction
from cdc_worker.config import Settings
from cdc_worker.errors import RecordingError
from cdc_worker.log import Logger
from cdc_worker.lsn import LSN
from cdc_worker.recording import Frame
from cdc_worker.rules import Rules, Table
from cdc_worker.transform import Answer

LEVEL: Final = 1
"""Of the compression: on such lines a higher one takes more time and hardly less room."""

FRAME_BYTES: Final = 2 << 20
"""So much is compressed at once, and has to be held by whoever reads it."""

RETENTION_INTERVAL: Final = 60.0
"""Seconds between two looks at what need not be kept any longer."""

_NAME: Final = re.compile(r"(.+)-[0-9A-F]{16}-[0-9a-f]{8}\.jsonl\.zst")


def check(directory: Path) -> None:
    """Make sure that segments can be made there. Raises RecordingError."""
    try:
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise _failure(directory, error) from error


def _failure(path: Path, error: OSError) -> RecordingError:
    return RecordingError(
        f'the recording can\'t be written to "{path}": {error.strerror or error}',
        hint="the directory must be there, have room, and be writable for the user that runs the worker"
        " (mkdir -m 700, or mount it); or set no recording_directory",
    )


class _Segment:
    """A file that is being written. What is there up to `durable` is whole and stays."""

    def __init__(self, path: Path, began: float) -> None:
        self.path = path
        self.began = began
        self.size = self.durable = self.frames = 0
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def append(self, frame: bytes) -> None:
        left = memoryview(frame)
        while left:  # a disk that becomes full takes a part
            left = left[os.write(self._file, left) :]
        self.size += len(frame)
        self.frames += bool(frame)  # what was put there before may only have to become durable

    def sync(self) -> None:
        os.fsync(self._file)
        if not self.durable:
            _sync_directory(self.path.parent)
        # A file that was removed, or whose directory something else was mounted over, takes what nobody will find.
        if not os.path.samestat(os.fstat(self._file), self.path.stat()):
            raise FileNotFoundError(errno.ENOENT, "it isn't there any more")
        self.durable = self.size

    def close(self) -> None:
        with suppress(OSError):  # what counts is durable
            os.close(self._file)

    def give_up(self) -> None:
        """Leave nothing behind that isn't whole, as far as that can be done: nothing is written after it."""
        with suppress(OSError):
            if self.durable:
                os.ftruncate(self._file, self.durable)
            else:
                self.path.unlink()
        self.close()


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Kept(NamedTuple):
    """A segment as the directory has it, the oldest first."""

    written_at: float
    path: Path
    size: int


class Recorder:
    """Records one connection's worth of the stream, from the position `start` on.

    Once it has raised RecordingError it is to be closed: another one goes on, from the checkpoint, in another file.
    """

    def __init__(
        self,
        directory: Path,
        rules: Rules,
        *,
        settings: Settings,
        system_identifier: str,
        database: str,
        start: LSN,
        log: Logger,
        clock: Callable[[], float] = time.monotonic,
        today: Callable[[], float] = time.time,
    ) -> None:
        self._directory = directory
        self._settings = settings
        self._log = log
        self._clock, self._today = clock, today
        masked = {name: table for name, table in rules.items() if table.masks} if settings.recording_masked else {}
        self._masks = {name: _masking(table) for name, table in masked.items()}
        self._header = Frame(
            worker=settings.worker,
            system_identifier=system_identifier,
            database=database,
            after="",
            until="",
            tables=sorted(map(".".join, rules)),
            masked={".".join(name): sorted(table.masks) for name, table in masked.items()},
        )
        self._compress = zstandard.ZstdCompressor(level=LEVEL, write_checksum=True).compress
        self._segment: _Segment | None = None
        self._after = self._until = start
        self._open = self._within = False  # a transaction, when the last slice was added, and when a frame was begun
        self._lines: list[Payload] = []
        self._size = 0
        self._partitions: dict[tuple[str, str], tuple[str, str]] = {}  # as the frame has named them last
        self._look_at = clock()

    def add(self, transaction: Transaction, answered: Sequence[Answer]) -> None:
        """Take a slice, and what was found for it by lookups."""
        lines, size, masks = self._lines, self._size, self._masks
        messages = iter(transaction.received)
        if transaction.first:
            lines.append(next(messages).payload)
        if answered:
            found = [recording.looked(answer) for answer in answered]
            lines += found
            size += sum(map(len, found))
        for payload, table, partition, changed in messages:
            if table is not None:
                if partition is not None and self._partitions.get(partition) != table:
                    self._partitions[partition] = table
                    lines.append(recording.partition(partition, table))
                if table in masks:
                    payload = wal2json.masked(payload, masks[table], moved=changed)  # noqa: PLW2901
            lines.append(payload)
            size += len(payload)
        self._size = size
        self._open = not transaction.last
        if transaction.last:
            self._until = max(self._until, transaction.end_lsn)
        if size >= FRAME_BYTES:
            self.flush()

    def flush(self) -> None:
        """Put what was added into a file, not yet durable. Raises RecordingError."""
        if self._lines:
            self._write(sync=False)

    def write(self, until: LSN) -> None:
        """Make durable what was added, and that nothing else has ended up to here. Raises RecordingError."""
        self._until = max(self._until, until)
        if self._lines or self._until > self._after or (self._segment and self._segment.durable < self._segment.size):
            self._write(sync=True)
        self.tend()

    def _write(self, *, sync: bool) -> None:
        frame = self._frame() if self._lines or self._until > self._after else b""
        try:
            if self._segment is None:
                self._segment = self._begin()
            if frame:
                self._segment.append(frame)
                failpoints.reach("frame_appended")
            if sync:
                self._segment.sync()
        except OSError as error:
            path = self._directory
            if self._segment is not None:
                path = self._segment.path
                self._segment.give_up()
                self._segment = None
            raise _failure(path, error) from error
        self._after, self._within = self._until, self._open
        self._lines, self._size = [], 0
        self._partitions.clear()

    def _begin(self) -> _Segment:
        # Whoever begins a file gives it a name of its own, so that no two processes ever write to one.
        name = f"{self._header.worker}-{self._after:016X}-{secrets.token_hex(4)}.jsonl.zst"
        self._log.debug("segment_begun", file=name)
        return _Segment(self._directory / name, self._clock())

    def _frame(self) -> bytes:
        number = 0 if self._segment is None else self._segment.frames
        header = msgspec.structs.replace(
            self._header, number=number, after=str(self._after), until=str(self._until), within=self._within
        )
        return self._compress(b"\n".join([recording.frame(header), *self._lines, b""]))

    def tend(self) -> None:
        """End a segment that is large or old enough, between two transactions, and delete what need not be kept."""
        segment, now = self._segment, self._clock()
        if segment is not None and not self._within and segment.durable == segment.size:
            settings = self._settings
            if segment.size >= settings.recording_segment_bytes or now >= (
                segment.began + settings.recording_segment_seconds
            ):
                segment.close()
                self._segment = None
                self._look_at = now
        if now >= self._look_at:
            self._look_at = now + RETENTION_INTERVAL
            try:
                self._retain(self._today())
            except OSError as error:
                reason = error.strerror or str(error)
                self._log.warning("segments_not_deleted", directory=str(self._directory), reason=reason)

    def _retain(self, now: float) -> None:
        days, most = self._settings.recording_retention_days, self._settings.recording_retention_bytes
        if days is None and most is None:
            return
        kept = self._kept()
        total, deleted = sum(segment.size for segment in kept), list[_Kept]()
        current = None if self._segment is None else self._segment.path
        try:
            for segment in kept:
                old = days is not None and segment.written_at < now - days * 86_400
                if segment.path != current and (old or (most is not None and total > most)):
                    segment.path.unlink(missing_ok=True)
                    deleted.append(segment)
                    total -= segment.size
        finally:
            if deleted:
                freed = sum(segment.size for segment in deleted)
                self._log.info("segments_deleted", segments=len(deleted), bytes=freed, last=deleted[-1].path.name)

    def _kept(self) -> list[_Kept]:
        """This worker's segments, by whichever process."""
        found = []
        for path in self._directory.iterdir():
            name = _NAME.fullmatch(path.name)
            if name is not None and name[1] == self._header.worker:
                with suppress(FileNotFoundError):  # somebody else deleted it
                    stat = path.stat()
                    found.append(_Kept(stat.st_mtime, path, stat.st_size))
        return sorted(found)

    def close(self) -> None:
        """End the segment. What was added and not written comes again."""
        if self._segment is not None:
            self._segment.close()
            self._segment = None


def _masking(table: Table) -> Callable[[Row], Row]:
    return lambda row: table.masked(row) or {}
