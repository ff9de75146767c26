"""The doctor on slot, checkpoint and writing: each thing wrong is produced, named, and mended as it says."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from socket import gethostname

import psycopg
import pytest
from doctoring import ailing, cure, findings, mend, report
from psycopg.conninfo import make_conninfo
from support import Crm, crm_on, eventually, grant, having, stranger

from cdc_worker import postgres
from cdc_worker.cluster import Binaries, Cluster
from cdc_worker.doctor import Report


@pytest.fixture(scope="module")
def tight(binaries: Binaries) -> Iterator[Cluster]:
    """A server that keeps little WAL for slots."""
    settings = {"max_slot_wal_keep_size": "64MB", "max_wal_size": "32MB", "max_prepared_transactions": "2"}
    with Cluster(binaries, settings=settings) as server:
        yield server


@pytest.fixture
def tight_crm(tight: Cluster, tmp_path: Path) -> Iterator[Crm]:
    with crm_on(tight, tmp_path) as crm:
        crm.settings["retained_alarm_bytes"] = str(20 << 20)
        crm.setup()
        yield crm


def traffic(crm: Crm, segments: int) -> None:
    """Let so many WAL segments of 16 MB go by."""
    for _ in range(segments):
        crm.execute("SELECT pg_logical_emit_message(false, 'traffic', 'x'), pg_switch_wal()")


def test_a_healthy_worker(crm: Crm) -> None:
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        found = {finding.check: finding for finding in report(crm)}
        assert {finding.outcome for finding in found.values()} <= {"ok", "warning"}, found
        assert found["reader"].message == f"process {crm.reader()} (cdc-worker {crm.slot}, 127.0.0.1)"
        done = crm.command("doctor", "--json")
        assert done.returncode == 0
        told = Report.model_validate(json.loads(done.stdout))
        assert told.healthy
        assert [finding.check for finding in told.findings] == [finding.check for finding in report(crm)]


def test_a_failure_is_told_with_its_fix_and_by_the_exit_code(crm: Crm) -> None:
    crm.execute("SELECT pg_drop_replication_slot(%s)", crm.slot)
    done = crm.command("doctor")
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    (number,) = (n for n, line in enumerate(lines) if line.startswith("failed   checkpoint:"))
    assert f'slot "{crm.slot}" does not exist: changes from ' in lines[number]
    assert " fix: " in lines[number + 1]
    assert not Report.model_validate(json.loads(crm.command("doctor", "--json").stdout)).healthy
    mend(crm, (ailing(crm, "checkpoint").fix or "").removeprefix("find out who dropped it; "))
    assert [finding.outcome for finding in findings(crm, "checkpoint")] == ["ok"]


def test_what_the_doctor_cannot_begin_with_is_a_failure_as_well(crm: Crm) -> None:
    crm.settings["profile"] = "nowhere.toml"
    (found,) = findings(crm, "profile")
    assert found.message == 'profile "nowhere.toml" can\'t be read: No such file or directory'
    del crm.settings["profile"]
    crm.settings["dsn"] = psycopg.conninfo.make_conninfo(crm.dsn, dbname="nowhere")
    (found,) = findings(crm, "connection")
    assert (found.outcome, found.message) == ("failed", 'database "nowhere" does not exist')


def test_nothing_is_set_up(bare_crm: Crm) -> None:
    for check in ("reader", "retained", "dead_letters"):
        assert ailing(bare_crm, check).message.endswith(" (see checkpoint)")
    assert cure(bare_crm, "checkpoint").fix == "run: cdc-worker setup"


def test_nobody_reads_the_slot(crm: Crm) -> None:
    found = ailing(crm, "reader")
    assert (found.outcome, found.fix) == ("warning", "cdc-worker run")
    assert found.message == f'nobody reads the slot "{crm.slot}": the server keeps WAL for it'
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        assert [finding.outcome for finding in findings(crm, "reader")] == ["ok"]
        assert worker.terminate() == 0
    assert ailing(crm, "reader").message.startswith(f'nobody reads the slot "{crm.slot}" since 20')


def test_a_stranger_reads_the_slot(server: Cluster, crm: Crm) -> None:
    with stranger(server, crm) as (process, pid):
        found = ailing(crm, "reader")
        assert found.message == f'slot "{crm.slot}" is read by process {pid} (pg_recvlogical, 127.0.0.1)'
        mend(crm, (found.fix or "").removeprefix("stop that process, or: "))
        process.wait()
    assert ailing(crm, "reader").outcome == "warning"


def test_another_doctor_is_nobody(crm: Crm) -> None:
    """It tries the slot for a moment: a worker that begins then need not stand by, even if it is not to wait."""
    dsn = make_conninfo(crm.dsn, application_name=postgres.DOCTOR, replication="database")
    with closing(psycopg.connect(dsn, autocommit=True)) as other:
        other.execute(f"START_REPLICATION SLOT {crm.slot} LOGICAL 0/0 (\"format-version\" '2')".encode())
        assert ailing(crm, "reader").message == f'nobody reads the slot "{crm.slot}": the server keeps WAL for it'
        with crm.worker("--no-wait", log_level="debug") as worker:
            eventually(lambda: crm.value("SELECT count(*) FROM cdc_worker.process"))
            other.close()
            worker.wait_for("replication_started")


def test_a_lock_that_would_hold_up_the_writing_and_hides_what_else_there_is(crm: Crm) -> None:
    with closing(psycopg.connect(crm.dsn, application_name="psql")) as other:
        other.execute("LOCK TABLE cdc_worker.checkpoint")
        found = cure(crm, "writing")
        assert f"a lock holds up its writing, of process {other.info.backend_pid} (psql, " in found.message


def test_a_lock_holds_up_the_writing(crm: Crm) -> None:
    with crm.worker() as worker, closing(psycopg.connect(crm.dsn, application_name="psql")) as other:
        worker.wait_for("replication_started")
        other.execute("LOCK TABLE activity")
        crm.add_leads(1)
        eventually(lambda: findings(crm, "writing")[0].outcome == "failed")
        found = cure(crm, "writing")
        assert f"of process {other.info.backend_pid} (psql, 127.0.0.1, idle in transaction, for " in found.message


def test_a_prepared_transaction_holds_up_the_writing(tight_crm: Crm) -> None:
    crm = tight_crm
    crm.execute("BEGIN; LOCK TABLE activity; PREPARE TRANSACTION 'it''s mine'")
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        crm.add_leads(1)
        eventually(lambda: findings(crm, "writing")[0].outcome == "failed")
        assert cure(crm, "writing").message.endswith("of the prepared transaction 'it''s mine'")


def test_much_wal_is_kept_for_a_slot_that_nobody_reads(tight_crm: Crm) -> None:
    traffic(tight_crm, 3)
    found = ailing(tight_crm, "retained")
    assert (found.outcome, found.fix) == ("failed", "cdc-worker run")
    assert ", more than the 20,971,520 of CDC_WORKER_RETAINED_ALARM_BYTES: nobody reads it" in found.message
    with tight_crm.worker(idle_advance_bytes=str(1 << 16), idle_advance_interval="0.1") as worker:
        worker.wait_for("replication_started")
        # What a slot needs moves on with the records that the server writes of running transactions.
        eventually(lambda: tight_crm.execute("CHECKPOINT") == [] and findings(tight_crm, "retained")[0].outcome == "ok")


def test_much_wal_is_kept_while_the_target_is_locked(tight_crm: Crm) -> None:
    crm = tight_crm
    with crm.worker() as worker, closing(psycopg.connect(crm.dsn)) as other:
        worker.wait_for("replication_started")
        other.execute("LOCK TABLE activity")
        crm.add_leads(1)
        traffic(crm, 3)
        eventually(lambda: "a lock holds up its writing" in findings(crm, "retained")[0].message)
        found = ailing(crm, "retained")
        assert found.fix == f"as a superuser: SELECT pg_terminate_backend({other.info.backend_pid})"


def test_wal_that_is_about_to_be_discarded(tight: Cluster, tight_crm: Crm) -> None:
    with having(tight, max_wal_size="1GB"):
        tight_crm.execute("CHECKPOINT")  # none is under way then, and none begins
        traffic(tight_crm, 6)
        found = ailing(tight_crm, "retained")
    assert " (unreserved), and will discard it at its next checkpoint: nobody reads it" in found.message


def test_dead_letters_wait(crm: Crm) -> None:
    crm.execute("ALTER TABLE activity ADD CHECK (description NOT LIKE '%%2%%')")
    crm.add_leads(3)
    crm.record()
    assert ailing(crm, "dead_letters").fix == (
        "see them: cdc-worker dead-letters list; when the cause is mended, as the owner:"
        " cdc-worker dead-letters retry --all; to leave it at that: cdc-worker dead-letters discard --all --yes"
    )
    crm.execute("ALTER TABLE activity DROP CONSTRAINT activity_description_check")
    found = cure(crm, "dead_letters")
    assert crm.types() == ["lead_created"] * 3
    assert found.message == (
        "1 changes could not become activities, the last because the target refused the row"
        " (SQLSTATE 23514, constraint activity_description_check)"
    )


def test_a_worker_of_least_privilege_finds_itself_healthy(crm: Crm) -> None:
    grant(crm, f"role_{crm.slot}")
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        for check in ("checkpoint", "reader", "writing", "retained", "dead_letters"):
            assert [finding.outcome for finding in findings(crm, check)] == ["ok"], check


def test_doctor_and_status_see_a_worker_that_is_stopped_as_it_is(crm: Crm) -> None:
    """They wait for nobody, and change nothing of it."""
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        worker.process.send_signal(signal.SIGSTOP)
        assert [finding.outcome for finding in findings(crm, "reader")] == ["ok"]
        assert f"process {worker.process.pid} on {gethostname()}" in crm.succeed("status")
        worker.process.send_signal(signal.SIGCONT)
        crm.add_leads(1)
        eventually(lambda: crm.types() == ["lead_created"])
        assert worker.terminate() == 0
