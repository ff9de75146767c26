"""TLS with a CA of the tests' own: who isn't the server that was named gets no password, and nobody reads along."""

from __future__ import annotations

import os
import re
import socket
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest
import trustme
from psycopg.conninfo import make_conninfo
from support import Crm, crm_on, eventually

from cdc_worker import errors
from cdc_worker.cluster import Binaries, Cluster

PASSWORD = "c4n4ry-p4ssw0rd"

HBA = (
    "hostssl all certified 127.0.0.1/32 cert",
    "hostssl all secretive 127.0.0.1/32 scram-sha-256",
    "host all postgres 127.0.0.1/32 trust",
    "local all all trust",
)
"""The roles of the worker come in by TLS or not at all."""


class Authority:
    """A CA, and what it has signed, in files."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.ca = trustme.CA()
        self.root = directory / "root.crt"
        self.ca.cert_pem.write_to_path(str(self.root))

    def issue(self, name: str, *hosts: str, common_name: str | None = None, expired: bool = False) -> dict[str, Path]:
        """A certificate and its key, as libpq's parameters."""
        now = datetime.now(UTC)
        until = now - timedelta(days=1) if expired else now + timedelta(days=1)
        issued = self.ca.issue_cert(
            *hosts, common_name=common_name, not_before=now - timedelta(days=2), not_after=until
        )
        files = {"sslcert": self._directory / f"{name}.crt", "sslkey": self._directory / f"{name}.key"}
        issued.cert_chain_pems[0].write_to_path(str(files["sslcert"]))
        issued.private_key_pem.write_to_path(str(files["sslkey"]))
        files["sslkey"].chmod(0o600)
        return files


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


def show(server: Cluster, certificate: dict[str, Path]) -> None:
    """Let the server have this certificate for whoever connects from now on."""
    owner = server.data.stat()
    for name, file in (("server.crt", certificate["sslcert"]), ("server.key", certificate["sslkey"])):
        path = server.data / name
        path.write_bytes(file.read_bytes())
        path.chmod(0o600)
        os.chown(path, owner.st_uid, owner.st_gid)
    server.reload()


@pytest.fixture(scope="module")
def secure(binaries: Binaries, authority: Authority) -> Iterator[Cluster]:
    """A server that has a certificate for localhost, and lets roles in by TLS alone."""
    with Cluster(binaries) as server:
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            connection.execute(f"CREATE ROLE secretive SUPERUSER LOGIN PASSWORD '{PASSWORD}'".encode())
            connection.execute("CREATE ROLE certified SUPERUSER LOGIN")
        root = server.data / "root.crt"
        root.write_bytes(authority.root.read_bytes())
        root.chmod(0o644)
        show(server, authority.issue("server", "localhost"))
        server.set(ssl="on", ssl_ca_file="root.crt")
        server.write_hba(*HBA)
        eventually(lambda: _ssl_is_on(server))
        yield server


def _ssl_is_on(server: Cluster) -> bool:
    with psycopg.connect(server.dsn()) as connection:
        return connection.execute("SHOW ssl").fetchone() == ("on",)


@pytest.fixture
def tls_crm(secure: Cluster, authority: Authority, tmp_path: Path, plugin: str) -> Iterator[Crm]:
    """A database that the worker reaches with a password, once it has verified the server."""
    with crm_on(secure, tmp_path, prepared=True, plugin=plugin) as crm:
        use(crm, authority, user="secretive", password=PASSWORD)
        yield crm


def use(crm: Crm, authority: Authority, **parameters: str | Path) -> None:
    """Let the commands connect with these parameters, beside verify-full and the CA."""
    verified = {"host": "localhost", "hostaddr": "127.0.0.1", "sslmode": "verify-full", "sslrootcert": authority.root}
    given = {name: str(value) for name, value in (verified | parameters).items()}
    crm.settings["dsn"] = make_conninfo(crm.dsn, **given)


ENCRYPTED = """
SELECT backend_type, ssl, version FROM pg_stat_activity JOIN pg_stat_ssl USING (pid)
WHERE application_name LIKE 'cdc-worker%%' ORDER BY 1
"""


def test_a_verified_server_is_read_and_written_with_tls_alone(tls_crm: Crm) -> None:
    """No role of the worker could come in without: pg_hba.conf has hostssl only."""
    crm = tls_crm
    crm.succeed("status")
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        assert crm.execute(ENCRYPTED) == [("client backend", True, "TLSv1.3"), ("walsender", True, "TLSv1.3")]
        crm.add_leads(3)
        eventually(lambda: crm.types() == ["lead_created"] * 3)
        assert worker.terminate() == 0
        assert PASSWORD not in worker.said
    assert "no encryption" in refused(crm, dsn=make_conninfo(crm.settings["dsn"], sslmode="disable"))


def refused(crm: Crm, **settings: str) -> str:
    """What `run` says that is not let in, or doesn't go in."""
    done = crm.command("run", **settings)
    assert done.returncode == errors.AuthenticationError.exit_code, done.stderr
    assert len(re.findall("^error: ", done.stderr, re.M)) == len(re.findall("^hint: ", done.stderr, re.M)) == 1
    assert PASSWORD not in done.stderr + done.stdout
    return done.stderr


def test_a_server_that_another_authority_vouches_for_is_not_believed(
    tls_crm: Crm, tmp_path: Path, secure: Cluster
) -> None:
    use(tls_crm, Authority(tmp_path), user="secretive", password=PASSWORD)
    assert "certificate verify failed" in refused(tls_crm)
    assert "alert unknown ca" in secure.log_tail()


def test_a_server_by_another_name_is_not_believed(tls_crm: Crm, authority: Authority) -> None:
    use(tls_crm, authority, user="secretive", password=PASSWORD, host="127.0.0.1")
    assert 'server certificate for "localhost" does not match host name "127.0.0.1"' in refused(tls_crm)


def test_a_certificate_that_has_expired_is_not_believed(tls_crm: Crm, authority: Authority, secure: Cluster) -> None:
    """Nor by a worker that runs already: it waits until there is a better one."""
    crm = tls_crm
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        show(secure, authority.issue("expired", "localhost", expired=True))
        try:
            eventually(lambda: not _believed(crm))
            assert "certificate verify failed" in refused(crm)
            crm.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'secretive'")
            crm.add_leads(1)
            eventually(lambda: {e["error"] for e in worker.events("connection_lost")} >= {"AuthenticationError"})
            assert crm.types() == []
        finally:
            show(secure, authority.issue("server", "localhost"))
        eventually(lambda: crm.types() == ["lead_created"])
        assert worker.terminate() == 0


def _believed(crm: Crm) -> bool:
    try:
        psycopg.connect(crm.settings["dsn"]).close()
    except psycopg.OperationalError:
        return False
    return True


def test_a_root_certificate_that_is_not_there_is_named(tls_crm: Crm, authority: Authority, tmp_path: Path) -> None:
    use(tls_crm, authority, user="secretive", password=PASSWORD, sslrootcert=tmp_path / "none.crt")
    assert f'root certificate file "{tmp_path / "none.crt"}" does not exist' in refused(tls_crm)


def test_a_server_without_tls_gets_no_password(untold: Untold, tls_crm: Crm, authority: Authority) -> None:
    """It is asked whether it speaks TLS, and told nothing when it doesn't."""
    for mode in ("require", "verify-full"):
        use(tls_crm, authority, user="secretive", password=PASSWORD, port=str(untold.port), sslmode=mode)
        assert "server does not support SSL, but SSL was required" in refused(tls_crm)
    assert untold.heard == [SSL_REQUEST] * 2


SSL_REQUEST = bytes.fromhex("00000008 04d2162f")
"""Manual: "Message Formats", SSLRequest."""


class Untold:
    """Something that listens as a server would, says that it has no TLS, and keeps what it is told."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self.heard: list[bytes] = []
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(10)
                heard = connection.recv(1 << 16)
                connection.sendall(b"N")
                while more := connection.recv(1 << 16):
                    heard += more
                self.heard.append(heard)

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()


@pytest.fixture
def untold() -> Iterator[Untold]:
    listener = Untold()
    yield listener
    listener.close()


def test_a_certificate_of_the_worker_is_as_good_as_a_password(tls_crm: Crm, authority: Authority) -> None:
    crm = tls_crm
    use(crm, authority, user="certified", **authority.issue("client", common_name="certified"))
    crm.add_leads(2)
    crm.record()
    assert crm.types() == ["lead_created"] * 2
    use(crm, authority, user="certified")
    assert "connection requires a valid client certificate" in refused(crm)
    use(crm, authority, user="certified", **authority.issue("another", common_name="another"))
    assert 'certificate authentication failed for user "certified"' in refused(crm)
