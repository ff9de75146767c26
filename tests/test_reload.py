"""A profile that changes while the worker runs, and tables that are added to it: exactly from one change on."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import LiteralString

import psycopg
import pytest
from application import Application, Connection, owed, statuses, told
from psycopg import sql
from support import Crm, WorkerProcess, eventually, grant
from test_deploy import Manager

from cdc_worker import ddl
from cdc_worker.cluster import Cluster

LEADFI = (Path(ddl.__file__).parent / "profiles" / "leadfi.toml").read_text("utf-8")

OTHER_WORDS = LEADFI.replace("Lead status changed", "Status changed")

WITH_CONTACTS = LEADFI.replace(
    '[tables.contact]\nkey = "contact_id"\n',
    """[tables.contact]
key = "contact_id"
identity = { contact_id = "{row.contact_id}" }
fields = { lead = "{row.lead_id}", customer = "{row.customer_uid}" }

[[tables.contact.rules]]
on = "insert"
type = "contact_added"
description = "Contact {new.contact_id} added"

[[tables.contact.rules]]
on = "update"
changed = "*"
type = "contact_updated"
description = "Contact {new.contact_id} updated: {columns}"
""",
)

THINGS = """
[tables."{0}"]
identity = {{ thing_id = "{{row.thing_id}}" }}
fields = {{}}

[[tables."{0}".rules]]
on = "insert"
type = "thing_added"
description = "Thing added"
"""

WITH_THINGS = LEADFI + THINGS.format("thing")


def with_profile(crm: Crm, text: str) -> Path:
    """Let the commands use a profile with this text."""
    path = crm.directory / "profile.toml"
    path.write_text(text, "utf-8")
    crm.settings["profile"] = str(path)
    return path


def contact(crm: Crm, number: int) -> None:
    crm.execute("INSERT INTO contact (contact_id, customer_uid, lead_id) VALUES (%s, 1, 1)", number)
    crm.execute("UPDATE contact SET is_primary_contact = false WHERE contact_id = %s", number)


def of_contacts(crm: Crm) -> list[str]:
    """What is told of contacts, in order."""
    return [a["description"] for a in crm.activities() if a["activity_type"].startswith("contact")]


def hang_up(crm: Crm, worker: WorkerProcess) -> None:
    worker.process.send_signal(signal.SIGHUP)


@contextmanager
def within_a_commit(crm: Crm, also: LiteralString = "written_at = written_at") -> Iterator[Connection]:
    """Hold the worker up where it has written a part of a commit, and no more."""
    with psycopg.connect(crm.dsn) as holder:

        def held() -> bool:
            cursor = holder.execute(
                b"UPDATE cdc_worker.checkpoint SET " + also.encode() + b" WHERE commit_lsn <> '0/0'"
            )
            if not cursor.rowcount:
                holder.rollback()
            return cursor.rowcount > 0

        eventually(held)
        yield holder


# Tables that are added beside a running worker


def contacts(connection: Connection, session: int, turn: int) -> None:
    """Change a lead, add a contact and change it, and note whether the table had its full replica identity by then."""
    statuses(connection, session, turn)
    number = session * 1_000_000 + turn
    connection.execute("INSERT INTO contact (contact_id, customer_uid, lead_id) VALUES (%s, 1, 1)", (number,))
    connection.execute("UPDATE contact SET is_primary_contact = false WHERE contact_id = %s", (number,))
    # Who has written to a table keeps its identity from being altered.
    connection.execute(
        "INSERT INTO wanted SELECT %s FROM pg_class WHERE oid = 'contact'::regclass AND relreplident = 'f'", (number,)
    )


def wanted(crm: Crm) -> Counter[str]:
    """What there is to tell of contacts."""
    numbers = [number for (number,) in crm.execute("SELECT contact_id FROM wanted")]
    texts = ("Contact {} added", "Contact {} updated: is_primary_contact")
    return Counter(text.format(number) for number in numbers for text in texts)


@pytest.fixture
def crm_with_contacts(crm: Crm) -> Crm:
    """LeadFi, whose profile doesn't tell of contacts yet."""
    with_profile(crm, LEADFI)
    crm.add_leads(100)
    crm.execute("INSERT INTO customer (customer_uid, name) VALUES (1, 'Acme')")
    crm.execute("CREATE TABLE wanted (contact_id int)")
    return crm


@pytest.mark.parametrize(
    ("order", "meanwhile"),
    [
        (["setup", "SIGHUP"], "caught up"),
        (["SIGHUP", "setup"], "caught up"),
        (["setup"], "caught up"),
        (["setup", "SIGHUP"], "lagging"),
        (["SIGHUP", "setup"], "lagging"),
        (["setup"], "lagging"),
        (["setup"], "disconnected"),
    ],
    ids=lambda value: value if isinstance(value, str) else " and ".join(value),
)
def test_a_table_that_is_added_is_recorded_from_its_full_replica_identity_on(
    crm_with_contacts: Crm, order: list[str], meanwhile: str
) -> None:
    crm = crm_with_contacts
    with crm.worker() as worker:
        eventually(lambda: len(crm.types()) == 101)
        if meanwhile != "caught up":
            worker.process.send_signal(signal.SIGSTOP)  # it has nothing in hand
        with Application(crm, contacts) as application:
            application.go_on(20)
            with_profile(crm, WITH_CONTACTS)
            for what in order:
                if what == "setup":
                    assert crm.succeed("setup").splitlines()[0] == "replica identity of public.contact is FULL"
                else:
                    hang_up(crm, worker)
                    if meanwhile == "caught up":
                        worker.wait_for("profile_reloaded")
                application.go_on(20)
        if meanwhile == "disconnected":
            name = f"cdc-worker {crm.slot}"
            crm.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = %s", name)
            writing = (
                "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s AND backend_type <> 'walsender'"
            )
            eventually(lambda: not crm.value(writing, name))
        worker.process.send_signal(signal.SIGCONT)
        assert wanted(crm).total() >= 3 * 20 * 2
        eventually(lambda: Counter(of_contacts(crm)) == wanted(crm))
        eventually(lambda: told(crm) == Counter(owed(application.done)))
        assert worker.events("profile_reloaded")
        assert not worker.events("cutover_pending")
        if order[0] == "SIGHUP" and meanwhile == "caught up":
            assert worker.wait_for("table_not_set_up")["tables"] == ["public.contact"]
        assert worker.terminate() == 0
    assert crm.value("SELECT count(*) FROM cdc_worker.dead_letter") == 0


def test_a_successor_that_waited_for_the_slot_meanwhile_has_the_table_as_well(crm_with_contacts: Crm) -> None:
    crm = crm_with_contacts
    with crm.worker() as first:
        first.wait_for("replication_started")
        with crm.worker() as second:
            second.wait_for("waiting_for_slot")
            second.process.send_signal(signal.SIGSTOP)  # it might take the slot while the first begins anew
            with_profile(crm, WITH_CONTACTS)
            crm.succeed("setup")
            contact(crm, 1)
            eventually(lambda: len(of_contacts(crm)) == 2)
            first.kill()
            second.process.send_signal(signal.SIGCONT)
            contact(crm, 2)
            eventually(lambda: len(of_contacts(crm)) == 4)
            assert second.terminate() == 0


def test_a_table_is_recorded_from_its_full_replica_identity_on_however_far_the_worker_lags(crm: Crm) -> None:
    """What was changed before carries no old values: it is left out, and is no dead letter."""
    crm.add_leads(1)
    crm.execute("INSERT INTO customer (customer_uid, name) VALUES (1, 'Acme')")
    contact(crm, 1)
    with_profile(crm, WITH_CONTACTS)
    crm.succeed("setup")
    contact(crm, 2)
    crm.record()
    assert of_contacts(crm) == ["Contact 2 added", "Contact 2 updated: is_primary_contact"]
    assert crm.value("SELECT count(*) FROM cdc_worker.dead_letter") == 0


def test_an_identity_that_is_mended_on_a_table_that_was_recorded_before_loses_nothing(crm: Crm) -> None:
    """An insert before it is recorded, an update without old values is a dead letter."""
    crm.execute("ALTER TABLE lead REPLICA IDENTITY DEFAULT")
    crm.add_leads(1)
    crm.execute("UPDATE lead SET status = 'unknown before'")
    crm.succeed("setup")
    crm.execute("UPDATE lead SET status = 'known'")
    crm.record()
    assert crm.types() == ["lead_created", "status_changed"]
    assert crm.execute("SELECT kind FROM cdc_worker.dead_letter") == [("old_values_unknown",)]


def test_a_table_that_setup_knows_and_the_profile_does_not_is_warned_of(crm: Crm) -> None:
    with_profile(crm, WITH_CONTACTS)
    crm.succeed("setup")
    with_profile(crm, LEADFI)
    with crm.worker() as worker:
        assert worker.wait_for("table_not_in_profile")["tables"] == ["public.contact"]
        assert worker.terminate() == 0


def test_a_table_that_waits_for_its_cut_over_is_warned_of_whatever_came_later(crm: Crm) -> None:
    """The order of its stretches in the table is anybody's."""
    crm.execute(
        "INSERT INTO cdc_worker.excluded (worker, table_name, from_lsn) VALUES (%s, 'public.lead', 'F/0')", crm.slot
    )
    crm.execute("UPDATE cdc_worker.excluded SET until_lsn = until_lsn WHERE from_lsn = '0/0'")
    crm.execute("ANALYZE cdc_worker.excluded")  # it is read as it lies there
    with crm.worker() as worker:
        assert worker.wait_for("cutover_pending")["tables"] == ["public.lead"]
        assert worker.terminate() == 0


# Within a large commit, whose changes are counted


def test_a_signal_within_a_large_commit_waits_for_its_end(crm: Crm) -> None:
    with_profile(crm, LEADFI)
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        with crm.connection.transaction():
            crm.add_leads(10_000)
            crm.execute("UPDATE lead SET status = 'x'")
        with within_a_commit(crm):
            with_profile(crm, OTHER_WORDS)
            hang_up(crm, worker)
        worker.wait_for("profile_reloaded")
        crm.execute("UPDATE lead SET status = 'y' WHERE lead_id = 1")
        eventually(lambda: crm.value("SELECT count(*) FROM activity") == 20_001)
    texts = crm.execute("SELECT description, count(*) FROM activity WHERE activity_type = 'status_changed' GROUP BY 1")
    assert sorted(texts) == [
        ('Lead status changed from "1. lead generated" to "x"', 10_000),
        ('Status changed from "x" to "y"', 1),
    ]


@pytest.fixture
def large_commit(crm: Crm) -> Crm:
    """LeadFi, whose profile doesn't have things yet, with a commit of many leads to be recorded."""
    crm.execute("CREATE TABLE thing (thing_id int PRIMARY KEY)")
    with_profile(crm, LEADFI)
    with crm.connection.transaction():
        crm.execute("INSERT INTO thing SELECT generate_series(1, 2000)")
        crm.add_leads(10_000)
    return crm


def records_things_from_now_on(crm: Crm) -> None:
    """Wait until it does, and hold what was recorded against what there was."""
    crm.succeed("setup")
    crm.execute("INSERT INTO thing VALUES (0)")
    eventually(lambda: "thing_added" in crm.types())
    assert Counter(crm.types()) == {"lead_created": 10_000, "thing_added": 1}


def test_a_scope_that_changes_within_a_large_commit_leaves_the_profile_until_its_end(large_commit: Crm) -> None:
    with large_commit.worker() as worker:
        with within_a_commit(large_commit, "nonce = gen_random_uuid()"):
            with_profile(large_commit, WITH_THINGS)
        worker.wait_for("profile_reloaded")
        events = [event["event"] for event in worker.events()]
        assert events[:4] == ["replication_started", "scope_changed", "replication_started", "profile_reloaded"]
        records_things_from_now_on(large_commit)
        assert worker.terminate() == 0


def test_a_signal_to_a_worker_that_begins_within_a_commit_waits_for_its_end(large_commit: Crm) -> None:
    with large_commit.worker() as first, within_a_commit(large_commit) as holder:
        name = f"cdc-worker {large_commit.slot}"
        of_first = large_commit.value("SELECT array_agg(pid) FROM pg_stat_activity WHERE application_name = %s", name)
        first.kill()
        with large_commit.worker() as second:
            taking_over = (
                "SELECT count(*) FROM pg_stat_activity"
                " WHERE wait_event_type = 'Lock' AND application_name = %s AND pid <> ALL (%s)"
            )
            eventually(lambda: large_commit.value(taking_over, name, of_first))
            with_profile(large_commit, WITH_THINGS)
            hang_up(large_commit, second)
            holder.rollback()
            second.wait_for("profile_reloaded")
            records_things_from_now_on(large_commit)
            assert second.terminate() == 0


def test_while_it_begins_anew_it_does_not_say_that_it_records(
    crm: Crm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = Manager(tmp_path / "notify", watchdog=0.4)
    for name, value in manager.variables.items():
        monkeypatch.setenv(name, value)
    with crm.worker() as worker, psycopg.connect(crm.dsn) as holder:
        eventually(lambda: manager.hears("STATUS=active"))
        holder.execute("LOCK TABLE cdc_worker.checkpoint")
        hang_up(crm, worker)
        eventually(lambda: manager.hears("STATUS=connecting"))
        manager.heard.clear()
        holder.rollback()
        eventually(lambda: manager.hears("STATUS=active"))
        assert worker.terminate() == 0


def test_a_worker_that_was_killed_within_a_commit_is_not_started_with_other_tables(crm: Crm) -> None:
    """They would count its changes otherwise: some would be passed over, and others told twice."""
    crm.execute("CREATE TABLE thing (thing_id int PRIMARY KEY)")
    with_profile(crm, WITH_THINGS)
    crm.setup()
    with crm.connection.transaction():
        crm.execute("INSERT INTO thing SELECT generate_series(1, 8000)")
        crm.add_leads(8_000)
    with crm.worker() as worker, within_a_commit(crm):
        worker.kill()
    at = crm.value("SELECT commit_lsn::text FROM cdc_worker.checkpoint")
    with_profile(crm, LEADFI)
    done = crm.command("run")
    assert done.returncode == 17
    assert done.stderr.splitlines()[1:] == [
        f"error: the worker stopped within the commit at {at}, whose changes were counted with the tables"
        " public.contact (facts), public.customer, public.lead, public.thing,"
        " and the profile has public.contact (facts), public.customer, public.lead",
        "hint: run it with those tables until that commit is done, then change the profile",
    ]
    with_profile(crm, WITH_THINGS)
    crm.record()
    with_profile(crm, LEADFI)
    crm.record()
    assert Counter(crm.types()) == {"lead_created": 8_000, "thing_added": 8_000}


def test_a_commit_whose_rest_means_nothing_is_done_all_the_same(crm: Crm) -> None:
    """A position within it would keep the profile from being changed for as long as nothing happens."""
    crm.execute("CREATE TABLE thing (thing_id int PRIMARY KEY)")
    path = with_profile(crm, WITH_THINGS)
    crm.setup()
    with crm.worker(idle_advance_interval="1000") as worker:
        worker.wait_for("replication_started")
        with crm.connection.transaction():
            crm.add_leads(5_000)
            crm.execute("UPDATE lead SET title = title")
        with within_a_commit(crm):
            pass
        eventually(lambda: crm.value("SELECT commit_lsn = '0/0' FROM cdc_worker.checkpoint"))
        path.write_text(LEADFI, "utf-8")
        hang_up(crm, worker)
        worker.wait_for("profile_reloaded")
        crm.add_leads(1)
        eventually(lambda: len(crm.types()) == 5_001)
        assert worker.terminate() == 0


# SIGHUP, whenever it comes


def tells_in_other_words(crm: Crm) -> None:
    """Wait until the worker tells of a change as OTHER_WORDS has it."""
    crm.execute("UPDATE lead SET status = random()::text")
    eventually(lambda: [told for told in crm.activities()[-1:] if told["description"].startswith("Status changed")])


def test_a_profile_that_is_wrong_changes_nothing(crm: Crm) -> None:
    path = with_profile(crm, LEADFI)
    crm.add_leads(30)
    with crm.worker() as worker, Application(crm, statuses) as application:
        worker.wait_for("replication_started")
        wrong = (
            ("name = 'broken'", 'profile "'),
            (LEADFI.replace('table = "activity"', 'table = "nowhere"'), "target table public.nowhere does not exist"),
            (WITH_THINGS, "captured table public.thing does not exist"),
        )
        for number, (text, reason) in enumerate(wrong):
            path.write_text(text, "utf-8")
            hang_up(crm, worker)
            eventually(lambda: len(worker.events("profile_refused")) > number)  # noqa: B023
            assert reason in worker.events("profile_refused")[number]["reason"]
            application.go_on(10)
    crm.settings.clear()
    crm.record()
    assert told(crm) == Counter(owed(application.done))


def test_a_profile_with_a_table_that_the_role_may_not_see_changes_nothing(crm: Crm) -> None:
    path = with_profile(crm, LEADFI)
    role = f"reader_of_{crm.slot}"
    crm.execute("CREATE SCHEMA hidden CREATE TABLE thing (thing_id int PRIMARY KEY)")
    grant(crm, role)
    try:
        with crm.worker() as worker:
            worker.wait_for("replication_started")
            path.write_text(LEADFI + THINGS.format("hidden.thing"), "utf-8")
            hang_up(crm, worker)
            reason = worker.wait_for("profile_refused")["reason"]
            assert reason == "the server refused: permission denied for schema hidden (SQLSTATE 42501)"
            crm.add_leads(1)
            eventually(crm.activities)
            assert worker.terminate() == 0
    finally:
        for statement in ("DROP OWNED BY {}", "DROP ROLE {}"):
            crm.connection.execute(sql.SQL(statement).format(sql.Identifier(role)))


def test_a_signal_to_a_worker_that_waits_for_its_slot_is_heeded(crm: Crm) -> None:
    with_profile(crm, LEADFI)
    crm.add_leads(1)
    with crm.worker() as first:
        first.wait_for("replication_started")
        with crm.worker() as second:
            second.wait_for("waiting_for_slot")
            with_profile(crm, OTHER_WORDS)
            hang_up(crm, second)
            first.kill()
            second.wait_for("profile_reloaded")
            tells_in_other_words(crm)
            assert second.terminate() == 0


def test_a_signal_while_the_server_is_down_is_heeded(own_crm: Crm, own_server: Cluster) -> None:
    with_profile(own_crm, LEADFI)
    own_crm.add_leads(1)
    with own_crm.worker() as worker:
        worker.wait_for("replication_started")
        own_server.stop("fast")
        worker.wait_for("connection_lost")
        with_profile(own_crm, OTHER_WORDS)
        hang_up(own_crm, worker)
        own_server.start()
        own_crm.reconnect()
        worker.wait_for("profile_reloaded")
        tells_in_other_words(own_crm)
        assert worker.terminate() == 0


def test_a_signal_to_a_run_once_is_heeded_and_it_ends_all_the_same(crm: Crm) -> None:
    with_profile(crm, LEADFI)
    crm.add_leads(3)
    with psycopg.connect(crm.dsn) as locker:
        locker.execute("LOCK TABLE activity")
        with crm.worker("--once") as worker:
            waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'activity'::regclass"
            eventually(lambda: crm.value(waiting))
            hang_up(crm, worker)
            locker.rollback()
            assert worker.wait() == 0
            assert worker.events("profile_reloaded")
    assert crm.types() == ["lead_created"] * 3


@pytest.fixture
def pipe(crm: Crm) -> Path:
    """A profile that is read from a pipe: only as far as the test has written it."""
    path = crm.directory / "profile.pipe"
    os.mkfifo(path)
    crm.settings["profile"] = str(path)
    return path


@contextmanager
def being_read(pipe: Path, text: str) -> Iterator[None]:
    """While somebody reads the profile, who gets its text afterwards."""

    def opened() -> int | None:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            return None  # nobody reads

    descriptor = eventually(opened)
    assert descriptor is not None
    try:
        yield
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


@contextmanager
def asked_to_reload(crm: Crm, pipe: Path) -> Iterator[WorkerProcess]:
    """A worker that has been asked to read its profile from the pipe."""
    crm.add_leads(1)
    with crm.worker() as worker:
        with being_read(pipe, LEADFI):
            pass
        worker.wait_for("replication_started")
        hang_up(crm, worker)
        yield worker


def test_a_second_signal_while_the_profile_is_read_has_it_read_again(crm: Crm, pipe: Path) -> None:
    with asked_to_reload(crm, pipe) as worker:
        with being_read(pipe, LEADFI):
            hang_up(crm, worker)
            hang_up(crm, worker)
        worker.wait_for("profile_reloaded")
        with being_read(pipe, OTHER_WORDS):
            pass
        eventually(lambda: len(worker.events("profile_reloaded")) == 2)
        tells_in_other_words(crm)
        assert worker.terminate() == 0


def waits(pid: int) -> bool:
    """Whether a process sleeps in the kernel: a signal that comes just before it does interrupts nothing."""

    def state() -> list[str]:
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        return [line for line in status if line.startswith(("State:", "voluntary", "nonvoluntary"))]

    before = state()
    time.sleep(0.05)
    return state() == before and before[0].split()[1] == "S"


def test_sigterm_ends_a_worker_that_reads_its_profile(crm: Crm, pipe: Path) -> None:
    with asked_to_reload(crm, pipe) as worker, being_read(pipe, ""):
        eventually(lambda: waits(worker.process.pid), what="it waits for what the pipe has to say")
        assert worker.terminate() == 0
        assert worker.events()[-1]["event"] == "worker_stopped"


def test_a_profile_that_the_server_was_not_there_to_check_is_read_again(own_crm: Crm, own_server: Cluster) -> None:
    pipe = own_crm.directory / "profile.pipe"
    os.mkfifo(pipe)
    own_crm.settings["profile"] = str(pipe)
    with asked_to_reload(own_crm, pipe) as worker:
        with being_read(pipe, LEADFI):
            own_server.crash()
        worker.wait_for("connection_lost")
        own_server.start()
        own_crm.reconnect()
        with being_read(pipe, OTHER_WORDS):
            pass
        worker.wait_for("profile_reloaded")
        tells_in_other_words(own_crm)
        assert worker.terminate() == 0
