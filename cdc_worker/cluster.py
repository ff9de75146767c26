"""A private PostgreSQL cluster in a temporary directory, for the demo, the tests and the benchmarks."""

import atexit
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from cdc_worker.binaries import Binaries, ClusterError, find_binaries

__all__ = ["Binaries", "Cluster", "ClusterError", "find_binaries"]

StopMode = Literal["smart", "fast", "immediate"]

SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "wal_level": "logical",
    "max_wal_senders": "20",
    "max_replication_slots": "20",
}

# Below the range from which Linux takes the ports of outgoing connections: a client that tries again and again to
# reach a stopped server can be given that server's port as its own, and then connects to itself.
PORTS = range(20000, 32768)

# What macOS allows; Linux allows four more.
SOCKET_PATH_MAX = 103

# macOS has no C.UTF-8, and a server does not start there with a locale that the system lacks.
LOCALE = "C.UTF-8" if sys.platform == "linux" else "C"


class Cluster:
    """One server with its data, its log and its socket. Leaving the context stops it and removes them all."""

    def __init__(
        self,
        binaries: Binaries,
        *,
        directory: Path | None = None,
        settings: Mapping[str, str] | None = None,
        allow_plugins: bool = True,
    ) -> None:
        """`directory` is where the temporary directory is made; the system's, if None.

        `allow_plugins` lets a server that refuses wal2json by default accept it.
        """
        self.binaries = binaries
        self.parent = directory
        self.port = 0
        self._directory: Path | None = None
        self._settings = dict(SETTINGS)
        if binaries.plugin_dir is not None:
            self._settings["dynamic_library_path"] = f"{binaries.plugin_dir}:$libdir"
        if binaries.plugin_list and binaries.plugin == "wal2json" and allow_plugins:
            self._settings["output_plugin_libraries"] = "pgoutput, test_decoding, wal2json"
        self._settings |= settings or {}
        self._user = _unprivileged_user() if os.geteuid() == 0 else None

    def __enter__(self) -> Self:
        _interrupt_when_terminated()
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def directory(self) -> Path:
        if self._directory is None:
            raise ClusterError("the cluster has not been started")
        return self._directory

    @property
    def origin(self) -> str:
        """Which server it is."""
        return self.binaries.origin

    @property
    def data(self) -> Path:
        return self.directory / "data"

    @property
    def log(self) -> Path:
        return self.directory / "log"

    @property
    def is_running(self) -> bool:
        return self._directory is not None and self._pg_ctl("status").returncode == 0

    def start(self, *, timeout: float = 60) -> None:
        """Start the server, on the port it had before. The first start makes the cluster."""
        first = self._directory is None
        if first:
            self._create()
        for attempt in range(5):
            if first:
                self.port = _free_port()
            self._write_settings()
            done = self._pg_ctl("start", "-l", str(self.log), timeout=timeout)
            if done.returncode == 0:
                return
            # Somebody else may have taken the port since we looked.
            if not (first and attempt < 4 and "could not bind" in self.log_tail()):
                raise ClusterError(f"the private cluster does not start:\n{self.log_tail() or done.stderr.strip()}")

    def stop(self, mode: StopMode = "fast", *, timeout: float = 60) -> None:
        """Stop the server. `fast` waits until the clients of walsenders have confirmed everything."""
        done = self._pg_ctl("stop", "-m", mode, timeout=timeout)
        if done.returncode != 0:
            raise ClusterError(f"the private cluster does not stop ({mode}): {done.stderr.strip()}\n{self.log_tail()}")

    def restart(self, mode: StopMode = "fast", *, timeout: float = 60) -> None:
        self.stop(mode, timeout=timeout)
        self.start(timeout=timeout)

    def crash(self) -> None:
        """Stop without a checkpoint: the next start recovers from WAL."""
        self.stop("immediate")

    def reload(self) -> None:
        self._write_settings()
        self._pg_ctl("reload")

    def close(self) -> None:
        """Stop the server and remove its directory."""
        if self._directory is None:
            return
        with _undisturbed():
            if self.is_running:
                self._pg_ctl("stop", "-m", "immediate")
            shutil.rmtree(self._directory, ignore_errors=True)
            shutil.rmtree(self.socket_directory, ignore_errors=True)
            self._directory = None
            atexit.unregister(self.close)

    def set(self, **settings: str) -> None:
        """Write settings into the configuration, for the next start or reload."""
        self._settings |= settings
        if self._directory is not None:
            self._write_settings()

    def write_hba(self, *lines: str) -> None:
        """Replace the rules of client authentication, and reload."""
        (self.data / "pg_hba.conf").write_text("".join(f"{line}\n" for line in lines))
        self.reload()

    def dsn(self, dbname: str = "postgres", *, user: str = "postgres", **params: str | int) -> str:
        """Connection string by TCP."""
        return make_conninfo("", **_merged(params, host="127.0.0.1", port=self.port, user=user, dbname=dbname))

    def socket_dsn(self, dbname: str = "postgres", *, user: str = "postgres", **params: str | int) -> str:
        """Connection string by Unix socket."""
        return self.dsn(dbname, user=user, **_merged(params, host=str(self.socket_directory)))

    def createdb(self, name: str, *, template: str = "template1") -> None:
        """By a connection: a server may come without the programs of clients."""
        with psycopg.connect(self.dsn(), autocommit=True) as connection:
            statement = sql.SQL("CREATE DATABASE {} TEMPLATE {}")
            connection.execute(statement.format(sql.Identifier(name), sql.Identifier(template)))

    def log_tail(self, lines: int = 20) -> str:
        if self._directory is None or not self.log.exists():
            return ""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def environment(self) -> dict[str, str]:
        """For programs of these binaries: they connect here unless told otherwise."""
        return self.binaries.environment() | {"PGHOST": "127.0.0.1", "PGPORT": str(self.port), "PGUSER": "postgres"}

    def run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run psql, pgbench, pg_recvlogical and the like as the current user, connecting here."""
        command = [self.binaries.program(program), *arguments]
        done = subprocess.run(
            command, env=self.environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise ClusterError(f"{program} ended with {done.returncode}: {done.stderr.strip()}")
        return done

    def _create(self) -> None:
        atexit.register(self.close)
        self._directory = Path(tempfile.mkdtemp(prefix="cdc-cluster-", dir=self.parent))
        self.socket_directory = self._directory
        if len(os.fsencode(self._directory / ".s.PGSQL.65535.lock")) > SOCKET_PATH_MAX:
            self.socket_directory = Path(tempfile.mkdtemp(prefix="cdc-", dir="/tmp"))
        if self._user is not None:
            for directory in {self._directory, self.socket_directory}:
                os.chown(directory, self._user.pw_uid, self._user.pw_gid)
        self._make_data()

    def _make_data(self) -> None:
        initdb = ["initdb", "--pgdata", str(self.data), "--username=postgres", "--auth=trust", "--no-sync"]
        done = self._server(*initdb, "--encoding=UTF8", f"--locale={LOCALE}")
        if done.returncode != 0:
            raise ClusterError(f"initdb failed: {done.stderr.strip()}")
        with (self.data / "postgresql.conf").open("a") as conf:
            conf.write("include 'cluster.conf'\n")

    def _write_settings(self) -> None:
        fixed = {"port": str(self.port), "unix_socket_directories": str(self.socket_directory)}
        settings = fixed | self._settings
        path = self.data / "cluster.conf"
        path.write_text(
            "".join(f"{name} = '{value.replace(chr(39), chr(39) * 2)}'\n" for name, value in settings.items())
        )
        path.chmod(0o644)

    def _pg_ctl(self, *arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        return self._server("pg_ctl", *arguments, "-D", str(self.data), "-s", "-t", str(max(1, round(timeout))))

    def _server(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a program that refuses root, as another user if we are root."""
        user = self._user
        # Its output goes to files: the server inherits them, and a pipe would stay open as long as it runs.
        with tempfile.TemporaryFile("w+") as stderr:
            done = subprocess.run(
                [self.binaries.program(program), *arguments],
                env=self.binaries.environment() | {"LC_ALL": LOCALE},
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                check=False,
                umask=0o077,
                user=user and user.pw_uid,
                group=user and user.pw_gid,
                extra_groups=user and [],
            )
            stderr.seek(0)
            return subprocess.CompletedProcess(done.args, done.returncode, "", stderr.read())


def _merged(params: Mapping[str, str | int], **defaults: str | int) -> dict[str, Any]:
    return defaults | dict(params)


def _unprivileged_user() -> pwd.struct_passwd:
    """Not `postgres`: whoever reaches this server would be let into the machine's own."""
    try:
        return pwd.getpwnam("nobody")
    except KeyError as error:
        raise ClusterError("the server refuses to run as root, and there is no user nobody") from error


def _free_port() -> int:
    while True:
        port = secrets.choice(PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def _interrupt_when_terminated() -> None:
    """Let SIGTERM and SIGHUP unwind the stack as Ctrl-C does, unless the program has its own way with them."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, signal.default_int_handler)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Hold back Ctrl-C until we are through: the second one must not leave a server behind."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
