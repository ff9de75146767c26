"""A dead letter that is tried again becomes what the stream would have written, had it not failed."""

from __future__ import annotations

import signal
import threading
from typing import Any, LiteralString

import psycopg
import pytest
import structlog
from support import Crm, WorkerProcess, eventually

from cdc_worker import config, dead_letters, errors
from cdc_worker.activities import BY_TIME
from cdc_worker.dead_letters import Selection, Tried
from cdc_worker.erasure import forget
from cdc_worker.profile import load
from cdc_worker.stop import Stop
from cdc_worker.worker import Worker

LOG = structlog.get_logger()

PROFILE = """
name = "deals"
context = ["request"]

[target]
table = "activity"
columns.activity_type = "type"
columns.description = "description"
columns.metadata = "metadata"
columns.date_created = "occurred_at"
columns.bd_in_charge = "owner"
columns.created_by = "created_by"
columns.lead_id = "lead"
columns.change_key = "change_key"
constants = { activity_category = "system" }

[tables.deal]
key = "id"
masked = ["phone"]
ignored = ["seen_at"]
identity = { id = "{row.id}" }
fields = { lead = "{row.id}" }
lookups.team = { table = "team", match = { team_id = "team_id" } }
lookups.part = { table = "part", match = { deal_id = "id" }, same_transaction = true }

[[tables.deal.rules]]
on = "insert"
type = "deal_created"
description = "{new.title} of {lookup.team.name or 'no team'}: {new.amount} {new.weight} {new.phone}"
metadata = { amount = "{new.amount}", weight = "{new.weight}", rate = "{lookup.team.rate}", part = "{values.part}" }
values = { part = "{lookup.part.name}" }
when = { new = { amount = { not = -1 } } }

[[tables.deal.rules]]
on = "update"
changed = "amount"
delta = { amount = { over = 0 } }
type = "amount_raised"
description = "{new.title}: {old.amount} to {new.amount}"
metadata = { part = "{lookup.part.name}" }

[[tables.deal.rules]]
on = "update"
changed = "unclaimed"
type = "deal_updated"
description = "{new.title}: {columns}"
metadata = { changes = "{changes}" }

[[tables.deal.rules]]
on = "delete"
type = "deal_deleted"
description = "{old.title}"

[[tables.deal.rules]]
on = "insert"
name = "own"
rule = "dead_letter_rules:own"
"""

RULES = """
import os

def own(event):
    if os.environ.get("FAULTY"):
        raise ValueError(event.row["title"])
    said = ", ".join(f"{name} {value!r}" for name, value in event.row.items())
    return {"type": "own", "description": said, "metadata": {"context": dict(event.context)}}
"""

TABLES: LiteralString = """
CREATE TABLE team (team_id bigint PRIMARY KEY, name text NOT NULL, rate double precision);
CREATE TABLE deal (
    id int, region text, title text, amount numeric, weight double precision, phone text, team_id bigint,
    seen_at timestamptz, number numeric, PRIMARY KEY (id, region)
) PARTITION BY LIST (region);
CREATE TABLE deal_north PARTITION OF deal FOR VALUES IN ('north');
CREATE TABLE deal_south PARTITION OF deal FOR VALUES IN ('south');
CREATE TABLE part (deal_id int, name text, price numeric);
ALTER TABLE part REPLICA IDENTITY FULL;
INSERT INTO team VALUES (1, 'Tigers', 0.1), (2, 'Bears', 1e20);
"""

WORKLOAD: LiteralString = """
BEGIN;
SELECT pg_logical_emit_message(true, 'cdc_worker.context',
    '{"changed_by": "jane_doe", "request": "a-1", "share": 0.5, "many": 12345678901234567890}');
INSERT INTO deal VALUES (1, 'north', 'One', 1.10, 0.1, '555-1', 1, now(), 12345678901234567890123456789);
INSERT INTO part VALUES (1, 'bolt', 3.50);
SELECT pg_logical_emit_message(true, 'cdc_worker.context', '{"changed_by": "joe"}');
UPDATE deal SET amount = 100000000000000000000.25, weight = 1e22, phone = '555-2' WHERE id = 1;
COMMIT;
INSERT INTO deal VALUES (2, 'south', 'Two', 2, 1e-7, NULL, 2, NULL, 0.50);
UPDATE deal SET region = 'north', title = E'Two\\t\\\\ "and" \\u00e4\\n' WHERE id = 2;
UPDATE deal SET phone = '555-3', team_id = 1, amount = 3.00 WHERE id = 2;
UPDATE team SET name = 'Lions';
DELETE FROM deal WHERE id = 1;
"""

FAULTS: dict[str, tuple[str, str]] = {
    "check": (
        "ALTER TABLE activity ADD CONSTRAINT fault CHECK (false) NOT VALID",
        "ALTER TABLE activity DROP CONSTRAINT fault",
    ),
    "not null": (
        "ALTER TABLE activity ADD absent int NOT NULL",
        "ALTER TABLE activity DROP absent",
    ),
    "too long": (
        "ALTER TABLE activity ADD short varchar(2) GENERATED ALWAYS AS (activity_type) STORED",
        "ALTER TABLE activity DROP short",
    ),
    "foreign key": (
        "CREATE TABLE known (id text PRIMARY KEY);"
        "ALTER TABLE activity ADD known text GENERATED ALWAYS AS (metadata ->> 'id') STORED REFERENCES known",
        "ALTER TABLE activity DROP known",
    ),
}


def settings_of(crm: Crm, **others: str) -> config.Settings:
    """Those of a worker for this database."""
    return config.load(None, {"dsn": crm.dsn, "slot": crm.slot} | crm.settings | others)


def record(crm: Crm, **others: str) -> None:
    """Record what is committed by now, in this process."""
    settings = settings_of(crm, **others)
    Worker(settings, load(settings.profile), stop=Stop(), log=LOG, once=True).run()


def retry(crm: Crm, *ids: int, **wishes: Any) -> list[Tried]:
    """Try dead letters again."""
    settings = settings_of(crm)
    return list(dead_letters.retry(settings, load(settings.profile), Selection(ids, **wishes), log=LOG))


def outcomes(tried: list[Tried]) -> dict[str, int]:
    """How many came to what."""
    return {of.outcome: sum(other.outcome == of.outcome for other in tried) for of in tried}


def waiting(crm: Crm) -> int:
    """How many dead letters there are."""
    return int(crm.value("SELECT count(*) FROM cdc_worker.dead_letter"))


def rows(crm: Crm) -> list[dict[str, Any]]:
    """What the worker wrote, in the order of its keys, but for the numbers that the target gave it."""
    found = [{**row, "activity_id": None} for row in crm.activities()]
    return sorted(found, key=lambda row: row["change_key"])


class Twice:
    """A database whose stream can be told once more, as if nothing had been written."""

    def __init__(self, crm: Crm) -> None:
        self._crm = crm
        self._lsn = crm.value("SELECT lsn::text FROM cdc_worker.checkpoint")
        crm.execute("SELECT pg_copy_logical_replication_slot(%s, %s)", crm.slot, f"{crm.slot}_again")

    def again(self) -> list[dict[str, Any]]:
        """What the stream writes now, with all that is by now."""
        crm, slot = self._crm, f"{self._crm.slot}_again"
        with crm.connection.transaction():
            crm.execute("SET LOCAL cdc_worker.protect = off")
            crm.execute("DELETE FROM activity WHERE change_key IS NOT NULL")
            crm.execute("DELETE FROM cdc_worker.dead_letter")
            crm.execute("UPDATE cdc_worker.checkpoint SET lsn = %s::pg_lsn, slot = %s", self._lsn, slot)
        record(crm, slot=slot, name=crm.slot, publication=crm.slot)
        assert waiting(crm) == 0
        return rows(crm)


@pytest.fixture
def deals(crm: Crm, monkeypatch: pytest.MonkeyPatch) -> Crm:
    """A database with a partitioned table, and a profile with all that a change can need."""
    write(crm, PROFILE)
    (crm.directory / "dead_letter_rules.py").write_text(RULES)
    monkeypatch.syspath_prepend(crm.directory)
    crm.settings["rule_modules"] = "dead_letter_rules"
    crm.connection.execute(TABLES)
    crm.setup()
    record(crm)
    return crm


def write(crm: Crm, text: str) -> None:
    """Make this the profile."""
    path = crm.directory / "deals.toml"
    path.write_text(text)
    crm.settings["profile"] = str(path)


def work(crm: Crm) -> None:
    """What the application does."""
    with psycopg.connect(crm.dsn, autocommit=True) as connection:
        for statement in WORKLOAD.split(";\n"):
            connection.execute(statement.encode())


@pytest.mark.parametrize("fault", FAULTS)
def test_what_the_target_refused_is_written_as_the_stream_would_have(deals: Crm, fault: str) -> None:
    broken, mended = FAULTS[fault]
    twice = Twice(deals)
    deals.connection.execute(broken.encode())
    work(deals)
    record(deals)
    count = waiting(deals)
    assert (count, rows(deals)) == (10, [])
    assert outcomes(retry(deals)) == {"failed again": count}
    assert deals.execute("SELECT DISTINCT attempts, tried_at IS NULL FROM cdc_worker.dead_letter") == [(2, False)]
    deals.connection.execute(mended.encode())
    assert outcomes(retry(deals)) == {"written": count}
    assert waiting(deals) == 0
    written = rows(deals)
    assert retry(deals) == []
    assert rows(deals) == written
    assert twice.again() == written


FAULTY = (
    PROFILE.replace("{new.title} of", "{new.title:,.2f} of")
    .replace("{new.title}: {old.amount}", "{new.title:d}: {old.amount}")
    .replace('description = "{old.title}"', 'description = "{old.title:d}"')
)


def test_what_a_rule_failed_to_make_is_written_as_the_stream_would_have(
    deals: Crm, monkeypatch: pytest.MonkeyPatch
) -> None:
    twice = Twice(deals)
    write(deals, FAULTY)
    monkeypatch.setenv("FAULTY", "1")
    work(deals)
    record(deals)
    assert deals.types() == ["deal_updated"] * 3
    count = waiting(deals)
    assert count == 7
    assert deals.execute("SELECT DISTINCT kind, masked FROM cdc_worker.dead_letter") == [("rule_failed", ["phone"])]
    assert outcomes(retry(deals, error="rule_failed")) == {"failed again": count}
    write(deals, PROFILE)
    monkeypatch.delenv("FAULTY")
    assert outcomes(retry(deals)) == {"written": count}
    written = rows(deals)
    assert twice.again() == written


def test_a_column_that_had_another_name_is_found_by_the_profile_that_knows_it(deals: Crm) -> None:
    twice = Twice(deals)
    stop, settings = Stop(), settings_of(deals)
    worker = Worker(settings, load(settings.profile), stop=stop, log=LOG)
    running = threading.Thread(target=worker.run)
    running.start()
    try:
        eventually(deals.reader)
        deals.execute("ALTER TABLE deal RENAME amount TO total")
        with deals.connection.transaction():
            deals.execute("INSERT INTO deal VALUES (1, 'north', 'One', 1.10, 0.1, NULL, 1)")
            deals.execute("INSERT INTO part VALUES (1, 'bolt', 3.50)")
        eventually(lambda: waiting(deals) == 1)
    finally:
        stop.request()
        running.join()
    deals.execute("UPDATE team SET name = 'Lions'")
    assert deals.value("SELECT found -> 'rows' -> 'part' ->> 'name' FROM cdc_worker.dead_letter") == "bolt"
    write(deals, PROFILE.replace("amount", "total").replace("total_raised", "amount_raised"))
    assert outcomes(retry(deals)) == {"written": 1}
    deals.execute("UPDATE team SET name = 'Tigers'")
    written = rows(deals)
    assert twice.again() == written


def refused(crm: Crm, where: str = "false") -> None:
    """Let the target refuse what isn't so."""
    crm.connection.execute(f"ALTER TABLE activity ADD CONSTRAINT fault CHECK ({where}) NOT VALID".encode())


def accepted(crm: Crm) -> None:
    """Let it accept all again."""
    crm.execute("ALTER TABLE activity DROP CONSTRAINT fault")


def test_two_that_try_at_once_write_one(crm: Crm) -> None:
    refused(crm)
    crm.add_leads(300)
    record(crm)
    accepted(crm)
    tried: list[list[Tried]] = []
    threads = [threading.Thread(target=lambda: tried.append(retry(crm))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert waiting(crm) == 0
    assert crm.types() == ["lead_created"] * 300
    assert {of.outcome for found in tried for of in found} <= {"written", "already there"}


SLOWLY = """
CREATE FUNCTION slowly() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(0.003); RETURN NEW; END $$;
CREATE TRIGGER slowly BEFORE INSERT ON activity FOR EACH ROW EXECUTE FUNCTION slowly();
"""


def test_one_that_is_killed_beside_a_worker_is_run_again(crm: Crm) -> None:
    refused(crm)
    crm.add_leads(300)
    record(crm)
    accepted(crm)
    crm.connection.execute(SLOWLY.encode())
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        arguments = ["dead-letters", "retry", "--all"]
        with WorkerProcess(arguments, crm.environment(), crm.directory / "retry.log") as retrying:
            crm.execute("UPDATE lead SET status = 'x' WHERE lead_id <= 50")
            eventually(lambda: waiting(crm) < 300)
            retrying.kill()
        assert 0 < waiting(crm) < 300
        assert "300 tried" not in crm.succeed("dead-letters", "retry", "--all")
        eventually(lambda: crm.types().count("status_changed") == 50)
        assert worker.terminate() == 0
    assert (waiting(crm), crm.types().count("lead_created")) == (0, 300)
    assert crm.value("SELECT count(*) FROM cdc_worker.replay") == 0


def test_one_that_is_interrupted_by_ctrl_c_leaves_the_rest_waiting(crm: Crm) -> None:
    refused(crm)
    crm.add_leads(3)
    record(crm)
    accepted(crm)
    with psycopg.connect(crm.dsn) as other:
        other.execute("LOCK TABLE activity IN SHARE MODE")
        arguments = ["dead-letters", "retry", "--all"]
        with WorkerProcess(arguments, crm.environment(), crm.directory / "retry.log") as retrying:
            eventually(lambda: crm.value("SELECT count(*) FROM pg_locks WHERE NOT granted"))
            retrying.process.send_signal(signal.SIGINT)
            assert retrying.wait() == 130
            assert retrying.said == "interrupted: what is written stays, and the rest waits\n"
    assert (waiting(crm), crm.types()) == (3, [])


def reasons(tried: list[Tried]) -> list[tuple[str, str | None]]:
    """What came of each, and why."""
    return [(of.outcome, of.reason) for of in tried]


def test_what_can_never_be_told_is_left(crm: Crm) -> None:
    crm.add_leads(1)
    crm.execute("ALTER TABLE lead REPLICA IDENTITY DEFAULT")
    crm.execute("UPDATE lead SET status = '7. lost'")
    record(crm)
    assert reasons(retry(crm)) == [("left", "it is not known what the row was before, and never will be")]
    assert waiting(crm) == 1


def test_what_the_profile_tells_no_more_is_left(deals: Crm) -> None:
    refused(deals)
    deals.execute("INSERT INTO deal VALUES (1, 'north', 'One')")
    record(deals)
    accepted(deals)
    write(deals, PROFILE.replace('type = "deal_created"', 'type = "deal_created"\nskip_unless = "new.amount"'))
    created, own = retry(deals)
    assert (created.outcome, own.outcome) == ("left", "written")
    assert (
        created.reason
        == 'the rule "deal_created" of the profile tells nothing of it any more; to leave it at that, discard it'
    )
    write(deals, PROFILE.replace('type = "deal_created"', 'type = "deal_began"'))
    ((_, reason),) = reasons(retry(deals))
    assert reason == 'the profile has no rule "deal_created" for it any more; to leave it at that, discard it'


def test_an_erased_person_is_not_told_of(crm: Crm) -> None:
    refused(crm, "lead_id IS NULL")
    crm.add_leads(2)
    record(crm)
    accepted(crm)
    profile = load("leadfi")
    forget(settings_of(crm), profile, {"lead": "1"})
    blanked = crm.execute(
        "SELECT reason, num_nonnulls(fields, context, found, raw), change ->> 'new'"
        " FROM cdc_worker.dead_letter ORDER BY dead_letter_id LIMIT 1"
    )
    assert blanked == [("the person was erased", 0, '{"lead_id": 1}')]
    assert outcomes(retry(crm)) == {"left": 1, "written": 1}
    assert [row["lead_id"] for row in crm.activities()] == [2]


def test_who_is_erased_while_it_is_tried_is_not_told_of(crm: Crm) -> None:
    refused(crm)
    crm.add_leads(2)
    record(crm)
    accepted(crm)
    with psycopg.connect(crm.dsn) as other:
        other.execute("LOCK TABLE activity IN SHARE MODE")
        tried: list[Tried] = []
        thread = threading.Thread(target=lambda: tried.extend(retry(crm)))
        thread.start()
        eventually(lambda: crm.value("SELECT count(*) FROM cdc_worker.replay"))
        forgetting = threading.Thread(target=lambda: forget(settings_of(crm), load("leadfi"), {"lead": "1"}))
        forgetting.start()
        eventually(lambda: crm.value("SELECT count(*) FROM pg_locks WHERE NOT granted") > 0)
    thread.join()
    forgetting.join()
    told = [row["metadata"].get("lead_name") for row in crm.activities()]
    assert told in (["Lead 2"], [None, "Lead 2"])  # it came before the erasure, which blanked it, or after


def test_what_is_discarded_stays_untold_until_it_is_named(crm: Crm) -> None:
    refused(crm)
    crm.add_leads(2)
    record(crm)
    accepted(crm)
    first, second = (
        number for (number,) in crm.execute("SELECT dead_letter_id FROM cdc_worker.dead_letter ORDER BY 1")
    )
    assert dead_letters.discard(settings_of(crm), Selection((first,))) == [first]
    assert dead_letters.discard(settings_of(crm), Selection((first,))) == []
    assert [of.id for of in retry(crm)] == [second]
    assert [of.id for of in dead_letters.listed(settings_of(crm), Selection(discarded=True))] == [first]
    assert outcomes(retry(crm, first)) == {"written": 1}
    assert (waiting(crm), crm.types()) == (0, ["lead_created"] * 2)
    with pytest.raises(errors.SettingsError, match=f"has no dead letter {first}"):
        retry(crm, first)


def test_a_column_that_is_masked_by_now_is_told_masked(deals: Crm) -> None:
    refused(deals)
    deals.execute("INSERT INTO deal VALUES (1, 'north', 'secret', 1, 2, '555-1')")
    record(deals)
    write(deals, PROFILE.replace('masked = ["phone"]', 'masked = ["phone", "title"]'))
    assert outcomes(retry(deals)) == {"failed again": 2}
    letters = "SELECT string_agg(letter::text, ' ') FROM cdc_worker.dead_letter AS letter"
    assert "secret" not in deals.value(letters)
    accepted(deals)
    assert outcomes(retry(deals)) == {"written": 2}
    assert "secret" not in deals.value("SELECT string_agg(activity::text, ' ') FROM activity")
    assert deals.activities()[0]["description"].startswith("*** of no team")


def test_a_row_that_was_found_is_told_masked_if_it_is_masked_by_now(deals: Crm) -> None:
    refused(deals)
    deals.execute("INSERT INTO deal VALUES (1, 'north', 'One', 1, 2, '555-1', 1)")
    record(deals)
    accepted(deals)
    write(deals, PROFILE + '\n[tables.team]\nkey = "team_id"\nmasked = ["name"]\n')
    assert outcomes(retry(deals)) == {"written": 2}
    assert deals.activities()[0]["description"].startswith("One of ***: 1 2")


OLD = """
UPDATE cdc_worker.dead_letter SET xid = NULL, commit_lsn = NULL, end_lsn = NULL, context = NULL, found = NULL,
    masked = NULL, change = change - 'columns' - 'floats'
"""


def test_what_an_older_version_kept_is_written_as_it_was_refused(deals: Crm) -> None:
    twice = Twice(deals)
    refused(deals)
    work(deals)
    record(deals)
    accepted(deals)
    deals.connection.execute(OLD.encode())
    assert set(outcomes(retry(deals))) == {"written"}
    written = rows(deals)
    assert twice.again() == written


def test_what_was_collapsed_is_written_as_it_was_refused(crm: Crm) -> None:
    refused(crm)
    crm.settings["unsigned_control"] = "true"
    with crm.connection.transaction():
        crm.execute("SELECT pg_logical_emit_message(true, 'cdc_worker.context', '{\"collapse\": \"Import\"}')")
        crm.add_leads(3)
    record(crm)
    accepted(crm)
    assert outcomes(retry(crm)) == {"written": 1}
    assert [(row["description"], row["metadata"]["changes"]) for row in crm.activities()] == [
        ("Import", {"lead": {"insert": 3}})
    ]


def test_a_conversion_has_the_contact_that_came_after_it(crm: Crm) -> None:
    twice = Twice(crm)
    refused(crm, "activity_type <> 'lead_converted'")
    crm.add_leads(1)
    with crm.connection.transaction():
        crm.execute("INSERT INTO customer (customer_uid, name) VALUES (70, 'Lind Ltd')")
        crm.execute("UPDATE lead SET is_converted = true")
        crm.execute("INSERT INTO contact (customer_uid, lead_id) VALUES (70, 1)")
    record(crm)
    accepted(crm)
    assert outcomes(retry(crm)) == {"written": 1}
    assert crm.activities()[-1]["customer_uid"] == 70
    written = rows(crm)
    assert twice.again() == written


def test_a_creation_that_was_discarded_is_not_told_by_a_backfill(crm: Crm) -> None:
    refused(crm)
    crm.add_leads(3)
    record(crm)
    accepted(crm)
    first, *_ = (number for (number,) in crm.execute("SELECT dead_letter_id FROM cdc_worker.dead_letter ORDER BY 1"))
    assert crm.succeed("dead-letters", "discard", str(first), "--yes") == "1 discarded\n"
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        crm.succeed("backfill", "lead")
        assert [row["lead_id"] for row in crm.activities()] == [2, 3]
        assert outcomes(retry(crm)) == {"written": 2}
        assert [row["lead_id"] for row in crm.activities()] == [2, 3]
        assert not [row for row in crm.activities() if "backfilled" in row["metadata"]]
        assert worker.terminate() == 0


def test_the_dead_letter_of_a_backfill_goes_once_a_backfill_has_written(crm: Crm) -> None:
    crm.execute("ALTER TABLE lead DISABLE TRIGGER ALL")
    crm.add_leads(2)
    record(crm)
    crm.execute("SET cdc_worker.protect = off")
    crm.execute("DELETE FROM activity")
    refused(crm, "lead_id <> 1")
    with crm.worker() as worker:
        worker.wait_for("replication_started")
        crm.succeed("backfill", "lead")
        accepted(crm)
        ((outcome, reason),) = reasons(retry(crm))
        assert (outcome, reason) == (
            "left",
            "it is of a backfill, which reads the row anew: cdc-worker backfill lead, then this",
        )
        crm.succeed("backfill", "lead")
        assert outcomes(retry(crm)) == {"already there": 1}
        assert worker.terminate() == 0
    assert (waiting(crm), [row["lead_id"] for row in crm.activities()]) == (0, [2, 1])


UNREADABLE: LiteralString = """
WITH gone AS (DELETE FROM activity WHERE activity_type = 'lead_created' RETURNING change_key, date_created)
INSERT INTO cdc_worker.dead_letter
    (worker, change_key, kind, reason, committed_at, change, xid, commit_lsn, end_lsn, context, raw)
SELECT (SELECT worker FROM cdc_worker.checkpoint), replace(change_key, 'lead_created', '*'), 'unreadable', 'no JSON',
       date_created AT TIME ZONE current_setting('timezone'),
       '{"operation": "unreadable", "schema": "public", "table": "lead", "old": null, "new": null, "changed": [],
         "partition": null}', 7, '0/1', '0/2',
       '{"said": {"changed_by": "jane_doe"}, "claimed": {}, "skip": false, "collapse": null, "refused": []}', %s::bytea
FROM gone
"""


def test_a_message_that_could_not_be_read_becomes_what_it_would_have(crm: Crm) -> None:
    crm.execute("SELECT pg_create_logical_replication_slot('lines', 'wal2json')")
    with crm.connection.transaction():
        crm.execute("SELECT pg_logical_emit_message(true, 'cdc_worker.context', '{\"changed_by\": \"jane_doe\"}')")
        crm.add_leads(1)
    lines = "SELECT data FROM pg_logical_slot_get_changes('lines', NULL, NULL, 'format-version', '2', 'add-tables', %s)"
    (line,) = [line for (line,) in crm.execute(lines, "public.lead") if '"action":"I"' in line]
    record(crm)
    before = rows(crm)
    crm.execute("SET cdc_worker.protect = off")
    crm.execute(UNREADABLE, line[:-9].encode())
    assert reasons(retry(crm)) == [("left", "its message can't be read: report it")]
    crm.execute("UPDATE cdc_worker.dead_letter SET raw = %s::bytea", line.encode())
    assert outcomes(retry(crm)) == {"written": 1}
    assert (waiting(crm), rows(crm)) == (0, before)


def test_a_message_among_changes_that_are_told_as_one_is_no_activity_of_its_own(crm: Crm) -> None:
    crm.settings["unsigned_control"] = "true"
    crm.add_leads(1)
    record(crm)
    crm.execute("SET cdc_worker.protect = off")
    crm.execute(UNREADABLE, b'{"action":"I","schema":"public","table":"lead","columns":[{"name":"lead_id","value":1}]}')
    crm.execute(
        "UPDATE cdc_worker.dead_letter SET context = jsonb_set(context, '{collapse}',"
        ' \'{"description": "Import", "type": null}\')'
    )
    assert reasons(retry(crm)) == [
        ("left", "it takes more of its transaction than was kept: cdc-worker replay, with a recording of it")
    ]
    assert (waiting(crm), rows(crm)) == (1, [])


def test_a_change_of_a_recording_without_places_keeps_its_key(crm: Crm) -> None:
    refused(crm)
    crm.add_leads(1)
    record(crm)
    accepted(crm)
    worker, cluster, rest = crm.value("SELECT change_key FROM cdc_worker.dead_letter").split("/", 2)
    key = f"{worker}/{cluster}/{BY_TIME}{rest}"
    crm.execute("UPDATE cdc_worker.dead_letter SET change_key = %s", key)
    assert outcomes(retry(crm)) == {"written": 1}
    assert [row["change_key"] for row in crm.activities()] == [key]
