"""History for rows that were there before the worker: each creation once, whoever tells of it, and nothing made up."""

from __future__ import annotations

import itertools
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg import sql
from psycopg.rows import TupleRow
from psycopg.waiting import wait
from storms import Faults, kill
from support import PATIENCE, Crm, WorkerProcess, crm_on, eventually, having, storm

from cdc_worker import catalog, checkpoint, config, log, postgres, profile
from cdc_worker.activities import Activity, Batch, Clusters, Position, parsed_key
from cdc_worker.backfill import Backfilled, Wishes, backfill, replacement
from cdc_worker.changes import Change, Transaction
from cdc_worker.cluster import Cluster
from cdc_worker.errors import CdcWorkerError
from cdc_worker.fence import Fence
from cdc_worker.history import Event, made_up, recorded
from cdc_worker.lsn import LSN
from cdc_worker.postgres import Statement
from cdc_worker.rows import Rows
from cdc_worker.sink import Sink
from cdc_worker.transform import transform


def add_leads(crm: Crm, *lead_ids: int, status: str | None = "2. proposal", converted: bool = False) -> None:
    for lead_id in lead_ids:
        crm.execute(
            "INSERT INTO lead (lead_id, full_name, source, bd_in_charge, type, status, is_converted, date_created)"
            " VALUES (%s, %s, 'web', 'jane', 'exchange', %s, %s, timestamp '2020-01-01 12:00' + %s * interval '1 day')",
            lead_id,
            f"Lead {lead_id}",
            status,
            converted,
            lead_id,
        )


def add_customer(crm: Crm, customer_uid: int, *, lead_id: int | None = None) -> None:
    crm.execute(
        "INSERT INTO customer (customer_uid, name, type, date_created)"
        " VALUES (%s, 'Acme', 'fund', '2021-05-06 07:08:09')",
        customer_uid,
    )
    if lead_id is not None:
        crm.execute(
            "INSERT INTO contact (customer_uid, lead_id, date_added) VALUES (%s, %s, '2021-06-07 08:09:10.123456')",
            customer_uid,
            lead_id,
        )


def fill(crm: Crm, *tables: str, dry_run: bool = False, **wishes: Any) -> dict[str, Backfilled]:
    """`cdc-worker backfill`, in this process; what was done by table."""
    settings = config.load(None, {"dsn": crm.dsn, "slot": crm.slot} | crm.settings)
    given = profile.load(settings.profile)
    done = backfill(settings, given, tables, Wishes(**wishes), log=log.get(), dry_run=dry_run)
    return {table.table.removeprefix("public."): table for table in done}


def told(crm: Crm) -> list[tuple[str, int | None, int | None]]:
    """Type and links of what the worker wrote, in order of the subjects."""
    found = crm.execute(
        "SELECT activity_type, lead_id, customer_uid FROM activity WHERE change_key IS NOT NULL"
        " ORDER BY lead_id, customer_uid, activity_type"
    )
    return [(kind, lead_id, customer_uid) for kind, lead_id, customer_uid in found]


def test_rows_that_were_there_before_get_the_history_that_is_known(bare_crm: Crm) -> None:
    crm = bare_crm
    add_leads(crm, 1, 2)
    add_leads(crm, 3, status=None, converted=True)
    add_leads(crm, 4, converted=True)  # nobody knows when
    add_customer(crm, 70, lead_id=3)
    crm.setup()
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        done = fill(crm)
        assert fill(crm)["lead"].activities == {}  # once is enough
        worker.terminate()
    assert {name: (table.rows, table.activities) for name, table in done.items()} == {
        "lead": (4, {"lead_created": 4, "lead_converted": 1}),
        "customer": (1, {"customer_created": 1}),
    }
    assert told(crm) == [
        ("lead_created", 1, None),
        ("lead_created", 2, None),
        ("lead_converted", 3, 70),
        ("lead_created", 3, None),
        ("lead_created", 4, None),
        ("customer_created", None, 70),
    ]
    by_type = {activity["activity_type"]: activity for activity in crm.activities() if activity["lead_id"] in (3, None)}
    created = by_type["lead_created"]
    as_of, lsn = (created["metadata"].pop(name) for name in ("as_of", "as_of_lsn"))
    assert crm.value("SELECT %s::timestamptz BETWEEN now() - interval '5 minutes' AND now()", as_of)
    assert crm.value("SELECT %s::pg_lsn < pg_current_wal_lsn()", lsn)
    cluster = crm.value("SELECT cdc_worker.cluster()")
    assert created == {
        "activity_id": created["activity_id"],
        "lead_id": 3,
        "customer_uid": None,
        "activity_type": "lead_created",
        "activity_category": "system",
        "description": 'Lead "Lead 3" created',
        "metadata": {
            "lead_id": 3,
            "lead_name": "Lead 3",
            "company_name": None,
            "context_source": "default",
            "backfilled": True,
            "values": {"source": "web", "type": "exchange", "status": None, "bd_in_charge": "jane"},
        },
        "date_created": crm.value("SELECT date_created FROM lead WHERE lead_id = 3"),
        "bd_in_charge": None,
        "created_by": "system",
        "is_visible_to_bd": True,
        "change_key": f"{crm.slot}/{cluster}/backfill/public.lead/3/lead_created/0",
    } | {name: created[name] for name in created.keys() - {*CREATED}}
    converted = by_type["lead_converted"]
    assert converted["description"] == 'Lead "Lead 3" converted to customer'
    assert converted["date_created"] == crm.value("SELECT date_added FROM contact")
    assert converted["metadata"]["values"] == {"status": None, "customer_uid": 70}
    assert by_type["customer_created"]["date_created"] == crm.value("SELECT date_created FROM customer")


CREATED = (
    *("activity_id", "lead_id", "customer_uid", "activity_type", "activity_category", "description", "metadata"),
    *("date_created", "bd_in_charge", "created_by", "is_visible_to_bd", "change_key"),
)


def test_what_the_stream_has_told_or_will_tell_is_not_told_again(bare_crm: Crm) -> None:
    crm = bare_crm
    add_leads(crm, 1)
    crm.setup()
    add_leads(crm, 2)
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        add_leads(crm, 3)
        fill(crm, "lead")
        add_leads(crm, 4)
        worker.terminate()
    crm.record()
    assert told(crm) == [("lead_created", lead_id, None) for lead_id in (1, 2, 3, 4)]
    assert [a["lead_id"] for a in crm.activities() if a["metadata"].get("backfilled")] == [1]


def test_setup_with_backfill_does_both(bare_crm: Crm) -> None:
    crm = bare_crm
    add_leads(crm, *range(1, 40))
    add_customer(crm, 70, lead_id=3)
    printed = crm.succeed("setup", "--with-backfill").splitlines()
    assert printed[-2:] == [
        "public.lead: 39 rows read, 39 activities written: 39 lead_created",
        "public.customer: 1 rows read, 1 activities written: 1 customer_created",
    ]
    assert crm.reader() is None
    assert len(told(crm)) == 40
    add_leads(crm, 40)
    assert crm.succeed("setup", "--with-backfill").splitlines()[-2:] == [
        "public.lead: 40 rows read, 0 activities written: none",
        "public.customer: 1 rows read, 0 activities written: none",
    ]
    assert len(told(crm)) == 41


# Interrupted


def progress(crm: Crm, table: str = "public.lead") -> int:
    """How many rows are dealt with."""
    found = crm.execute("SELECT rows FROM cdc_worker.backfill WHERE table_name = %s", table)
    return int(found[0][0]) if found else 0


def test_interrupted_at_every_chunk_boundary_it_goes_on_from_there(bare_crm: Crm) -> None:
    crm = bare_crm
    add_leads(crm, *range(1, 11))
    crm.setup()
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        for row in range(1, 11):
            with filling(crm, "lead", "--rate", "0.001") as interrupted:  # it sleeps for long after each row
                reached(crm, row)
                interrupted.kill()
            assert told(crm) == [("lead_created", lead_id, None) for lead_id in range(1, row + 1)]
        done = fill(crm, "lead")["lead"]
        worker.terminate()
    assert (done.resumed, done.rows, done.activities) == (True, 0, {})


def reached(crm: Crm, rows: int, process: WorkerProcess | None = None) -> None:
    """Wait until so many rows are dealt with, or the process has ended."""
    eventually(lambda: progress(crm) >= rows or (process is not None and process.process.poll() is not None))


def filling(crm: Crm, *arguments: str) -> WorkerProcess:
    """Start `cdc-worker backfill`."""
    return WorkerProcess(["backfill", *arguments], crm.environment(), crm.directory / "backfill.log")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_interrupted_within_a_chunk_it_has_written_nothing_of_it(bare_crm: Crm, number: int) -> None:
    crm = bare_crm
    add_leads(crm, *range(1, 31))
    crm.setup()
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        fill(crm, "lead", to_key=("10",))
        with crm.connection.transaction():
            crm.execute("LOCK TABLE activity IN SHARE MODE")
            with filling(crm, "lead") as interrupted:
                eventually(lambda: waiting_for_locks(crm), what="it waits for the target")
                interrupted.process.send_signal(number)
                assert interrupted.wait() != 0
            if number == signal.SIGINT:
                eventually(lambda: not waiting_for_locks(crm), what="its session has ended")
        assert len(told(crm)) == 10
        done = fill(crm, "lead")["lead"]
        worker.terminate()
    assert (done.resumed, done.activities) == (False, {"lead_created": 20})
    assert told(crm) == [("lead_created", lead_id, None) for lead_id in range(1, 31)]


def waiting_for_locks(crm: Crm) -> int:
    """How many sessions wait for a lock."""
    return int(crm.value("SELECT count(DISTINCT pid) FROM pg_locks WHERE NOT granted"))


@storm(3, chaos=20)
def test_killed_again_and_again_it_writes_each_once(bare_crm: Crm, seed: int, faults: Faults, rounds: int) -> None:
    crm, chance = bare_crm, random.Random(seed)
    add_leads(crm, *range(1, 301))
    crm.setup()
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        for _ in range(rounds):
            with filling(crm, "lead", "--chunk-size", "7") as killed:
                reached(crm, progress(crm) + chance.randrange(40), killed)
                time.sleep(chance.random() / 100)
                kill(killed, faults)
        fill(crm, "lead")
        worker.terminate()
    assert told(crm) == [("lead_created", lead_id, None) for lead_id in range(1, 301)]


# Raced

MOMENTS = ("before the read", "before the position after it", "before the verdict", "before it is written")


def change(crm: Crm, lead_id: int, assignment: LiteralString) -> None:
    crm.connection.execute(sql.SQL("UPDATE lead SET {} WHERE lead_id = %s").format(sql.SQL(assignment)), (lead_id,))


def delete(crm: Crm, lead_id: int) -> None:
    crm.execute("DELETE FROM lead WHERE lead_id = %s", lead_id)


def again(crm: Crm, lead_id: int) -> None:
    delete(crm, lead_id)
    add_leads(crm, lead_id)


def again_at_once(crm: Crm, lead_id: int) -> None:
    with crm.connection.transaction():
        again(crm, lead_id)


def again_and_again(crm: Crm, lead_id: int) -> None:
    again(crm, lead_id)
    again(crm, lead_id)


def move(crm: Crm, lead_id: int) -> None:
    change(crm, lead_id, "lead_id = lead_id + 1")


def move_and_give_the_key_to_another(crm: Crm, lead_id: int) -> None:
    move(crm, lead_id)
    add_leads(crm, lead_id)


def move_and_back(crm: Crm, lead_id: int) -> None:
    move(crm, lead_id)
    change(crm, lead_id + 1, "lead_id = lead_id - 1")


def date_otherwise(crm: Crm, lead_id: int) -> None:
    change(crm, lead_id, "date_created = now()")


def negotiate(crm: Crm, lead_id: int) -> None:
    change(crm, lead_id, "status = '3. negotiation'")


ACTS: dict[Callable[[Crm, int], None], int] = {
    delete: 0,
    again: 1,
    again_at_once: 1,
    again_and_again: 2,
    move: 0,
    move_and_give_the_key_to_another: 1,
    move_and_back: 0,
    date_otherwise: 0,
    negotiate: 0,
}
"""What an application does to a lead, and how many leads it makes thereby."""


@pytest.mark.parametrize("place", range(len(MOMENTS)), ids=MOMENTS)
def test_whatever_happens_at_whichever_moment_a_row_is_created_once(
    bare_crm: Crm, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    crm = bare_crm
    cases = {number * 10: case for number, case in enumerate(itertools.product(ACTS, (True, False)), start=1)}
    add_leads(crm, *(lead_id for lead_id, (_, old) in cases.items() if old))
    crm.setup()
    add_leads(crm, *(lead_id for lead_id, (_, old) in cases.items() if not old))
    to_do = [*cases.items()]

    def work() -> None:
        while to_do:
            lead_id, (act, _) = to_do.pop()
            act(crm, lead_id)

    def working(original: Callable[..., Any], *, before: bool) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if before:
                work()
            found = original(*arguments, **named)
            work()
            return found

        return call

    of, name = [(Rows, "after"), (Rows, "after"), (Fence, "wait_for"), (Sink, "write")][place]
    monkeypatch.setattr(of, name, working(getattr(of, name), before=place in (0, 3)))
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        fill(crm, "lead")
        assert not to_do
        fill(crm, "lead")
        worker.terminate()
    crm.record()
    found = [activity for activity in crm.activities() if activity["activity_type"] == "lead_created"]
    created = Counter(activity["lead_id"] // 10 * 10 for activity in found)
    living = {lead_id // 10 * 10 for (lead_id,) in crm.execute("SELECT lead_id FROM lead")}
    for lead_id, (act, old) in cases.items():
        # Of one that was there before, and is gone before anybody has told of it, nobody may ever know.
        unknown = old and (act is delete or ACTS[act] > 0)
        assert 0 <= ACTS[act] + 1 - created[lead_id] <= unknown, (lead_id, act, old)
    assert {activity["lead_id"] // 10 * 10 for activity in found if activity["metadata"].get("backfilled")} <= {
        lead_id for lead_id, (_, old) in cases.items() if old
    }
    assert living <= created.keys()
    statuses = crm.execute(STATUSES)
    assert [row for row in statuses if not row[-1]] == []
    assert statuses


STATUSES = """
SELECT told.lead_id, told.metadata, changed.metadata, changed.change_key,
       told.metadata -> 'values' ->> 'status' = changed.metadata ->>
           CASE WHEN ('0/0'::pg_lsn + ('x' || split_part(changed.change_key, '/', 3))::bit(64)::bigint)
                     <= (told.metadata ->> 'as_of_lsn')::pg_lsn THEN 'new_status' ELSE 'old_status' END
FROM activity AS told JOIN activity AS changed USING (lead_id)
WHERE told.metadata ? 'backfilled' AND changed.activity_type = 'status_changed'
"""
"""Whether what was made up says how the row was as of the position that it names."""


def called(monkeypatch: pytest.MonkeyPatch, of: type, name: str) -> threading.Event:
    """Set once a method has been called."""
    event, original = threading.Event(), getattr(of, name)

    def call(*arguments: Any, **named: Any) -> Any:
        event.set()
        return original(*arguments, **named)

    monkeypatch.setattr(of, name, call)
    return event


def test_it_waits_for_a_worker_that_lags(crm: Crm, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = called(monkeypatch, Fence, "wait_for")
    with crm.worker() as worker, ThreadPoolExecutor() as pool:
        worker.wait_for("replication_started")
        worker.process.send_signal(signal.SIGSTOP)
        add_leads(crm, *range(1, 11))
        filled = pool.submit(fill, crm, "lead")
        assert waits.wait(PATIENCE)
        with suppress(TimeoutError):
            filled.result(0.2)  # it would have been done by then
        assert (told(crm), filled.done()) == ([], False)
        worker.process.send_signal(signal.SIGCONT)
        assert filled.result(PATIENCE)["lead"].activities == {}
        worker.terminate()
    assert told(crm) == [("lead_created", lead_id, None) for lead_id in range(1, 11)]


def test_what_has_been_seen_once_is_seen_from_then_on(crm: Crm) -> None:
    """Whatever goes on by then: a row that is read again for what happened before would be read for ever."""
    settings = config.load(None, {"dsn": crm.dsn, "slot": crm.slot})
    with postgres.connect(crm.dsn, "fence") as connection, psycopg.connect(crm.dsn) as other:
        fence = Fence(connection, settings, log.get())
        other.execute("SELECT pg_current_xact_id()")
        fence.horizon()
        other.commit()
        add_leads(crm, 1)
        there = fence.here()
        assert fence.settle()
        other.execute("SELECT pg_current_xact_id()")
        add_leads(crm, 2)
        settled = fence.horizon()
        assert settled >= there
        other.commit()
        assert fence.horizon() > settled


def test_what_others_do_not_see_yet_is_waited_for(
    own_server: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its commit is in the WAL, and recorded, while the session that made it has yet to end its transaction."""
    doubts = called(monkeypatch, Fence, "settle")
    with crm_on(own_server, tmp_path) as crm:
        add_leads(crm, 2, 3, 4)
        crm.setup()
        add_leads(crm, 1)
        crm.record()
        with crm.worker() as worker, ThreadPoolExecutor() as pool, psycopg.connect(crm.dsn, autocommit=True) as other:
            worker.wait_for("replication_started")
            pid = other.info.backend_pid
            with having(own_server, synchronous_standby_names="nobody"):
                committed = pool.submit(
                    other.execute,
                    "DELETE FROM lead WHERE lead_id = 1; UPDATE lead SET status = '3. negotiation' WHERE lead_id = 4;"
                    "UPDATE lead SET lead_id = 9 WHERE lead_id = 2; UPDATE lead SET lead_id = 2 WHERE lead_id = 3",
                )
                eventually(
                    lambda: crm.value("SELECT wait_event FROM pg_stat_activity WHERE pid = %s", pid) == "SyncRep"
                )
                os.kill(pid, signal.SIGSTOP)
            try:
                eventually(lambda: len(crm.activities()) == 5)
                assert crm.value("SELECT array_agg(lead_id ORDER BY lead_id) FROM lead") == [1, 2, 3, 4]
                filled = pool.submit(fill, crm, "lead")
                assert doubts.wait(PATIENCE)
            finally:
                os.kill(pid, signal.SIGCONT)
            committed.result(PATIENCE)
            filled.result(PATIENCE)
            fill(crm, "lead")
            worker.terminate()
        created = [a["lead_id"] for a in crm.activities() if a["activity_type"] == "lead_created"]
        assert sorted(created) == [1, 2, 4, 9]
        assert [row[-1] for row in crm.execute(STATUSES)] == [True]


def test_what_triggers_wrote_since_a_deletion_is_about_the_new_row(bare_crm: Crm) -> None:
    crm = bare_crm
    crm.setup()
    add_leads(crm, 7)
    crm.record()
    crm.execute("DELETE FROM lead")
    crm.record()
    crm.execute("UPDATE cdc_worker.excluded SET from_lsn = pg_current_wal_lsn(), until_lsn = NULL")
    crm.execute("UPDATE cdc_worker.checkpoint SET nonce = gen_random_uuid()")
    add_leads(crm, 7)
    crm.execute("SELECT create_system_activity('lead_created', 'by a trigger', 7)")
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        assert fill(crm, "lead")["lead"].activities == {}
        crm.execute("SET cdc_worker.protect = off")
        crm.execute("UPDATE activity SET date_created = '2020-01-01' WHERE description = 'by a trigger'")
        assert fill(crm, "lead")["lead"].activities == {"lead_created": 1}
        worker.terminate()


ONCE = """
SELECT company_name, count(*), bool_or(metadata ? 'backfilled')
FROM (SELECT metadata, metadata ->> 'company_name' AS company_name FROM activity
      WHERE activity_type = 'lead_created' AND change_key IS NOT NULL) AS created
GROUP BY company_name
"""


class Application(threading.Thread):
    """A CRM at work: leads come and go, change, get other keys, and get keys that others had.

    Each lead has a name of its own for all its life, in its column company_name.
    """

    def __init__(self, crm: Crm, seed: int, *, keys: int) -> None:
        super().__init__()
        self._dsn, self._chance, self._keys = crm.dsn, random.Random(seed), keys
        self._name = f"{seed}"
        self.stop = threading.Event()
        self.failure: BaseException | None = None
        self.inserted: set[str] = set()

    def run(self) -> None:
        try:
            with psycopg.connect(self._dsn, autocommit=True) as connection:
                for number in itertools.count():
                    if self.stop.is_set():
                        return
                    with suppress(psycopg.errors.UniqueViolation):
                        self._act(connection, f"new {self._name} {number}")
                    time.sleep(0.001)  # what it does is to be raced, not to fill the log
        except BaseException as error:
            self.failure = error

    def _act(self, connection: psycopg.Connection[TupleRow], name: str) -> None:
        chance, key, other = self._chance, self._chance.randrange(self._keys), self._chance.randrange(self._keys)
        match chance.randrange(8):
            case 0 | 1:
                connection.execute(INSERT, (key, name))
                self.inserted.add(name)
            case 2:
                connection.execute("DELETE FROM lead WHERE lead_id = %s", (key,))
            case 3:
                with connection.transaction():
                    connection.execute("DELETE FROM lead WHERE lead_id = %s", (key,))
                    connection.execute(INSERT, (key, name))
                self.inserted.add(name)
            case 4:
                connection.execute("UPDATE lead SET lead_id = %s WHERE lead_id = %s", (other, key))
            case 5:
                connection.execute("UPDATE lead SET date_created = date_created + '1 day' WHERE lead_id = %s", (key,))
            case 6:
                connection.execute("UPDATE lead SET is_converted = NOT is_converted WHERE lead_id = %s", (key,))
            case _:
                connection.execute("UPDATE lead SET status = %s WHERE lead_id = %s", (name, key))


INSERT = """
INSERT INTO lead (lead_id, full_name, company_name, source, bd_in_charge, type)
VALUES (%s, 'Ada', %s, 'web', 'jane', 't')
"""


@storm(1, chaos=8)
def test_a_row_met_by_stream_and_two_backfills_is_created_once(bare_crm: Crm, seed: int, rounds: int) -> None:
    for number in range(rounds):
        race(bare_crm, seed + number)
        bare_crm.execute("TRUNCATE lead CASCADE")
        bare_crm.execute("DROP SCHEMA cdc_worker CASCADE")
        bare_crm.execute("SELECT pg_drop_replication_slot(%s)", bare_crm.slot)


def race(crm: Crm, seed: int) -> None:
    keys, chance = 60, random.Random(seed)
    for key in range(0, keys, 2):
        crm.execute(INSERT, key, f"old {key}")
    crm.setup()
    applications = [Application(crm, 2 * seed + number, keys=keys) for number in range(2)]
    for application in applications:
        application.start()
    try:
        for _ in range(3):
            with crm.worker() as worker:
                worker.wait_for("replication_started")
                backfills = [filling(crm, "lead", "--chunk-size", str(chance.choice((3, 10, 30)))) for _ in range(2)]
                for process in backfills:
                    with process:
                        assert process.wait() == 0, process.said
                if chance.random() < 0.5:
                    worker.kill()
                else:
                    worker.terminate()
    finally:
        for application in applications:
            application.stop.set()
            application.join()
    assert [application.failure for application in applications] == [None, None]
    crm.record()
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        fill(crm, "lead")
        crm.succeed("verify", "lead")
        worker.terminate()
    created = {name: (count, backfilled) for name, count, backfilled in crm.execute(ONCE)}
    living = {name for (name,) in crm.execute("SELECT company_name FROM lead")}
    inserted = set().union(*(application.inserted for application in applications))
    assert {name: found for name, found in created.items() if found[0] != 1} == {}
    assert living - created.keys() == set()
    assert inserted - created.keys() == set()
    assert {name for name, (_, backfilled) in created.items() if backfilled} & inserted == set()


# Recorded after all


class Replay:
    """What a replay's progress is to the sink: it marks its dead letter."""

    worker = "replay"
    position = Position(LSN(0))

    def __init__(self, change_key: str) -> None:
        self._change_key = change_key

    def advance(
        self,
        before: Position,
        after: Position,
        committed_at: datetime | None = None,
        *,
        activities: int = 0,
        dead_letters: int = 0,
    ) -> Statement:
        mark: LiteralString = "UPDATE cdc_worker.dead_letter SET attempts = attempts + 1 WHERE change_key = {}"
        return Statement(mark, (self._change_key,))

    def fenced(self) -> CdcWorkerError:
        return CdcWorkerError("there is no such dead letter")


def replay(crm: Crm, *, before_commit: Callable[[], object] = lambda: None) -> None:
    """Write the only dead letter as the stream would have, by what backfill.py and the sink have for it."""
    settings = config.load(None, {"dsn": crm.dsn, "slot": crm.slot})
    given = profile.load("leadfi")
    with psycopg.connect(crm.dsn) as connection:
        ((change_key, change),) = connection.execute("SELECT change_key, change FROM cdc_worker.dead_letter").fetchall()
        known = checkpoint.read(connection, settings.worker)
    key = parsed_key(settings.worker, Clusters(known.system_identifier), change_key)
    assert key is not None
    meant = recorded(given, "lead")
    event = Event(str(change["new"]["lead_id"]), key.rule, "created", key.place)
    with postgres.connect(crm.dsn, settings.worker) as writing:
        writing.execute("SET cdc_worker.protect = off")
        table = catalog.check(writing, given, settings.rules(given))
        late = {key.place: made_up(meant, event, [], [])}
        statements = replacement(given.target, table, settings.worker, Clusters(known.system_identifier), late)
        sink = Sink(
            writing,
            given.target,
            table=table,
            time_zone="UTC",
            progress=Replay(change_key),
            decode=str,
            also=lambda rows: f"{statements}; ",
        )
        inserted = Change("insert", "public", "lead", None, change["new"])
        lsn = key.place.lsn
        transaction = Transaction(7, lsn, LSN(lsn + 8), datetime.now(UTC), [inserted], [], [inserted], 0, True, True)
        (outcome,) = transform(
            settings.rules(given), [transaction], worker=settings.worker, system_identifier=known.system_identifier
        )
        assert isinstance(outcome, Activity)
        assert outcome.change_key == change_key
        batch = Batch(Position(LSN(0)))
        batch.add([sink.line(outcome, inserted)], transaction, done=1, complete=True)
        before_commit()
        wait(sink.write(batch), sink.fileno())  # type: ignore[arg-type]  # as in the worker


def test_a_creation_that_is_recorded_after_all_replaces_what_was_made_up(crm: Crm) -> None:
    crm.execute("ALTER TABLE activity ADD CONSTRAINT no_web CHECK (metadata ->> 'source' <> 'web')")
    add_leads(crm, 7)
    crm.record()
    crm.execute("ALTER TABLE activity DROP CONSTRAINT no_web")
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        assert fill(crm, "lead")["lead"].activities == {"lead_created": 1}  # nobody knows whether it is ever recorded
        (before,) = crm.activities()
        with pytest.raises(ZeroDivisionError):
            replay(crm, before_commit=lambda: 1 // 0)
        assert crm.activities() == [before]
        replay(crm)
        (after,) = crm.activities()
        assert fill(crm, "lead")["lead"].activities == {}
        worker.terminate()
    assert "backfilled" in before["metadata"]
    assert "backfilled" not in after["metadata"]
    assert after["change_key"].endswith("/public.lead/0/lead_created")
    assert crm.activities() == [after]


def test_a_backfill_that_is_at_it_hears_of_what_is_recorded_after_all(crm: Crm) -> None:
    crm.execute("ALTER TABLE activity ADD CONSTRAINT no_web CHECK (metadata ->> 'source' <> 'web')")
    add_leads(crm, 7)
    crm.record()
    crm.execute("ALTER TABLE activity DROP CONSTRAINT no_web")
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        with ThreadPoolExecutor() as pool, filling(crm, "lead") as process:
            with crm.connection.transaction():
                crm.execute("LOCK TABLE activity IN SHARE MODE")
                eventually(lambda: waiting_for_locks(crm) == 1, what="it waits for the target")
                replayed = pool.submit(replay, crm)
                eventually(lambda: waiting_for_locks(crm) == 2, what="the replay waits for it")
            replayed.result()
            assert process.wait() == 0, process.said
        worker.terminate()
    assert ["backfilled" in activity["metadata"] for activity in crm.activities()] == [False]


def test_a_row_that_gets_a_key_behind_it_is_not_passed_by(bare_crm: Crm) -> None:
    crm = bare_crm
    add_leads(crm, *range(10, 20))
    crm.setup()
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        with filling(crm, "lead", "--rate", "0.001") as interrupted:
            reached(crm, 1)
            interrupted.kill()
        change(crm, 15, "lead_id = 5")
        fill(crm, "lead")
        change(crm, 5, "lead_id = 4")
        assert fill(crm, "lead")["lead"].activities == {}
        worker.terminate()
    created = [a["lead_id"] for a in crm.activities() if a["activity_type"] == "lead_created"]
    assert sorted(created) == [5, 10, 11, 12, 13, 14, 16, 17, 18, 19]
