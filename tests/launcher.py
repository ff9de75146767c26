"""Starts cdc-worker without importing it each time, which takes longer than most commands: a process that has, forks.

What comes of it is a process as any other, with a number, an environment, files and signals of its own.
"""

from __future__ import annotations

import atexit
import functools
import gc
import itertools
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NoReturn

FAIL_POINT = "CDC_TEST_FAIL_POINT"
"""Where a process is to be killed, and at which time that it gets there: "committed:3"."""


class Process:
    """`python -m cdc_worker` with arguments. Of subprocess.Popen it has what the tests use."""

    def __init__(self, launcher: socket.socket, request: dict[str, Any], files: Sequence[int]) -> None:
        self._replies, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
        with theirs:
            socket.send_fds(launcher, [json.dumps(request).encode()], [*files, theirs.fileno()])
        self.returncode: int | None = None
        self.pid = int(self._replies.recv(32))

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        with suppress(BlockingIOError):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it ends; returns the exit code. Raises TimeoutError."""
        if self.returncode is None:
            self._replies.settimeout(timeout)
            self.returncode = int(self._replies.recv(32))
            self._replies.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


def launch(
    arguments: Sequence[str],
    environment: dict[str, str],
    *,
    stdout: IO[Any],
    stderr: IO[Any],
    stdin: int | None = None,
) -> Process:
    """Start cdc-worker."""
    request = {"arguments": arguments, "environment": environment, "directory": str(Path.cwd())}
    with Path(os.devnull).open() as nothing:
        files = [nothing.fileno() if stdin is None else stdin, stdout.fileno(), stderr.fileno()]
        return Process(_launcher(), request, files)


@functools.cache
def _launcher() -> socket.socket:
    """Where the process that forks takes requests. It ends when this process does."""
    ours, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
    with theirs:
        number = theirs.fileno()
        subprocess.Popen([sys.executable, __file__, str(number)], pass_fds=[number], stdin=subprocess.DEVNULL)
    return ours


def _serve(requests: socket.socket) -> None:
    """Fork for each request. Returns only in the process that was asked for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, which then end this
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        message, files, _, _ = socket.recv_fds(requests, 1 << 20, 4)
        if not message:
            os._exit(0)
        if os.fork() == 0:
            break
        for file in files:
            os.close(file)
    requests.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with socket.socket(fileno=files.pop()) as replies:
        if pid := os.fork():
            for file in (0, 1, 2, *files):
                os.close(file)
            with suppress(BrokenPipeError):
                replies.send(str(pid).encode())
                replies.send(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())
            os._exit(0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    request = json.loads(message)
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.path[0] = request["directory"]
    sys.argv[1:] = request["arguments"]


def _end_at(point: str, times: int) -> None:
    """Have this process killed, as by SIGKILL, when it has reached a point so many times."""
    reached = itertools.count(1)

    def reach(at: str) -> None:
        if at == point and next(reached) == times:
            os.kill(os.getpid(), signal.SIGKILL)

    failpoints.reach = reach


def _run() -> int:
    """Run `python -m cdc_worker`; returns what its process would end with."""
    try:
        runpy.run_module("cdc_worker", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
            return 1
        return end.code or 0
    except BaseException:  # the interpreter would print it as well
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def _end(code: int) -> NoReturn:
    """End as the interpreter does, but for taking all apart that was shared: that takes longer than most commands."""
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are no daemons
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            code = 120  # see Py_FinalizeEx
    os._exit(code)


if __name__ == "__main__":
    sys.path[0] = str(Path.cwd())
    import cdc_worker.cli
    import cdc_worker.doctor  # noqa: F401  # what it imports when it is needed

    gc.freeze()
    from cdc_worker import failpoints

    _serve(socket.socket(fileno=int(sys.argv[1])))
    if FAIL_POINT in os.environ:
        name, _, number = os.environ.pop(FAIL_POINT).partition(":")
        _end_at(name, int(number))
    _end(_run())
