"""Is the log true? What is damaged is found, what is not isn't, and what is found can be made up for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from support import Crm, eventually

from cdc_worker import config, log, profile
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
    """With a worker."""
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
    crm.execute("SELECT pg_logical_emit_message(true, 'cdc_worker.cutover', '{\"fence\": true}')")
    eventually(lambda: crm.value("SELECT lsn >= %s FROM cdc_worker.checkpoint", position))


def lose(crm: Crm, kind: str, lead_id: int, *, last: bool = True) -> None:
    """Take an activity out of the log."""
    crm.execute("SET cdc_worker.protect = off")
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
