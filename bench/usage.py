"""What a client costs: processor and memory, its own, its walsender's and those of the backends that write for it.

The kernel tells the client's processor time when it is waited for. All else is asked for while it runs, so what a
process of the server did in its last milliseconds isn't counted.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import psycopg

APPLICATION_NAME = "bench"
"""Of the connections that measure, which are not measured."""

INTERVAL = 0.025
"""Seconds between two looks at a process."""

SERVED = """
SELECT pid, backend_type = 'walsender' FROM pg_stat_activity
WHERE backend_type IN ('walsender', 'client backend') AND application_name NOT IN ('bench', 'pgbench', 'psql')
"""

READS = "SELECT active_pid FROM pg_replication_slots WHERE slot_name = %s AND active_pid IS NOT NULL"

TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Usage:
    """Of one process or several: seconds of the processor, and the most bytes of memory at a time."""

    cpu: float = 0.0
    peak_bytes: int = 0


def cpu_seconds(pid: int) -> float:
    """Of a process so far. Raises OSError if it is gone."""
    # clock_getcpuclockid(3), which Python lacks. The times in /proc/PID/stat go by hundredths.
    return time.clock_gettime(~pid << 3 | 2)


def memory(pid: int, line: str) -> int:
    """Bytes that a line of a process's status tells. Raises OSError if it is gone, IndexError if it is about to be."""
    return int(Path(f"/proc/{pid}/status").read_text().split(f"{line}:")[1].split()[0]) * 1024


def peak(pid: int) -> int:
    """The most memory that a process has had, in bytes."""
    # Not ru_maxrss: a child begins with its parent's.
    return memory(pid, "VmHWM")


def tree_cpu_seconds(root: int) -> float:
    """Of a process and all that descend from it, also of those that have ended and were waited for."""
    parents, seconds = dict[int, int](), dict[int, float]()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # proc(5): the name, in parentheses, may hold anything; cutime and cstime are the 16th and 17th field.
            fields = path.read_text().rpartition(")")[2].split()
            pid = int(path.parent.name)
            parents[pid] = int(fields[1])
            seconds[pid] = cpu_seconds(pid) + (int(fields[13]) + int(fields[14])) / TICKS
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found and pid not in found}:
        found |= more
    return sum(seconds[pid] for pid in found if pid in seconds)


@dataclass(slots=True)
class _Seen:
    cpu: float = 0.0
    peak_bytes: int = 0

    def look(self, pid: int, line: str) -> None:
        with suppress(OSError, IndexError):  # it may have ended meanwhile: the last look counts
            self.cpu = max(self.cpu, cpu_seconds(pid))
            self.peak_bytes = max(self.peak_bytes, memory(pid, line))


@dataclass(slots=True)
class _Processes:
    seen: dict[int, _Seen] = field(default_factory=dict)

    def look(self) -> None:
        for pid, seen in self.seen.items():
            seen.look(pid, "RssAnon")  # what of the shared buffers it has touched is not its own

    @property
    def usage(self) -> Usage:
        found = self.seen.values()
        return Usage(sum(one.cpu for one in found), max((one.peak_bytes for one in found), default=0))


class Meter:
    """Watches a client, and what the server does for it, from a thread of its own.

    By time.monotonic: `streaming_since` is when the walsender of the slot was first seen at work, and `ended` when the
    client has ended; None before that.
    """

    def __init__(self, dsn: str, slot: str, process: subprocess.Popen[bytes]) -> None:
        self.streaming_since: float | None = None
        self.ended: float | None = None
        self.client = Usage()
        self._dsn, self._slot, self._process = dsn, slot, process
        self._client = _Seen()
        self._walsenders, self._backends = _Processes(), _Processes()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="meter", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def walsender(self) -> Usage:
        return self._walsenders.usage

    @property
    def backend(self) -> Usage:
        """Of all connections that are neither the walsender's nor of those who measure."""
        return self._backends.usage

    def wait(self) -> int:
        """Wait until the client ends; returns its exit code."""
        _, status, usage = os.wait4(self._process.pid, 0)
        self.ended = time.monotonic()
        self._process.returncode = os.waitstatus_to_exitcode(status)
        self._ended.set()
        self._thread.join()
        self.client = Usage(usage.ru_utime + usage.ru_stime, self._client.peak_bytes)
        return self._process.returncode

    def _watch(self) -> None:
        connection = psycopg.connect(self._dsn, autocommit=True, application_name=APPLICATION_NAME)
        with closing(connection), suppress(psycopg.OperationalError):  # the server may be stopped meanwhile
            looked_at = 0.0
            while not self._ended.is_set():
                self._client.look(self._process.pid, "VmHWM")
                if self.streaming_since is None:
                    for (pid,) in connection.execute(READS, (self._slot,)).fetchall():
                        self.streaming_since = time.monotonic()
                        self._walsenders.seen[pid] = _Seen()
                if time.monotonic() > looked_at + 4 * INTERVAL:
                    looked_at = time.monotonic()
                    for pid, sends in connection.execute(SERVED).fetchall():
                        processes = self._walsenders if sends else self._backends
                        processes.seen.setdefault(pid, _Seen())
                self._walsenders.look()
                self._backends.look()
                self._ended.wait(INTERVAL if self.streaming_since else INTERVAL / 5)
