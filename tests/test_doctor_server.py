"""The doctor looks at the server. What it finds is made on a real one, and its fix, as printed, mends it."""

from __future__ import annotations

import os
import re
import select
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest
from doctoring import ailing, cure, findings, healthy, mend, report
from psycopg import sql
from psycopg.conninfo import make_conninfo
from support import GRANTS, Crm, crm_on, eventually, having, leadfi, role

from cdc_worker import binaries as packages
from cdc_worker import errors, postgres, server_checks
from cdc_worker.checks import Finding
from cdc_worker.cluster import Binaries, Cluster, find_binaries


@pytest.fixture(scope="module")
def spare(binaries: Binaries) -> Iterator[Cluster]:
    """A server whose settings the tests here change, and set back."""
    # An autovacuum would be a transaction in the way as well.
    with Cluster(binaries, settings={"max_prepared_transactions": "5", "autovacuum": "off"}) as server:
        yield server


@pytest.fixture
def spare_crm(spare: Cluster, tmp_path: Path) -> Iterator[Crm]:
    """A database with LeadFi's tables on the spare server, not set up."""
    with crm_on(spare, tmp_path) as crm:
        yield crm


@contextmanager
def restarted(server: Cluster, crm: Crm, **settings: str) -> Iterator[None]:
    """A server with settings that take a restart; afterwards as it was."""
    before = {name: crm.value("SELECT current_setting(%s)", name) for name in settings}
    server.set(**settings)
    server.restart()
    crm.reconnect()
    try:
        yield
    finally:
        crm.execute("ALTER SYSTEM RESET ALL")
        server.set(**before)
        server.restart()
        crm.reconnect()


def outcomes(crm: Crm, check: str) -> list[str]:
    """What a check came to."""
    return [finding.outcome for finding in findings(crm, check)]


def said(crm: Crm, check: str) -> str:
    """The message of a check's only finding."""
    (found,) = findings(crm, check)
    return found.message


# What it is


def test_an_ordinary_installation_is_healthy(crm: Crm) -> None:
    for check in server_checks.CHECKS:
        expected = ["warning" if check.__name__ == "max_slot_wal_keep_size" else "ok"]
        assert outcomes(crm, check.__name__) == expected, findings(crm, check.__name__)
    assert said(crm, "version").startswith(f"PostgreSQL {crm.value('SHOW server_version').split()[0]}")


def test_a_server_that_is_too_old(crm: Crm) -> None:
    old = replace(postgres.server(crm.connection), version=130021)
    with pytest.raises(errors.ServerError, match="the server is PostgreSQL 13, and 14 or later is needed"):
        postgres.check_server(old, crm.slot)


def test_a_standby(spare: Cluster, spare_crm: Crm) -> None:
    spare_crm.setup()
    spare.stop()
    (spare.data / "standby.signal").touch()
    spare.start()
    spare_crm.reconnect()
    done = spare_crm.command("run", "--once")
    with spare_crm.worker() as worker:
        worker.wait_for("connection_lost")
        assert {finding.check for finding in report(spare_crm)} >= {check.__name__ for check in server_checks.CHECKS}
        found = cure(spare_crm, "primary")
        worker.wait_for("replication_started")
        assert worker.terminate() == 0
    assert found.message == "the server is a standby, where nothing can be written (SQLSTATE 55000)"
    assert f"error: {found.message}\nhint: {found.fix}\n" in done.stderr


def test_no_logical_wal(spare: Cluster, spare_crm: Crm) -> None:
    with restarted(spare, spare_crm, wal_level="replica"):
        assert cure(spare_crm, "wal_level", server=spare).message == 'wal_level is "replica"'
        spare_crm.setup()
        spare_crm.execute("SELECT pg_drop_replication_slot(%s)", spare_crm.slot)


@pytest.mark.parametrize(("encoding", "outcome"), [("SQL_ASCII", "warning"), ("EUC_TW", "failed")])
def test_an_encoding_that_cannot_be_read(server: Cluster, tmp_path: Path, encoding: str, outcome: str) -> None:
    name = f"crm {encoding}"
    server.run("createdb", f"--encoding={encoding}", "--template=template0", "--locale=C", name)
    crm = Crm(server.dsn(name), f"slot_{encoding.lower()}", tmp_path)
    try:
        leadfi(crm.connection)
        done = crm.command("run", "--once")
        found = cure(crm, "encoding", server=server)
        assert found.outcome == outcome
        assert encoding in found.message
        assert (f"error: {found.message}\n" in done.stderr) == (outcome == "failed")
        crm.succeed("setup")
    finally:
        crm.close()
        with psycopg.connect(crm.settings.get("dsn", crm.dsn), client_encoding="UTF8", autocommit=True) as connection:
            connection.execute(
                "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = %s", (crm.slot,)
            )
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            for database in (name, f"{name}_utf8"):
                connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(database)))


def test_an_encoding_that_has_no_unicode(server: Cluster, tmp_path: Path) -> None:
    server.run("createdb", "--encoding=MULE_INTERNAL", "--template=template0", "--locale=C", "mule")
    try:
        found = ailing(Crm(server.dsn("mule"), "slot_mule", tmp_path), "connection")
        assert found.message == "conversion between UTF8 and MULE_INTERNAL is not supported"
    finally:
        server.run("dropdb", "--force", "mule")


def test_clocks_that_differ(binaries: Binaries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as environment, Cluster(binaries) as server, crm_on(server, tmp_path) as crm:
        assert healthy(crm, "clock")
        server.stop()
        environment.setenv("LD_PRELOAD", str(faketime()))
        environment.setenv("FAKETIME", "-90s")
        server.start()
        environment.undo()
        crm.reconnect()
        found = ailing(crm, "clock")
        assert "the server's clock is 90 s behind this machine's" in found.message
        server.restart()
        crm.reconnect()
        assert healthy(crm, "clock")


def faketime() -> Path:
    """A library under which programs see another time, unpacked beside the servers; nothing is installed."""
    found = [*packages.cache_directory().glob("libfaketime_*/usr/lib/*/faketime/libfaketime.so.1")]
    if not found:
        packages._apt().get("libfaketime", report=packages.to_stderr)
        found = [*packages.cache_directory().glob("libfaketime_*/usr/lib/*/faketime/libfaketime.so.1")]
    return found[0]


# The plugin


WAL2JSON = r"wal2json (2\.3 to 2\.5|2\.6 or later)"


def slot_row(crm: Crm) -> str:
    """The worker's slot as it is."""
    return str(crm.value("SELECT row_to_json(s)::text FROM pg_replication_slots s WHERE slot_name = %s", crm.slot))


def test_the_plugin_is_tried_without_a_trace(crm: Crm) -> None:
    crm.add_leads(3)
    before = slot_row(crm)
    assert re.fullmatch(rf'{WAL2JSON}, which can read the slot "{crm.slot}"', said(crm, "plugin"))
    assert slot_row(crm) == before
    assert crm.value("SELECT count(*) FROM pg_replication_slots WHERE temporary") == 0
    crm.record()
    assert crm.types() == ["lead_created"] * 3


def test_the_plugin_is_tried_where_there_is_no_slot_yet_and_beside_a_worker(bare_crm: Crm) -> None:
    assert re.fullmatch(WAL2JSON, said(bare_crm, "plugin"))
    assert bare_crm.value("SELECT count(*) FROM pg_replication_slots WHERE temporary") == 0
    bare_crm.setup()
    with bare_crm.worker() as worker:
        worker.wait_for("replication_started")
        assert re.fullmatch(WAL2JSON, said(bare_crm, "plugin"))
        assert healthy(bare_crm, "senders")
        assert worker.terminate() == 0


def test_the_plugin_is_known_to_be_there_though_a_transaction_holds_up_the_slot(bare_crm: Crm) -> None:
    with psycopg.connect(bare_crm.dsn) as other:
        pid = other.execute("SELECT pg_backend_pid(), pg_current_xact_id()").fetchall()[0][0]
        (found,) = findings(bare_crm, "plugin")
    assert found.outcome == "ok"
    assert f"process {pid}" in found.message


@pytest.mark.parametrize("installed", [True, False])
def test_no_plugin(spare: Cluster, spare_crm: Crm, installed: bool) -> None:
    spare_crm.settings["plugin"] = "wal2json"
    if installed:
        spare_crm.setup()
    with having(spare, dynamic_library_path="/nowhere"):
        found, *unreadable = findings(spare_crm, "plugin")
        assert found.message == "the server has no output plugin wal2json"
        assert found.fix
        assert found.fix.endswith(f"apt-get install postgresql-{spare.binaries.version.split('.')[0]}-wal2json")
        assert len(unreadable) == installed
    assert healthy(spare_crm, "plugin")


def test_a_server_that_does_not_look_where_its_own_plugin_is(spare: Cluster, spare_crm: Crm) -> None:
    spare_crm.settings["plugin"] = "pgoutput"
    with having(spare, dynamic_library_path="/nowhere"):
        found = cure(spare_crm, "plugin")
    assert found.message == "the server has no output plugin pgoutput"


def test_a_plugin_that_is_too_old(spare: Cluster, spare_crm: Crm) -> None:
    """Before release 2.0 it didn't know format-version, which test_decoding doesn't know either."""
    spare_crm.setup()
    old = spare.directory / "old"
    old.mkdir(mode=0o755, exist_ok=True)
    shutil.copy(spare.binaries.bindir.parent / "lib/test_decoding.so", old / "wal2json.so")
    shutil.chown(spare.directory, "nobody") if os.geteuid() == 0 else None
    with having(spare, dynamic_library_path=str(old)):
        found, _ = findings(spare_crm, "plugin")
        assert found.message.startswith("the server's wal2json is too old, for 2.0 or later is needed: option ")
        done = spare_crm.command("run", "--once")
        assert f"error: {found.message}\nhint: {found.fix}\n" in done.stderr
        assert done.returncode == errors.PluginMissingError.exit_code
    assert healthy(spare_crm, "plugin")


@pytest.fixture(scope="module")
def newest() -> Iterator[Cluster]:
    """A server that refuses wal2json unless it is told to allow it, and isn't."""
    with Cluster(find_binaries(newest=True), allow_plugins=False) as server:
        yield server


def test_where_wal2json_is_refused_pgoutput_will_do(newest: Cluster, tmp_path: Path) -> None:
    with crm_on(newest, tmp_path) as crm:
        assert said(crm, "plugin") == (
            "pgoutput, for the server refuses the output plugin wal2json:"
            " output_plugin_libraries is pgoutput, test_decoding"
        )


@pytest.mark.parametrize("way", [0, 1], ids=["pgoutput", "wal2json"])
def test_a_plugin_that_is_refused(newest: Cluster, tmp_path: Path, way: int) -> None:
    with crm_on(newest, tmp_path) as crm, role(crm, "SUPERUSER", granted=False):
        crm.settings["plugin"] = "wal2json"
        found = ailing(crm, "plugin")
        assert found.message.endswith("output_plugin_libraries is pgoutput, test_decoding")
        mend(crm, ways(found)[way])
        assert healthy(crm, "plugin")


def ways(found: Finding) -> list[str]:
    """The ways out that a fix names."""
    return (found.fix or "").split("; ")


@pytest.mark.parametrize("way", [0, 1], ids=["pgoutput", "wal2json"])
def test_a_plugin_that_is_refused_to_a_slot_that_is_there(newest: Cluster, tmp_path: Path, way: int) -> None:
    """As after an upgrade of the server. The role may not see the setting."""
    with crm_on(newest, tmp_path) as crm:
        crm.execute("ALTER ROLE postgres SET output_plugin_libraries = pgoutput, wal2json")
        crm.setup()
        crm.add_leads(1)
        crm.execute("ALTER ROLE postgres RESET output_plugin_libraries")
        with role(crm):
            refused, kept = findings(crm, "plugin")
            assert refused.message.endswith("output_plugin_libraries doesn't name it")
            assert re.fullmatch(
                rf'nobody can read the slot "{crm.slot}" like this, and the server keeps [\d,]+ bytes of WAL for it,'
                " more and more",
                kept.message,
            )
            assert ways(refused) == ways(kept)
            mend(crm, ways(refused)[way])
            slot = crm.value("SELECT slot FROM cdc_worker.checkpoint")
            assert said(crm, "plugin").endswith(f'which can read the slot "{slot}"')
            crm.record()
        assert crm.types() == ["lead_created"]


# The role


def test_a_role_with_what_it_needs_and_no_more_is_healthy(crm: Crm) -> None:
    with role(crm):
        for check in server_checks.CHECKS:
            expected = ["warning" if check.__name__ == "max_slot_wal_keep_size" else "ok"]
            assert outcomes(crm, check.__name__) == expected, findings(crm, check.__name__)


def test_a_role_that_may_not_replicate(crm: Crm) -> None:
    with role(crm):
        crm.execute("ALTER ROLE cdc NOREPLICATION")
        unknown, refused = ailing(crm, "plugin"), ailing(crm, "replication")
        assert unknown.outcome == "unknown"
        assert unknown.fix == refused.fix
        assert cure(crm, "role").message == 'role "cdc" lacks REPLICATION'
        assert healthy(crm, "plugin")
        assert healthy(crm, "replication")


def test_a_role_without_a_grant(crm: Crm) -> None:
    grants = [grant for grant in GRANTS if grant.startswith("GRANT ")]
    with role(crm):
        for grant in grants:
            revoke = grant.format(role="cdc").replace("GRANT", "REVOKE", 1).replace(" TO ", " FROM ")
            crm.connection.execute(revoke.encode())
            found = cure(crm, "role")
            assert found.outcome == "failed"
            assert found.message.startswith('role "cdc" lacks ')
        crm.add_leads(1)
        crm.record()
        assert crm.types() == ["lead_created"]


def test_nothing_is_set_up(bare_crm: Crm) -> None:
    assert ailing(bare_crm, "role").outcome == "unknown"
    cure(bare_crm, "role")


def test_a_password_that_expires(crm: Crm) -> None:
    with role(crm):
        crm.execute("ALTER ROLE cdc VALID UNTIL '2001-01-01 12:00+00'")
        found = cure(crm, "role")
        assert found.outcome == "warning"
        assert found.message.startswith('the password of role "cdc" is valid until 2001-01-01')


# What there is to spare


def test_no_walsender_is_left(spare: Cluster, spare_crm: Crm) -> None:
    spare_crm.setup()
    with restarted(spare, spare_crm, max_wal_senders="1"):
        found = ailing(spare_crm, "senders")
        assert (found.outcome, found.message[:33]) == ("warning", "0 of 1 walsenders are in use, whi")
        with receiving(spare, spare_crm):
            assert ailing(spare_crm, "replication").fix == (
                "see that the server is up, can be reached, and has max_connections and max_wal_senders to spare"
            )
            found = ailing(spare_crm, "senders")
            assert found.outcome == "failed"
            assert found.message == "1 of 1 walsenders are in use, and the worker needs 1"
        assert found.fix
        mend(spare_crm, found.fix, server=spare)
        assert healthy(spare_crm, "senders")


@contextmanager
def receiving(server: Cluster, crm: Crm, name: str = "receiver") -> Iterator[None]:
    """A program that receives WAL as a standby does."""
    directory = crm.directory / name
    directory.mkdir()
    program = subprocess.Popen(
        [server.binaries.program("pg_receivewal"), "--directory", str(directory), "--no-loop"],
        env=server.environment() | {"PGAPPNAME": name},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        streaming = "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming' AND application_name = %s"
        eventually(lambda: crm.value(streaming, name), what="WAL is received")
        yield
    finally:
        program.kill()
        program.wait()


def test_no_slot_is_left(spare: Cluster, spare_crm: Crm) -> None:
    spare_crm.execute("SELECT pg_create_physical_replication_slot('idle')")
    try:
        with restarted(spare, spare_crm, max_replication_slots="1"):
            found = ailing(spare_crm, "replication_slots")
            assert found.outcome == "failed"
            assert "nobody reads idle" in found.message
            assert found.message.endswith("are in use, and the worker needs 1")
            assert ailing(spare_crm, "plugin").outcome == "unknown"
            cure(spare_crm, "replication_slots", server=spare)
            assert healthy(spare_crm, "plugin")
    finally:
        spare_crm.execute("SELECT pg_drop_replication_slot('idle')")
    spare_crm.setup()
    with restarted(spare, spare_crm, max_replication_slots="1"):
        with spare_crm.worker() as worker:
            worker.wait_for("replication_started")
            assert said(spare_crm, "plugin").startswith("wal2json, of a version not known")
            worker.terminate()
        assert cure(spare_crm, "replication_slots", server=spare).outcome == "warning"


def test_another_slot_keeps_wal(spare_crm: Crm) -> None:
    spare_crm.settings["retained_alarm_bytes"] = str(1 << 20)
    spare_crm.execute("SELECT pg_create_physical_replication_slot('forgotten', true)")
    # Its commit flushes it.
    spare_crm.execute("SELECT pg_logical_emit_message(true, 'traffic', repeat('x', 2000000))")
    found = cure(spare_crm, "other_slots")
    assert found.outcome == "warning"
    assert found.message.startswith('nobody reads the slot "forgotten", for which the server keeps ')


def test_no_connection_is_left(spare: Cluster, spare_crm: Crm) -> None:
    with restarted(spare, spare_crm, max_connections="2", superuser_reserved_connections="0"):
        found = ailing(spare_crm, "connections")
        assert found.outcome == "warning"
        assert found.message.startswith("1 of 2 connections are in use, which leaves too few for a stand-by")
        assert found.fix
        mend(spare_crm, found.fix, server=spare)
        assert healthy(spare_crm, "connections")


@pytest.mark.parametrize(("limit", "outcome"), [(1, "failed"), (3, "warning")])
@pytest.mark.parametrize("kind", ["ROLE", "DATABASE"])
def test_too_few_connections_are_allowed(crm: Crm, kind: str, limit: int, outcome: str) -> None:
    name = "cdc" if kind == "ROLE" else crm.connection.info.dbname
    others = 0 if kind == "ROLE" else 1  # the connection of the test
    with role(crm):
        crm.connection.execute(f"ALTER {kind} {name} CONNECTION LIMIT {limit + others}".encode())
        found = cure(crm, "connections")
        assert found.outcome == outcome
        assert f'{others} of {limit + others} connections of the {kind.lower()} "{name}" are in use' in found.message


# What is set


@pytest.mark.parametrize(
    ("setting", "outcome"), [("default_transaction_read_only = on", "failed"), ("wal_sender_timeout = 0", "warning")]
)
@pytest.mark.parametrize("where", ["ROLE cdc", "DATABASE {0}", "ROLE cdc IN DATABASE {0}"])
def test_a_setting_of_role_or_database_that_does_harm(crm: Crm, where: str, setting: str, outcome: str) -> None:
    with role(crm):
        crm.connection.execute(f"ALTER {where.format(crm.connection.info.dbname)} SET {setting}".encode())
        found = cure(crm, "settings")
        assert found.outcome == outcome
        assert found.message.startswith(setting.replace("=", "is"))


def test_a_setting_of_the_connection_that_does_harm(crm: Crm) -> None:
    crm.settings["dsn"] = make_conninfo(crm.dsn, options="-c default_transaction_read_only=on")
    found = ailing(crm, "settings")
    assert (found.outcome, found.fix) == ("failed", "mend the options in CDC_WORKER_DSN or PGOPTIONS")
    del crm.settings["dsn"]
    assert healthy(crm, "settings")


def test_settings_that_the_worker_overrides_do_no_harm(crm: Crm) -> None:
    with role(crm):
        crm.execute("ALTER ROLE cdc SET datestyle = 'German'")
        crm.execute("ALTER ROLE cdc SET synchronous_commit = off")
        crm.execute("ALTER ROLE cdc SET client_min_messages = 'error'")
        (found,) = findings(crm, "settings")
        assert found.outcome == "ok"
        assert found.message == (
            "of role and database, client_min_messages, datestyle, synchronous_commit: overridden by the worker"
        )


@pytest.mark.parametrize("setting", ["fsync", "full_page_writes"])
def test_a_server_that_may_lose_what_it_committed(spare: Cluster, spare_crm: Crm, setting: str) -> None:
    with having(spare, **{setting: "off"}):
        found = cure(spare_crm, "settings")
        assert found.outcome == "warning"
        assert found.message.startswith(f"{setting} is off")


def test_a_pooler_that_drops_options(crm: Crm) -> None:
    crm.connection.execute(f"ALTER DATABASE {crm.connection.info.dbname} SET bytea_output = 'escape'".encode())
    with dropping_options(crm) as port:
        crm.settings["dsn"] = make_conninfo(crm.dsn, port=port, sslmode="disable", gssencmode="disable")
        found = ailing(crm, "settings")
        assert found.outcome == "failed"
        assert "bytea_output = escape" in found.message
        done = crm.command("run", "--once")
        assert f"error: {found.message}\nhint: {found.fix}\n" in done.stderr
        assert done.returncode == errors.ConnectionStringError.exit_code
        del crm.settings["dsn"]
    assert healthy(crm, "settings")


@contextmanager
def dropping_options(crm: Crm) -> Iterator[int]:
    """The port of something between client and server that takes `options` from what a connection begins with."""

    def serve(client: socket.socket) -> None:
        with client, socket.create_connection((crm.connection.info.host, crm.connection.info.port)) as server:
            (length,) = struct.unpack("!i", client.recv(4, socket.MSG_WAITALL))
            startup = client.recv(length - 4, socket.MSG_WAITALL)
            words = startup[4:].rstrip(b"\0").split(b"\0")
            pairs = [pair for pair in zip(words[::2], words[1::2], strict=True) if pair[0] != b"options"]
            startup = startup[:4] + b"".join(word + b"\0" for pair in pairs for word in pair) + b"\0"
            server.sendall(struct.pack("!i", len(startup) + 4) + startup)
            ends = {client: server, server: client}
            while True:
                for end in select.select(list(ends), [], [])[0]:
                    data = end.recv(1 << 16)
                    if not data:
                        return
                    ends[end].sendall(data)

    with socket.create_server(("127.0.0.1", 0)) as listening:

        def accept() -> None:
            while True:
                try:
                    client, _ = listening.accept()
                except OSError:
                    return
                threading.Thread(target=serve, args=(client,), daemon=True).start()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.parametrize(
    ("names", "others"),
    [
        ("*", 'FIRST 1 ("berlin")'),
        ("{0}", ""),
        ('ANY 2 (london, "{0}", paris)', 'ANY 2 ("london", "paris")'),
        ('2 ("{0}", "new york")', 'FIRST 1 ("new york")'),
        ("london, *", 'FIRST 1 ("london", "berlin")'),
    ],
)
def test_commits_that_would_wait_for_the_worker(spare: Cluster, spare_crm: Crm, names: str, others: str) -> None:
    name = postgres.application_name(spare_crm.slot)
    quoted = names.format(name) if '"' in names else names.format(f'"{name}"')
    with receiving(spare, spare_crm, "berlin"), having(spare, synchronous_standby_names=quoted):
        found = cure(spare_crm, "synchronous_standby")
        assert found.outcome == "failed"
        assert spare_crm.value("SHOW synchronous_standby_names") == others


@pytest.mark.parametrize("size", ["-1", "64MB"])
def test_wal_that_is_kept_without_a_limit_or_not_long_enough(spare: Cluster, spare_crm: Crm, size: str) -> None:
    with having(spare, max_slot_wal_keep_size="1GB"), having(spare, max_slot_wal_keep_size=size):
        found = cure(spare_crm, "max_slot_wal_keep_size")
        assert found.outcome == "warning"
        assert spare_crm.value("SHOW max_slot_wal_keep_size") == "16GB"


# Who is in the way


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A transaction is a long one as soon as it has written."""
    monkeypatch.setattr(server_checks, "LONG", 0.0)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize(("installed", "outcome"), [(True, "warning"), (False, "failed")])
def test_a_session_that_is_idle_in_its_transaction(spare_crm: Crm, installed: bool, outcome: str) -> None:
    if installed:
        spare_crm.setup()
    with closing(psycopg.connect(spare_crm.dsn, application_name="nightly")) as other:
        pid = other.execute("SELECT pg_backend_pid(), pg_current_xact_id()").fetchall()[0][0]
        found = cure(spare_crm, "open_transactions")
        assert found.outcome == outcome
        assert found.message.startswith(f"process {pid} (nightly, idle in transaction) has a transaction open since 2")


@pytest.mark.usefixtures("at_once")
def test_a_prepared_transaction(spare: Cluster, spare_crm: Crm) -> None:
    for dsn in (spare_crm.dsn, spare.dsn()):
        with psycopg.connect(dsn, autocommit=True) as other:
            other.execute("BEGIN; SELECT pg_current_xact_id(); PREPARE TRANSACTION 'O''Brien 1'")
        found = cure(spare_crm, "open_transactions", server=spare)
        assert found.message.startswith("prepared transaction 'O''Brien 1' of the database")


@pytest.mark.usefixtures("at_once")
def test_transactions_whose_age_is_hidden(spare_crm: Crm) -> None:
    crm = spare_crm
    crm.setup()
    with role(crm), closing(psycopg.connect(crm.dsn)) as other:
        other.execute("SELECT pg_current_xact_id()")
        found = ailing(crm, "open_transactions")
        assert found.outcome == "unknown"
        assert found.fix
        mend(crm, found.fix)
        assert cure(crm, "open_transactions").outcome == "warning"
