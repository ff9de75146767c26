"""Backfill as its users meet it: options, what is printed, interruptions, and what they get wrong."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest
from doctoring import mend
from structlog.testing import capture_logs
from support import Crm, WorkerProcess, eventually, role, stranger
from test_backfill import add_customer, add_leads, fill, filling, reached, told, waiting_for_locks

from cdc_worker import config, errors, fence, profile, progress
from cdc_worker.backfill import SAMPLES, Backfilled, Sample, Wishes
from cdc_worker.cluster import Cluster
from cdc_worker.status import Backfill, Status, lines, status


@pytest.fixture
def crm(new_crm: Crm) -> Crm:
    return new_crm


@contextmanager
def begun(crm: Crm) -> Iterator[WorkerProcess]:
    """Let the worker begin, and run."""
    crm.setup()
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        yield worker


def leads(crm: Crm) -> list[int | None]:
    """The leads that were told of, in order."""
    return [lead_id for _, lead_id, _ in told(crm)]


# Which rows


def test_dates_are_in_the_targets_zone_unless_they_have_one(crm: Crm) -> None:
    """Lead 1 was created at noon of the second of January, and each of the others a day later."""
    crm.settings["time_zone"] = "Asia/Tokyo"
    add_leads(crm, *range(1, 9))
    with begun(crm):
        fill(crm, "lead", since=datetime(2020, 1, 4, 12), until=datetime(2020, 1, 5, 12))
        assert leads(crm) == [3]
        fill(crm, "lead", since=datetime(2020, 1, 6, 3, tzinfo=UTC), until=datetime(2020, 1, 7, 3, tzinfo=UTC))
        assert leads(crm) == [3, 5]
        crm.succeed("backfill", "lead", "--since", "2020-01-08T12:00:00.000001+09:00")
        assert leads(crm) == [3, 5, 8]
        crm.succeed("backfill", "lead", "--until", "2020-01-03")
        assert leads(crm) == [1, 3, 5, 8]
        fill(crm)
        assert leads(crm) == [*range(1, 9)]


def test_a_range_of_keys_begins_after_the_one_and_ends_with_the_other(crm: Crm) -> None:
    add_leads(crm, *range(1, 9))
    with begun(crm):
        assert fill(crm, "lead", from_key=("2",), to_key=("4",))["lead"].rows == 2
        assert leads(crm) == [3, 4]
        crm.succeed("backfill", "lead", "--to-key", "1")
        crm.succeed("backfill", "lead", "--from-key", "7")
        assert leads(crm) == [1, 3, 4, 8]
        crm.succeed("backfill", "lead", "--from-key", "-5")
        assert leads(crm) == [*range(1, 9)]


def test_different_wishes_are_parts_with_a_progress_of_their_own(crm: Crm) -> None:
    add_leads(crm, *range(1, 7))
    with begun(crm):
        for wishes in ({}, {"to_key": ("3",)}, {"from_key": ("3",)}, {"since": datetime(2020, 1, 4)}):
            fill(crm, "lead", **wishes)
        fill(crm, "lead", chunk_size=2, rate=1e6)  # how fast makes no part
        parts = crm.execute("SELECT part, rows FROM cdc_worker.backfill ORDER BY part")
    assert parts == [("", 6), ("from 3", 3), ("since 2020-01-04T00:00:00", 6), ("to 3", 3)]


def test_no_two_parts_have_one_name() -> None:
    keys = [(), ("",), ("a",), ("b",), ("a to b",), ("a,b",), ("a", "b"), ("'a'",), ("%2C",), (",",)]
    wishes = [Wishes(since, from_key=one, to_key=other) for since in MOMENTS for one in keys for other in keys]
    assert len({wish.part for wish in wishes}) == len(wishes)
    assert Wishes().part == ""
    assert (
        Wishes(datetime(2020, 1, 2), from_key=("a b",), to_key=("7",)).part
        == "since 2020-01-02T00:00:00 from 'a b' to 7"
    )


MOMENTS = [None, datetime(2020, 1, 2), datetime(2020, 1, 2, tzinfo=UTC)]


def test_so_many_rows_are_written_at_once(crm: Crm) -> None:
    add_leads(crm, *range(1, 8))
    with begun(crm):
        crm.succeed("backfill", "lead", "--chunk-size", "3")
    sizes = crm.execute("SELECT count(*) FROM activity GROUP BY xmin::text ORDER BY min(lead_id)")
    assert sizes == [(3,), (3,), (1,)]


def test_with_a_rate_chunks_are_no_larger_than_a_second_takes(crm: Crm) -> None:
    add_leads(crm, *range(1, 4))
    with begun(crm), filling(crm, "lead", "--rate", "2.5"):
        reached(crm, 2)
        assert crm.execute("SELECT count(*) FROM activity GROUP BY xmin::text ORDER BY min(lead_id)")[0] == (2,)


def test_a_dry_run_keeps_to_the_rate_as_well(crm: Crm, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    add_leads(crm, 1, 2)
    crm.setup()
    with monkeypatch.context() as patched:
        patched.setattr(time, "sleep", slept.append)
        assert fill(crm, "lead", dry_run=True, rate=0.001)["lead"].rows == 2
    assert len([seconds for seconds in slept if seconds > 900]) == 2


# What it says


def test_a_dry_run_tells_what_a_run_then_writes_and_needs_no_worker(crm: Crm) -> None:
    add_leads(crm, *range(1, 6))
    add_leads(crm, *range(6, 11), converted=True)
    add_customer(crm, 70, lead_id=6)
    crm.execute("UPDATE lead SET date_created = 'infinity' WHERE lead_id = 2")
    crm.setup()
    states = [f"cdc_worker.{name}" for name in ("backfill", "dead_letter", "checkpoint", "skipped")] + ["activity"]

    def seen() -> list[Any]:
        return [crm.connection.execute(f"SELECT * FROM {name}".encode()).fetchall() for name in states]

    before = seen()
    dry = fill(crm, dry_run=True, chunk_size=3)
    assert seen() == before
    with begun(crm):
        done = fill(crm)
        again = fill(crm, dry_run=True)
    for name, table in done.items():
        assert dry[name].model_copy(update={"dry_run": False, "samples": []}) == table
        assert (again[name].activities, again[name].samples) == ({}, [])
    samples = dry["lead"].samples
    written = crm.execute(
        "SELECT activity_type, coalesce(lead_id, customer_uid)::text, date_created::text, description FROM activity"
    )
    assert [sample for sample in samples if tuple(sample.model_dump().values()) not in written] == []
    assert [(sample.type, sample.subject) for sample in samples] == [
        ("lead_created", "1"),
        ("lead_created", "2"),
        ("lead_created", "3"),
        ("lead_converted", "6"),
    ]
    assert SAMPLES == 3


def test_what_a_person_reads(crm: Crm) -> None:
    add_leads(crm, 1, 2)
    add_customer(crm, 70)
    crm.setup()
    assert crm.succeed("backfill", "--dry-run").splitlines() == [
        "public.lead: 2 rows read, 2 activities would be written: 2 lead_created",
        '  2020-01-02 12:00:00  lead_created  Lead "Lead 1" created',
        '  2020-01-03 12:00:00  lead_created  Lead "Lead 2" created',
        "public.customer: 1 rows read, 1 activities would be written: 1 customer_created",
        '  2021-05-06 07:08:09  customer_created  Customer "Acme" created (ID: 70)',
    ]
    with begun(crm):
        crm.execute("ALTER TABLE activity ADD CHECK (lead_id <> 2)")
        assert crm.succeed("backfill", "lead", "--since", "2000-01-01").splitlines() == [
            "public.lead (since 2000-01-01T00:00:00): 2 rows read, 1 activities written: 1 lead_created",
            "  1 became dead letters: cdc-worker dead-letters list",
        ]


def test_the_fields_of_the_json_are_those_of_the_model_and_told_there(crm: Crm) -> None:
    add_leads(crm, 1)
    crm.setup()
    found = [json.loads(line) for line in crm.succeed("backfill", "--dry-run", "--json").splitlines()]
    assert [list(table) for table in found] == [list(Backfilled.model_fields)] * 2
    assert [Backfilled.model_validate(table).table for table in found] == ["public.lead", "public.customer"]
    assert list(found[0]["samples"][0]) == list(Sample.model_fields)
    for model in (Backfilled, Sample):
        assert [name for name, field in model.model_fields.items() if not field.description] == []


def test_on_a_terminal_there_is_a_progress_bar(crm: Crm) -> None:
    add_leads(crm, *range(1, 6))
    crm.execute("ANALYZE lead")
    crm.setup()
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 200, 0, 0))
    try:
        subprocess.run(
            [sys.executable, "-m", "cdc_worker", "backfill", "lead", "--dry-run"],
            env=crm.environment(),
            stdout=subprocess.PIPE,
            stderr=theirs,
            check=True,
        )
        shown = os.read(ours, 1 << 16).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert re.search(r"public\.lead: 100%.*5/5 \[\d\d:\d\d<00:00, .*rows/s\]", shown), shown


def test_elsewhere_the_log_tells_how_far_it_is(crm: Crm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    add_leads(crm, *range(1, 6))
    crm.execute("ANALYZE lead")
    crm.setup()
    with capture_logs() as events:
        fill(crm, "lead", dry_run=True, chunk_size=2)
    told = [(event["event"], event["what"], event["done"], event["total"]) for event in events]
    assert told == [("progress", "public.lead", done, 5) for done in (2, 4, 5)]
    assert events[-1]["seconds_left"] == 0
    assert events[-1]["per_second"] > 0


# Interrupted


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_interrupts_it_is_told_that_it_goes_on_from_there(crm: Crm, number: int) -> None:
    add_leads(crm, *range(1, 4))
    with begun(crm), filling(crm, "lead", "--rate", "0.001") as interrupted:
        reached(crm, 1)
        interrupted.process.send_signal(number)
        assert interrupted.wait() == 130
        assert interrupted.said == "interrupted: what is written stays, and the same command goes on from there\n"
        done = fill(crm, "lead")["lead"]
        assert (done.resumed, done.rows) == (True, 2)
        assert leads(crm) == [1, 2, 3]


def test_a_dry_run_that_is_interrupted_has_written_nothing(crm: Crm) -> None:
    add_leads(crm, 1)
    crm.setup()
    with psycopg.connect(crm.dsn) as other:
        other.execute("LOCK TABLE lead")
        with filling(crm, "lead", "--dry-run") as interrupted:
            eventually(lambda: waiting_for_locks(crm), what="it waits for the table")
            interrupted.process.send_signal(signal.SIGINT)
            assert interrupted.wait() == 130
            assert interrupted.said == "interrupted: nothing was written\n"


def test_setup_that_is_interrupted_goes_on_as_well(crm: Crm) -> None:
    add_leads(crm, 1)
    with psycopg.connect(crm.dsn) as other:
        other.execute("LOCK TABLE activity IN SHARE MODE")
        setting_up = WorkerProcess(["setup", "--with-backfill"], crm.environment(), crm.directory / "setup.log")
        with setting_up:
            eventually(lambda: waiting_for_locks(crm), what="it waits for the target")
            setting_up.process.send_signal(signal.SIGINT)
            assert setting_up.wait() == 130
        assert setting_up.said.endswith(
            "interrupted: what is written stays, and the same command goes on from there\n"
        ), setting_up.said
    assert crm.succeed("setup", "--with-backfill").splitlines()[-2].endswith("1 activities written: 1 lead_created")


def backfills(crm: Crm) -> tuple[list[Backfill], list[str]]:
    """What the status says of backfills, to machines and to people."""
    found = status(config.load(None, {"dsn": crm.dsn, "slot": crm.slot}))
    return found.backfills, [line.removeprefix("backfill:").strip() for line in lines(found) if "backfill" in line]


def test_the_status_shows_it_running_interrupted_and_finished(crm: Crm) -> None:
    add_leads(crm, *range(1, 6))
    crm.execute("ANALYZE lead")
    with begun(crm):
        assert backfills(crm) == ([], [])
        with filling(crm, "lead", "--rate", "0.001") as running:
            reached(crm, 1, running)
            ((found,), (line,)) = backfills(crm)
            assert (found.table, found.part, found.finished_at) == ("public.lead", "", None)
            assert (found.rows, found.expected, found.activities) == (1, 5, 1)
            assert line.startswith("public.lead: 1 of about 5 rows, 1 activities, last written 20")
            running.process.send_signal(signal.SIGINT)
            running.wait()
        ((left,), _) = backfills(crm)
        assert left.finished_at is None
        fill(crm, "lead")
        fill(crm, "lead", to_key=("1",))
        (whole, part), (said, of_part) = backfills(crm)
        assert (whole.rows, whole.activities, whole.dead_letters, part.part) == (5, 5, 0, "to 1")
        assert whole.finished_at is not None
        assert re.fullmatch(r"public\.lead: 5 rows, 5 activities, finished 20.* UTC", said)
        assert of_part.startswith("public.lead (to 1): 1 rows, 0 activities, finished 20")
        machine = Status.model_validate_json(crm.succeed("status", "--json"))
        assert machine.backfills == [whole, part]


# What users get wrong


def refused(crm: Crm, *arguments: str, code: int = 1, **settings: str) -> tuple[str, str]:
    """What the command says, message and hint: one error."""
    done = crm.command("backfill", *arguments, **settings)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    said = re.fullmatch(r"error: (.*)\nhint: (.*)\n", done.stderr)
    assert said, done.stderr
    return said[1], said[2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nosuch"], ('the profile "leadfi" has no table "nosuch"', "those it has: lead, customer, contact")),
        (
            ["contact"],
            (
                'nothing to backfill: the table contact has no rule with "backfill" in the profile "leadfi"',
                "those that have: lead, customer",
            ),
        ),
        (["--from-key", "1"], ("keys are of one table", "name one of: lead, customer")),
        (["lead", "customer", "--to-key", "1"], ("keys are of one table", "name one of: lead, customer")),
        (
            ["--profile", "sales_cookbook"],
            (
                'nothing to backfill: there is no rule with "backfill" in the profile "sales_cookbook"',
                'say in a rule\'s "backfill" when it happened',
            ),
        ),
    ],
)
def test_what_there_is_to_backfill_the_profile_says(crm: Crm, arguments: list[str], said: tuple[str, str]) -> None:
    assert refused(crm, *arguments, code=2) == said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--since", "yesterday"], "'yesterday' is no date such as 2026-01-31, 2026-01-31T12:00 or "),
        (["--until", "2026-02-30"], "'2026-02-30' is no date such as "),
        (["--rate", "0"], "0.0 is not in the range x>0."),
        (["--chunk-size", "0"], "0 is not in the range 1<=x<=100000."),
    ],
)
def test_a_wish_that_means_nothing_is_misuse(crm: Crm, arguments: list[str], said: str) -> None:
    done = crm.command("backfill", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"Invalid value for '{arguments[0]}': {said}" in done.stderr


def test_a_key_is_read_as_the_database_reads_it(crm: Crm) -> None:
    crm.setup()
    for key in ("Ada", "", "99999999999"):
        assert refused(crm, "lead", "--dry-run", "--from-key", key, code=2) == (
            f"{key} can't be a key of public.lead: lead_id is of the type integer",
            "name a key of a row",
        )
    assert refused(crm, "lead", "--dry-run", "--to-key", "1", "--to-key", "2", code=2) == (
        "1 2 can't be a key of public.lead, which is lead_id",
        "give a value for each column",
    )


def test_before_setup_it_says_so(crm: Crm) -> None:
    for arguments in ((), ("--dry-run",)):
        said = refused(crm, *arguments)
        assert said == (f'there is no checkpoint of the worker "{crm.slot}"', "run: cdc-worker setup")
    mend(crm, "cdc-worker setup")
    assert refused(crm)[0].startswith("nobody reads the slot")


def test_after_an_upgrade_it_wants_the_tables_of_its_version(crm: Crm) -> None:
    crm.setup()
    crm.execute("DROP TABLE cdc_worker.backfill, cdc_worker.skipped")
    crm.execute("DELETE FROM cdc_worker.schema_file")
    for command in ("backfill", "status", "forget --lead 7 --yes"):
        said = crm.command(*command.split()).stderr
        assert 'tables of cdc-worker are not those of this version: relation "cdc_worker.' in said
        assert said.endswith("\nhint: run: cdc-worker setup\n")
    mend(crm, "cdc-worker setup")
    with begun(crm):
        fill(crm)


def test_without_a_worker_nothing_is_read_or_written(crm: Crm) -> None:
    add_leads(crm, 1)
    crm.setup()
    assert refused(crm) == (
        f'nobody reads the slot "{crm.slot}": what is committed by now is not recorded before a worker runs',
        "run: cdc-worker run, beside this command",
    )
    assert crm.value("SELECT count(*) FROM cdc_worker.backfill") == 0
    with begun(crm):
        crm.succeed("backfill")


def test_a_worker_that_goes_away_is_waited_for(crm: Crm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fence, "SLOW", 0.0)
    add_leads(crm, 1, 2)
    with begun(crm) as worker, ThreadPoolExecutor() as pool, capture_logs() as events:
        with crm.connection.transaction():
            crm.execute("LOCK TABLE activity IN SHARE MODE")
            filled = pool.submit(fill, crm, "lead", chunk_size=1)
            eventually(lambda: waiting_for_locks(crm), what="it has the first chunk in hand")
            worker.kill()
            eventually(lambda: crm.reader() is None)
        eventually(lambda: [e for e in events if e["event"] == "waiting_for_worker" and not e["running"]])
        assert leads(crm) == [1]
        with crm.worker():
            assert filled.result()["lead"].rows == 2
    assert leads(crm) == [1, 2]


def test_a_worker_that_stays_away_ends_it_and_the_next_run_goes_on(crm: Crm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fence, "ABSENCE", 0.1)
    add_leads(crm, 1, 2)
    with begun(crm) as worker, ThreadPoolExecutor() as pool:
        with crm.connection.transaction():
            crm.execute("LOCK TABLE activity IN SHARE MODE")
            filled = pool.submit(fill, crm, "lead", chunk_size=1)
            eventually(lambda: waiting_for_locks(crm), what="it has the first chunk in hand")
            worker.kill()
            eventually(lambda: crm.reader() is None)
        with pytest.raises(errors.NotRunningError, match="nobody reads the slot"):
            filled.result()
    with begun(crm):
        done = fill(crm, "lead")["lead"]
    assert (done.resumed, done.rows) == (True, 1)
    assert leads(crm) == [1, 2]


def test_who_reads_the_slot_and_is_no_worker_is_not_waited_for(
    server: Cluster, crm: Crm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fence, "ABSENCE", 0.5)
    monkeypatch.setattr(fence, "SLOW", 0.0)
    monkeypatch.setattr(fence, "AGAIN", 0.0)
    add_leads(crm, 1)
    crm.setup()
    with stranger(server, crm) as (_, pid):
        said = (
            f'slot "{crm.slot}" is read by process {pid} (pg_recvlogical, 127.0.0.1), which is no cdc-worker: what is'
            " committed by now is not recorded before a worker runs",
            f"stop that process, or: SELECT pg_terminate_backend({pid})",
        )
        assert refused(crm) == said
        with monkeypatch.context() as patched, capture_logs() as events:
            patched.setattr(fence.Fence, "check", lambda self: None)  # it has come since
            with pytest.raises(errors.NotRunningError) as raised:
                fill(crm)
        assert (str(raised.value), raised.value.hint) == said
    waited = [event["running"] for event in events if event["event"] == "waiting_for_worker"]
    assert len(waited) > 1
    assert not any(waited)


def test_without_a_primary_key_it_prints_the_statement_that_makes_one(crm: Crm) -> None:
    add_leads(crm, 1)
    crm.execute("ALTER TABLE lead DROP CONSTRAINT lead_pkey CASCADE")
    with begun(crm):
        message, hint = refused(crm, "lead")
        assert message == (
            'public.lead has no primary key on its "key" in the profile (lead_id), by which its rows could be read'
        )
        mend(crm, hint)
        crm.succeed("backfill", "lead")
    assert leads(crm) == [1]


def test_a_key_that_may_be_null_is_no_primary_key(crm: Crm) -> None:
    add_leads(crm, 1)
    crm.execute("ALTER TABLE lead DROP CONSTRAINT lead_pkey CASCADE, ADD UNIQUE (lead_id)")
    crm.execute("ALTER TABLE lead ALTER lead_id DROP NOT NULL")
    with begun(crm):
        message, hint = refused(crm, "lead")
        assert message.startswith("public.lead has no primary key")
        crm.execute("ALTER TABLE lead ALTER lead_id SET NOT NULL")  # of a unique index that is enough
        crm.succeed("backfill", "lead", "--to-key", "0")
        mend(crm, hint)
        crm.succeed("backfill", "lead")
    assert leads(crm) == [1]


def test_a_key_that_activities_do_not_link_to_is_a_fault_of_the_profile(crm: Crm) -> None:
    path = crm.directory / "unlinked.toml"
    text = profile.read("leadfi").replace(
        'fields = { lead = "{row.lead_id}" }', 'fields = { lead = "{row.lead_id:03}" }'
    )
    path.write_text(text, "utf-8")
    line = 1 + text[: text.index("[tables.lead.rules.backfill]")].count("\n")
    done = crm.command("profile", "check", str(path), dsn="")
    assert done.returncode == 1
    assert done.stdout.splitlines()[0] == (
        f"{path}:{line}: (top): tables.lead, rule 1 (lead_created): what was recorded of a row is found by its key, and"
        " no column of the target takes a field that is {row.lead_id}"
    )
    done = crm.command("backfill", profile=str(path))
    assert done.returncode == 1
    assert "no column of the target takes a field that is {row.lead_id}" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_role_that_lacks_rights_is_told_which(crm: Crm) -> None:
    add_leads(crm, 1)
    with begun(crm), role(crm):
        message, hint = refused(crm)
        assert message == (
            'role "cdc" lacks SELECT ON "public"."lead", SELECT ON "public"."customer", SELECT ON "public"."contact",'
            ' SELECT ON "public"."activity", SELECT ON cdc_worker.skipped, INSERT, UPDATE ON cdc_worker.backfill,'
            " SELECT, UPDATE ON cdc_worker.replay"
        )
        mend(crm, hint.partition("; GRANT INSERT, UPDATE")[0])
        crm.succeed("backfill", "--dry-run")
        assert refused(crm)[0] == (
            'role "cdc" lacks INSERT, UPDATE ON cdc_worker.backfill, SELECT, UPDATE ON cdc_worker.replay'
        )
        mend(crm, hint)
        crm.succeed("backfill")
    assert leads(crm) == [1]


@pytest.mark.parametrize("table", ["lead", "activity"])
def test_rows_that_a_policy_hides_are_not_missed(crm: Crm, table: str) -> None:
    """They would look as if they weren't there, and activities as if they were not."""
    add_leads(crm, 1)
    with begun(crm), role(crm):
        mend(crm, refused(crm)[1])
        crm.connection.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY".encode())
        message, hint = refused(crm)
        assert message == (
            f'row security is on for "public"."{table}": rows that it hides from the role "cdc" would be missed'
        )
        mend(crm, hint)
        crm.succeed("backfill")
    assert leads(crm) == [1]
