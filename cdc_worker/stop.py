"""A request to shut down, or to read the profile anew, by signal: to look at, to wait for, and to select on."""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Final

HANG: Final = 300.0
"""A loop that doesn't turn for so many seconds never will: it waits for nothing for that long."""


class Hung(BaseException):
    """The loop has not turned: for how long, and where it was."""


class Stopped(BaseException):
    """A shutdown was requested while we were waiting in a call that can't be selected on."""


class Stop:
    """A request to shut down, by signal: something to look at, to wait for, and to select on.

    A request to read the profile anew comes the same way; it is taken up at the next commit boundary.
    """

    def __init__(self) -> None:
        self.reload_requested = False
        self._set = False
        self._turns = 0
        self._interruptible = False
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)

    def install(self) -> None:
        """Let SIGTERM and SIGINT request it, and SIGHUP the other."""
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            self.reload_requested = True
            return
        self._set = True
        if self._interruptible:
            raise Stopped

    def request(self) -> None:
        """Request it, from another thread."""
        self._set = True
        os.write(self._writer, b"\0")

    def is_set(self) -> bool:
        """Whether it has been requested."""
        return self._set

    def sleep(self, seconds: float) -> None:
        """Sleep, but not beyond a request."""
        select.select([self], [], [], seconds)
        self.clear()

    def fileno(self) -> int:
        """Readable once something has been requested."""
        return self._reader

    def clear(self) -> None:
        """Make it unreadable until the next request."""
        with suppress(BlockingIOError):
            os.read(self._reader, 512)

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Let a request raise Stopped at once: for calls that wait without our select."""
        self._interruptible = True
        try:
            if self._set:
                raise Stopped
            yield
        finally:
            self._interruptible = False

    def turned(self) -> None:
        """Say that the loop has turned."""
        self._turns += 1

    @contextmanager
    def turning(self) -> Iterator[None]:
        """Raise Hung where the loop hangs, if that is in the main thread: nothing else could end it there."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        seen, still = self._turns, 0

        def look(number: int, frame: FrameType | None) -> None:
            nonlocal seen, still
            # Not at the first time: the process may have slept, and has not come to turn yet.
            still = still + 1 if seen == self._turns else 0
            seen = self._turns
            if still > 1 and frame is not None:
                code = frame.f_code
                raise Hung(f"{HANG:.0f} s in {code.co_qualname} ({Path(code.co_filename).name}, line {frame.f_lineno})")

        before = signal.signal(signal.SIGALRM, look)
        signal.setitimer(signal.ITIMER_REAL, HANG / 3, HANG / 3)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
