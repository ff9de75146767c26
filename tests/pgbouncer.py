"""pgbouncer in front of a server, from the distribution's package, which is unpacked and not installed."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from psycopg.conninfo import conninfo_to_dict, make_conninfo
from support import eventually

from cdc_worker import binaries, cluster

CONFIGURATION = """\
[databases]
* = host={host} port={port} user=postgres
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {listen_port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = 1
"""


def _program() -> Path:
    """pgbouncer's program, fetched once and kept."""

    def found() -> list[Path]:
        return [*binaries.cache_directory().glob("pgbouncer_*/usr/sbin/pgbouncer")]

    if not found():
        # Asked for twice, its libraries come with it.
        binaries._apt().get("pgbouncer", "pgbouncer", report=binaries.to_stderr)
    return found()[0]


@contextmanager
def pgbouncer(dsn: str) -> Iterator[str]:
    """A pgbouncer in transaction mode, with one connection to the server; yields the DSN through it."""
    program, port, to = _program(), cluster._free_port(), conninfo_to_dict(dsn)
    libraries = ":".join(map(str, program.parents[2].glob("usr/lib/*-linux-*")))
    with tempfile.TemporaryDirectory(prefix="pgbouncer-") as directory:
        ini, log = Path(directory) / "pgbouncer.ini", Path(directory) / "log"
        ini.write_text(CONFIGURATION.format(host=to["host"], port=to["port"], listen_port=port))
        user = cluster._unprivileged_user() if os.geteuid() == 0 else None  # it refuses root
        Path(directory).chmod(0o755)
        with log.open("wb") as output:
            process = subprocess.Popen(
                [program, ini],
                env=os.environ | {"LD_LIBRARY_PATH": libraries},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                user=user and user.pw_uid,
                group=user and user.pw_gid,
                extra_groups=user and [],
            )
        try:

            def listening() -> bool:
                assert process.poll() is None, log.read_text()
                with socket.socket() as probe:
                    return probe.connect_ex(("127.0.0.1", port)) == 0

            eventually(listening, what="pgbouncer listens")
            yield make_conninfo(dsn, host="127.0.0.1", port=port)
        finally:
            process.kill()
            process.wait()
