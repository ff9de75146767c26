"""A backfill beside an application that must not notice: no transaction that goes on, no lock, no reading of it all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import LiteralString

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from support import Crm, WorkerProcess, eventually

from cdc_worker import config, log, profile
from cdc_worker.backfill import Wishes, backfill


def add_leads(crm: Crm, count: int, *, converted: int) -> None:
    """The last ones are converted, and have a contact each."""
    crm.add_leads(count)
    crm.execute("UPDATE lead SET is_converted = true WHERE lead_id > %s", count - converted)
    crm.execute("INSERT INTO customer (customer_uid, name) SELECT lead_id, 'Acme' FROM lead WHERE is_converted")
    crm.execute("INSERT INTO contact (customer_uid, lead_id) SELECT customer_uid, customer_uid FROM customer")


@pytest.fixture
def filled_crm(bare_crm: Crm) -> Iterator[Crm]:
    """A CRM with thirty leads, of which ten are converted, set up afterwards, and a worker that runs."""
    crm = bare_crm
    add_leads(crm, 30, converted=10)
    crm.setup()
    crm.execute("INSERT INTO activity (lead_id, activity_type) SELECT lead_id, 'call' FROM lead")
    crm.execute("CREATE ROLE filler SUPERUSER LOGIN")
    try:
        with crm.worker() as worker:
            worker.wait_for("replication_started")
            yield crm
            worker.terminate()
    finally:
        crm.execute("DROP ROLE filler")


def filling(crm: Crm, *arguments: str) -> WorkerProcess:
    """Start `cdc-worker backfill lead`, with a role by which its sessions are told from the worker's."""
    environment = crm.environment(dsn=make_conninfo(crm.dsn, user="filler"))
    return WorkerProcess(["backfill", "lead", *arguments], environment, crm.directory / "backfill.log")


IDLE = """
SELECT count(*) > 0 AND bool_and(state = 'idle' AND xact_start IS NULL AND backend_xid IS NULL AND backend_xmin IS NULL)
FROM pg_stat_activity WHERE usename = 'filler'
"""

LOCKS = """
SELECT coalesce(relation::regclass::text, locktype), mode
FROM pg_locks JOIN pg_stat_activity USING (pid)
WHERE usename = 'filler' AND granted = %s AND (relation IS NULL OR relation >= 16384)
"""


def locks(crm: Crm, *, granted: bool) -> set[tuple[str, str]]:
    """What the backfill has locked, or waits for: tables, and what isn't one, with the mode."""
    return {(name, mode) for name, mode in crm.execute(LOCKS, granted)}


def test_between_chunks_it_has_no_transaction_no_snapshot_and_no_lock(filled_crm: Crm) -> None:
    crm = filled_crm
    with filling(crm, "--rate", "0.001"):  # it sleeps for long after each row
        eventually(lambda: crm.value("SELECT coalesce(sum(rows), 0) FROM cdc_worker.backfill") == 1)
        eventually(lambda: crm.value(IDLE), what="its sessions are idle")
        assert crm.execute("SELECT FROM pg_locks JOIN pg_stat_activity USING (pid) WHERE usename = 'filler'") == []


APPLICATION: tuple[LiteralString, ...] = (
    "SELECT FROM lead FOR UPDATE NOWAIT",
    "SELECT FROM customer FOR UPDATE NOWAIT",
    "SELECT FROM contact FOR UPDATE NOWAIT",
    "UPDATE lead SET status = '2. proposal' WHERE lead_id < 30",
    "DELETE FROM activity WHERE lead_id IN (1, 30) AND change_key IS NULL",
    "UPDATE lead SET lead_id = 1000 WHERE lead_id = 1",
    "UPDATE customer SET name = 'Other' WHERE customer_uid < 30",
    "UPDATE contact SET is_primary_contact = false WHERE customer_uid < 30",
    "DELETE FROM lead WHERE lead_id = 30",
    "DELETE FROM customer WHERE customer_uid = 30",
    "DELETE FROM contact WHERE customer_uid = 29",
    "UPDATE activity SET description = 'called' WHERE lead_id = 29 AND change_key IS NULL",
    "INSERT INTO lead (full_name, source, bd_in_charge, type) VALUES ('Ada', 'web', 'jane', 'exchange')",
    "INSERT INTO customer (customer_uid, name) VALUES (100, 'New')",
    "INSERT INTO contact (customer_uid, lead_id) VALUES (100, 28)",
    "INSERT INTO activity (lead_id, activity_type) VALUES (28, 'call')",
    "LOCK TABLE lead, customer, contact IN ACCESS EXCLUSIVE MODE NOWAIT",
)


def test_while_it_writes_the_application_waits_for_nothing(filled_crm: Crm) -> None:
    """It is held in the middle of a chunk's rows, by one with a key of its own that isn't committed."""
    crm = filled_crm
    key = f"{crm.slot}/{crm.value('SELECT cdc_worker.cluster()')}/backfill/public.lead/15/lead_created/0"
    with psycopg.connect(crm.dsn) as holder:
        holder.execute("INSERT INTO activity (activity_type, change_key) VALUES ('held', %s)", (key,))
        with filling(crm) as process:
            # Again and again, but never for long.
            eventually(lambda: {name for name, _ in locks(crm, granted=False)} == {"transactionid"}, what="it waits")
            held = eventually(lambda: {name for name, _ in locks(crm, granted=True) if name == "activity"})
            held |= {name for name, _ in locks(crm, granted=True)}
            assert held.isdisjoint({"lead", "customer", "contact"})
            with psycopg.connect(crm.dsn, options="-c lock_timeout=5s") as application:
                for statement in APPLICATION:
                    application.execute(statement)
                application.commit()
            holder.rollback()
            assert process.wait() == 0, process.said
    eventually(lambda: "lead_deleted" in crm.types())
    assert sorted(a["lead_id"] for a in crm.activities() if a["activity_type"] == "lead_created") == [*range(1, 32)]


@pytest.mark.parametrize("table", ["lead", "contact"])
def test_of_the_applications_tables_it_wants_to_read_only(filled_crm: Crm, table: LiteralString) -> None:
    crm = filled_crm
    with psycopg.connect(crm.dsn) as holder:
        holder.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
        with filling(crm) as process:
            eventually(lambda: locks(crm, granted=False), what="it waits for the table")
            assert locks(crm, granted=False) == {(table, "AccessShareLock")}
            assert locks(crm, granted=True) == {("virtualxid", "ExclusiveLock")}
            holder.rollback()
            assert process.wait() == 0, process.said


READ = "SELECT seq_tup_read + idx_tup_fetch FROM pg_stat_user_tables WHERE relname = %s"

SESSIONS = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'cdc-worker%%'"


def test_it_reads_the_target_once_and_then_what_is_about_its_rows(bare_crm: Crm) -> None:
    """A hundred chunks, of tables that nobody has analysed. Contacts have no index by which they could be found."""
    crm = bare_crm
    leads, chunks, calls = 2_000, 100, 20_000
    add_leads(crm, leads, converted=leads // 4)
    crm.setup()
    crm.execute("ALTER TABLE activity SET (autovacuum_enabled = off)")
    crm.execute(
        "INSERT INTO activity (lead_id, activity_type) SELECT 1 + n %% %s, 'call' FROM generate_series(1, %s) n",
        leads,
        calls,
    )
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        crm.execute("SELECT pg_stat_reset()")
        settings = config.load(None, {"dsn": crm.dsn, "slot": crm.slot})
        (done,) = backfill(
            settings, profile.load("leadfi"), ["lead"], Wishes(chunk_size=leads // chunks), log=log.get()
        )
        worker.terminate()
    assert done.activities == {"lead_created": leads, "lead_converted": leads // 4}
    eventually(lambda: crm.value(SESSIONS) == 0, what="the server has counted")
    assert crm.value(READ, "activity") < 3 * calls
    assert crm.value(READ, "contact") <= chunks * leads // 4
