"""The worker never harms the server unseen: alarms, and the slot that is given up before the disk is full."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from support import Crm, crm_on, eventually, stranger

from cdc_worker.cluster import Binaries, Cluster
from cdc_worker.config import load
from cdc_worker.errors import SlotGivenUpError, SlotMissingError
from cdc_worker.status import Status, status

MEGABYTE = str(1 << 20)


@pytest.fixture(scope="module")
def noting(binaries: Binaries) -> Iterator[Cluster]:
    """A server that often notes in the WAL from where on a slot needs it."""
    with Cluster(binaries, settings={"checkpoint_timeout": "30s", "max_wal_size": "32MB"}) as server:
        yield server


@pytest.fixture
def crm(noting: Cluster, tmp_path: Path) -> Iterator[Crm]:
    with crm_on(noting, tmp_path, prepared=True) as crm:
        yield crm


def traffic(crm: Crm) -> None:
    """More than a megabyte of WAL that is none of the worker's business."""
    crm.execute("SELECT pg_logical_emit_message(false, 'traffic', repeat('x', 1 << 20)), pg_switch_wal()")
    crm.execute("SELECT pg_logical_emit_message(false, 'traffic', 'x')")


def seen(crm: Crm) -> Status:
    return status(load(None, {"dsn": crm.dsn, "slot": crm.slot}))


def test_much_retained_wal_raises_an_alarm_and_its_end_is_told(crm: Crm) -> None:
    settings = {"retained_alarm_bytes": MEGABYTE, "idle_advance_bytes": str(1 << 16), "idle_advance_interval": "0.2"}
    with crm.worker(**settings) as worker, closing(psycopg.connect(crm.dsn)) as other:
        worker.wait_for("replication_started")
        other.execute("LOCK TABLE activity")
        traffic(crm)
        crm.add_leads(1)
        alarm = worker.wait_for("wal_retained")
        assert (alarm["level"], alarm["alarm_bytes"], alarm["wal_status"]) == ("warning", 1 << 20, "reserved")
        assert alarm["retained_bytes"] > 1 << 20
        held_up = worker.wait_for("write_held_up")  # for ten seconds by now
        assert len(held_up["by"]) == 1
        assert held_up["by"][0].startswith(
            f"process {other.info.backend_pid} (client backend, 127.0.0.1, idle in transaction"
        )
        failure = seen(crm).last_error
        assert failure
        assert failure.error == f"the server kept {alarm['retained_bytes']:,} bytes of WAL for the slot"
        other.rollback()

        def released() -> bool:
            crm.execute("CHECKPOINT")
            crm.add_leads(1)
            return bool(worker.events("wal_released"))

        eventually(released)
        assert len(worker.events("wal_retained")) == 1
        assert worker.terminate() == 0


def test_an_alarm_is_raised_at_the_start_as_well(crm: Crm) -> None:
    traffic(crm)
    with crm.worker(retained_alarm_bytes=MEGABYTE) as worker:
        assert worker.wait_for("wal_retained")["retained_bytes"] > 1 << 20
        worker.wait_for("replication_started")


def given_up(crm: Crm, code: int, said: str, position: str) -> None:
    """The slot is gone, all say what is missing, and the way out leads on."""
    assert code == SlotGivenUpError.exit_code
    assert f'error: slot "{crm.slot}" is given up: the server kept ' in said
    assert f" of CDC_WORKER_RETAINED_LIMIT_BYTES; changes from {position} (" in said
    assert crm.value("SELECT count(*) FROM pg_replication_slots WHERE slot_name = %s", crm.slot) == 0
    missing = f'slot "{crm.slot}" does not exist: changes from {position} ('
    done = crm.command("run")
    assert done.returncode == SlotMissingError.exit_code
    assert missing in done.stderr
    found = seen(crm)
    assert (found.late or "").startswith(f"gap: {missing}")
    assert said.split("hint: ")[1].startswith("see what held it up; then: cdc-worker recover\n")
    crm.succeed("recover")
    before = len(crm.types())
    crm.add_leads(1)
    crm.record()
    assert len(crm.types()) == before + 1


def test_beyond_a_limit_that_is_set_the_slot_is_given_up(crm: Crm) -> None:
    with crm.worker(retained_limit_bytes=MEGABYTE) as worker, closing(psycopg.connect(crm.dsn)) as other:
        worker.wait_for("replication_started")
        other.execute("LOCK TABLE activity")
        traffic(crm)
        crm.add_leads(1)
        code = worker.wait()
        assert worker.events("worker_failed")[0]["error"] == "SlotGivenUpError"
        position = crm.value("SELECT lsn::text FROM cdc_worker.checkpoint")
        other.rollback()
        assert crm.types() == []
    given_up(crm, code, worker.said, position)


def test_a_slot_that_has_kept_too_much_meanwhile_is_given_up_at_the_start(crm: Crm) -> None:
    crm.add_leads(1)
    traffic(crm)
    position = crm.value("SELECT lsn::text FROM cdc_worker.checkpoint")
    done = crm.command("run", retained_limit_bytes=MEGABYTE)
    given_up(crm, done.returncode, done.stderr, position)


def test_what_it_looks_at_holds_up_neither_the_stream_nor_the_end(crm: Crm) -> None:
    with crm.worker() as worker, closing(psycopg.connect(crm.dsn)) as other:
        worker.wait_for("replication_started")
        other.execute("LOCK TABLE cdc_worker.tally, cdc_worker.process")
        for count in (1, 2, 3):
            crm.add_leads(1)
            eventually(lambda count=count: len(crm.types()) == count)  # type: ignore[misc]
        assert worker.wait_for("look_failed")["sqlstate"] == "55P03"
        assert worker.terminate() == 0


def test_a_stand_by_raises_the_alarm_as_well(noting: Cluster, crm: Crm) -> None:
    with stranger(noting, crm) as (process, _), crm.worker(retained_alarm_bytes=MEGABYTE) as worker:
        worker.wait_for("waiting_for_slot")
        process.send_signal(signal.SIGSTOP)
        traffic(crm)
        worker.wait_for("wal_retained")


def test_without_a_limit_no_slot_is_ever_given_up(crm: Crm) -> None:
    crm.add_leads(1)
    traffic(crm)
    crm.record(retained_alarm_bytes=MEGABYTE)
    assert crm.types() == ["lead_created"]


@pytest.mark.parametrize("quiet", [False, True], ids=["", "to a role that is to hear of errors only"])
def test_a_row_that_the_plugin_drops_raises_one_alarm_with_what_mends_it(crm: Crm, quiet: bool) -> None:
    """Without old rows wal2json leaves out updates, and says so in a WARNING in the middle of the stream.

    Where the table is published, which a role that sets up need not be allowed to see to, they would fail.
    """
    crm.execute('CREATE TABLE "Odd ""table" (id int, note text)')
    profile = Path(crm.directory / "odd.toml")
    profile.write_text(
        'name = "odd"\n[target]\ntable = "activity"\n'
        '[target.columns]\nactivity_type = "type"\ndescription = "description"\nchange_key = "change_key"\n'
        "[tables.'Odd \"table']\n[[tables.'Odd \"table'.rules]]\n"
        'on = "update"\nchanged = "note"\ntype = "noted"\ndescription = "{new.note}"\n'
    )
    crm.settings["profile"] = str(profile)
    crm.setup()
    crm.connection.execute(f"DROP PUBLICATION {crm.slot}".encode())
    crm.execute("""ALTER TABLE "Odd ""table" REPLICA IDENTITY NOTHING""")
    crm.execute("""INSERT INTO "Odd ""table" SELECT n, 'a' FROM generate_series(1, 100) n""")
    if quiet:
        database = sql.Identifier(crm.connection.info.dbname)
        crm.connection.execute(sql.SQL("ALTER DATABASE {} SET client_min_messages = error").format(database))
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        crm.execute("""UPDATE "Odd ""table" SET note = 'b'""")
        alarm = worker.wait_for("change_dropped_by_plugin")
        assert (alarm["level"], alarm["operation"]) == ("error", "UPDATE")
        crm.connection.execute(alarm["mend"].encode())
        crm.execute("""UPDATE "Odd ""table" SET note = 'c'""")
        eventually(lambda: crm.types() == ["noted"] * 100)
        assert len(worker.events("change_dropped_by_plugin")) == 1
        assert worker.terminate() == 0
    failure = seen(crm).last_error
    assert failure
    said = f"the plugin dropped UPDATEs of {alarm['table']}, which are lost; to mend it: {alarm['mend']}"
    assert failure.error == said
