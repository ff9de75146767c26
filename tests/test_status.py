"""Status: what a person on call sees, and a machine reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from support import Crm, crm_on, eventually

from cdc_worker.cluster import Binaries, Cluster
from cdc_worker.config import load
from cdc_worker.lsn import LSN
from cdc_worker.status import Status, status


@pytest.fixture(scope="module")
def quiet(binaries: Binaries) -> Iterator[Cluster]:
    """A server to which the worker reports its progress often, as it does at a quarter of this timeout."""
    with Cluster(binaries, settings={"wal_sender_timeout": "2s", "autovacuum": "off"}) as server:
        yield server


@pytest.fixture
def crm(quiet: Cluster, tmp_path: Path) -> Iterator[Crm]:
    with crm_on(quiet, tmp_path) as crm:
        crm.setup()
        yield crm


def seen(crm: Crm) -> Status:
    return status(load(None, {"dsn": crm.dsn, "slot": crm.slot}))


def test_the_fields_of_the_json_are_those_of_the_model_and_told_there(crm: Crm) -> None:
    found = json.loads(crm.succeed("status", "--json"))
    assert list(found) == list(Status.model_fields)
    assert Status.model_validate(found).slot == crm.slot
    told = {name for name, field in Status.model_fields.items() if field.description}
    assert set(found) - told == {"worker", "slot", "plugin"}


def test_before_the_first_run(crm: Crm) -> None:
    found = seen(crm)
    assert (found.worker, found.slot, found.plugin) == (crm.slot, crm.slot, "wal2json")
    assert (found.streaming, found.active_pid, found.holder) == (False, None, None)
    assert (found.commit_lsn, found.changes, found.committed_at, found.dead_letters) == (None, 0, None, 0)
    assert found.wal_status == "reserved"
    assert found.retained_bytes > 0
    assert LSN.parse(found.wal_end) - LSN.parse(found.checkpoint) == found.lag_bytes


def test_no_lag_while_streaming_and_caught_up(crm: Crm) -> None:
    """Also where the WAL moves on with what is none of the worker's business, and the checkpoint stays."""
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        crm.add_leads(1)
        eventually(crm.activities)
        checkpoint = crm.value("SELECT lsn FROM cdc_worker.checkpoint")
        crm.execute("CREATE TABLE elsewhere ()")
        found = eventually(lambda: (found := seen(crm)).lag_bytes == 0 and found)
        assert found
        assert found.lag_seconds == 0
        assert found.streaming
        assert found.holder == f"cdc-worker {crm.slot}"
        assert found.active_pid is not None
        assert found.committed_at == commit_time(crm)
        assert LSN.parse(found.wal_end) > LSN.parse(found.checkpoint) >= LSN.parse(checkpoint)
        assert f"reader:       cdc-worker {crm.slot}, process {found.active_pid}" in crm.succeed("status")
        assert worker.terminate() == 0
    eventually(lambda: not seen(crm).streaming)


def commit_time(crm: Crm) -> datetime:
    found = crm.value("SELECT committed_at FROM cdc_worker.checkpoint")
    assert isinstance(found, datetime)
    return found


def test_lag_in_bytes_and_seconds_while_the_target_is_locked(crm: Crm) -> None:
    with crm.worker() as worker, psycopg.connect(crm.dsn) as other:
        worker.wait_for("replication_started")
        eventually(lambda: seen(crm).lag_bytes == 0)
        other.execute("LOCK TABLE activity IN SHARE MODE")
        crm.add_leads(100)
        end = LSN.parse(crm.value("SELECT pg_current_wal_lsn()"))
        reached = LSN.parse(seen(crm).checkpoint)
        first = eventually(lambda: (found := seen(crm)).lag_seconds > 0 and found)
        assert first
        assert 0 < first.lag_bytes <= LSN.parse(first.wal_end) - reached
        assert first.streaming
        eventually(lambda: seen(crm).lag_seconds > first.lag_seconds)
        assert LSN.parse(seen(crm).checkpoint) < end
        other.rollback()
        eventually(lambda: seen(crm).lag_bytes == 0)
        assert len(crm.activities()) == 100


def test_a_stranger_at_the_slot_is_named_and_is_no_streaming_worker(quiet: Cluster, crm: Crm) -> None:
    dsn = make_conninfo(crm.dsn, application_name="pg_recvlogical", replication="database")
    with closing(psycopg.connect(dsn, autocommit=True)) as stranger:
        stranger.execute(f"START_REPLICATION SLOT {crm.slot} LOGICAL 0/0 (\"format-version\" '2')".encode())
        found = seen(crm)
        assert (found.streaming, found.holder) == (False, "pg_recvlogical")
        assert found.active_pid == stranger.info.backend_pid
        assert f"pg_recvlogical, process {found.active_pid}" in crm.succeed("status")


def test_dead_letters_are_counted(crm: Crm) -> None:
    crm.execute("ALTER TABLE activity ADD CHECK (description NOT LIKE '%%2%%')")
    crm.add_leads(3)
    crm.record()
    assert seen(crm).dead_letters == 1
    assert "dead letters: 1" in crm.succeed("status")


def test_wal_that_is_kept_for_a_stopped_worker_is_counted(crm: Crm) -> None:
    before = seen(crm)
    crm.add_leads(1000)
    after = seen(crm)
    assert after.retained_bytes > before.retained_bytes
    assert after.lag_bytes > before.lag_bytes
    assert after.checkpoint == before.checkpoint


def test_a_missing_slot_is_an_error(crm: Crm) -> None:
    crm.execute("SELECT pg_drop_replication_slot(%s)", crm.slot)
    done = crm.command("status", "--json")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f'error: slot "{crm.slot}" does not exist: changes from ')
