"""Servers in containers, made of deploy/postgres.Dockerfile, in place of private clusters (CDC_TEST_SERVER=docker).

The base image is postgres:15, or the one that CDC_TEST_BASE_IMAGE names; `make matrix` takes those of each major.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Final

import docker  # type: ignore[import-untyped]  # it ships none
from docker.errors import DockerException  # type: ignore[import-untyped]
from psycopg.pq import PGconn, Ping
from testcontainers.core.container import DockerContainer
from testcontainers.core.image import DockerImage

from cdc_worker.cluster import SETTINGS, Binaries, Cluster, ClusterError, StopMode, _free_port, find_binaries

# Outside the data directory, so that they can be written before there is one, and while the server is stopped.
_CONFIG: Final = "/etc/postgresql.conf"
_HBA: Final = "/etc/pg_hba.conf"

_SIGNALS: Final[dict[StopMode, str]] = {"smart": "SIGTERM", "fast": "SIGINT", "immediate": "SIGQUIT"}


def default_base() -> str:
    return os.environ.get("CDC_TEST_BASE_IMAGE") or "postgres:15"


@cache
def answers() -> bool:
    """Whether there is a Docker engine."""
    try:
        return bool(docker.from_env(timeout=5).ping())
    except (DockerException, OSError):
        return False


@cache
def image(base: str) -> str:
    """The server's image, built once a run. It is left there, for the next run to build from."""
    try:
        built = DockerImage(
            path=Path(__file__).parent.parent,
            tag=f"cdc-worker-test-server:{re.sub('[^a-z0-9.]', '-', base)}",
            dockerfile_path="deploy/postgres.Dockerfile",
            buildargs={"POSTGRES_IMAGE": base},
        ).build()
    except DockerException as error:
        raise ClusterError(
            f"no image of a server can be built from {base}: {error}",
            hint="start a Docker engine (without a registry: deploy/stand-ins/build) or unset CDC_TEST_SERVER",
        ) from error
    return str(built)


class ContainerServer(Cluster):
    """One server in a container, on a port of loopback that stays the same. Programs are run on this machine."""

    def __init__(self, base: str | None = None, *, settings: Mapping[str, str] | None = None) -> None:
        self.base = base or default_base()
        self.port = 0
        self._settings = SETTINGS | {"listen_addresses": "*", "hba_file": _HBA} | dict(settings or {})
        self._hba = ["local all all trust", "host all all all trust"]
        self._container: DockerContainer | None = None

    @cached_property
    def binaries(self) -> Binaries:  # type: ignore[override]  # read only, and later
        """Found when a test first runs a program: most need none, nor a machine that has any."""
        return find_binaries()

    @property
    def origin(self) -> str:
        return f"containers of {self.base} with wal2json"

    @property
    def directory(self) -> Path:
        raise ClusterError("the server's files are in a container: for them a test needs a Cluster")

    @property
    def is_running(self) -> bool:
        if self._container is None:
            return False
        self._container.reload()
        return self._container.status == "running"

    def start(self, *, timeout: float = 60) -> None:
        if self._container is None:
            self._create()
        else:
            self._engine.start()
        self._until(lambda: PGconn.ping(self.dsn().encode()) == Ping.OK, "start", timeout, while_running=True)

    def stop(self, mode: StopMode = "fast", *, timeout: float = 60) -> None:
        self._engine.kill(_SIGNALS[mode])
        self._until(lambda: not self.is_running, f"stop ({mode})", timeout)

    def reload(self) -> None:
        self._write_settings()
        self._engine.kill("SIGHUP")

    def close(self) -> None:
        """Remove the container with its data."""
        if self._container is not None:
            self._container.stop()
            self._container = None

    def set(self, **settings: str) -> None:
        if "output_plugin_libraries" in settings:
            raise ClusterError("the image sets output_plugin_libraries: for another a test needs a Cluster")
        self._settings |= settings
        if self._container is not None:
            self._write_settings()

    def write_hba(self, *lines: str) -> None:
        # Clients on this machine come from an address of the engine's network.
        self._hba = [line.replace("127.0.0.1/32", "all") for line in lines]
        self.reload()

    def socket_dsn(self, dbname: str = "postgres", *, user: str = "postgres", **params: str | int) -> str:
        raise ClusterError("the server's socket is in a container: for it a test needs a Cluster")

    def log_tail(self, lines: int = 20) -> str:
        return self._engine.logs(tail=lines).decode(errors="replace").strip() if self._container is not None else ""

    @property
    def _engine(self) -> Any:
        """The container, as the engine's client has it."""
        if self._container is None:
            raise ClusterError("the server has not been started")
        return self._container.get_wrapped_container()

    def _files(self) -> dict[str, bytes]:
        settings = {"port": str(self.port)} | self._settings
        config = (f"{name} = '{value.replace(chr(39), chr(39) * 2)}'\n" for name, value in settings.items())
        return {_CONFIG: "".join(config).encode(), _HBA: "".join(f"{line}\n" for line in self._hba).encode()}

    def _write_settings(self) -> None:
        assert self._container is not None
        for path, content in self._files().items():
            self._container.copy_into_container(content, path)

    def _create(self) -> None:
        self.port = _free_port()
        container = DockerContainer(
            image(self.base),
            command=f"postgres -c config_file={_CONFIG}",
            env={
                "POSTGRES_HOST_AUTH_METHOD": "trust",
                "POSTGRES_INITDB_ARGS": "--encoding=UTF8 --locale=C.UTF-8 --no-sync",
            },
            shm_size="256m",
        )
        # The engine's client takes an address as well: on all of them, anybody could connect.
        container.ports[f"{self.port}/tcp"] = ("127.0.0.1", self.port)  # type: ignore[assignment]  # wider than typed
        for path, content in self._files().items():
            container.with_copy_into_container(content, path)
        self._container = container
        container.start()

    def _until(self, fact: Callable[[], bool], what: str, timeout: float, *, while_running: bool = False) -> None:
        deadline = time.monotonic() + timeout
        while not fact():
            if time.monotonic() > deadline or (while_running and not self.is_running):
                raise ClusterError(f"the server does not {what}:\n{self.log_tail()}")
            time.sleep(0.02)
