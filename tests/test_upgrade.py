"""A server is upgraded by `pg_upgrade`, as docs/upgrading.md tells it: nothing is lost, and nothing is there twice."""

from __future__ import annotations

import shlex
from pathlib import Path

import psycopg
import pytest
import servers
from support import Crm, eventually, make_crm
from test_bad_input import add, one_error
from test_slot_faults import drop, gaps, names, recovered, true_and_goes_on

from cdc_worker import errors
from cdc_worker.cluster import Binaries, Cluster, ClusterError


class Upgraded(Cluster):
    """What `pg_upgrade` makes of another cluster, which it finds running, and leaves stopped and as it was."""

    def __init__(self, before: Cluster) -> None:
        super().__init__(servers.a_server("18").binaries)
        self.before = before

    def _make_data(self) -> None:
        super()._make_data()
        self.port = self.before.port  # no server starts with a configuration that has none
        self._write_settings()
        if int(self.before.binaries.version.partition(".")[0]) < 18:
            self._must("pg_checksums", "--disable", "--pgdata", str(self.data))  # from 18 on initdb enables them
        self.before.stop()
        self._must(
            "pg_upgrade",
            "--username=postgres",
            *("--old-bindir", str(self._programs(self.before.binaries)), "--old-datadir", str(self.before.data)),
            *("--new-bindir", str(self.binaries.bindir), "--new-datadir", str(self.data)),
            *("--old-port", str(self.port), "--new-port", str(self.port)),
            *("--socketdir", str(self.socket_directory)),
        )

    def _programs(self, of: Binaries) -> Path:
        """The programs of another server, which find their libraries though pg_upgrade has one environment for all."""
        if of.library_path is None:
            return of.bindir
        directory = self.directory / "programs"
        directory.mkdir()
        directory.chmod(0o755)
        for program in of.bindir.iterdir():
            script = directory / program.name
            command = f'LD_LIBRARY_PATH={shlex.quote(of.library_path)} exec {shlex.quote(str(program))} "$@"'
            script.write_text(f"#!/bin/sh\n{command}\n")
            script.chmod(0o755)
        return directory

    def _must(self, program: str, *arguments: str) -> None:
        done = self._server(program, *arguments)
        if done.returncode != 0:
            raise ClusterError(f"{program} ended with {done.returncode}: {done.stderr}")


def notes_versions(server: Cluster) -> bool:
    """Whether it notes with each column what a server of an older minor doesn't know, and can't restore."""
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        connection.execute("CREATE TABLE versioned (id integer)")
        of = "FROM pg_attribute WHERE attrelid = 'versioned'::regclass"
        found = connection.execute(f"SELECT bool_or(attoptions::text LIKE '%pg_attver%') {of}").fetchone()
        connection.execute("DROP TABLE versioned")
    return bool(found and found[0])


def eighteen_notes_versions() -> bool:
    with servers.a_server("18") as new:
        return notes_versions(new)


def set_status(crm: Crm, name: str, status: str) -> None:
    crm.execute("UPDATE lead SET status = %s WHERE full_name = %s", status, name)


@pytest.mark.parametrize("before", ["18", "distribution", "newest"])
def test_nothing_is_lost_across_a_major_upgrade_and_nothing_is_there_twice(before: str, tmp_path: Path) -> None:
    """To a minor that is older than the old server's there is no upgrade, and nothing is changed."""
    with servers.a_server(before) as old:
        crm = make_crm(old, tmp_path)
        add(crm, "Ann")
        crm.setup()
        with crm.worker() as worker:
            worker.wait_for("replication_started")
            crm.succeed("backfill")
            add(crm, "Bob")
            set_status(crm, "Ann", "2")
            add(crm, "Cid")
            crm.execute("DELETE FROM lead WHERE full_name = 'Cid'")
            eventually(lambda: len(crm.types()) == 5)
            worker.terminate()
        set_status(crm, "Bob", "2")
        crm.record()
        drop(crm)
        recorded, database = crm.activities(), crm.connection.info.dbname
        assert names(crm) == ["Ann", "Bob", "Ann", "Cid", "Cid", "Bob"]
        crm.close()
        if notes_versions(old) and not eighteen_notes_versions():
            with pytest.raises(ClusterError, match=r"Restoring database schemas .*\n\*failure\*"), Upgraded(old):
                pass
            old.start()
            crm.reconnect()
            assert crm.activities() == recorded
            crm.close()
            return
        with Upgraded(old) as new:
            crm.dsn = new.dsn(database)
            crm.reconnect()
            one_error(crm, ["run"], errors.ClusterMismatchError.exit_code)
            assert "\nreconciled, by 0 activities; " in recovered(crm)
            assert crm.activities() == recorded
            assert [(code, reconciled) for code, _, _, reconciled in gaps(crm)] == [
                (errors.ClusterMismatchError.exit_code, True)
            ]
            set_status(crm, "Bob", "3")
            true_and_goes_on(crm)
            assert names(crm) == ["Ann", "Bob", "Ann", "Cid", "Cid", "Bob", "Bob", "Zoe"]
            crm.close()


def test_an_upgrade_is_refused_while_there_is_the_slot(tmp_path: Path) -> None:
    """From 17 on, however far the worker has come: its last commit is not confirmed."""
    with servers.a_server("18") as old:
        crm = make_crm(old, tmp_path)
        crm.setup()
        add(crm, "Ann")
        crm.record()
        crm.close()
        with pytest.raises(ClusterError, match="logical replication slots that cannot be upgraded"), Upgraded(old):
            pass
