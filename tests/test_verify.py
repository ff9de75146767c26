"""Is the log true? What is damaged is found, what is not isn't, and what is found can be made up for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any

import psycopg
import pytest
from support import Crm, eventually
from test_backfill import fill

from cdc_worker import config, journal, log, profile
from cdc_worker import verify as module
from cdc_worker.errors import BusyError
from cdc_worker.late import Late, repairing
from cdc_worker.verify import Disagreement, Verified, Wishes, verify


def verified(crm: Crm, *tables: str, **wishes: Any) -> tuple[list[Disagreement], dict[str, Verified]]:
    """`cdc-worker verify`, in this process: what disagrees, and what each table came to."""
    settings = config.load(None, {"dsn": crm.dsn, "slot": crm.slot} | crm.settings)
    found = [*verify(settings, profile.load(settings.profile), tables, Wishes(**wishes), log=log.get())]
    return (
        [of for of in found if isinstance(of, Disagreement)],
        {of.table.removeprefix("public."): of for of in found if isinstance(of, Verified)},
    )


def missing(crm: Crm, *tables: str, **wishes: Any) -> list[tuple[str, str | None, list[str]]]:
    """What is missing of whom; what is explained isn't."""
    found, _ = verified(crm, *tables, **wishes)
    return sorted((of.subject, of.missing or of.undecided, of.columns) for of in found if of.explained is None)


@contextmanager
def running(crm: Crm) -> Iterator[None]:
    """With a worker, whose rows we may spoil."""
    crm.execute("SET cdc_worker.protect = off")
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        yield
        worker.terminate()


def insert(crm: Crm, *lead_ids: int) -> None:
    crm.execute(
        "INSERT INTO lead (lead_id, full_name, source, bd_in_charge, type, status)"
        " SELECT n, 'Lead ' || n, 'web', 'jane', 'exchange', '1' FROM unnest(%s::int[]) n",
        [*lead_ids],
    )


def caught_up(crm: Crm) -> None:
    """Until all that is committed by now is recorded."""
    position = crm.value("SELECT pg_current_wal_insert_lsn()")
    crm.execute("SELECT pg_logical_emit_message(true, 'cdc_worker.marker', '{\"fence\": true}')")
    eventually(lambda: crm.value("SELECT lsn >= %s FROM cdc_worker.checkpoint", position))


def lose(crm: Crm, kind: str, lead_id: int, *, last: bool = True) -> None:
    """Take an activity out of the log."""
    crm.execute(
        "DELETE FROM activity WHERE activity_id = (SELECT activity_id FROM activity"
        " WHERE activity_type = %s AND lead_id = %s ORDER BY activity_id * (CASE WHEN %s THEN -1 ELSE 1 END) LIMIT 1)",
        kind,
        lead_id,
        last,
    )


def test_each_kind_of_damage_is_found_and_repaired(crm: Crm) -> None:
    with running(crm):
        insert(crm, *range(1, 13))
        for status in ("2", "3", "4"):
            crm.execute("UPDATE lead SET status = %s WHERE lead_id <= 10", status)
        crm.execute("UPDATE lead SET bd_in_charge = 'joe', email = 'a@x' WHERE lead_id <= 10")
        crm.execute("DELETE FROM lead WHERE lead_id IN (5, 6)")
        insert(crm, 6)
        crm.execute("UPDATE lead SET lead_id = 107 WHERE lead_id = 7")
        caught_up(crm)
        assert missing(crm) == []

        lose(crm, "status_changed", 1)
        lose(crm, "status_changed", 2, last=False)
        lose(crm, "lead_created", 3)
        lose(crm, "lead_deleted", 5)
        lose(crm, "lead_deleted", 6)
        lose(crm, "lead_updated", 107)
        key = crm.value("SELECT max(change_key) FROM activity WHERE lead_id = 9")
        forged = key.rpartition("/")[0].rpartition("/")[0] + "/77/"
        fake = (
            "INSERT INTO activity (activity_type, activity_category, description, metadata, lead_id, change_key)"
            " VALUES (%s, 'system', '', %s, %s, %s)"
        )
        crm.execute(fake, "status_changed", '{"old_status": "4", "new_status": "9"}', 9, f"{forged}status_changed")
        crm.execute(fake, "lead_created", '{"lead_id": 99, "status": "9"}', 99, f"{forged}lead_created")
        crm.execute(
            'UPDATE activity SET metadata = metadata || \'{"new_bd": "eve"}\''
            " WHERE lead_id = 10 AND activity_type = 'assignment_changed'"
        )
        expected = [
            ("1", "change", ["status"]),
            ("10", "change", ["bd_in_charge"]),
            ("107", "creation", []),
            ("2", "change", ["status"]),
            ("3", "creation", []),
            ("5", "deletion", []),
            ("6", "deletion", []),
            ("7", "deletion", []),
            ("9", "change", ["status"]),
            ("99", "deletion", []),
        ]
        assert missing(crm, chunk_size=3) == expected
        before = crm.value("SELECT count(*) FROM activity")
        assert missing(crm, repair=True) == expected
        assert missing(crm) == []
        written = crm.value("SELECT count(*) FROM activity") - before
        assert written == len(expected)
        assert missing(crm, repair=True) == []
        assert crm.value("SELECT count(*) FROM activity") == before + written


def converted(crm: Crm, lead_id: int) -> None:
    """A lead has become a customer, since a time that its contact tells."""
    crm.execute("INSERT INTO customer (customer_uid, name) VALUES (%s, 'Acme')", lead_id)
    crm.execute("INSERT INTO contact (customer_uid, lead_id) VALUES (%s, %s)", lead_id, lead_id)


def test_a_conversion_that_a_backfill_has_told_is_told(crm: Crm) -> None:
    """Also of a lead that the stream has created, and of one that it knew not to be converted."""
    with running(crm):
        insert(crm, 1, 2)
        converted(crm, 1)
        converted(crm, 2)
        crm.execute("UPDATE lead SET is_converted = NULL WHERE lead_id = 2")
        crm.execute("UPDATE lead SET is_converted = true")
        caught_up(crm)
        lose(crm, "lead_converted", 1)
        lose(crm, "lead_converted", 2)
        assert missing(crm) == [("2", "change", ["is_converted"])]
        assert fill(crm, "lead")["lead"].activities == {"lead_converted": 2}
        assert missing(crm, repair=True) == []
        assert fill(crm, "lead")["lead"].activities == {}
        assert crm.value("SELECT count(*) FROM activity WHERE activity_type = 'lead_converted'") == 2


def test_a_creation_that_is_missing_is_found_by_another_key_as_well(crm: Crm) -> None:
    with running(crm):
        insert(crm, 1, 3)
        crm.execute("UPDATE lead SET lead_id = lead_id + 1")
        caught_up(crm)
        lose(crm, "lead_created", 1)
        lose(crm, "lead_created", 3)
        assert missing(crm) == [("2", "creation", []), ("4", "creation", [])]
        assert fill(crm, "lead", to_key=("3",))["lead"].activities == {"lead_created": 1}
        assert missing(crm, repair=True) == [("4", "creation", [])]
        assert missing(crm) == []
        assert fill(crm, "lead")["lead"].activities == {}
        assert crm.value("SELECT count(*) FROM activity WHERE activity_type = 'lead_created'") == 2


def test_what_is_made_up_for_is_marked_and_dated_honestly(crm: Crm) -> None:
    with running(crm):
        insert(crm, 1, 2, 3)
        for status in ("2", "3"):
            crm.execute("UPDATE lead SET status = %s", status)
        crm.execute("DELETE FROM lead WHERE lead_id = 3")
        caught_up(crm)
        lose(crm, "status_changed", 1, last=False)
        lose(crm, "status_changed", 2)
        lose(crm, "lead_deleted", 3)
        dates = {
            (lead_id, kind, status): at
            for lead_id, kind, status, at in crm.execute(
                "SELECT lead_id, activity_type, metadata ->> 'new_status', date_created FROM activity"
            )
        }
        found, done = verified(crm, repair=True)
        assert [of.repaired for of in found] == ["yes"] * 3
        assert (done["lead"].disagree, done["lead"].repaired, done["lead"].activities) == (3, 3, 3)
        made = {a["lead_id"]: a for a in crm.activities() if a["metadata"].get("reconciled")}
    middle, last, deletion = made[1], made[2], made[3]
    assert middle["description"] == 'Lead status changed from "1" to "2"'
    assert middle["date_created"] == dates[1, "status_changed", "3"]
    assert last["description"] == 'Lead status changed from "2" to "3"'
    assert last["date_created"] > dates[1, "status_changed", "3"]
    assert deletion["activity_type"] == "lead_deleted"
    assert deletion["metadata"]["status"] == "3"
    before: list[tuple[int, dict[str, Any], str, str | None]]
    before = [(1, middle, "lead_created", None), (2, last, "status_changed", "2")]
    for lead_id, activity, kind, earlier in before:
        since = crm.value(
            "SELECT (%s::timestamptz AT TIME ZONE current_setting('timezone'))", activity["metadata"]["not_before"]
        )
        assert since == dates[lead_id, kind, earlier]
    for activity in made.values():
        assert (activity["created_by"], activity["bd_in_charge"]) == ("system", None)
        assert activity["metadata"]["reconciled"] is True
        assert {"as_of", "as_of_lsn"} <= activity["metadata"].keys()
        assert "/repair/public.lead/" in activity["change_key"]


def test_a_missing_creation_is_what_a_backfill_would_write(crm: Crm) -> None:
    with running(crm):
        insert(crm, 1)
        caught_up(crm)
        lose(crm, "lead_created", 1)
        assert missing(crm, repair=True) == [("1", "creation", [])]
        (made,) = crm.activities()
        assert made["change_key"].endswith("/backfill/public.lead/1/lead_created/0")
        assert made["metadata"]["values"]["status"] == "1"
        assert made["date_created"] == crm.value("SELECT date_created FROM lead")
        assert fill(crm, "lead")["lead"].activities == {}
        assert missing(crm) == []
        crm.execute("UPDATE lead SET status = '2'")
        caught_up(crm)
        assert missing(crm) == []
        lose(crm, "status_changed", 1)
        assert missing(crm) == [("1", "change", ["status"])]


def test_what_is_known_to_be_missing_is_explained(crm: Crm) -> None:
    crm.settings["unsigned_control"] = "true"
    crm.execute("ALTER TABLE activity ADD CONSTRAINT no_poison CHECK (metadata ->> 'new_status' <> 'poison') NOT VALID")
    with running(crm):
        insert(crm, *range(1, 9))
        with crm.connection.transaction():
            crm.execute("SELECT cdc_worker.set_context('{\"skip\": true}')")
            crm.execute("UPDATE lead SET status = '2' WHERE lead_id IN (1, 2)")
            crm.execute("DELETE FROM lead WHERE lead_id = 3")
            insert(crm, 13)
            crm.execute("UPDATE lead SET lead_id = 17 WHERE lead_id = 7")
        with crm.connection.transaction():
            crm.execute('SELECT cdc_worker.set_context(\'{"collapse": "moved"}\')')
            crm.execute("UPDATE lead SET status = '3' WHERE lead_id = 4")
        crm.execute("UPDATE lead SET status = 'poison' WHERE lead_id = 5")
        crm.execute("UPDATE lead SET status = '2' WHERE lead_id = 6")
        caught_up(crm)
        lose(crm, "status_changed", 6)
        crm.succeed("forget", "--lead", "6", "--yes")
        lose(crm, "lead_created", 6)
        crm.execute("UPDATE lead SET status = '9' WHERE lead_id = 2")  # and what comes after it is told
        caught_up(crm)
        found, done = verified(crm, repair=True)
        assert {of.subject: of.explained for of in found} == {
            "1": "skipped",
            "2": "skipped",
            "3": "skipped",
            "13": "skipped",
            "7": "skipped",
            "17": "skipped",
            "4": "skipped",
            "5": "dead letter",
            "6": "erased",
        }
        assert (done["lead"].disagree, done["lead"].explained, done["lead"].activities) == (0, 9, 0)
        crm.execute("UPDATE lead SET status = '10' WHERE lead_id = 2")
        caught_up(crm)
        lose(crm, "status_changed", 2)
        assert missing(crm) == [("2", "change", ["status"])]


def test_who_is_forgotten_meanwhile_is_not_told_of_again(crm: Crm, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(crm):
        insert(crm, 1, 2)
        for status in ("2", "3"):
            crm.execute("UPDATE lead SET status = %s", status)
        caught_up(crm)
        for lead_id in (1, 2):
            lose(crm, "status_changed", lead_id)
        write, forgotten = module._Repairs._write, list[str]()

        def forgetting(*arguments: Any) -> Any:
            if not forgotten:
                forgotten.append(crm.succeed("forget", "--lead", "1", "--yes"))
            return write(*arguments)

        with monkeypatch.context() as patched:
            patched.setattr(module._Repairs, "_write", forgetting)
            found, done = verified(crm, repair=True)
        assert [(of.subject, of.repaired) for of in found] == [
            ("1", "a person was erased of whom it would tell"),
            ("2", "yes"),
        ]
        assert (done["lead"].repaired, done["lead"].activities) == (1, 1)
        assert crm.value("SELECT count(*) FROM activity WHERE lead_id = 1 AND metadata <> '{\"erased\": true}'") == 0
        assert missing(crm) == []


def test_two_repairs_at_once_write_the_same(crm: Crm) -> None:
    with running(crm), ThreadPoolExecutor() as pool:
        insert(crm, *range(1, 60))
        crm.execute("UPDATE lead SET status = '2'")
        caught_up(crm)
        crm.execute("DELETE FROM activity WHERE activity_type = 'status_changed'")
        crm.execute("DELETE FROM activity WHERE lead_id <= 20")
        both = [pool.submit(verified, crm, repair=True) for _ in range(2)]
        done = [of.result()[1]["lead"] for of in both]
        assert missing(crm) == []
        assert sum(of.activities for of in done) == 59
    made = [a["lead_id"] for a in crm.activities() if a["metadata"].get("reconciled")]
    assert sorted(made) == [*range(1, 60)]


def test_no_repair_meets_what_comes_late(crm: Crm) -> None:
    settings = config.load(None, {"dsn": crm.dsn, "slot": crm.slot})
    with running(crm):
        insert(crm, 1)
        caught_up(crm)
        with Late(settings, profile.load("leadfi"), command="replay", log=log.get()):
            with pytest.raises(BusyError, match="there runs: replay;"):
                verified(crm, repair=True)
            assert verified(crm)[1]["lead"].disagree == 0
        lose(crm, "lead_created", 1)
        assert missing(crm, repair=True) == [("1", "creation", [])]
        with (
            repairing(crm.connection, crm.slot),
            pytest.raises(BusyError, match="there runs: verify --repair;"),
            Late(settings, profile.load("leadfi"), command="replay", log=log.get()),
        ):
            pass
    assert crm.value("SELECT count(*) FROM cdc_worker.replay") == 0


def test_what_is_lost_again_is_repaired_again(crm: Crm) -> None:
    with running(crm):
        insert(crm, 1)
        for status in ("2", "3"):
            crm.execute("UPDATE lead SET status = %s", status)
            caught_up(crm)
            lose(crm, "status_changed", 1)
            assert missing(crm, repair=True) == [("1", "change", ["status"])]
            assert missing(crm) == []
    assert [a["change_key"].rpartition(".")[2] for a in crm.activities()[1:]] == ["1000", "2000"]


def test_a_sample_is_of_some_rows_and_of_some_that_are_gone(crm: Crm) -> None:
    with running(crm):
        insert(crm, *range(1, 2001))
        crm.execute("DELETE FROM lead WHERE lead_id > 1000")
        caught_up(crm)
        crm.execute("DELETE FROM activity WHERE activity_type = 'lead_deleted'")
        found, done = verified(crm, "lead", sample=100)
        assert done["lead"].sample
        assert 100 < done["lead"].subjects <= 200
        assert done["lead"].subjects == 100 + len(found)
        subjects = sorted(int(of.subject) for of in found)
        assert subjects[0] < 1400
        assert subjects[-1] > 1600


def test_a_transaction_that_does_not_end_leaves_a_row_undecided(crm: Crm) -> None:
    with running(crm), closing(psycopg.connect(crm.dsn, application_name="import")) as other:
        insert(crm, 1, 2)
        caught_up(crm)
        other.execute("UPDATE contact SET lead_id = lead_id WHERE false; SELECT pg_current_xact_id()")
        assert missing(crm, patience=0.1) == []
        lose(crm, "lead_created", 1)
        found, done = verified(crm, patience=0.1)
        assert [(of.subject, of.missing) for of in found] == [("1", None)]
        assert re.fullmatch(
            r"transactions go on: process \d+ \(import, idle in transaction, for [\d:]+\)", found[0].undecided or ""
        )
        assert (done["lead"].undecided, done["lead"].true) == (1, False)
        other.rollback()
        assert missing(crm) == [("1", "creation", [])]


def test_customers_are_held_against_what_their_columns_are_mapped_to(crm: Crm) -> None:
    with running(crm):
        crm.execute("INSERT INTO customer (customer_uid, name, type) SELECT n, 'A', 't' FROM generate_series(1, 3) n")
        for closed in (True, False, None, True):
            crm.execute("UPDATE customer SET is_closed = %s", closed)
        caught_up(crm)
        assert missing(crm) == []
        newest = (
            "DELETE FROM activity WHERE activity_id = (SELECT max(activity_id) FROM activity"
            " WHERE customer_uid = %s AND activity_type = %s)"
        )
        crm.execute(newest, 1, "status_changed")
        crm.execute(newest, 2, "customer_updated")
        for kind in ("status_changed", "customer_updated"):
            crm.execute(newest, 3, kind)
        expected = [
            ("1", "change", ["status"]),
            ("2", "change", ["is_closed"]),
            ("3", "change", ["is_closed", "status"]),
        ]
        assert [(a, b, sorted(c)) for a, b, c in missing(crm, repair=True)] == expected
        assert missing(crm) == []
        made = [(a["customer_uid"], a["activity_type"]) for a in crm.activities() if a["metadata"].get("reconciled")]
    assert made == [
        (1, "status_changed"),
        (2, "customer_updated"),
        (3, "status_changed"),
        (3, "customer_updated"),
    ]


def test_what_was_left_to_triggers_for_a_while_is_explained(crm: Crm) -> None:
    with running(crm):
        insert(crm, 1, 2, 3)
        caught_up(crm)
        begin = crm.value("SELECT pg_current_wal_insert_lsn()")
        crm.execute("UPDATE lead SET status = '2' WHERE lead_id < 3")
        crm.execute("DELETE FROM lead WHERE lead_id = 3")
        end = crm.value("SELECT pg_current_wal_insert_lsn()")
        crm.execute("UPDATE lead SET status = '3' WHERE lead_id = 2")
        caught_up(crm)
        crm.execute("DELETE FROM activity WHERE metadata ->> 'new_status' = '2' OR activity_type = 'lead_deleted'")
        assert len(missing(crm)) == 3
        crm.execute(
            "INSERT INTO cdc_worker.excluded (worker, table_name, from_lsn, until_lsn, triggers)"
            " VALUES (%s, 'public.lead', %s, %s, true)",
            crm.slot,
            begin,
            end,
        )
        found, done = verified(crm, repair=True)
        assert {of.subject: of.explained for of in found} == dict.fromkeys("123", "left to triggers")
        assert (done["lead"].explained, done["lead"].activities, done["lead"].true) == (3, 0, True)


def test_more_new_keys_than_can_be_remembered_are_looked_for_each_time(
    crm: Crm, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(crm):
        insert(crm, *range(1, 7))
        crm.execute("UPDATE lead SET lead_id = lead_id + 100")
        caught_up(crm)
        for most in (3, 100):
            monkeypatch.setattr(journal, "MOVES", most)
            assert missing(crm, chunk_size=2) == []
        lose(crm, "lead_updated", 103)
        for most in (3, 100):
            monkeypatch.setattr(journal, "MOVES", most)
            assert missing(crm, chunk_size=2) == [("103", "creation", []), ("3", "deletion", [])]


def test_rows_with_many_activities_are_read_by_few_at_a_time(crm: Crm, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    original = journal.Journal.of

    def of(self: journal.Journal, keys: Any, **positions: Any) -> Any:
        asked.append(len(keys))
        return original(self, keys, **positions)

    monkeypatch.setattr(journal.Journal, "of", of)
    monkeypatch.setattr(module, "EVENTS", 60)
    with running(crm):
        insert(crm, *range(1, 121))
        for status in "23456":
            crm.execute("UPDATE lead SET status = %s", status)
        caught_up(crm)
        lose(crm, "status_changed", 100)
        assert missing(crm, "lead") == [("100", "change", ["status"])]
    assert (asked[0], max(asked[1:])) == (module.FIRST, 10)
